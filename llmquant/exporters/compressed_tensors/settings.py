"""What is said of the linears in config.json: one config group for all that share a setting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llmquant.activations import ActivationScheme
from llmquant.errors import CheckpointError
from llmquant.grid import Grid
from llmquant.grids.affine import Affine
from llmquant.grids.fp8 import Fp8
from llmquant.patterns import matches, patterns

METHOD = "compressed-tensors"
PACKED, INT, FLOAT = "pack-quantized", "int-quantized", "float-quantized"
NAIVE = "naive-quantized"  # what older writers call the tensors of the last two
MIXED = "mixed-precision"
KINDS: dict[str, Literal["int8", "fp8"]] = {"int": "int8", "float": "fp8"}


@dataclass(frozen=True)
class Setting:
    """What can differ between linears.

    kind: "int" or "float", of the weights. group_size: of strategy "group" only.
    inputs: what activations are rounded to; None: they are not.
    """

    kind: str
    bits: int
    symmetric: bool
    strategy: str
    group_size: int | None
    inputs: ActivationScheme | None

    @property
    def format(self) -> str:
        return FLOAT if self.kind == "float" else INT if self.inputs else PACKED


def setting(grid: Grid, inputs: ActivationScheme | None) -> Setting:
    """Return the setting of a linear; its grid is affine or fp8."""
    if isinstance(grid, Fp8):
        return Setting("float", 8, True, grid.config.strategy, None, inputs)
    assert isinstance(grid, Affine)
    strategy = grid.config.strategy
    return Setting("int", grid.bits, grid.symmetric, strategy, grid.group if strategy == "group" else None, inputs)


def write(settings: Mapping[str, Setting], kept: Sequence[str], actorder: bool) -> dict[str, Any]:
    """Return the `quantization_config` of config.json for linears by name; ``kept`` are those that stay float."""
    groups = {}
    formats = {its.format for its in settings.values()}
    for i, (setting, _) in enumerate(Counter(settings.values()).most_common()):
        names = [name for name, its in settings.items() if its == setting]
        others = [name for name, its in settings.items() if its != setting]
        groups[f"group_{i}"] = {
            # vLLM prefers the class to the parts of a fused matrix, so the class cannot stand for the rest.
            "targets": _targets(names, [*others, *kept]) if others else ["Linear"],
            "weights": {
                "num_bits": setting.bits,
                "type": setting.kind,
                "symmetric": setting.symmetric,
                "strategy": setting.strategy,
                "group_size": setting.group_size,
                "dynamic": False,
                "actorder": "weight" if actorder else None,
            },
            "input_activations": None if setting.inputs is None else _write_inputs(setting.inputs),
            "output_activations": None,
        } | ({"format": setting.format} if len(formats) > 1 else {})
    return {
        "quant_method": METHOD,
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "config_groups": groups,
        "ignore": _targets(kept, settings),
        "kv_cache_scheme": None,
    }


def _write_inputs(scheme: ActivationScheme) -> dict[str, Any]:
    return {
        "num_bits": 8,
        "type": next(kind for kind, type_ in KINDS.items() if type_ == scheme.type),
        "symmetric": scheme.symmetric,
        "strategy": "token" if scheme.dynamic else "tensor",
        "group_size": None,
        "dynamic": scheme.dynamic,
        "observer": None if scheme.dynamic else scheme.observer,
    }


def _targets(names: Iterable[str], others: Iterable[str]) -> list[str]:
    found = patterns(names, others)
    return [matched[0] if len(matched) == 1 else f"re:{pattern}" for pattern, matched in found.items()]


def read(config: Mapping[str, Any], name: str) -> tuple[Setting, str, Any]:
    """Return a linear's setting, the format of its tensors, and its actorder.

    Raises CheckpointError for what llmquant does not read.
    """
    scheme = _scheme_of(config, name)
    found = config.get("transform_config")
    expect(not found, "transform_config", found, "none, as llmquant does not read it")
    weights: Mapping[str, Any] = scheme.get("weights") or {}
    expect(isinstance(weights, Mapping), "weights", weights, "settings")
    kind, bits, group_size = weights.get("type", "int"), weights.get("num_bits"), weights.get("group_size")
    expect(group_size is None or isinstance(group_size, int), "group_size", group_size, "a number, or none")
    strategy = weights.get("strategy") or {None: "tensor", -1: "channel"}.get(group_size, "group")
    expect(isinstance(kind, str) and kind in KINDS, "type", kind, "int or float")
    if not isinstance(bits, int) or not 2 <= bits <= 8:
        raise CheckpointError(f"num_bits is {bits}, expected 2 to 8")
    expect(kind == "int" or bits == 8, "num_bits", bits, "8 for type float")
    expect(strategy in ("group", "channel", "tensor"), "strategy", strategy, "group, channel or tensor")
    if strategy != "group":
        group_size = None
    elif not isinstance(group_size, int) or group_size < 1:
        raise CheckpointError(f"group_size is {group_size}, expected more than 0 for strategy group")
    given = scheme.get("input_activations")
    format_ = str(scheme.get("format") or config.get("format"))
    formats = (FLOAT, NAIVE) if kind == "float" else (PACKED, INT, NAIVE)
    expect(format_ in formats, "format", format_, " or ".join(formats))
    expect(format_ != PACKED or not given, "input_activations", given, f"none in {PACKED}")
    setting = Setting(kind, bits, bool(weights.get("symmetric", True)), str(strategy), group_size, _read_inputs(given))
    return setting, format_, weights.get("actorder")


def _read_inputs(found: Mapping[str, Any] | None) -> ActivationScheme | None:
    if not found:
        return None
    expect(isinstance(found, Mapping), "input_activations", found, "settings, or none")
    type_, bits, dynamic = found.get("type", "int"), found.get("num_bits", 8), found.get("dynamic", False)
    strategy = found.get("strategy") or "tensor"
    fine = (
        isinstance(type_, str)
        and type_ in KINDS
        and bits == 8
        and (dynamic, strategy) in ((True, "token"), (False, "tensor"))
    )
    expect(fine, "input_activations", found, "8 bits, int or float, strategy token if dynamic, else tensor")
    return ActivationScheme(type=KINDS[type_], dynamic=dynamic, symmetric=bool(found.get("symmetric", True)))


def expect(fine: bool, what: str, found: object, expected: str) -> None:
    """Raise CheckpointError unless what was found is fine."""
    if not fine:
        raise CheckpointError(f"{what} is {found}, expected {expected}")


def expect_all(tensors: Iterable[str], needed: Iterable[str]) -> None:
    """Raise CheckpointError unless all suffixes that are needed are there."""
    for suffix in needed:
        if suffix not in tensors:
            raise CheckpointError(f"{suffix} is missing, found only {', '.join(sorted(tensors)) or 'nothing'}")


def _scheme_of(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return the config group of one linear; a name goes before a pattern, a pattern before the class Linear."""
    by_target: dict[str, Mapping[str, Any]] = {}
    groups = config.get("config_groups") or {}
    expect(isinstance(groups, Mapping), "config_groups", groups, "groups by name")
    for key, scheme in groups.items():
        if not isinstance(scheme, Mapping):
            raise CheckpointError(f"config_groups.{key} is {scheme!r}, expected targets and weights, not a preset")
        targets = scheme.get("targets") or []
        fine = isinstance(targets, list) and all(isinstance(target, str) for target in targets)
        expect(fine, f"config_groups.{key}.targets", targets, "a list of names")
        by_target.update(dict.fromkeys(targets, scheme))
    for target in sorted(by_target, key=lambda target: (target.startswith("re:"), target)):
        try:
            if target == name or (target.startswith("re:") and matches(target[3:], name, "match")):
                return by_target[target]
        except ValueError as error:
            raise CheckpointError(f"config_groups: {target!r:.200} {error}") from None
    if "Linear" in by_target:
        return by_target["Linear"]
    raise CheckpointError(f"no config group targets it, found {', '.join(by_target) or 'no config_groups'}")
