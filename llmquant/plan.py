"""Decide for every tensor what will happen to it, and what that costs, before any weight is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import ModuleType
from typing import Any, Literal

import torch

from llmquant import plugins
from llmquant.activations import ActivationScheme, Inputs
from llmquant.checkpoint import TensorInfo
from llmquant.errors import FormatError, LlmquantError, RecipeError, ShapeError
from llmquant.grid import Grid, QuantizedTensor
from llmquant.models import moe
from llmquant.models.spec import ModelSpec, Site
from llmquant.recipe import Choice, Recipe
from llmquant.stats import Needs, most_of

PIECE = 1 << 20  # weights that are quantized together where nothing else limits them
Placement = Literal["waiting", "memory", "files"]
"""Where activations are, the fastest place first; that does not change the result. "waiting": in memory, and at each
site those of every batch wait until it is quantized, so that a layer is computed once. "memory": a layer is computed
once for each site. "files": the same, and between layers they are in files of the work folder."""


@dataclass(frozen=True)
class Linear:
    """One weight matrix [rows, cols] of a decoder layer, or (layer None) the output matrix or the token embedding.

    grid: None where it stays float; ``note`` then says why, or which fallback was taken.
    lookup: it is the token embedding, whose rows are read one by one: there are no activations.
    """

    name: str
    layer: int | None
    rows: int
    cols: int
    dtype: torch.dtype
    grid: Grid | None
    choice: Choice | None
    note: str = ""
    lookup: bool = False

    @property
    def weights(self) -> int:
        return self.rows * self.cols

    @property
    def weight_name(self) -> str:
        return f"{self.name}.weight"

    @property
    def part(self) -> int | str:
        """What is finished and kept together with it: its layer, or it alone."""
        return self.name if self.layer is None else self.layer

    @property
    def activations(self) -> ActivationScheme | None:
        """What its inputs are rounded to, if they are."""
        return self.choice.activations if self.grid and self.choice else None

    @property
    def static(self) -> bool:
        """Whether calibration chooses the range of its inputs."""
        return self.activations is not None and not self.activations.dynamic


@dataclass(frozen=True)
class Plan:
    """What a run does.

    linears: every linear of the decoder layers in computing order, then the output matrix; the token embedding
        where a mixture quantizes it.
    kept: all other tensors, copied as they are.
    types: what a mixture gives every tensor of a GGUF file, by its name in the checkpoint.
    untie: the output matrix is a tensor of its own although the model ties it to the embedding.
    """

    recipe: Recipe
    spec: ModelSpec
    layers: int
    linears: tuple[Linear, ...]
    kept: Mapping[str, TensorInfo]
    untie: bool
    floats: tuple[str, ...]  # modules with a matrix that stays float
    types: Mapping[str, str] = field(default_factory=dict)
    needs: Needs = "nothing"
    sizes: Mapping[str, int] = field(default_factory=dict)  # format -> bytes of all tensors
    unfoldable: tuple[str, ...] = ()  # sites that transforms leave as they are
    files: Mapping[str, int] = field(default_factory=dict)  # format -> bytes of the weights' files, headers included
    placement: Placement = "waiting"
    peaks: Mapping[str, int] = field(default_factory=dict)  # phase of the run -> bytes of memory that it needs at most
    host_bytes: int = 0  # the same of the host, where layers are computed by a GPU
    scratch_bytes: int = 0  # what the work folder holds beside what is finished
    seconds: Mapping[str, float] = field(default_factory=dict)  # phase of the run -> about how long it takes
    given_up: Mapping[str, str] = field(default_factory=dict)  # linears that could not be quantized -> why

    @property
    def quantized(self) -> dict[str, Linear]:
        return {x.name: x for x in self.linears if x.grid is not None}

    @property
    def parts(self) -> dict[int | str, list[Linear]]:
        """The quantized linears by what is finished together."""
        found: dict[int | str, list[Linear]] = {}
        for linear in self.quantized.values():
            found.setdefault(linear.part, []).append(linear)
        return found

    @property
    def float_parts(self) -> list[int | str]:
        """The parts with tensors that stay float and may change: the layers, and modules outside of them."""
        kept = [*self.kept, *(x.weight_name for x in self.linears if x.grid is None)]
        outside = {n.rpartition(".")[0] for n in kept if not n.startswith(f"{self.spec.layers}.")}
        return [*range(self.layers), *sorted(outside)]

    def without(self, reasons: Mapping[str, str]) -> Plan:
        """Return the plan in which linears that could not be quantized stay float.

        So do those that read the same activations: many runtimes compute them as one matrix.

        reasons: by name.
        """
        if not reasons:
            return self
        left = dict(reasons)
        for site in (self.of_layer(i, site) for i in range(self.layers) for site in self.spec.sites_of(i)):
            because = next((x.name for x in site if x.name in reasons), "")
            if because:
                left |= {x.name: f"as {because}" for x in site if x.grid and x.name not in reasons}
        linears = [
            replace(x, grid=None, choice=None, note=f"left float: {left[x.name]}") if x.name in left else x
            for x in self.linears
        ]
        for name in self.recipe.formats:
            exporter = plugins.load("exporters", name, "formats")
            if hasattr(exporter, "check_together"):
                exporter.check_together({x.name: x.grid for x in linears})
        floats = tuple(sorted({*self.floats, *left}))
        return replace(self, linears=tuple(linears), floats=floats, given_up=left)

    def as_dict(self) -> dict[str, Any]:
        """Return what is planned and what it costs, for JSON."""
        return {
            "linears": {
                x.name: {"shape": [x.rows, x.cols], "grid": x.choice.grid, "bits_per_weight": x.grid.bits_per_weight}
                if x.grid and x.choice
                else {"shape": [x.rows, x.cols], "grid": "float", "bits_per_weight": 8 * x.dtype.itemsize}
                for x in self.linears
            },
            "kept": {name: list(info.shape) for name, info in self.kept.items()},
            "notes": self.notes,
            "bits_per_weight": self.bits_per_weight,
            "bytes": dict(self.files),
            "peak_bytes": self.peak_bytes,
            "peaks": dict(self.peaks),
            "placement": self.placement,
            "seconds": {phase: round(seconds, 1) for phase, seconds in self.seconds.items()},
            "host_bytes": self.host_bytes,
            "work_bytes": self.work_bytes,
            "scratch_bytes": self.scratch_bytes,
        }

    @property
    def notes(self) -> list[str]:
        """Every departure from the recipe's own grid that a report must list."""
        skipped = [f"{site}: not transformed, as nothing in a layer can absorb its scales" for site in self.unfoldable]
        layers = self.spec.layers
        experts = {
            f"{layers}.{i}.{name}": f"{layers}.{i}.{name.replace(site.expert, moe.any_expert(site))}"
            for i in range(self.layers)
            for site in self.spec.sites_of(i)
            for name in site.linears
            if site.expert
        }
        alike: dict[tuple[str, str], list[str]] = {}  # a note that all experts of a layer have is listed once
        for linear in self.linears:
            alike.setdefault((experts.get(linear.name, linear.name), linear.note), []).append(linear.name)
        choices = {id(x.choice): x.choice for x in self.linears if x.grid and x.choice and x.name in experts}
        if any(needs_of(choice) == "fisher" for choice in choices.values()):
            skipped.append(
                "experts: two-sided feedback for their last linears only, as the others' rows see few tokens"
            )
        every = Counter(experts.values())
        listed = [
            f"{name}: {note}"
            for (group, note), names in alike.items()
            for name in ([group] if len(names) == every[group] else names)
            if note
        ]
        return listed + skipped

    @property
    def weights(self) -> int:
        """Number of weights in the whole model."""
        return sum(x.weights for x in self.linears) + sum(i.numel for i in self.kept.values())

    @property
    def bits_per_weight(self) -> float:
        """Everything stored for the quantized linears, in bits, over their weights."""
        bits = sum(x.weights * x.grid.bits_per_weight for x in self.linears if x.grid)
        return bits / max(sum(x.weights for x in self.quantized.values()), 1)

    @property
    def peak_bytes(self) -> int:
        """Memory that the run needs at most."""
        return max(self.peaks.values())

    @property
    def work_bytes(self) -> int:
        """Size of the work folder: a byte a code, and what the grids store."""
        bits = sum(
            x.weights * (8 + x.grid.bits_per_weight - x.grid.table.numel().bit_length() + 1)
            for x in self.linears
            if x.grid
        )
        return int(bits / 8)

    def file_bits_per_weight(self, format_: str) -> float:
        """The written weights' files, headers included, in bits, over all weights of the model."""
        return 8 * self.files[format_] / self.weights

    @cached_property
    def _by_layer(self) -> Mapping[int | None, Mapping[str, Linear]]:
        found: dict[int | None, dict[str, Linear]] = {}
        for linear in self.linears:
            found.setdefault(linear.layer, {})[linear.name] = linear
        return found

    def of_layer(self, layer: int | None, site: Site | None = None) -> list[Linear]:
        """Return the linears of a layer, or of one of its sites."""
        here = self._by_layer.get(layer, {})
        return list(here.values()) if site is None else self.named(layer, site.linears)

    def named(self, layer: int | None, names: Iterable[str]) -> list[Linear]:
        """Return those of a layer's modules that are linears of the plan."""
        here = self._by_layer.get(layer, {})
        return [here[name] for name in (f"{self.spec.layers}.{layer}.{n}" for n in names) if name in here]


