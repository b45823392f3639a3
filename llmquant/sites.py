"""The linears of one layer, quantized site by site on what the quantized linears before them give."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from llmquant import activations as activation_ranges
from llmquant import calibrate, memory, mismatch, noise, plugins
from llmquant.activations import Inputs
from llmquant.checkpoint import check_finite
from llmquant.errors import CalibrationError, FormatError, LlmquantError, NumericsError
from llmquant.experts import Reader, Routed
from llmquant.grid import QuantizedTensor, dequantize, error_sums, rows_of
from llmquant.metrics import output_power
from llmquant.models import moe
from llmquant.models.spec import ModelSpec, Site
from llmquant.plan import Linear, Plan
from llmquant.ranks import ALONE, Ranks
from llmquant.stats import Accumulator, Stats
from llmquant.stream import Activations, Stream
from llmquant.transform import Rounding

GIVEN_UP = (CalibrationError, NumericsError, FormatError)
"""What a run that is told to skip such linears goes on after."""


@dataclass
class Quantized:
    """What becomes of the linears of a layer.

    linears, records: by name. targets: the weights that were rounded, where rounding is learned. biases: where they
    are corrected, as they are stored. given_up: linears that could not be quantized and stay float, and why. floats:
    their weights, as stored.
    """

    linears: dict[str, QuantizedTensor] = field(default_factory=dict)
    records: dict[str, Any] = field(default_factory=dict)
    targets: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    given_up: dict[str, str] = field(default_factory=dict)
    floats: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Goal:
    """The float model's side of a layer that is being quantized.

    layer: as it is in the checkpoint. activations: what it reads. scales: by which transforms divided the
    activations of sites.
    """

    layer: nn.Module
    activations: Activations
    scales: Mapping[str, Tensor] = field(default_factory=dict)

    def scaled(self, site: str, x: Tensor) -> Tensor:
        """Return what a site would read if the float model had been transformed."""
        return x / self.scales[site] if site in self.scales else x


@dataclass
class Layer:
    """A layer on its way from float to quantized.

    module: in which each quantized weight takes the place of its float one. activations: what it reads. goal: the
    float model's side, where a mismatch is corrected. outputs: the Fisher information of linears' outputs, by name in
    the layer, where algorithms read it. skip: leave a site float that cannot be quantized. done: what there is so far.
    """

    plan: Plan
    stream: Stream
    module: nn.Module
    index: int
    activations: Activations
    goal: Goal | None = None
    outputs: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    skip: bool = False
    done: Quantized = field(default_factory=Quantized)
    rounding: dict[str, Inputs] = field(default_factory=dict)

    @property
    def sites(self) -> list[Site]:
        """Those with something to quantize, in the order of computation; one that stands for those of all experts."""
        found = self._with_grids
        begin = calibrate.experts_of(self.plan.spec, self.index) if any(site.expert for site in found) else None
        return [site for site in found if not site.expert] + ([] if begin is None else [begin])

    @property
    def _with_grids(self) -> list[Site]:
        sites = self.plan.spec.sites_of(self.index)
        return [site for site in sites if any(x.grid for x in self.plan.of_layer(self.index, site))]

    def quantize(self, go_on: bool) -> Quantized:
        """Quantize the linears, and correct their biases if the recipe says so.

        go_on: leave the outputs of the quantized layer in ``activations``, those of the float layer in the goal's.

        A site's statistics are those of its inputs as the quantized layers before it make them, with
        ``true_sequential`` also the quantized sites before it in the layer. Then, if the plan says so, the
        layer is computed once for all: every batch waits at a site until it is quantized. Otherwise one pass for each
        site sees the same activations. The float layer keeps step.

        Where experts begin, all tokens wait, and the statistics of one expert after the other are taken of them.
        """
        if self.plan.recipe.true_sequential and self.plan.placement == "waiting":
            self._quantize_in_one_pass(go_on)
            return self.done
        self._quantize_in_passes()
        if go_on:
            if self.goal is not None:
                self.stream.run(self.goal.layer, self.index, self.goal.activations)
            with calibrate.rounded(self.module, self._with_grids, self.rounding):
                self.stream.run(self.module, self.index, self.activations)
        return self.done

    def _quantize_in_one_pass(self, go_on: bool) -> None:
        with self._chains() as begun:
            running = [begun(batch) for batch in range(len(self.activations))]
            for _ in self.sites:
                site, *seen = self._next(running[0])
                sums = self._sums(site)
                sums.add(*seen)
                for of_batch in running[1:]:
                    sums.add(*self._next(of_batch)[1:])
                self._quantize({site: sums})
            if not go_on:
                for chain in itertools.chain(*running):
                    chain.close()
                return
            ends = [self._next(of_batch)[1:] for of_batch in running]
        for batch, outputs in enumerate(ends):
            self.activations[batch] = outputs[0]
            if self.goal is not None and len(outputs) > 1:
                self.goal.activations[batch] = outputs[1]

    def _quantize_in_passes(self) -> None:
        sites = self.sites
        with self._chains() as begun:
            for together in [[s] for s in sites] if self.plan.recipe.true_sequential or not sites else [sites]:
                wanted = {site.name: self._sums(site) for site in together}
                for batch in range(len(self.activations)):
                    chains = begun(batch)
                    for _ in sites[: sites.index(together[-1]) + 1]:
                        site, *seen = self._next(chains)
                        if site is not None and site.name in wanted:
                            wanted[site.name].add(*seen)
                    for chain in chains:
                        chain.close()
                self._quantize({site: wanted.pop(site.name) for site in together})

    @contextmanager
    def _chains(self) -> Iterator[Callable[[int], list[calibrate.Steps]]]:
        """Give what begins to compute a batch, that of the float model beside it where there is one."""
        with ExitStack() as stack:
            sides = [(stack.enter_context(calibrate.stepwise(self.module, self.sites)), self.activations)]
            stack.enter_context(calibrate.rounded(self.module, self.sites, self.rounding))
            if self.goal is not None:
                begin = stack.enter_context(calibrate.stepwise(self.goal.layer, self.sites))
                sides.append((begin, self.goal.activations))

            def begun(batch: int) -> list[calibrate.Steps]:
                both = [(begin, read) for begin, read in sides if batch < len(read)]
                return [begin(x := read[batch], read.call(x, self.index)) for begin, read in both]

            yield begun

    def _next(self, chains: Sequence[calibrate.Steps]) -> tuple[Any, ...]:
        """Return the site that is reached next, if any, and what to add to its sums; at the end, what each chain gives.

        These are what the quantized and the float layer read there, with the experts that were chosen in between.
        """
        stops = [next(chain) for chain in chains]
        site, x, *chosen = stops[0]
        aimed = [stop[1] for stop in stops[1:]]
        if site is not None and self.goal is not None:
            aimed = [self.goal.scaled(site.name, y) for y in aimed]
        return site, x, *chosen[:1], *aimed

    def _sums(self, site: Site) -> Accumulator | Routed:
        return self._accumulator(site) if site.linears else Routed(self.stream.ranks)

    def _accumulator(self, site: Site) -> Accumulator:
        return accumulator(self.plan, self.stream, self.plan.of_layer(self.index, site), self.goal is not None)

    def _quantize(self, wanted: dict[Site, Accumulator | Routed]) -> None:
        """Quantize sites by their sums, which are dropped one by one."""
        for site in list(wanted):
            sums = wanted.pop(site)
            if isinstance(sums, Routed):
                self._quantize_experts(sums)
            else:
                stats = sums.result()
                del sums
                self._quantize_site(site, stats)

    def _quantize_experts(self, routed: Routed) -> None:
        reader = Reader(self.module, routed, self._accumulator, None if self.goal is None else self._aimed_before)
        of_experts = itertools.groupby((s for s in self._with_grids if s.expert), key=lambda site: site.expert)
        for _, sites in of_experts:
            known = ((site, *reader.stats(site)) for site in sites)
            # in sequence, the inputs of an expert's last linear are those that its quantized first ones give
            for site, stats, told in known if self.plan.recipe.true_sequential else list(known):
                self._quantize_site(site, stats, told)

    def _aimed_before(self, site: Site) -> Callable[[Tensor], Tensor]:
        """Return what becomes of the float model's tokens on their way to a site of an expert."""
        goal, spec = self.goal, self.plan.spec
        assert goal is not None
        assert spec.experts is not None
        name = site.name if moe.reads_inner(site) else spec.experts.site
        change = moe.before(goal.layer, site)
        return lambda x: goal.scaled(name, change(x))

    def _quantize_site(self, site: Site, stats: Stats, known: Mapping[str, Any] | None = None) -> None:
        """known: what a report tells of the statistics in the place of their tokens."""
        plan, scores = self.plan, calibrate.score_linears(self.plan.spec)
        linears = [x for x in plan.of_layer(self.index, site) if x.grid]
        weights = [calibrate.weight_of(self.module.get_submodule(local_name(plan, x))) for x in linears]
        uncut = [x.name for x in linears if local_name(plan, x) in scores]
        if plan.recipe.bias_correction:
            aimed = [w.float() @ _aimed_mean(stats) for w in weights]
        information = {x.name: self.outputs.get(information_of(plan.spec, site, local_name(plan, x))) for x in linears}
        memory.trim()
        try:
            quantized, told, targets = quantize_together(
                linears, weights, stats, plan.recipe.rewrites, uncut, information, self.stream.ranks
            )
            memory.trim()
            if self.skip:
                check_packable(plan, quantized)
        except GIVEN_UP as error:
            if not self.skip:
                raise
            check_can_stay_float(plan, linears[0], error)
            self.done.given_up |= {x.name: str(error) for x in linears}
            self.done.floats |= {x.weight_name: self._as_stored(x) for x in linears}
            return
        for linear in linears:
            put(self.module, plan, linear, quantized[linear.name], self.rounding)
        if plan.recipe.bias_correction:
            self.done.biases |= _corrected_biases(plan, self.stream, self.module, linears, aimed, stats)
        self.done.linears |= quantized
        self.done.records |= {name: record | (known or {}) for name, record in told.items()}
        if plan.recipe.learned_rounding is not None:
            self.done.targets |= targets

    def _as_stored(self, linear: Linear) -> Tensor:
        """Round a float weight, as transforms may have left it, to the dtype it is stored in, and return it."""
        weight = self.module.get_parameter(f"{local_name(self.plan, linear)}.weight")
        stored = weight.to(self.stream.checkpoint.infos[linear.weight_name].dtype)
        check_finite(stored, linear.weight_name)
        with torch.no_grad():
            weight.copy_(stored)
        return stored


