"""From a float model to quantized layers: calibrate a layer, quantize its linears, go on to the next."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from llmquant import calibrate, gradients, learned, memory, plugins, training, work
from llmquant import plan as planning
from llmquant.activations import Inputs
from llmquant.distillation import Training
from llmquant.errors import CalibrationError, LlmquantError
from llmquant.experts import Reader, Routed
from llmquant.grid import dequantize
from llmquant.models import moe
from llmquant.models.spec import Site
from llmquant.plan import Linear, Plan
from llmquant.progress import Progress
from llmquant.sites import (
    GIVEN_UP,
    Goal,
    Layer,
    Quantized,
    accumulator,
    check_packable,
    information_of,
    local_name,
    put,
    quantize_together,
)
from llmquant.stats import Sample, Stats, enough
from llmquant.stream import Activations, Stream
from llmquant.transform import Rounding, Scales, SiteView


@torch.no_grad()
def quantize_layers(
    plan: Plan, stream: Stream, log: work.Work, tokens: Tensor, progress: Progress, skip: bool = False
) -> None:
    """Quantize everything in the order of computation, and keep each part in the work folder as it is finished.

    skip: leave float what cannot be quantized, with those that read the same activations.

    The activations are those of the quantized model. Where a mismatch is corrected, those of the float model go along
    for as many of the first tokens as that needs.
    """
    outside = [x for x in plan.of_layer(None) if x.grid]
    heads = [x for x in outside if not x.lookup and not log.has(x.part)]
    lookups = [x for x in outside if x.lookup]
    unfinished = [i for i in range(plan.layers) if not log.has(i)]
    end = plan.layers if heads else 1 + max(unfinished, default=-1)  # of what must be computed
    if end == 0 and all(log.has(x.part) for x in lookups):
        progress("quantizing layers", plan.layers, plan.layers)
        return
    stream.load()
    with log.scratch() as folder:
        places = {name: folder / name if plan.placement == "files" else None for name in ("float", "quantized", "all")}
        along = plan.recipe.mismatch_correction or plan.recipe.tunes_layers
        aimed = stream.start(tokens, places["float"], enough_for(plan.linears)) if along else None
        information = _keep_information(plan, stream, log, tokens, places["all"])
        for linear in lookups:
            if not log.has(linear.part):
                log.begin()
                stats = lookup_stats(plan, stream, linear, tokens, information, places["all"])
                _save_outside(plan, log, linear, stream.embedding_weight(), stats, skip)
            if linear.name in log.given_up(linear.part):
                continue
            stream.set_embedding(dequantize(log.load(linear)), also_head=not plan.untie)
        activations = stream.start(tokens, places["quantized"])
        memory.trim()
        if not plan.recipe.tunes_layers:  # which asks the model for batches of other sizes
            stream.drop()
        for index in range(end):
            progress("quantizing layers", index, plan.layers)
            last = index == end - 1 and not heads
            if not log.has(index):
                log.begin()
                _quantize_layer(plan, stream, log, index, activations, aimed, not last, skip)
            elif not last:
                _pass_finished(plan, stream, log, index, activations, aimed)
            memory.trim()
        if heads:
            stream.load()
        for linear in heads:
            log.begin()
            aim = aimed if plan.recipe.mismatch_correction else None
            stats = head_stats(stream, tokens, activations, plan, aim)
            _save_outside(plan, log, linear, stream.head_weight(), stats, skip)
        stream.drop()
    progress("quantizing layers", plan.layers, plan.layers)


def _pass_finished(
    plan: Plan, stream: Stream, log: work.Work, index: int, activations: Activations, aimed: Activations | None
) -> None:
    """Send the activations through a layer that an earlier run has quantized, those of the float model as it was."""
    with stream.layer(index) as layer:
        if aimed is not None:
            stream.run(layer, index, aimed)
        rounding: dict[str, Inputs] = {}
        given_up = log.given_up(index)
        for linear in plan.of_layer(index):
            if linear.grid is not None and linear.name not in given_up:
                put(layer, plan, linear, log.load(linear), rounding)
        _put_floats(layer, plan, index, {name: log.load_float(index, name) for name in log.floats(index)})
        with calibrate.rounded(layer, plan.spec.sites_of(index), rounding):
            stream.run(layer, index, activations)


def _quantize_layer(
    plan: Plan,
    stream: Stream,
    log: work.Work,
    index: int,
    activations: Activations,
    aimed: Activations | None,
    go_on: bool,
    skip: bool,
) -> None:
    """Quantize a layer and keep it.

    go_on: leave its outputs in the activations. skip: leave float what cannot be quantized.
    """
    with stream.layer(index) as layer:
        goal = None if aimed is None else Goal(copy.deepcopy(layer), aimed)
        told: dict[str, Any] = {}
        floats: dict[str, Tensor] = {}
        known = log.information(index, stream.device) if plan.needs == "fisher" else None
        outputs = dict(known.linears) if known else {}
        if plan.recipe.folds:
            floats, told, scales = transform_layer(plan, stream, layer, index, activations, outputs)
            if goal is not None:
                goal.scales = scales
        with_goal = goal if plan.recipe.mismatch_correction else None
        tunes = plan.recipe.tunes_layers
        rounded = Layer(plan, stream, layer, index, activations, with_goal, outputs, skip)
        done = rounded.quantize(go_on and not tunes)
        if tunes:
            assert goal is not None
            assert known is not None
            stream.run(goal.layer, index, goal.activations)
            _tune(plan, stream, layer, index, activations, goal, known, done)
            stream.run(layer, index, activations)
        records = {name: record | told.get(name, {}) for name, record in done.records.items()}
        log.save(index, done.linears, records, floats | done.biases | done.floats, done.given_up)
        log.drop_information(index)


def enough_for(linears: Sequence[Linear]) -> int:
    """Return on how many tokens transforms and mismatches are found: fewer than rounding needs."""
    return enough(max((x.cols for x in linears), default=0))


def _save_outside(plan: Plan, log: work.Work, linear: Linear, weight: Tensor, stats: Stats, skip: bool = False) -> None:
    try:
        done, records, _ = quantize_together([linear], [weight], stats)
        if skip:
            check_packable(plan, done)
    except GIVEN_UP as error:
        if not skip:
            raise
        log.save(linear.part, {}, {}, given_up={linear.name: str(error)})
        return
    log.save(linear.part, done, records)


def _tune(
    plan: Plan,
    stream: Stream,
    layer: nn.Module,
    index: int,
    activations: Activations,
    goal: Goal,
    known: gradients.LayerInformation,
    done: Quantized,
) -> None:
    """Tune a layer's linears, as the recipe says. The activations of ``goal`` are the layer's outputs already."""
    linears = {local_name(plan, x): x for x in plan.of_layer(index) if x.name in done.linears}
    before = {local: done.linears[x.name] for local, x in linears.items()}
    changing: learned.Steps
    settings: learned.LearnedRounding | Training
    if plan.recipe.learned_rounding is not None:
        settings = plan.recipe.learned_rounding
        changing = learned.SignSteps(before, {local: done.targets[x.name] for local, x in linears.items()}, settings)
    else:
        assert plan.recipe.training is not None
        settings = plan.recipe.training
        changing = training.AdamSteps(before, settings)
    tuned, told = learned.tune(
        layer,
        before,
        changing,
        torch.cat([activations[i] for i in range(len(goal.activations))]),
        torch.cat(list(goal.activations)),
        stream.caller(activations, index),
        known.layer,
        settings.steps,
        settings.tokens,
    )
    for local, linear in linears.items():
        put(layer, plan, linear, tuned[local], {})
        done.linears[linear.name] = tuned[local]
        done.records[linear.name]["tuned"] = told


def lookup_stats(
    plan: Plan,
    stream: Stream,
    linear: Linear,
    tokens: Tensor,
    known: Stats | None = None,
    folder: Path | None = None,
) -> Stats:
    """Return the statistics with which the embedding is rounded; none where its algorithm needs no Hessian.

    known: what ``gradients.measure`` gave, if it was asked already. folder: as it wants it.
    """
    if linear.choice is None or planning.needs_of(linear.choice) not in ("hessian", "fisher"):
        return Stats.none(linear.cols, stream.device)
    also_head = stream.tied and not plan.untie
    return gradients.measure(stream, tokens, also_head, folder=folder) if known is None else known


def _keep_information(plan: Plan, stream: Stream, log: work.Work, tokens: Tensor, folder: Path | None) -> Stats | None:
    """Keep the Fisher information of all layers' outputs in the work folder, and return that of the embedding's.

    None where that is not to be done now.
    """
    if plan.needs != "fisher" or all(log.has(i) or log.has_information(i) for i in range(plan.layers)):
        return None
    two_sided = planning.two_sided(plan.linears)
    linears = [informing(plan, index) if two_sided else [] for index in range(plan.layers)]

    def keep(index: int, of_layer: gradients.LayerInformation) -> None:
        if not log.has(index):
            log.save_information(index, of_layer)

    return gradients.measure(stream, tokens, stream.tied and not plan.untie, linears, keep, folder)


def informing(plan: Plan, index: int) -> list[str]:
    """Return the modules of a layer of which the Fisher information of the outputs is to be known.

    Of an expert's first linears it is not: it would take more memory than the model, and be found on few tokens.
    """
    sites = [s for s in plan.spec.sites_of(index) if not s.expert or moe.reads_inner(s)]
    return list(dict.fromkeys(information_of(plan.spec, site, name) for site in sites for name in site.linears))


def transform_layer(
    plan: Plan,
    stream: Stream,
    layer: nn.Module,
    index: int,
    activations: Activations,
    outputs: dict[str, tuple[Tensor, ...]],
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Tensor]]:
    """Fold what the transforms find into a layer, and into the information of its linears' ``outputs``.

    Returns the changed tensors that stay float, records by linear, and by site what its activations were divided by.

    All sites are searched on the layer while it is float, and before any of its
    linears is quantized: a fold changes the linear that feeds the site too. A search
    needs less text than rounding does. Experts come one after the other.
    """
    folding = [
        s
        for s in plan.spec.sites_of(index)
        if s.fold and s.name not in plan.unfoldable and any(x.grid for x in plan.named(index, s.readers))
    ]
    sites = [site for site in folding if not site.expert]
    begin = calibrate.experts_of(plan.spec, index)
    sums = {site.name: accumulator(plan, stream, plan.named(index, site.readers), drift=False) for site in sites}
    some = activations.first(enough_for(plan.of_layer(index)))
    samples = {site.name: Sample(some.tokens, stream.ranks) for site in sites}
    routed = Routed(stream.ranks)

    def see(site: Site, x: Tensor, *chosen: Tensor) -> None:
        if site == begin:
            routed.add(x, chosen[0])
        else:
            sums[site.name].add(x)
            samples[site.name].add(x)

    with calibrate.watch(layer, [*sites, *([begin] if begin else [])], see):
        stream.run(layer, index, some, keep=False)
    experts = {site.expert for site in plan.spec.sites_of(index) if site.expert}
    share = routed.chosen[0].shape[1] / len(experts) if experts else 1.0
    folds = _Folds(plan, stream, layer, index, outputs, share)
    folds.search(
        sites, {site.name: sums[site.name].result() for site in sites}, {n: s.result() for n, s in samples.items()}
    )
    if begin is not None:
        assert plan.spec.experts is not None
        routed.x = [x / folds.scales.get(plan.spec.experts.site, 1) for x in routed.x]
        reader = Reader(layer, routed, lambda site: accumulator(plan, stream, plan.of_layer(index, site), drift=False))
        for site in (site for site in folding if site.expert):
            folds.search([site], {site.name: reader.stats(site)[0]}, {site.name: reader.sample(site)})
    return _round_floats(plan, stream, layer, index, folds.changed), folds.records, folds.scales


class _Folds:
    """What the transforms find for the sites of a layer, folded into it.

    share: of the tokens that an expert reads, on average.
    records: by linear. scales: by site, what its activations were divided by. changed: modules.
    """

    def __init__(
        self,
        plan: Plan,
        stream: Stream,
        layer: nn.Module,
        index: int,
        outputs: dict[str, tuple[Tensor, ...]],
        share: float,
    ) -> None:
        self._plan, self._stream, self._layer, self._index = plan, stream, layer, index
        self._outputs, self._share = outputs, share
        self.records: dict[str, Any] = {}
        self.scales: dict[str, Tensor] = {}
        self.changed: list[str] = []

    def search(self, sites: Sequence[Site], stats: dict[str, Stats], inputs: dict[str, Tensor]) -> None:
        """Let each transform search all sites, then the next. stats, inputs: of what the sites read."""
        for name, config in self._plan.recipe.folds:
            transform = plugins.load("transforms", name, "transforms")
            for site in sites:
                factors = self._folded(name, transform, config, site, stats[site.name], inputs[site.name])
                if factors is not None:
                    stats[site.name], inputs[site.name] = stats[site.name].divided(factors), inputs[site.name] / factors

    def _folded(
        self, name: str, transform: ModuleType, config: Any, site: Site, stats: Stats, inputs: Tensor
    ) -> Tensor | None:
        """Fold what a transform finds for a site into the layer, and return what its activations are divided by."""
        plan, layer, index = self._plan, self._layer, self._index
        assert site.fold is not None
        linears = plan.named(index, site.readers)
        view = SiteView(
            tuple(self._weights(x, site) for x in linears),
            tuple(map(_rounding, linears)),
            stats,
            inputs,
            calibrate.producer_rows(layer, site),
            site.fold.kind.startswith("norm"),
        )

        def search() -> Scales:
            found: Scales = transform.search(view, config)
            return found._replace(factors=found.factors.cpu())

        try:
            found = self._stream.ranks.from_first(search)
        except LlmquantError as error:
            raise type(error)(f"{linears[0].weight_name}: {error}") from None
        for linear in linears:
            self.records.setdefault(linear.name, {}).setdefault("transforms", []).append({"name": name, **found.record})
        if bool((found.factors == 1).all()):
            return None
        dtype = self._stream.checkpoint.infos[f"{plan.spec.layers}.{index}.{site.fold.module}.weight"].dtype
        factors = calibrate.storable_scales(layer, site, found.factors.to(stats.square_mean.device), dtype)
        divisor = calibrate.fold_scales(layer, site, factors)
        if feeding := self._outputs.get(site.fold.module):
            of_parts = torch.split(divisor, [len(part) for part in feeding])
            scaled = tuple(p * d * d[:, None] for p, d in zip(feeding, of_parts, strict=True))
            self._outputs[site.fold.module] = scaled
        self.scales[site.name] = self.scales.get(site.name, 1) * factors
        self.changed += [site.fold.module, *site.readers]
        return factors

    def _weights(self, linear: Linear, site: Site) -> Tensor:
        """Return the weights that a search rounds: of an expert's as large a share as that of the tokens it reads."""
        name = local_name(self._plan, linear)
        w = calibrate.weight_of(self._layer.get_submodule(name)).float()
        if name in site.linears or linear.grid is None or linear.grid.shared or linear.grid.per_tensor:
            return w
        return w[torch.linspace(0, len(w) - 1, math.ceil(self._share * len(w)), device=w.device).long()]