def make(
    recipe: Recipe,
    spec: ModelSpec,
    config: Any,
    tied: bool,
    infos: Mapping[str, TensorInfo],
    matrices: Sequence[str],
    foldable: Collection[str] = (),
) -> Plan:
    """Return the plan, or raise for the first thing that cannot work (ShapeError, FormatError, RecipeError).

    config: the model's transformers configuration.
    tied: whether the model uses its embedding as the output matrix too.
    matrices: the names of all linear modules outside the decoder layers, for formats that list what stays float.
    foldable: the sites whose scales another module of a layer can absorb, for transforms.
    """
    exporters = {name: plugins.load("exporters", name, "formats") for name in recipe.formats}
    layers = _count_layers(spec, infos)
    untie = tied and recipe.tied_embeddings == "untie"
    embed, head = f"{spec.embed}.weight", f"{spec.head}.weight"
    infos = {n: i for n, i in infos.items() if n != head or not tied}
    if untie:
        infos[head] = infos[embed]
    types: dict[str, tuple[str, str]] = {}
    for name, exporter in exporters.items():
        if recipe.mixture and not hasattr(exporter, "choose_types"):
            raise FormatError(
                f"a {name} file has no mixtures. Use `formats: [gguf]`, or a `grid` instead of the mixture"
            )
        if hasattr(exporter, "choose_types"):
            turned = f"{spec.layers}." if spec.conv1d else None
            shapes = {n: i.shape[::-1] if turned and n.startswith(turned) else i.shape for n, i in infos.items()}
            types = exporter.choose_types(recipe.mixture, config, shapes, infos[embed].dtype, _calibrated(recipe))
    head_choice = recipe.choose(spec.head, head=True)
    if tied and not untie and head_choice is not None:
        raise RecipeError(
            f"{spec.head}: the recipe quantizes it, but this model ties it to {spec.embed}, which stays float. "
            "Set `tied_embeddings: untie`, or leave it in `ignore`."
        )
    wanted = types if recipe.mixture else {}
    linears = [
        _linear(f"{spec.layers}.{i}.{local}", i, recipe, spec, infos, exporters, wanted)
        for i in range(layers)
        for site in spec.sites_of(i)
        for local in site.linears
    ]
    if head in infos:
        linears.append(_linear(spec.head, None, recipe, spec, infos, exporters, wanted))
    if recipe.mixture:
        linears.append(_linear(spec.embed, None, recipe, spec, infos, exporters, wanted))
    for exporter in exporters.values():
        if hasattr(exporter, "check_together"):
            exporter.check_together({x.name: x.grid for x in linears})
    planned = {x.weight_name for x in linears}
    kept = {name: info for name, info in infos.items() if name not in planned}
    needs = _needs(recipe, linears)
    quantized = {x.name for x in linears if x.grid}
    routers = [
        f"{spec.layers}.{i}.{name}"
        for i in range(layers)
        for name in (spec.experts.routers if spec.experts else ())
        if any(site.expert for site in spec.sites_of(i))
    ]
    floats = sorted(({x.name for x in linears} | {*matrices, *routers, spec.head}) - quantized)
    unfoldable = _unfoldable(spec, layers, quantized, foldable) if recipe.folds else ()
    stored = {name: type_ for name, (type_, _) in types.items()}
    plan = Plan(recipe, spec, layers, tuple(linears), kept, untie, tuple(floats), stored, needs, unfoldable=unfoldable)
    return replace(plan, sizes={name: _size(plan, exporter) for name, exporter in exporters.items()})