def check_can_stay_float(plan: Plan, linear: Linear, error: LlmquantError) -> None:
    """Raise what a linear cannot be quantized for where it cannot stay float alone: in an expert."""
    sites = [] if linear.layer is None else plan.spec.sites_of(linear.layer)
    if any(site.expert and local_name(plan, linear) in site.linears for site in sites):
        raise type(error)(
            f"{error} It is an expert, and runtimes compute those of a layer as one matrix, so that it cannot stay "
            "float alone: keep all of them float by a rule."
        ) from None


def check_packable(plan: Plan, quantized: Mapping[str, QuantizedTensor]) -> None:
    """Raise FormatError where a format of the recipe cannot hold the numbers of a linear."""
    for name in plan.recipe.formats:
        for q in quantized.values():
            plugins.load("exporters", name, "formats").pack(q)


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
        module = layer.get_submodule(local_name(plan, linear))
        if getattr(module, "bias", None) is not None:
            bias, name = module.get_parameter("bias"), f"{linear.name}.bias"
            missing = wanted - calibrate.weight_of(module).float() @ stats.mean
            stored = (bias + missing).to(stream.checkpoint.infos[name].dtype)
            bias.copy_(stored)
            found[name] = stored
    return found


def information_of(spec: ModelSpec, site: Site, linear: str) -> str:
    """Return the module whose outputs' Fisher information serves a linear of a site.

    What experts give is added up, so that the sum tells it for each of them.
    """
    return spec.experts.module if spec.experts and moe.reads_inner(site) else linear


