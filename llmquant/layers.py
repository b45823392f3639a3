"""From a float model to quantized layers: calibrate a layer, quantize its linears, go on to the next."""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from llmquant import activations as activation_ranges
from llmquant import calibrate, gradients, learned, memory, mismatch, noise, plugins, work
from llmquant import plan as planning
from llmquant.activations import Inputs
from llmquant.errors import CalibrationError, LlmquantError
from llmquant.grid import QuantizedTensor, dequantize, error_sums, rows_of
from llmquant.metrics import output_error
from llmquant.models.spec import Site
from llmquant.plan import Linear, Plan
from llmquant.progress import Progress
from llmquant.stats import Accumulator, Sample, Stats
from llmquant.stream import Activations, Stream
from llmquant.transform import Rounding, Scales, SiteView

ENOUGH = 8192  # tokens that transforms and mismatches are found on, at least, and for each column of the widest linear:
ENOUGH_BY_COLUMN = 4


@torch.no_grad()
def quantize_layers(plan: Plan, stream: Stream, log: work.Work, tokens: Tensor, progress: Progress) -> None:
    """Quantize everything in the order of computation, and keep each part in the work folder as it is finished.

    The activations are those of the quantized model. Where a mismatch is corrected, those of the float model go along
    for the first tokens.
    """
    along = plan.recipe.mismatch_correction or plan.recipe.learned_rounding is not None
    aimed = stream.start(tokens).first(_enough(plan.linears)) if along else None
    outside = [x for x in plan.of_layer(None) if x.grid]
    information = _keep_information(plan, stream, log, tokens)
    for linear in (x for x in outside if x.lookup):
        if not log.has(linear.part):
            stats = lookup_stats(plan, stream, linear, tokens, information)
            _save_outside(log, linear, stream.embedding_weight(), stats)
        stream.set_embedding(dequantize(log.load(linear)), also_head=not plan.untie)
    heads = [x for x in outside if not x.lookup and not log.has(x.part)]
    activations = stream.start(tokens)
    for index in range(plan.layers):
        progress("quantizing layers", index, plan.layers)
        last = index == plan.layers - 1 and not heads
        if log.has(index) and last:
            continue
        with stream.layer(index) as layer:
            if log.has(index):
                if aimed is not None:
                    stream.run(layer, index, aimed)
                rounding: dict[str, Inputs] = {}
                for linear in plan.of_layer(index):
                    if linear.grid is not None:
                        _put(layer, plan, linear, log.load(linear), rounding)
                _put_floats(layer, plan, index, {name: log.load_float(index, name) for name in log.floats(index)})
                with calibrate.rounded(layer, plan.spec.sites, rounding):
                    stream.run(layer, index, activations)
                continue
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
            learns = plan.recipe.learned_rounding is not None
            done = _quantize_layer(plan, stream, layer, index, activations, with_goal, outputs, not last and not learns)
            if learns:
                assert goal is not None
                assert known is not None
                stream.run(goal.layer, index, goal.activations)
                _learn(plan, stream, layer, index, activations, goal, known, done)
                stream.run(layer, index, activations)
            records = {name: record | told.get(name, {}) for name, record in done.records.items()}
            log.save(index, done.linears, records, floats | done.biases)
            log.drop_information(index)
    for linear in heads:
        aim = aimed if plan.recipe.mismatch_correction else None
        _save_outside(log, linear, stream.head_weight(), head_stats(stream, tokens, activations, plan, aim))
    progress("quantizing layers", plan.layers, plan.layers)


def _enough(linears: Sequence[Linear]) -> int:
    """Return on how many tokens transforms and mismatches are found: fewer than rounding needs."""
    return max([ENOUGH, *(ENOUGH_BY_COLUMN * x.cols for x in linears)])


def _save_outside(log: work.Work, linear: Linear, weight: Tensor, stats: Stats) -> None:
    done, records, _ = quantize_together([linear], [weight], stats)
    log.save(linear.part, done, records)


@dataclass
class Quantized:
    """What becomes of the linears of a layer.

    linears, records: by name. targets: the weights that were rounded. biases: where they are corrected, as they are
    stored.
    """

    linears: dict[str, QuantizedTensor] = field(default_factory=dict)
    records: dict[str, Any] = field(default_factory=dict)
    targets: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)