def _count_layers(spec: ModelSpec, infos: Mapping[str, TensorInfo]) -> int:
    prefix = f"{spec.layers}."
    found = {int(n[len(prefix) :].split(".")[0]) for n in infos if n.startswith(prefix) and n[len(prefix)].isdigit()}
    missing = set(range(max(found, default=0))) - found
    if not found or missing:
        raise ShapeError(f"{prefix}{min(missing, default=0)}: the checkpoint has no tensors of this decoder layer")
    return len(found)


def _linear(
    name: str,
    layer: int | None,
    recipe: Recipe,
    spec: ModelSpec,
    infos: Mapping[str, TensorInfo],
    exporters: Mapping[str, ModuleType],
    types: Mapping[str, tuple[str, str]],
) -> Linear:
    if f"{name}.weight" not in infos:
        raise ShapeError(f"{name}.weight: the checkpoint has no such tensor")
    info = infos[f"{name}.weight"]
    if len(info.shape) != 2 or not info.dtype.is_floating_point:
        raise ShapeError(f"{name}.weight: is {info.dtype} {list(info.shape)}, not a float matrix")
    if not info.numel:
        raise ShapeError(f"{name}.weight: is {list(info.shape)}, so there is nothing in it")
    rows, cols = reversed(info.shape) if spec.conv1d and layer is not None else info.shape
    type_, note = types.get(f"{name}.weight", (None, ""))
    choice = recipe.choose(name, type_, head=name == spec.head)
    lookup = name == spec.embed
    if choice is None:
        return Linear(name, layer, rows, cols, info.dtype, None, None, note, lookup)
    if choice.grid != type_:  # by a rule
        note = ""
    if lookup and needs_of(choice) == "diagonal":  # of activations, which it has none of
        choice = recipe.of_type(choice.grid, {"name": "rtn"}) or choice
    try:
        try:
            grid = choice.grid_config.bind(rows, cols, info.dtype)
        except ShapeError as error:
            if recipe.fallback == "error":
                raise
            substituted = choice.grid_config.substitute()
            if recipe.fallback == "keep" or substituted is None:
                return Linear(name, layer, rows, cols, info.dtype, None, None, f"kept float: {_short(error)}", lookup)
            name_, substitute = substituted
            grid = substitute.bind(rows, cols, info.dtype)
            note = f"substituted {name_} {substitute}: {_short(error)}"
        for format_, exporter in exporters.items():
            exporter.check(grid, rows, cols)
            if choice.activations is not None:
                if not hasattr(exporter, "check_inputs"):
                    raise FormatError(
                        f"a {format_} file cannot say that activations are rounded. Use `formats: [compressed_tensors]`"
                        ", or leave out `activations`"
                    )
                exporter.check_inputs(grid, choice.activations)
            if spec.conv1d and not getattr(exporter, "CONV1D", False):
                raise FormatError(
                    "transformers builds this model with Conv1D modules, which readers of this format do not replace. "
                    "Choose another format, e.g. `formats: [gptq]`"
                )
    except LlmquantError as error:
        raise type(error)(f"{name}.weight: {error}") from None
    return Linear(name, layer, rows, cols, info.dtype, grid, choice, note, lookup)