def accumulator(plan: Plan, stream: Stream, linears: Sequence[Linear], drift: bool) -> Accumulator:
    static = any(x.static for x in linears)
    return Accumulator(linears[0].cols, plan.needs, stream.device, static, drift, stream.ranks)


def quantize_together(
    linears: Sequence[Linear],
    weights: Sequence[Tensor],
    stats: Stats,
    rewrites: Sequence[tuple[str, Any]] = (),
    uncut: Collection[str] = (),
    outputs: Mapping[str, tuple[Tensor, ...] | None] | None = None,
    ranks: Ranks = ALONE,
) -> tuple[dict[str, QuantizedTensor], dict[str, Any], dict[str, Tensor]]:
    """Quantize linears that read the same activations; return them, what a report tells, and what was rounded.

    Those with the same grid and algorithm are stacked and quantized as one matrix, so that the work on the Hessian is
    shared. Where rows influence each other, those of one linear do.

    rewrites: the transforms; some clip weights. uncut: linears that are not clipped.
    outputs: the Fisher information of a linear's outputs, by name, where its algorithm reads it.
    ranks: among which rows are dealt; what was rounded is told of a rank's own.
    """
    done: dict[str, QuantizedTensor] = {}
    records: dict[str, Any] = {}
    targets: dict[str, Tensor] = {}
    if not torch.isfinite(stats.square_mean).all():
        raise CalibrationError(
            f"{linears[0].weight_name}: what it reads from the calibration text is not finite, or its square is not. "
            "Its dtype may overflow, or a weight before it be broken. `llmquant eval` on the float model tells."
        )
    rest = list(zip(linears, weights, strict=True))
    while rest:
        first = rest[0][0]
        alike = rest[:1] if first.grid and first.grid.shared else [r for r in rest if _same(r[0], first)]
        rest = [r for r in rest if r not in alike]
        started = time.monotonic()
        try:
            q, found = _quantize_alike(alike, stats, rewrites, uncut, outputs or {}, ranks)
        except LlmquantError as error:
            if any(str(error).startswith(f"{linear.weight_name}:") for linear, _ in alike):
                raise
            raise type(error)(f"{first.weight_name}: {error}") from None
        seconds = (time.monotonic() - started) / len(alike)
        row = 0
        for (linear, w), (target, sums, share) in zip(alike, found, strict=True):
            done[linear.name] = rows_of(q, row, row := row + len(w))
            targets[linear.name] = target
            told: dict[str, Any] = {} if share is None else {"corrected": round(share, 4)}
            record = _record(linear, w, done[linear.name], sums, stats.tokens)
            records[linear.name] = record | told | {"seconds": round(seconds, 3)}
    return done, records, targets