def _learn(
    plan: Plan,
    stream: Stream,
    layer: nn.Module,
    index: int,
    activations: Activations,
    goal: Goal,
    known: gradients.LayerInformation,
    done: Quantized,
) -> None:
    """Give a layer's linears learned codes. The activations of ``goal`` are the layer's outputs already."""
    assert plan.recipe.learned_rounding is not None
    linears = {_local(plan, x): x for x in plan.of_layer(index) if x.grid}
    tuned, told = learned.tune(
        layer,
        {local: done.linears[x.name] for local, x in linears.items()},
        {local: done.targets[x.name] for local, x in linears.items()},
        torch.cat(activations.batches[: len(goal.activations.batches)]),
        torch.cat(goal.activations.batches),
        stream.caller(activations, index),
        known.layer,
        plan.recipe.learned_rounding,
    )
    for local, linear in linears.items():
        _put(layer, plan, linear, tuned[local], {})
        done.linears[linear.name] = tuned[local]
        done.records[linear.name]["learned"] = told


def lookup_stats(
    plan: Plan, stream: Stream, linear: Linear, tokens: Tensor, known: gradients.Information | None = None
) -> Stats:
    """Return the statistics with which the embedding is rounded; none where its algorithm needs no Hessian."""
    if linear.choice is None or planning.needs_of(linear.choice) not in ("hessian", "fisher"):
        return Stats.none(linear.cols, stream.device)
    known = known or gradients.measure(stream, tokens, also_head=stream.tied and not plan.untie)
    return known.embedding


def _keep_information(plan: Plan, stream: Stream, log: work.Work, tokens: Tensor) -> gradients.Information | None:
    """Keep the Fisher information of all layers' outputs in the work folder; None where that is not to be done now."""
    if plan.needs != "fisher" or all(log.has(i) or log.has_information(i) for i in range(plan.layers)):
        return None
    two_sided = any(x.choice and x.grid and planning.needs_of(x.choice) == "fisher" for x in plan.linears)
    linears = [name for site in plan.spec.sites for name in site.linears] if two_sided else []
    found = gradients.measure(stream, tokens, stream.tied and not plan.untie, linears)
    for index, of_layer in enumerate(found.layers):
        if not log.has(index):
            log.save_information(index, of_layer)
    return found