def _short(error: Exception) -> str:
    return str(error).split(". ")[0]


def _calibrated(recipe: Recipe) -> bool:
    """Whether the recipe's own algorithm knows how large activations are."""
    if recipe.imatrix is not None:
        return True
    _, config = plugins.configure("algorithms", recipe.algorithm, "algorithm")
    needs: Needs = plugins.load("algorithms", recipe.algorithm["name"], "algorithm").needs(config)
    return needs != "nothing"


def needs_of(choice: Choice) -> Needs:
    """Return what a linear's algorithm wants to know."""
    needs: Needs = plugins.load("algorithms", choice.algorithm, "algorithm").needs(choice.algorithm_config)
    return needs


def two_sided(linears: Iterable[Linear]) -> bool:
    """Whether an algorithm of theirs reads the Fisher information of a linear's outputs."""
    return any(x.choice and x.grid and needs_of(x.choice) == "fisher" for x in linears)


def _needs(recipe: Recipe, linears: Sequence[Linear]) -> Needs:
    """Return what a run must learn from text; raise RecipeError when the recipe has none, or an imatrix instead."""
    needs: list[Needs] = ["nothing"]
    needs += [needs_of(x.choice) for x in linears if x.choice and x.grid]
    needs += [plugins.load("transforms", name, "transforms").needs(config) for name, config in recipe.rewrites]
    needs += ["hessian"] if recipe.mismatch_correction else []
    needs += ["fisher"] if recipe.tunes_layers else []
    needs += ["diagonal"] if recipe.bias_correction else []
    static = any(x.static for x in linears)
    most = most_of(needs)
    if recipe.imatrix is not None:
        if recipe.transforms:
            raise RecipeError("imatrix: the transforms need text, of which it tells too little. Leave out `imatrix`")
        if recipe.mismatch_correction:
            raise RecipeError("imatrix: a mismatch is corrected on text. Leave out `imatrix`")
        if recipe.bias_correction:
            raise RecipeError("imatrix: biases are corrected on text. Leave out `imatrix`")
        if recipe.tunes_layers:
            raise RecipeError("imatrix: layers are tuned on text. Leave out `imatrix`")
        if most in ("hessian", "fisher"):
            raise RecipeError("imatrix: the algorithm needs more than an imatrix tells: text. Leave out `imatrix`")
        if static:
            raise RecipeError("imatrix: does not tell the ranges of activations. Leave out `imatrix`; text tells both")
        return "nothing"  # that the model's own activations must give
    if static and most == "nothing":
        most = "diagonal"
    if most != "nothing" and recipe.calibration is None:
        who = "static ranges of activations need" if static else "the algorithm needs"
        raise RecipeError(f"calibration: missing, and {who} text. Add --set calibration.path=FILE.")
    return most