def _same(linear: Linear, other: Linear) -> bool:
    return (linear.grid, linear.choice) == (other.grid, other.choice)


def _quantize_alike(
    alike: Sequence[tuple[Linear, Tensor]],
    stats: Stats,
    rewrites: Sequence[tuple[str, Any]],
    uncut: Collection[str],
    outputs: Mapping[str, tuple[Tensor, ...] | None],
    ranks: Ranks,
) -> tuple[QuantizedTensor, list[tuple[Tensor, Tensor, float | None]]]:
    """Quantize linears with the same grid and algorithm as one matrix, each rank some of its rows.

    Returns the matrix, and of each linear: what was rounded, of this rank's rows; ``_sums``; how far a mismatch was
    corrected.
    """
    grid, choice = alike[0][0].grid, alike[0][0].choice
    assert grid is not None
    assert choice is not None
    rounding = Rounding(grid, plugins.load("algorithms", choice.algorithm, "algorithm"), choice.algorithm_config)
    known = [outputs.get(x.name) for x, _ in alike]
    of_outputs = None if None in known else [part for parts in known if parts for part in parts]
    lengths = [len(w) for _, w in alike]
    clips = [name for name, _ in rewrites if hasattr(plugins.load("transforms", name, "transforms"), "clip")]
    if grid.shared or clips:
        pieces = lengths  # of which each is seen as a whole
    else:
        pieces = [len(part) for part in of_outputs] if of_outputs else [1] * sum(lengths)
    here = _dealt(pieces, ranks)
    ends = list(itertools.accumulate(lengths))
    own = [
        w[max(here.start - end + len(w), 0) : max(here.stop - end + len(w), 0)].float()
        for (_, w), end in zip(alike, ends, strict=True)
    ]
    wanted: list[tuple[Tensor, float | None]] = [(w, None) for w in own]
    if stats.drift is not None:
        wanted = [*mismatch.corrected(own, stats, ranks)]

    def compute() -> tuple[QuantizedTensor | None, list[Tensor], list[Tensor]]:
        """Return this rank's rows, quantized; by linear, what was rounded, and its sums."""
        rounded = [
            w if x.name in uncut or not len(w) else _clipped(w, stats, rounding, rewrites)
            for (x, _), (w, _) in zip(alike, wanted, strict=True)
        ]
        if here.start == here.stop:
            return None, rounded, [torch.zeros(len(SUMS), dtype=torch.float64) for _ in alike]
        starts = itertools.accumulate(map(len, of_outputs or ()), initial=0)
        some = tuple(
            part for part, at in zip(of_outputs or (), starts, strict=False) if at in range(here.start, here.stop)
        )
        stacked = torch.cat(rounded) if len(rounded) > 1 else rounded[0]
        q: QuantizedTensor = rounding.algorithm.quantize(
            stacked, replace(stats, outputs=some if of_outputs else None), grid, rounding.config
        )
        sums, row = [], 0
        for (linear, _), w, target in zip(alike, own, rounded, strict=True):
            sums.append(_sums(linear, w, target, rows_of(q, row, row := row + len(w)), stats))
        return q, rounded, sums

    q, rounded, sums = _joined(compute, ranks)
    if choice.activations is not None:
        q = replace(q, inputs=activation_ranges.fit(choice.activations, stats.sample))
    return q, [(target, of, share) for target, of, (_, share) in zip(rounded, sums, wanted, strict=True)]


