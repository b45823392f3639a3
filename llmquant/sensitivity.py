"""How much each linear of a model matters: quantized alone, what becomes of the predictions.

Every unit (a linear, the linears of a site, or those of a layer) is quantized by the
recipe's own algorithm (without what takes a whole run: feedback between rows, mismatch
correction, learned rounding) while all others stay float, what the recipe's transforms
find folded into them. Its effect is the mean KL divergence from the float model's predictions,
end to end, on text that nothing was calibrated on.

A small error moves the predictions by a divergence in proportion to its square. So one
measured grid tells the others, by the errors that each leaves at the linear's outputs.

The float activations before a layer are kept while its units are measured, so that only
the layers from there on are computed again: about half of them, on average. The same
walk through the layers collects the calibration's statistics where the algorithm reads any.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llmquant import calibrate, data, experts, layers, plugins, run, sites
from llmquant.checkpoint import read_json
from llmquant.errors import CheckpointError, OutputError, RecipeError
from llmquant.files import cannot_write, held, write_json
from llmquant.grid import dequantize
from llmquant.metrics import Result, Scores
from llmquant.models import moe
from llmquant.models.spec import Site
from llmquant.plan import Linear, Plan
from llmquant.progress import Progress, silent
from llmquant.protocols import Windows
from llmquant.recipe import Recipe
from llmquant.stats import Accumulator, Stats, most_of
from llmquant.stream import Activations, Stream

By = Literal["linear", "site", "layer"]
OWN = "recipe"
BLOCK_GRIDS = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
BITS = ("2", "3", "4", "8")
FILE = "sensitivity.json"
TINY = 1e-30
ROWS = 128  # enough to know the mean error of all to some per cent


@dataclass(frozen=True)
class Unit:
    """Linears that are quantized together and get one grid.

    layer: None for the output matrix and the token embedding.
    """

    name: str
    layer: int | None
    linears: tuple[str, ...]
    weights: int


@dataclass(frozen=True)
class Measured:
    """What quantizing one unit alone does.

    grid: a label of ``grids_of``. bits_per_weight: of the unit.
    kld: mean KL divergence from the float model, nats a token; kld_error: its standard error.
    top1: share of tokens whose likeliest next token stays the same.
    """

    unit: str
    grid: str
    bits_per_weight: float
    kld: float
    kld_error: float
    top1: float


@dataclass(frozen=True)
class Sensitivity:
    """All that was measured.

    errors: by unit and grid, what quantizing leaves at the linears' outputs, as a share of their power, on average
        over the unit's linears.
    fingerprint: what decides the figures: model, recipe, texts, versions.
    """

    model: str
    recipe: str
    by: By
    protocol: str
    units: tuple[Unit, ...]
    results: tuple[Measured, ...]
    errors: Mapping[str, Mapping[str, float]]
    fingerprint: Mapping[str, Any]

    @property
    def grids(self) -> list[str]:
        grids = [grid for of_unit in self.errors.values() for grid in of_unit]
        return list(dict.fromkeys([*grids, *(result.grid for result in self.results)]))

    def table(self) -> dict[str, dict[str, Measured]]:
        """Return the results by unit, then by grid."""
        found: dict[str, dict[str, Measured]] = {unit.name: {} for unit in self.units}
        for result in self.results:
            found[result.unit][result.grid] = result
        return found

    def costs(self) -> dict[str, dict[str, float]]:
        """Return by unit and grid how far the model diverges, in nats a token.

        On grids without a measured divergence: that on the grid with the nearest error at the outputs, times the
        errors' ratio.
        """
        found: dict[str, dict[str, float]] = {}
        for name, results in self.table().items():
            found[name] = {grid: result.kld for grid, result in results.items()}
            errors = {grid: max(error, TINY) for grid, error in self.errors.get(name, {}).items()}
            for grid in errors.keys() - results.keys():
                near = min(results, key=lambda g: abs(math.log(errors[g] / errors[grid])), default=None)
                if near is not None:
                    found[name][grid] = results[near].kld * errors[grid] / errors[near]
        return found


@dataclass(frozen=True)
class Cost:
    """What is still to be measured, and about how long that takes (from one measured pass; quantizing not included).

    layer_passes: a layer, over all tokens. bytes: of the activations and reference predictions kept in memory.
    """

    measurements: int
    layer_passes: int
    tokens: int
    seconds: float
    bytes: int

    def __str__(self) -> str:
        return (
            f"{self.measurements} measurements, {self.layer_passes} passes of a layer over {self.tokens} tokens: about "
            f"{self.seconds:.0f} s, and the time to quantize; {self.bytes / 1e6:.0f} MB of activations and predictions"
        )


def grid_rule(label: str, recipe: Recipe) -> dict[str, Any]:
    """Return the ``grid`` of a recipe's rule that a label stands for.

    A label is "recipe" (the recipe's own choice, no rule), the name of a grid, or bits and a group size for the
    recipe's own grid, such as "3" or "w3g64".
    """
    short = re.fullmatch(r"w?(\d)(?:g(\d+))?", label)
    if label == OWN:
        return {}
    if short is None:
        return {"name": label}
    if recipe.grid is None:
        raise RecipeError(f"grids: {label!r} changes the bits of the recipe's grid, but the recipe has a mixture")
    size = {} if short[2] is None else {"group_size": int(short[2])}
    return {"bits": int(short[1])} | size


def grids_of(text: str, recipe: Recipe) -> list[str]:
    """Return the labels in a comma-separated list; "budget" stands for a set that budgets can be filled with."""
    if text != "budget":
        return list(dict.fromkeys(label.strip() for label in text.split(",")))
    if recipe.mixture is not None or recipe.formats == ["gguf"]:
        return list(BLOCK_GRIDS)
    if recipe.grid is not None and recipe.grid["name"] == "affine":
        return list(BITS)
    raise RecipeError("grids: there is no usual set for this recipe. Name them, e.g. --grids q8_0,q4_0")


def with_rules(recipe: Recipe, rules: Sequence[Mapping[str, Any]], name: str = "") -> Recipe:
    """Return a recipe whose first rules are these.

    A mixture's own types give way to smaller blocks where theirs do not divide a matrix; so do the rules' then.
    """
    values = recipe.model_dump(exclude_defaults=True, exclude={"budget", "selection"})
    values["rules"] = [*rules, *values.get("rules", [])]
    if recipe.mixture is not None and rules:
        values["fallback"] = "substitute"
    if name:
        values["name"] = name
    made: Recipe = plugins.validate(Recipe, values, "")
    return made


def uniform(recipe: Recipe, units: Sequence[Unit], label: str) -> Recipe:
    """Return the recipe with one grid for all units."""
    grid = grid_rule(label, recipe)
    return with_rules(recipe, [{"match": [n for u in units for n in u.linears], "grid": grid}] if grid else [])


def units_of(plan: Plan, by: By) -> list[Unit]:
    """Return what the plan quantizes in units, in computing order, then what is outside the layers.

    All experts of a layer go together: a runtime keeps them in one tensor.
    """
    found: list[Unit] = []
    for index in range(plan.layers):
        layer = f"{plan.spec.layers}.{index}"
        groups: dict[str, list[Linear]] = {}
        for site in plan.spec.sites_of(index):
            for linear in plan.of_layer(index, site):
                if linear.grid is not None:
                    key = {"linear": linear.name, "site": f"{layer}.{site.name}", "layer": layer}[by]
                    key = key.replace(site.expert, moe.any_expert(site)) if site.expert else key
                    groups.setdefault(key, []).append(linear)
        found += [_unit(name, index, linears) for name, linears in groups.items()]
    return found + [_unit(x.name, None, [x]) for x in plan.of_layer(None) if x.grid]


def _unit(name: str, layer: int | None, linears: Sequence[Linear]) -> Unit:
    return Unit(name, layer, tuple(x.name for x in linears), sum(x.weights for x in linears))


def check_weights_only(plan: Plan) -> None:
    """Raise RecipeError when a recipe rounds more than weights: nothing else is measured."""
    if any(x.activations for x in plan.linears):
        raise RecipeError("activations: only the rounding of weights is measured. Leave out `activations`")


@torch.no_grad()
def measure(
    model: str | Path,
    recipe: Recipe,
    windows: Windows,
    out: Path,
    by: By = "linear",
    grids: str = OWN,
    device: str = "auto",
    restart: bool = False,
    trust_remote_code: bool = False,
    announce: Callable[[Cost], None] = lambda cost: None,
    progress: Progress = silent,
    quick: bool = False,
) -> Sensitivity:
    """Measure every unit on every grid; write ``out/sensitivity.json`` after each measurement and return it.

    What the recipe's transforms find for its own grids is folded into a layer before its units are measured.

    windows: text that the recipe does not calibrate on. grids: as for ``grids_of``.
    quick: measure the divergence of a unit on the grid next to the recipe's own only; on the others the error at the
        outputs, of ``ROWS`` rows.
    announce: told the cost before the measurements begin, after one pass of the float model.

    The same call goes on where one before stopped; other grids are added to what is there.
    """
    if by not in get_args(By):
        raise RecipeError(f"--by {by}: there are {', '.join(get_args(By))}")
    stream = run.open_stream(model, recipe, run.device_of(device), trust_remote_code)
    checkpoint = stream.checkpoint
    labels = grids_of(grids, recipe)
    own = run.plan_for(stream, recipe)
    check_weights_only(own)
    units = units_of(own, by)
    plans = {label: _uniform_plan(stream, recipe, units, label) for label in labels}
    text = None
    if most_of(p.needs for p in plans.values()) != "nothing":
        assert recipe.calibration is not None
        tokenizer = data.load_tokenizer(checkpoint.folder, trust_remote_code)
        text = data.calibration_tokens(recipe.calibration, tokenizer, stream.context)
    stream.load()
    if own.untie:
        head = stream.model.get_submodule(stream.spec.head)
        head.weight = nn.Parameter(stream.embedding_weight().clone(), requires_grad=False)
    with held(out):
        log = _Log(out, model, recipe, by, windows, units, run.fingerprint(checkpoint, own, text, None), restart)
        ends = {(u.name, g) for u in units for g in ([_nearest(own, plans, u)] if quick else labels)}
        todo = [(u, label) for u in units for label in labels if log.lacks(u.name, label, (u.name, label) in ends)]
        if not todo:
            return log.all()

        walk = _Walk(stream, windows, progress)
        passed = [unit for unit, label in todo if (unit.name, label) in ends]
        passes = sum(stream.layers - (0 if _starts_anew(own, unit) else _place(unit, stream)) for unit in passed)
        announce(walk.cost(len(passed), passes))
        task = _Task(stream, own, plans, todo, ends, windows, text, walk, log, progress)
        for index in range(stream.layers):
            with stream.layer(index) as layer:
                task.measure_layer(layer, index)
        for unit in [unit for unit in units if unit.layer is None]:
            task.measure_outside(unit)
        return log.all()


class _Task:
    """Measures units in computing order; the activations are those of the float model.

    own: the recipe's plan. plans: with one grid for all units, by label. todo: units and labels to measure. ends: those
    of which the divergence is measured, not just the error at the outputs.
    """

    def __init__(
        self,
        stream: Stream,
        own: Plan,
        plans: Mapping[str, Plan],
        todo: Sequence[tuple[Unit, str]],
        ends: Collection[tuple[str, str]],
        windows: Windows,
        text: data.CalibrationTokens | None,
        walk: _Walk,
        log: _Log,
        progress: Progress,
    ) -> None:
        self._stream, self._plans, self._todo, self._ends = stream, plans, todo, ends
        self._plan = replace(own, needs=most_of(p.needs for p in plans.values()))
        self._windows, self._text, self._walk, self._log, self._progress = windows, text, walk, log, progress
        self._importance = run.importance(own, stream)
        self._held = stream.start(windows.tokens)
        self._sample = None if text is None else stream.start(text.tokens)
        self._done = 0

    def measure_layer(self, layer: nn.Module, index: int) -> None:
        """Measure a layer's units, and let the activations go on to the next."""
        stats: _Collected | None = None
        if self._sample is not None:
            if self._plan.recipe.folds and any(unit.layer == index for unit, _ in self._todo):
                layers.transform_layer(self._plan, self._stream, layer, index, self._sample, {})
            stats = _Collected(self._stream, layer, index, self._sample, self._plan)
        for label, plan in self._plans.items():
            here = [unit for unit, wanted in self._todo if unit.layer == index and wanted == label]
            whole = [n for u in here if (u.name, label) in self._ends for n in u.linears]
            parts = [n for u in here if (u.name, label) not in self._ends for n in u.linears]
            weights, errors = _quantized(plan, layer, index, whole, stats, self._importance)
            errors |= _quantized(plan, layer, index, parts, stats, self._importance, ROWS)[1]
            for unit in here:
                result = None
                if (unit.name, label) in self._ends:
                    linears = [self._plan.quantized[n] for n in unit.linears]
                    modules = {layer.get_submodule(sites.local_name(plan, x)): weights[x.name] for x in linears}
                    with _replaced(modules):
                        x = self._stream.passed(layer, index, self._held)
                    result = self._walk.score(x, index + 1)
                self._record(unit, label, sum(errors[n] for n in unit.linears) / len(unit.linears), result)
        self._stream.run(layer, index, self._held)

    def measure_outside(self, unit: Unit) -> None:
        """Measure the embedding or the output matrix, after all layers."""
        labels = [label for of, label in self._todo if of == unit]
        if not labels:
            return
        stream, linear = self._stream, self._plan.quantized[unit.linears[0]]
        stats = self._outside_stats(linear)
        weight = stream.embedding_weight() if linear.lookup else stream.head_weight()
        for label in labels:
            linear = self._plans[label].quantized[unit.linears[0]]
            if (unit.name, label) not in self._ends:
                linear, some = _some_rows(linear, weight, ROWS)
                told = sites.quantize_together([linear], [some], stats)[1]
                self._record(unit, label, told[linear.name]["error"], None)
                continue
            quantized, told, _ = sites.quantize_together([linear], [weight], stats)
            with _replaced({stream.model.get_submodule(linear.name): dequantize(quantized[linear.name])}):
                x = stream.start(self._windows.tokens) if linear.lookup else self._held
                first = 0 if linear.lookup else stream.layers
                result = self._walk.score(x.copy(), first)
            self._record(unit, label, told[linear.name]["error"], result)

    def _outside_stats(self, linear: Linear) -> Stats:
        if self._sample is None or self._text is None:
            return _importance(self._importance, linear) or Stats.none(linear.cols, self._stream.device)
        if linear.lookup:
            return layers.lookup_stats(self._plan, self._stream, linear, self._text.tokens)
        return layers.head_stats(self._stream, self._text.tokens, self._sample, self._plan)

    def _record(self, unit: Unit, label: str, error: float, result: Result | None) -> None:
        measured = None if result is None else _measured(self._plans[label], unit, label, result)
        self._log.add(unit, label, error, measured)
        self._done += 1
        self._progress("measuring", self._done, len(self._todo))


def _nearest(own: Plan, plans: Mapping[str, Plan], unit: Unit) -> str:
    """Return the grid whose bits for a weight of a unit are nearest to those that the recipe gives it."""
    wanted = _bits(own, unit)
    return min(plans, key=lambda label: abs(_bits(plans[label], unit) - wanted))


def read(path: Path) -> Sensitivity:
    """Return what ``measure`` has written, or raise CheckpointError."""
    values = read_json(path, "`llmquant sensitivity` writes one")
    try:
        found: Sensitivity = plugins.validate(Sensitivity, values, "")
    except RecipeError as error:
        raise CheckpointError(f"{path}: is not what `llmquant sensitivity` writes: {error}") from None
    units = {unit.name for unit in found.units}
    if unknown := sorted(({result.unit for result in found.results} | found.errors.keys()) - units):
        raise CheckpointError(f"{path}: is not what `llmquant sensitivity` writes: {unknown[0]} is none of its units")
    told = [r.kld for r in found.results] + [error for of_unit in found.errors.values() for error in of_unit.values()]
    if not all(0 <= number < math.inf for number in told):
        raise CheckpointError(f"{path}: has a divergence or an error that is negative or not finite")
    model, recipe_ = found.fingerprint.get("model"), found.fingerprint.get("recipe")
    if not isinstance(model, dict) or not {"folder", "hash"} <= model.keys() or not isinstance(recipe_, dict):
        raise CheckpointError(f"{path}: does not tell which model and recipe it was measured for")
    return found


class _Walk:
    """The float model's predictions, and those that follow from changed activations."""

    def __init__(self, stream: Stream, windows: Windows, progress: Progress) -> None:
        self._stream, self._windows = stream, windows
        x = stream.start(windows.tokens)
        started = time.monotonic()
        for index in range(stream.layers):
            progress("float model", index, stream.layers)
            with stream.layer(index) as layer:
                stream.run(layer, index, x)
        self._pass_seconds = (time.monotonic() - started) / stream.layers
        started = time.monotonic()
        self._reference = list(self._predictions(x))
        self._head_seconds = time.monotonic() - started
        self._activations = sum(batch.nbytes for batch in x)

    def _predictions(self, x: Activations) -> Iterator[Float[Tensor, "scored vocab"]]:
        rows = (row[None] for batch in x for row in batch)
        for i, row in enumerate(rows):
            counted = self._windows.scored[i].to(row.device)
            yield self._stream.finish(self._windows.tokens[i : i + 1], row)[0, :-1][counted]

    def score(self, x: Activations, index: int) -> Result:
        """Return how far the predictions are from the float model's, x being what layer ``index`` reads."""
        for later in range(index, self._stream.layers):
            with self._stream.layer(later) as layer:
                self._stream.run(layer, later, x)
        scores = Scores()
        for i, logits in enumerate(self._predictions(x)):
            targets = self._windows.tokens[i, 1:][self._windows.scored[i]].to(logits.device)
            scores.add(logits, targets, self._reference[i])
        return scores.result()

    def cost(self, measurements: int, passes: int) -> Cost:
        return Cost(
            measurements,
            passes,
            self._windows.tokens.numel(),
            passes * self._pass_seconds + measurements * self._head_seconds,
            2 * self._activations + sum(logits.nbytes for logits in self._reference),
        )


class _Log:
    """The file of results. It appears whole after every measurement; one of other settings is refused."""

    def __init__(
        self,
        folder: Path,
        model: str | Path,
        recipe: Recipe,
        by: By,
        windows: Windows,
        units: Sequence[Unit],
        made_from: Mapping[str, Any],
        restart: bool,
    ) -> None:
        self._path = folder / FILE
        scored = hashlib.sha256(windows.tokens.numpy().astype("<i8").tobytes() + windows.scored.numpy().tobytes())
        fingerprint = {**made_from, "scored": scored.hexdigest()}
        self._all = Sensitivity(str(model), recipe.name, by, windows.label, tuple(units), (), {}, fingerprint)
        if self._path.exists() and not restart:
            before = read(self._path)
            self._refuse_others(before)
            self._all = before
        self._found = {(result.unit, result.grid) for result in self._all.results}

    def lacks(self, unit: str, grid: str, end_to_end: bool) -> bool:
        """Whether what this unit does on this grid is still unknown."""
        known = (unit, grid) in self._found if end_to_end else grid in self._all.errors.get(unit, {})
        return not known

    def _refuse_others(self, before: Sensitivity) -> None:
        now = self._all
        if before.by != now.by:
            raise OutputError(f"{self._path}: was measured by {before.by}. Give another --out, or --restart")
        different = [
            key
            for key in sorted(now.fingerprint)
            if _plain(before.fingerprint.get(key)) != _plain(now.fingerprint[key])
        ]
        if different:
            raise OutputError(
                f"{self._path}: was measured for another {different[0]}. Give another --out, or --restart to begin anew"
            )

    def add(self, unit: Unit, grid: str, error: float, result: Measured | None) -> None:
        errors = {**self._all.errors, unit.name: {**self._all.errors.get(unit.name, {}), grid: error}}
        results = self._all.results if result is None else (*self._all.results, result)
        self._all = replace(self._all, results=results, errors=errors)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(self._path, error) from None
        write_json(self._path, asdict(self._all))

    def all(self) -> Sensitivity:
        """Return everything, in the order of the units."""
        order = {unit.name: i for i, unit in enumerate(self._all.units)}
        return replace(self._all, results=tuple(sorted(self._all.results, key=lambda r: order[r.unit])))


def _plain(value: Any) -> str:
    """Return a text that is the same before and after a value has been in a JSON file."""
    return json.dumps(value, sort_keys=True)


def _uniform_plan(stream: Stream, recipe: Recipe, units: Sequence[Unit], label: str) -> Plan:
    """Return the plan with one grid for all units; raise RecipeError where one of them would stay float."""
    plan = run.plan_for(stream, uniform(recipe, units, label))
    left = next((x for u in units for x in plan.linears if x.name in u.linears and x.grid is None), None)
    if left is not None:
        raise RecipeError(f"grids: {label}: {left.name} would stay float: {left.note}. Leave this grid out")
    return plan


def _measured(plan: Plan, unit: Unit, label: str, result: Result) -> Measured:
    assert result.kld_mean is not None
    assert result.kld_error is not None
    assert result.top1 is not None
    # no divergence is negative; a sum of float32 can be, by its rounding
    return Measured(
        unit.name, label, round(_bits(plan, unit), 4), max(result.kld_mean, 0.0), result.kld_error, result.top1
    )


def _bits(plan: Plan, unit: Unit) -> float:
    """Return the bits for a weight of a unit."""
    linears = [plan.quantized[name] for name in unit.linears]
    return sum(x.weights * x.grid.bits_per_weight for x in linears if x.grid) / unit.weights


def _starts_anew(plan: Plan, unit: Unit) -> bool:
    """Whether a unit changes what the first layer reads: the token embedding."""
    return plan.quantized[unit.linears[0]].lookup


def _place(unit: Unit, stream: Stream) -> int:
    return stream.layers if unit.layer is None else unit.layer


class _Collected:
    """The statistics of every site of a float layer; those of experts are taken when they are asked for."""

    def __init__(self, stream: Stream, layer: nn.Module, index: int, sample: Activations, plan: Plan) -> None:
        """Leave the layer's outputs in ``sample``."""
        begin = calibrate.experts_of(plan.spec, index)
        common = [site for site in plan.spec.sites_of(index) if site.linears and not site.expert]
        sums: dict[str, Accumulator] = {}
        routed = experts.Routed()

        def see(site: Site, x: Tensor, *chosen: Tensor) -> None:
            if site == begin:
                routed.add(x, chosen[0])
                return
            if site.name not in sums:
                sums[site.name] = Accumulator(x.shape[1], plan.needs, x.device)
            sums[site.name].add(x)

        with calibrate.watch(layer, [*common, *([begin] if begin else [])], see):
            stream.run(layer, index, sample)
        self._known = {name: accumulator.result() for name, accumulator in sums.items()}
        self._reader = experts.Reader(
            layer, routed, lambda site: sites.accumulator(plan, stream, plan.of_layer(index, site), drift=False)
        )

    def of(self, site: Site) -> Stats:
        return self._reader.stats(site)[0] if site.expert else self._known[site.name]


def _quantized(
    plan: Plan,
    layer: nn.Module,
    index: int,
    names: Sequence[str],
    stats: _Collected | None,
    importance: Mapping[str, Tensor],
    rows: int = sys.maxsize,
) -> tuple[dict[str, Float[Tensor, "_rows _cols"]], dict[str, float]]:
    """Return what a runtime will read in the place of these linears' weights, and the errors at their outputs.

    rows: quantize only so many of each, evenly spread.
    """
    found: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    scores = calibrate.score_linears(plan.spec)
    for site in plan.spec.sites_of(index):
        linears = [x for x in plan.of_layer(index, site) if x.name in names]
        if not linears:
            continue
        weights = [calibrate.weight_of(layer.get_submodule(sites.local_name(plan, x))) for x in linears]
        together = [(linears, weights, None if stats is None else stats.of(site))]
        if importance:  # of each linear's own
            together = [([x], [w], _importance(importance, x)) for x, w in zip(linears, weights, strict=True)]
        for these, theirs, known in together:
            some = [_some_rows(x, w, rows) for x, w in zip(these, theirs, strict=True)]
            these, theirs = [x for x, _ in some], [w for _, w in some]
            known = known or Stats.none(these[0].cols, theirs[0].device)
            uncut = [x.name for x in these if sites.local_name(plan, x) in scores]
            done, records, _ = sites.quantize_together(these, theirs, known, plan.recipe.rewrites, uncut)
            found |= {name: dequantize(q) for name, q in done.items()}
            errors |= {name: record["error"] for name, record in records.items()}
    return found, errors


def _some_rows(linear: Linear, w: Float[Tensor, "rows cols"], rows: int) -> tuple[Linear, Float[Tensor, "some cols"]]:
    """Return a linear of some rows of another, evenly spread, and their weights; all where rows share their scale."""
    if len(w) <= rows or linear.grid is None or linear.grid.shared or linear.grid.per_tensor:
        return linear, w
    return replace(linear, rows=rows), w[torch.linspace(0, len(w) - 1, rows, device=w.device).long()]


def _importance(known: Mapping[str, Tensor], linear: Linear) -> Stats | None:
    square = known.get(linear.weight_name)
    return None if square is None else Stats(None, square, square.sqrt(), 1)


@contextmanager
def _replaced(weights: Mapping[nn.Module, Tensor]) -> Iterator[None]:
    """While active, let modules have other weights."""
    before = {module: calibrate.weight_of(module).clone() for module in weights}
    for module, weight in weights.items():
        calibrate.weight_of(module).copy_(weight)
    try:
        yield
    finally:
        for module, weight in before.items():
            calibrate.weight_of(module).copy_(weight)
