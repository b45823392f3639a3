"""compressed-tensors files, format "pack-quantized": 2, 3, 4 or 8 bits; groups, rows or whole tensors.

A linear of ``rows`` outputs and ``cols`` inputs becomes

    weight_packed      int32 [rows, cols * bits / 32]    codes, packed along the inputs
    weight_scale       float [rows, groups]              [rows, 1] for strategy channel, [1] for tensor
    weight_zero_point  int32 [rows * bits / 32, groups]  packed along the outputs; only if asymmetric
                       int8  [1]                         strategy tensor: minus 2^(bits-1), not packed
    weight_shape       int64 [2]                         rows, cols

with the bit order of ``llmquant.words`` (the last word of a line is padded), and
``weight = scale * (code - zero)``, zero being 2^(bits-1) in a symmetric linear. The
library counts codes and zero points from -2^(bits-1) and adds that when it packs,
so the stored bits are ours as they are. `actorder: group` of older writers adds

    weight_g_idx       int32 [cols]                      the group of every input; -1: in order

Source: compressed_tensors 0.20, compressors/pack_quantized and quantization/.
Readers: vLLM and SGLang (strategies group and channel), transformers with compressed-tensors (all).
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from llmquant import words
from llmquant.errors import CheckpointError, FormatError
from llmquant.grid import Grid, QuantizedTensor
from llmquant.grids.affine import Affine
from llmquant.patterns import patterns

METHOD = "compressed-tensors"
FORMAT = "pack-quantized"
BITS = (2, 3, 4, 8)  # vLLM's kernels take 4 and 8; 3 needs a library that packs densely (since May 2026)

Setting: TypeAlias = "tuple[int, bool, str, int | None]"
"""What can differ between linears: (num_bits, symmetric, strategy, group_size)."""


def check(grid: Grid, rows: int, cols: int) -> None:
    """Raise FormatError when a compressed-tensors file cannot hold this grid; any shape will do."""
    if not isinstance(grid, Affine):
        raise FormatError(
            f"a compressed-tensors file cannot hold the grid {type(grid).__name__}, only affine. "
            "Use `grid: {name: affine}`, or `formats: [gguf]` for k-quants"
        )
    if grid.bits not in BITS:
        raise FormatError(f"a compressed-tensors file cannot hold {grid.bits} bits, only 2, 3, 4 or 8. Use 4 or 8")


def pack(q: QuantizedTensor) -> dict[str, Tensor]:
    """Return the tensors of one linear, keyed by the end of their name; raise FormatError for scales not finite."""
    assert isinstance(q.grid, Affine)
    bits = q.grid.bits
    scale, zero = q.params["scale"].flatten(1), q.params["zero"].flatten(1)
    if not scale.is_meta and not (finite := torch.isfinite(scale)).all():
        raise FormatError(
            f"{int((~finite).sum())} of {finite.numel()} scales are not finite in {q.grid.scale_dtype}. "
            "Look for broken weights, use scale_dtype bfloat16, or leave the linear float with `ignore`"
        )
    tensors = {
        "weight_packed": words.pack(q.codes, bits),
        "weight_scale": scale[0] if q.grid.per_tensor else scale,
        "weight_shape": torch.tensor(q.codes.shape),
    }
    if not q.grid.symmetric and q.grid.per_tensor:
        tensors["weight_zero_point"] = (zero[0].int() - 2 ** (bits - 1)).to(torch.int8)
    elif not q.grid.symmetric:
        tensors["weight_zero_point"] = words.pack(zero.T, bits).T
    return {suffix: tensor.contiguous() for suffix, tensor in tensors.items()}


def quantization_config(linears: Mapping[str, Grid], kept: Sequence[str], record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `quantization_config` of config.json, with one config group for each setting.

    linears: the grid of every quantized linear, one at least.
    kept: the linears that stay float.
    record: `actorder` is told to the reader; it changes nothing in the file.
    """
    settings = {name: _setting(grid) for name, grid in linears.items()}
    groups = {}
    for i, (setting, _) in enumerate(Counter(settings.values()).most_common()):
        bits, symmetric, strategy, group_size = setting
        names = [name for name, its in settings.items() if its == setting]
        others = [name for name, its in settings.items() if its != setting]
        groups[f"group_{i}"] = {
            # vLLM prefers the class to the parts of a fused matrix, so the class cannot stand for the rest.
            "targets": _targets(names, [*others, *kept]) if others else ["Linear"],
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": symmetric,
                "strategy": strategy,
                "group_size": group_size,
                "dynamic": False,
                "actorder": "weight" if record.get("actorder") else None,
            },
            "input_activations": None,
            "output_activations": None,
        }
    return {
        "quant_method": METHOD,
        "quantization_status": "compressed",
        "format": FORMAT,
        "config_groups": groups,
        "ignore": _targets(kept, settings),
        "kv_cache_scheme": None,
    }


def _setting(grid: Grid) -> Setting:
    assert isinstance(grid, Affine)
    strategy = grid.config.strategy
    return grid.bits, grid.symmetric, strategy, grid.group if strategy == "group" else None


def _targets(names: Iterable[str], others: Iterable[str]) -> list[str]:
    found = patterns(names, others)
    return [matched[0] if len(matched) == 1 else f"re:{pattern}" for pattern, matched in found.items()]