def _dealt(pieces: Sequence[int], ranks: Ranks) -> slice:
    """Return which rows this rank quantizes: some of the pieces, about as many rows as the others.

    >>> [_dealt([4, 4, 1, 4], Ranks(rank, 3)) for rank in range(3)]
    [slice(0, 4, None), slice(4, 9, None), slice(9, 13, None)]
    """
    edges = list(itertools.accumulate(pieces, initial=0))
    start, stop = (min(edges, key=lambda x: abs(x - edges[-1] * r / ranks.size)) for r in (ranks.rank, ranks.rank + 1))
    return slice(start, stop)


def _joined(
    compute: Callable[[], tuple[QuantizedTensor | None, list[Tensor], list[Tensor]]], ranks: Ranks
) -> tuple[QuantizedTensor, list[Tensor], list[Tensor]]:
    """Return what all ranks compute: rows one after the other, and added sums; what was rounded stays a rank's own."""
    if ranks.size == 1:
        q, rounded, sums = compute()
        assert q is not None
        return q, rounded, sums
    rounded = []

    def sent() -> tuple[QuantizedTensor | None, Tensor]:
        q, targets, sums = compute()
        rounded.extend(targets)
        moved = q and q.to("cpu")
        return moved, torch.stack(sums).cpu()

    found = ranks.each(sent)
    parts = [part for part, _ in found if part is not None]
    device = rounded[0].device
    params = {n: torch.cat([part.params[n] for part in parts]).to(device) for n in parts[0].params}
    record = {  # of numbers the largest: ranks may have damped differently
        name: max(part.record[name] for part in parts) if isinstance(value, int | float) else value
        for name, value in parts[0].record.items()
    }
    q = replace(parts[0], codes=torch.cat([part.codes for part in parts]).to(device), params=params, record=record)
    return q, rounded, list(torch.stack([sums for _, sums in found]).sum(0))