def _rounding(linear: Linear) -> Rounding | None:
    if linear.grid is None or linear.choice is None:
        return None
    algorithm = plugins.load("algorithms", linear.choice.algorithm, "algorithm")
    return Rounding(linear.grid, algorithm, linear.choice.algorithm_config)


def _round_floats(
    plan: Plan, stream: Stream, layer: nn.Module, index: int, modules: Sequence[str]
) -> dict[str, Tensor]:
    """Return the float tensors of changed modules in the dtype they are stored in; the layer gets the same values.

    Raises CalibrationError when that dtype cannot hold a value.
    """
    quantized = {x.weight_name for x in plan.of_layer(index) if x.grid}
    floats = {}
    for module in dict.fromkeys(modules):
        for local, parameter in layer.get_submodule(module).named_parameters():
            name = f"{plan.spec.layers}.{index}.{module}.{local}"
            if name not in quantized:
                floats[name] = parameter.to(stream.checkpoint.infos[name].dtype)
                if not torch.isfinite(floats[name]).all():
                    raise CalibrationError(
                        f"{name}: with the scales of the transforms folded into it, it has values that "
                        f"{floats[name].dtype} cannot hold: the largest is {float(parameter.abs().max()):g}. "
                        "Leave out `transforms`, or use a model in bfloat16 or float32."
                    )
    _put_floats(layer, plan, index, floats)
    return floats


def _put_floats(layer: nn.Module, plan: Plan, index: int, floats: Mapping[str, Tensor]) -> None:
    for name, value in floats.items():
        layer.get_parameter(name.removeprefix(f"{plan.spec.layers}.{index}.")).copy_(value)


def head_stats(
    stream: Stream, tokens: Tensor, activations: Activations, plan: Plan, aimed: Activations | None = None
) -> Stats:
    """Return the statistics of what the output matrix reads.

    aimed: the float model's activations; with them, the statistics have a drift.
    """
    sums = accumulator(plan, stream, [x for x in plan.of_layer(None) if not x.lookup], aimed is not None)
    for i, (batch, x) in enumerate(zip(stream.own_batches(*tokens.shape), activations, strict=True)):
        both = [x] if aimed is None or i >= len(aimed) else [x, aimed[i]]
        sums.add(*(stream.before_head(tokens[batch], y).flatten(0, 1) for y in both))
    return sums.result()