@dataclass
class Goal:
    """The float model's side of a layer that is being quantized.

    layer: as it is in the checkpoint. activations: what it reads. scales: by which transforms divided the
    activations of sites.
    """

    layer: nn.Module
    activations: Activations
    scales: Mapping[str, Tensor] = field(default_factory=dict)

    def scaled(self, site: Site, x: Tensor) -> Tensor:
        """Return what the site would read if the float model had been transformed."""
        return x / self.scales[site.name] if site.name in self.scales else x


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
    needs less text than rounding does.
    """
    sites = [
        s for s in plan.spec.sites if s.name not in plan.unfoldable and any(x.grid for x in plan.of_layer(index, s))
    ]
    sums = {site.name: _accumulator(plan, stream, plan.of_layer(index, site), drift=False) for site in sites}
    some = activations.first(_enough(plan.of_layer(index)))
    samples = {site.name: Sample(some.tokens) for site in sites}

    def see(site: Site, x: Tensor) -> None:
        sums[site.name].add(x)
        samples[site.name].add(x)

    with calibrate.watch(layer, sites, see):
        stream.run(layer, index, some, keep=False)
    stats = {site.name: sums[site.name].result() for site in sites}
    inputs = {site.name: samples[site.name].result() for site in sites}
    records: dict[str, Any] = {}
    scales: dict[str, Tensor] = {}
    changed: list[str] = []
    for name, config in plan.recipe.folds:
        transform = plugins.load("transforms", name, "transforms")
        for site in sites:
            assert site.fold is not None
            linears = plan.of_layer(index, site)
            view = SiteView(
                tuple(calibrate.weight_of(layer.get_submodule(local)).float() for local in site.linears),
                tuple(map(_rounding, linears)),
                stats[site.name],
                inputs[site.name],
                calibrate.producer_rows(layer, site),
                site.fold.kind.startswith("norm"),
            )
            try:
                found: Scales = transform.search(view, config)
            except LlmquantError as error:
                raise type(error)(f"{linears[0].weight_name}: {error}") from None
            for linear in linears:
                records.setdefault(linear.name, {}).setdefault("transforms", []).append({"name": name, **found.record})
            if bool((found.factors == 1).all()):
                continue
            dtype = stream.checkpoint.infos[f"{plan.spec.layers}.{index}.{site.fold.module}.weight"].dtype
            factors = calibrate.storable_scales(layer, site, found.factors, dtype)
            divisor = calibrate.fold_scales(layer, site, factors)
            if feeding := outputs.get(site.fold.module):
                of_parts = torch.split(divisor, [len(part) for part in feeding])
                outputs[site.fold.module] = tuple(p * d * d[:, None] for p, d in zip(feeding, of_parts, strict=True))
            stats[site.name], inputs[site.name] = stats[site.name].divided(factors), inputs[site.name] / factors
            scales[site.name] = scales.get(site.name, 1) * factors
            changed += [site.fold.module, *site.linears]
    return _round_floats(plan, stream, layer, index, changed), records, scales


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


def _quantize_layer(
    plan: Plan,
    stream: Stream,
    layer: nn.Module,
    index: int,
    activations: Activations,
    goal: Goal | None,
    outputs: Mapping[str, tuple[Tensor, ...]],
    go_on: bool,
) -> Quantized:
    """Quantize a layer's linears, and correct their biases if the recipe says so.

    With ``go_on`` the outputs of the quantized layer are left in ``activations``.

    A site's statistics are those of its inputs as the quantized layers before it
    make them, with ``true_sequential`` also the quantized sites before it in the
    layer. Then, if memory allows, the layer is computed once for all: every
    batch waits at a site until it is quantized. Otherwise one pass for each site
    sees the same activations. The float layer of ``goal``, if any, keeps step, and
    its outputs go to the goal's activations.
    """
    done = Quantized()
    rounding: dict[str, Inputs] = {}
    sites = [s for s in plan.spec.sites if any(x.grid for x in plan.of_layer(index, s))]
    scores = calibrate.score_linears(plan.spec)

    def quantize_site(site: Site, stats: Stats) -> None:
        linears = [x for x in plan.of_layer(index, site) if x.grid]
        weights = [calibrate.weight_of(layer.get_submodule(_local(plan, x))) for x in linears]
        uncut = [x.name for x in linears if _local(plan, x) in scores]
        if plan.recipe.bias_correction:
            aimed = [w.float() @ _aimed_mean(stats) for w in weights]
        information = {x.name: outputs.get(_local(plan, x)) for x in linears}
        quantized, told, targets = quantize_together(linears, weights, stats, plan.recipe.rewrites, uncut, information)
        for linear in linears:
            _put(layer, plan, linear, quantized[linear.name], rounding)
        if plan.recipe.bias_correction:
            done.biases.update(_corrected_biases(plan, stream, layer, linears, aimed, stats))
        done.linears.update(quantized)
        done.records.update(told)
        done.targets.update(targets)

    with ExitStack() as stack:
        begin = stack.enter_context(calibrate.stepwise(layer, sites))
        stack.enter_context(calibrate.rounded(layer, sites, rounding))
        begins, chains = [begin], [activations]
        if goal is not None:
            begins.append(stack.enter_context(calibrate.stepwise(goal.layer, sites)))
            chains.append(goal.activations)

        def begun(batch: int) -> list[calibrate.Steps]:
            both = [(b, c) for b, c in zip(begins, chains, strict=True) if batch < len(c.batches)]
            return [begin(chain.batches[batch], chain.call(chain.batches[batch], index)) for begin, chain in both]

        def next_site(steps: Sequence[calibrate.Steps]) -> tuple[Site | None, list[Tensor]]:
            """Return the site that is reached next, if any, and what each chain reads there."""
            stops = [next(of_chain) for of_chain in steps]
            site, seen = stops[0][0], [x for _, x in stops]
            if site is not None and goal is not None and len(seen) > 1:
                seen[1] = goal.scaled(site, seen[1])
            return site, seen

        if plan.recipe.true_sequential and plan.waiting_bytes < memory.available_bytes(stream.device) / 2:
            running = [begun(batch) for batch in range(len(activations.batches))]
            for _ in sites:
                stops = [next_site(steps) for steps in running]
                reached = stops[0][0]
                assert reached is not None
                sums = _accumulator(plan, stream, plan.of_layer(index, reached), goal is not None)
                for _, seen in stops:
                    sums.add(*seen)
                quantize_site(reached, sums.result())
            if not go_on:
                for of_chain in itertools.chain(*running):
                    of_chain.close()
            else:
                ends = [next_site(steps)[1] for steps in running]
                for i, chain in enumerate(chains):
                    chain.batches = [of_batch[i] for of_batch in ends[: len(chain.batches)]]
            return done
        for together in [[s] for s in sites] if plan.recipe.true_sequential or not sites else [sites]:
            wanted = {s.name: _accumulator(plan, stream, plan.of_layer(index, s), goal is not None) for s in together}
            for batch in range(len(activations.batches)):
                steps = begun(batch)
                for _ in sites[: sites.index(together[-1]) + 1]:
                    at, seen = next_site(steps)
                    if at is not None and at.name in wanted:
                        wanted[at.name].add(*seen)
                for of_chain in steps:
                    of_chain.close()
            for site in together:
                quantize_site(site, wanted[site.name].result())
    if go_on:
        if goal is not None:
            stream.run(goal.layer, index, goal.activations)
        with calibrate.rounded(layer, sites, rounding):
            stream.run(layer, index, activations)
    return done


def _aimed_mean(stats: Stats) -> Tensor:
    """Return the mean of what a site reads in the float model, as far as that is known."""
    assert stats.mean is not None
    return stats.mean if stats.drift is None else stats.mean + stats.drift.mean


def _corrected_biases(
    plan: Plan, stream: Stream, layer: nn.Module, linears: Sequence[Linear], aimed: Sequence[Tensor], stats: Stats
) -> dict[str, Tensor]:
    """Give the biases that a site's linears have the mean error of their outputs; return them as they are stored.

    The layer has the quantized weights already. aimed: each linear's mean output in the float model, without bias.

    Source: Nagel et al. 2019, https://arxiv.org/abs/1906.04721, section 4.2, with activations measured on text.
    """
    assert stats.mean is not None
    found: dict[str, Tensor] = {}
    for linear, wanted in zip(linears, aimed, strict=True):
        module = layer.get_submodule(_local(plan, linear))
        if getattr(module, "bias", None) is not None:
            bias, name = module.get_parameter("bias"), f"{linear.name}.bias"
            missing = wanted - calibrate.weight_of(module).float() @ stats.mean
            stored = (bias + missing).to(stream.checkpoint.infos[name].dtype)
            bias.copy_(stored)
            found[name] = stored
    return found


def _accumulator(plan: Plan, stream: Stream, linears: Sequence[Linear], drift: bool) -> Accumulator:
    return Accumulator(linears[0].cols, plan.needs, stream.device, any(x.static for x in linears), drift)


def head_stats(
    stream: Stream, tokens: Tensor, activations: Activations, plan: Plan, aimed: Activations | None = None
) -> Stats:
    """Return the statistics of what the output matrix reads.

    aimed: the float model's activations; with them, the statistics have a drift.
    """
    sums = _accumulator(plan, stream, [x for x in plan.of_layer(None) if not x.lookup], aimed is not None)
    at = 0
    for i, x in enumerate(activations.batches):
        of_batch = tokens[at : at + len(x)]
        both = [x] if aimed is None else [x, *aimed.batches[i : i + 1]]
        sums.add(*(stream.before_head(of_batch, y).flatten(0, 1) for y in both))
        at += len(x)
    return sums.result()


def quantize_together(
    linears: Sequence[Linear],
    weights: Sequence[Tensor],
    stats: Stats,
    rewrites: Sequence[tuple[str, Any]] = (),
    uncut: Collection[str] = (),
    outputs: Mapping[str, tuple[Tensor, ...] | None] | None = None,
) -> tuple[dict[str, QuantizedTensor], dict[str, Any], dict[str, Tensor]]:
    """Quantize linears that read the same activations; return them, what a report tells, and what was rounded.

    Those with the same grid and algorithm are stacked and quantized as one
    matrix: rows do not influence each other, and the work on the Hessian is shared.

    rewrites: the transforms; some clip weights. uncut: linears that are not clipped.
    outputs: the Fisher information of a linear's outputs, by name, where its algorithm reads it.
    """
    done: dict[str, QuantizedTensor] = {}
    records: dict[str, Any] = {}
    targets: dict[str, Tensor] = {}
    rest = list(zip(linears, weights, strict=True))
    while rest:
        first = rest[0][0]
        grid, choice = first.grid, first.choice
        assert grid is not None
        assert choice is not None
        alike = rest[:1] if grid.shared else [r for r in rest if (r[0].grid, r[0].choice) == (grid, choice)]
        rest = [r for r in rest if r not in alike]
        started = time.monotonic()
        rounding = Rounding(grid, plugins.load("algorithms", choice.algorithm, "algorithm"), choice.algorithm_config)
        try:
            wanted: list[tuple[Tensor, float | None]] = [(w.float(), None) for _, w in alike]
            if stats.drift is not None:
                wanted = [*mismatch.corrected([w for w, _ in wanted], stats)]
            rounded = {
                x.name: w if x.name in uncut else _clipped(w, stats, rounding, rewrites)
                for (x, _), (w, _) in zip(alike, wanted, strict=True)
            }
            targets |= rounded
            stacked = torch.cat(list(rounded.values())) if len(rounded) > 1 else rounded[first.name]
            known = [outputs.get(x.name) if outputs else None for x, _ in alike]
            of_outputs = None if None in known else tuple(part for parts in known if parts for part in parts)
            both: QuantizedTensor = rounding.algorithm.quantize(
                stacked, replace(stats, outputs=of_outputs), grid, rounding.config
            )
            if choice.activations is not None:
                both = replace(both, inputs=activation_ranges.fit(choice.activations, stats.sample))
        except LlmquantError as error:
            raise type(error)(f"{first.weight_name}: {error}") from None
        seconds = (time.monotonic() - started) / len(alike)
        row = 0
        for (linear, w), (target, share) in zip(alike, wanted, strict=True):
            q = rows_of(both, row, row + linear.rows)
            row += linear.rows
            done[linear.name] = q
            told: dict[str, Any] = {} if share is None else {"corrected": round(share, 4)}
            records[linear.name] = _record(linear, w, target, q, stats) | told | {"seconds": round(seconds, 3)}
    return done, records, targets


def _clipped(w: Tensor, stats: Stats, rounding: Rounding, rewrites: Sequence[tuple[str, Any]]) -> Tensor:
    for name, config in rewrites:
        transform = plugins.load("transforms", name, "transforms")
        if hasattr(transform, "clip"):
            w = transform.clip(w, stats, rounding, config)
    return w


def _record(linear: Linear, w: Tensor, target: Tensor, q: QuantizedTensor, stats: Stats) -> dict[str, Any]:
    """Return what a report tells of a linear; raise CalibrationError when its numbers are not finite.

    target: the weights that were rounded; the error at the output is that of rounding these.
    """
    w = w.float()
    wrong, loud, lost, heard = error_sums(q, w, stats.square_mean).tolist()
    error = lost / max(heard, 1e-30)
    if stats.hessian is not None:
        error = output_error(dequantize(q).sub_(target), target, stats.hessian)
    if not math.isfinite(error) and not torch.isfinite(dequantize(q)).all():
        raise CalibrationError(
            f"{linear.weight_name}: quantized, it has values that are not finite: its largest weight is "
            f"{float(w.abs().max()):g}, and a scale may have overflowed its dtype. Set grid.scale_dtype to float32 or "
            "bfloat16, or keep this linear float by a rule."
        )
    assert linear.grid is not None
    return {
        "error": round(error, 8),
        "bits_per_weight": round(linear.grid.bits_per_weight, 4),
        "tokens": stats.tokens,
        **({f"input_{key}": float(value) for key, value in q.inputs.params.items()} if q.inputs else {}),
        "layer": linear.layer,
        **noise.of_weights(q, wrong / w.numel(), loud / w.numel()),
        **q.record,
    }


def _local(plan: Plan, linear: Linear) -> str:
    return linear.name.removeprefix(f"{plan.spec.layers}.{linear.layer}.")


def _put(layer: nn.Module, plan: Plan, linear: Linear, q: QuantizedTensor, rounding: dict[str, Inputs]) -> None:
    """Give a layer the weight that a runtime will read, so that what follows sees the real error.

    rounding: gets an entry where a runtime rounds the linear's inputs, too.
    """
    weight = calibrate.weight_of(layer.get_submodule(_local(plan, linear)))
    with torch.no_grad():
        weight.copy_(dequantize(q))
    if q.inputs is not None:
        rounding[_local(plan, linear)] = q.inputs