def _clipped(w: Tensor, stats: Stats, rounding: Rounding, rewrites: Sequence[tuple[str, Any]]) -> Tensor:
    for name, config in rewrites:
        transform = plugins.load("transforms", name, "transforms")
        if hasattr(transform, "clip"):
            w = transform.clip(w, stats, rounding, config)
    return w


SUMS = ("error² of the weights", "weights²", "error² of the outputs", "outputs²")


def _sums(linear: Linear, w: Tensor, target: Tensor, q: QuantizedTensor, stats: Stats) -> Float64[Tensor, " sums"]:
    """Return ``SUMS`` over some rows of a linear; raise CalibrationError when its numbers are not finite.

    target: the weights that were rounded; the error at the output is that of rounding these.
    """
    if not len(w):
        return torch.zeros(len(SUMS), dtype=torch.float64, device=w.device)
    sums = error_sums(q, w, stats.square_mean)
    if stats.hessian is not None:
        sums[2] = output_power(dequantize(q).sub_(target), stats.hessian)
        sums[3] = output_power(target, stats.hessian)
    if not torch.isfinite(sums[2:]).all() and not torch.isfinite(dequantize(q)).all():
        raise CalibrationError(
            f"{linear.weight_name}: quantized, it has values that are not finite: its largest weight is "
            f"{float(w.abs().max()):g}, and a scale may have overflowed its dtype. Set grid.scale_dtype to float32 or "
            "bfloat16, or keep this linear float by a rule."
        )
    return sums


def _record(linear: Linear, w: Tensor, q: QuantizedTensor, sums: Tensor, tokens: int) -> dict[str, Any]:
    """Return what a report tells of a linear."""
    wrong, loud, lost, heard = sums.tolist()
    assert linear.grid is not None
    return {
        "error": round(lost / max(heard, 1e-30), 8),
        "bits_per_weight": round(linear.grid.bits_per_weight, 4),
        "tokens": tokens,
        **({f"input_{key}": float(value) for key, value in q.inputs.params.items()} if q.inputs else {}),
        "layer": linear.layer,
        **noise.of_weights(q, wrong / w.numel(), loud / w.numel()),
        "histogram": noise.on_levels(q, w),
        **q.record,
    }


def local_name(plan: Plan, linear: Linear) -> str:
    """Return the name of a linear within its layer."""
    return linear.name.removeprefix(f"{plan.spec.layers}.{linear.layer}.")


def put(layer: nn.Module, plan: Plan, linear: Linear, q: QuantizedTensor, rounding: dict[str, Inputs]) -> None:
    """Give a layer the weight that a runtime will read, so that what follows sees the real error.

    rounding: gets an entry where a runtime rounds the linear's inputs, too.
    """
    weight = calibrate.weight_of(layer.get_submodule(local_name(plan, linear)))
    with torch.no_grad():
        weight.copy_(dequantize(q))
    if q.inputs is not None:
        rounding[local_name(plan, linear)] = q.inputs