def _unfoldable(spec: ModelSpec, layers: int, quantized: Collection[str], foldable: Collection[str]) -> tuple[str, ...]:
    """Return the sites that transforms leave as they are; raise RecipeError when these are all.

    The linears that experts begin with are scaled with the site that feeds them all.
    """
    found = {
        site.name: None
        for i in range(layers)
        for site in spec.sites_of(i)
        if (site.fold or not site.expert) and any(f"{spec.layers}.{i}.{n}" in quantized for n in site.readers)
    }
    unfoldable = tuple(name for name in found if name not in foldable)
    if len(unfoldable) == len(found):
        raise RecipeError(
            f"transforms: nothing in this model's layers can absorb scales of {', '.join(found) or 'any site'}. "
            "Leave out `transforms`"
        )
    return unfoldable


def placeholder(linear: Linear) -> QuantizedTensor:
    """Return a quantized linear without numbers (meta tensors), for its sizes."""
    assert linear.grid is not None
    grid = linear.grid
    wished = torch.zeros(1, grid.span // grid.group)  # not on meta, where every operation is slow
    params = {
        name: torch.empty(linear.rows, linear.cols // grid.span, value.shape[1], dtype=value.dtype, device="meta")
        for name, value in grid.store(wished, wished).items()
    }
    codes = torch.empty(linear.rows, linear.cols, dtype=torch.uint8, device="meta")
    scheme = linear.activations
    return QuantizedTensor(grid, codes, params, inputs=None if scheme is None else Inputs.placeholder(scheme))


def _size(plan: Plan, exporter: ModuleType) -> int:
    packed: dict[tuple[Grid, ActivationScheme | None, int, int], int] = {}
    if hasattr(exporter, "float_bytes"):
        total: int = exporter.float_bytes(plan)
    else:
        total = sum(info.bytes for info in plan.kept.values())
        total += sum(x.weights * x.dtype.itemsize for x in plan.linears if x.grid is None)
    for linear in plan.linears:
        if linear.grid is None:
            continue
        key = (linear.grid, linear.activations, linear.rows, linear.cols)
        if key not in packed:
            packed[key] = packed_bytes(linear, exporter)
        total += packed[key]
    return total


def packed_bytes(linear: Linear, exporter: ModuleType) -> int:
    """Return the size of a quantized linear's tensors in a container."""
    return sum(t.nbytes for t in exporter.pack(placeholder(linear)).values())