def extra_files(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the JSON files beside config.json: none."""
    return {}


def linears(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return the quantized linears among a folder's tensors: module name -> {suffix: tensor name}."""
    found: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for name in names:
        module, _, suffix = name.rpartition(".")
        if suffix in ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"):
            found[module][suffix] = name
    return dict(found)


def unpack(tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str) -> Float[Tensor, "rows cols"]:
    """Return the float32 weight of the linear ``name``; 2 to 8 bits, any order of groups.

    Raises CheckpointError for a missing or ill-shaped tensor and for a setting that llmquant does not read.
    """
    (bits, symmetric, strategy, group_size), actorder = _setting_of(config, name)
    needed = ["weight_packed", "weight_scale", "weight_shape"]
    needed += [] if symmetric else ["weight_zero_point"]
    needed += ["weight_g_idx"] if actorder == "group" else []
    for suffix in needed:
        if suffix not in tensors:
            raise CheckpointError(f"{suffix} is missing, found only {', '.join(sorted(tensors)) or 'nothing'}")
    scale, packed, size = tensors["weight_scale"], tensors["weight_packed"], tensors["weight_shape"].tolist()
    _expect(len(size) == 2, "weight_shape", size, "[rows, cols]")
    rows, cols = size
    groups = math.ceil(cols / group_size) if group_size else 1
    shape = [1] if strategy == "tensor" else [rows, groups]
    fine = scale.is_floating_point() and (list(scale.shape) or [1]) == shape
    _expect(fine, "weight_scale", f"{scale.dtype} {list(scale.shape)}", f"a float {shape}")
    packed_shape = [rows, math.ceil(cols * bits / 32)]
    fine = packed.dtype == torch.int32 and list(packed.shape) == packed_shape
    why = f"for {bits} bits (older versions padded every word of 3, 5, 6 or 7 bits; llmquant does not read those)"
    _expect(fine, "weight_packed", f"{packed.dtype} {list(packed.shape)}", f"int32 {packed_shape} {why}")
    group = _groups_of_columns(tensors.get("weight_g_idx"), cols, group_size, groups)
    weight = words.unpack(packed, bits, cols).float()
    if symmetric:
        weight -= 2 ** (bits - 1)
    else:
        weight -= _zeros(tensors["weight_zero_point"], bits, shape).float().view(-1, groups).index_select(1, group)
    weight *= scale.float().view(-1, groups).index_select(1, group)
    return weight


def _groups_of_columns(g_idx: Tensor | None, cols: int, group_size: int | None, groups: int) -> Tensor:
    if g_idx is None or group_size is None or bool((g_idx == -1).all()):
        return torch.arange(cols) // (group_size or cols)
    fine = len(g_idx) == cols and bool(((g_idx >= 0) & (g_idx < groups)).all())
    found = f"{len(g_idx)} numbers from {int(g_idx.min())} to {int(g_idx.max())}"
    _expect(fine, "weight_g_idx", found, f"{cols} from 0 to {groups - 1}")
    return g_idx.long()


def _zeros(zero: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """Return zero points of ``shape``, counted from 0."""
    if zero.dtype == torch.int8 and (list(zero.shape) or [1]) == shape:
        return zero.int().add(2 ** (bits - 1))
    expected = [math.ceil(shape[0] * bits / 32), *shape[1:]]
    fine = len(shape) == 2 and zero.dtype == torch.int32 and list(zero.shape) == expected
    wanted = f"int32 {expected} or int8 {list(shape)}" if len(shape) == 2 else f"int8 {list(shape)}"
    _expect(fine, "weight_zero_point", f"{zero.dtype} {list(zero.shape)}", wanted)
    return words.unpack(zero.T, bits, shape[0]).T.contiguous()


def _setting_of(config: Mapping[str, Any], name: str) -> tuple[Setting, Any]:
    """Return what holds for one linear: its setting, and its actorder."""
    scheme = _scheme_of(config, name)
    format_ = scheme.get("format") or config.get("format")
    _expect(format_ == FORMAT, "format", format_, FORMAT)
    for key, found in (
        ("input_activations", scheme.get("input_activations")),
        ("transform_config", config.get("transform_config")),
    ):
        _expect(not found, key, found, "none, as llmquant reads weights only")
    weights: Mapping[str, Any] = scheme.get("weights") or {}
    kind, bits, group_size = weights.get("type", "int"), weights.get("num_bits"), weights.get("group_size")
    strategy = weights.get("strategy") or {None: "tensor", -1: "channel"}.get(group_size, "group")
    _expect(kind == "int", "type", kind, "int")
    if not isinstance(bits, int) or not 2 <= bits <= 8:
        raise CheckpointError(f"num_bits is {bits}, expected 2 to 8")
    _expect(strategy in ("group", "channel", "tensor"), "strategy", strategy, "group, channel or tensor")
    if strategy != "group":
        group_size = None
    elif not isinstance(group_size, int) or group_size < 1:
        raise CheckpointError(f"group_size is {group_size}, expected more than 0 for strategy group")
    return (bits, bool(weights.get("symmetric", True)), str(strategy), group_size), weights.get("actorder")


def _expect(fine: bool, what: str, found: object, expected: str) -> None:
    if not fine:
        raise CheckpointError(f"{what} is {found}, expected {expected}")


def _scheme_of(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return the config group of one linear; a name goes before a pattern, a pattern before the class Linear."""
    by_target: dict[str, Mapping[str, Any]] = {}
    for key, scheme in (config.get("config_groups") or {}).items():
        if not isinstance(scheme, Mapping):
            raise CheckpointError(f"config_groups.{key} is {scheme!r}, expected targets and weights, not a preset")
        by_target.update(dict.fromkeys(scheme.get("targets") or [], scheme))
    for target in sorted(by_target, key=lambda target: (target.startswith("re:"), target)):
        if target == name or (target.startswith("re:") and re.match(target[3:], name)):
            return by_target[target]
    if "Linear" in by_target:
        return by_target["Linear"]
    raise CheckpointError(f"no config group targets it, found {', '.join(by_target) or 'no config_groups'}")
