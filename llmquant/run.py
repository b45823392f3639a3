"""The one loop: calibrate a layer, quantize it, go on to the next, write the files."""

from __future__ import annotations

import hashlib
import itertools
import math
import platform
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import llmquant
from llmquant import activations as activation_ranges
from llmquant import calibrate, data, export, memory, noise, plugins, recipe, threads, work
from llmquant import plan as planning
from llmquant.activations import Inputs
from llmquant.checkpoint import Checkpoint, check_finite, check_output
from llmquant.errors import CalibrationError, CheckpointError, LlmquantError
from llmquant.grid import QuantizedTensor, dequantize, error_sums, rows_of
from llmquant.metrics import output_error
from llmquant.models.spec import Site
from llmquant.packed import PackedCheckpoint, open_model
from llmquant.plan import Linear, Plan
from llmquant.protocols import Windows
from llmquant.stats import Accumulator, Sample, Stats
from llmquant.stream import Activations, Stream
from llmquant.transform import Rounding, Scales, SiteView

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


def silent(what: str, done: int, total: int) -> None:
    """Tell nobody."""


@dataclass
class Report:
    """What a run did.

    linears: module name -> output error (relative, on the calibration tokens; weight error
        where there are none), noise (``llmquant.noise``), damping, bits per weight, seconds.
    residual_errors: format -> after each layer, how far the residual stream is from the float model's, as a share
        of its size; where asked for.
    outputs: format -> folder. bytes: format -> size of its weights' files.
    """

    model: str
    recipe: dict[str, Any]
    calibration: dict[str, Any]
    linears: dict[str, dict[str, Any]]
    notes: list[str]
    bits_per_weight: float
    outputs: dict[str, str] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    hashes: dict[str, dict[str, str]] = field(default_factory=dict)
    seconds: float = 0.0
    peak_rss_bytes: int = 0
    resumed_layers: int = 0
    evaluation: list[dict[str, Any]] = field(default_factory=list)
    residual_errors: dict[str, list[float]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def device_of(name: str) -> torch.device:
    """Return the device for "auto", "cpu", "cuda" and the like."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise LlmquantError("--device cuda: torch finds no CUDA device here. Use --device cpu or auto.")
    return torch.device(name)


def load_float(model: str | Path) -> Checkpoint:
    """Open a model to be quantized; raise CheckpointError for one that already is."""
    checkpoint = open_model(model)
    if isinstance(checkpoint, PackedCheckpoint):
        raise CheckpointError(
            f"{checkpoint.folder}: is already quantized ({checkpoint.settings.get('quant_method')}). "
            "Quantize the float model it was made from."
        )
    return checkpoint


def load_config(model: str | Path, trust_remote_code: bool = False) -> Any:
    """Return the transformers configuration of a model."""
    return Stream(load_float(model), torch.device("cpu"), trust_remote_code, weights=False).config


def make_plan(model: str | Path, recipe_: recipe.Recipe, trust_remote_code: bool = False) -> Plan:
    """Return what a run would do, with the sizes of its files; reads no weights."""
    stream = Stream(load_float(model), torch.device("cpu"), trust_remote_code, weights=False)
    return with_files(plan_for(stream, recipe_), stream)


def plan_for(stream: Stream, recipe_: recipe.Recipe) -> Plan:
    """Return what a run would do to the model of a stream, which is built only if that depends on its modules."""
    exporters = [plugins.load("exporters", name, "formats") for name in recipe_.formats]
    told = any(hasattr(exporter, "quantization_config") for exporter in exporters)
    return planning.make(
        recipe_,
        stream.spec,
        stream.config,
        stream.tied,
        stream.hidden_size,
        stream.checkpoint.infos,
        stream.context,
        stream.other_linears if told else (),
        stream.foldable if recipe_.transforms else (),
        memory.available_bytes(stream.device),
    )


def with_files(plan: Plan, stream: Stream) -> Plan:
    """Return a plan that knows how large its files will be."""
    formats = plan.recipe.formats
    return replace(
        plan, files={name: export.file_bytes(plan, stream.checkpoint, name, stream.config) for name in formats}
    )


def quantize(
    model: str | Path,
    recipe_: recipe.Recipe,
    out: str | Path,
    work_folder: str | Path | None = None,
    device: str = "auto",
    restart: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> tuple[Report, Windows | None]:
    """Quantize a model and write it in every format of the recipe; return the report, and held-out text if there is.

    out: the new folder; with several formats, one folder in it for each.
    work_folder: where finished layers are kept (``OUT.work``, removed at the end,
        if not given). The same call after a crash goes on from there.
    """
    started = time.monotonic()
    memory.reset_peak()
    out = Path(out)
    check_output(out)
    checkpoint = load_float(model)
    stream = Stream(checkpoint, device_of(device), trust_remote_code, weights=False)
    plan = plan_for(stream, recipe_)
    text = None
    if plan.needs != "nothing":
        assert recipe_.calibration is not None
        tokenizer = data.load_tokenizer(checkpoint.folder, trust_remote_code)
        export.check_tokenizer(recipe_.formats, tokenizer, stream.config)
        text = data.calibration_tokens(recipe_.calibration, tokenizer, stream.context)
        if recipe_.transforms:
            stream.dtype = torch.float32  # a scaled weight in 16 bits would be rounded twice
        stream.load()
    direct = Direct(plan, checkpoint, stream.device, importance(plan, stream))
    source: work.Work | Direct = direct
    resumed = 0
    if text is not None or work_folder is not None or len(recipe_.formats) > 1:
        folder = Path(work_folder) if work_folder else out.with_name(out.name + ".work")
        source = work.Work(folder, fingerprint(checkpoint, plan, text), restart)
        resumed = sum(source.has(i) for i in range(plan.layers))
        if text is None:
            direct.save(source, progress)
        else:
            _quantize_layers(plan, stream, source, text.tokens, progress)
            checkpoint = work.Transformed(checkpoint, source, plan.layers)
    report = Report(
        model=str(model),
        recipe=recipe_.model_dump(mode="json", exclude_defaults=True),
        calibration={} if text is None else text.as_dict(),
        linears={},
        notes=plan.notes,
        bits_per_weight=round(plan.bits_per_weight, 4),
        resumed_layers=resumed,
        versions={"llmquant": llmquant.__version__, "torch": torch.__version__, "python": platform.python_version()},
    )
    for name in recipe_.formats:
        target = out if len(recipe_.formats) == 1 else out / name
        written = export.write(plan, checkpoint, source, name, stream.config, target, progress)
        report.outputs[name] = str(target)
        report.bytes[name] = written.bytes
        report.hashes[name] = written.hashes
    report.linears = {name: noise.in_decibels(told) for name, told in source.all_records().items()}
    if work_folder is None:
        source.remove()
    else:
        source.close()
    report.seconds = round(time.monotonic() - started, 2)
    report.peak_rss_bytes = memory.peak_bytes()
    return report, None if text is None else data.held_out_windows(text)


@torch.no_grad()
def square_means(
    model: str | Path,
    text: data.Calibration,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> dict[str, Stats]:
    """Return how large the activations are that each linear of the float model reads, by the weight's name."""
    stream = Stream(load_float(model), device_of(device), trust_remote_code)
    folder = stream.checkpoint.folder
    tokens = data.calibration_tokens(text, data.load_tokenizer(folder, trust_remote_code), stream.context).tokens
    activations = stream.start(tokens)
    found: dict[str, Stats] = {}
    for index in range(stream.layers):
        progress("measuring layers", index, stream.layers)
        with stream.layer(index) as layer:
            sums: dict[str, Accumulator] = {}

            def see(site: Site, x: Tensor, sums: dict[str, Accumulator] = sums) -> None:
                if site.name not in sums:
                    sums[site.name] = Accumulator(x.shape[1], "diagonal", x.device)
                sums[site.name].add(x)

            with calibrate.watch(layer, stream.spec.sites, see):
                stream.run(layer, index, activations)
        for site in stream.spec.sites:
            for local in site.linears:
                found[f"{stream.spec.layers}.{index}.{local}.weight"] = sums[site.name].result()
    progress("measuring layers", stream.layers, stream.layers)
    return found


def reopen_work(folder: Path, recipe_formats: Sequence[str]) -> tuple[Plan, Checkpoint, Any, work.Work]:
    """Return what a finished work folder was made from, to export it again without calibration."""
    note = work.read_note(folder)
    recipe_ = plugins.validate(recipe.Recipe, note["recipe"] | {"formats": list(recipe_formats)}, "")
    checkpoint = load_float(note["model"]["folder"])
    stream = Stream(checkpoint, torch.device("cpu"), weights=False)
    plan = plan_for(stream, recipe_)
    log = work.Work(folder, note)
    # a layer of which nothing is quantized may have no file
    missing = [i for i in (*range(plan.layers), None) if not log.has(i) and any(x.grid for x in plan.of_layer(i))]
    if missing:
        what = "what is outside the layers" if missing[0] is None else f"layer {missing[0]} of {plan.layers}"
        raise CheckpointError(
            f"{folder}: {what} is not finished. Run `llmquant quantize` with the same settings and --work {folder} "
            "to go on."
        )
    return plan, work.Transformed(checkpoint, log, plan.layers), stream.config, log


def fingerprint(checkpoint: Checkpoint, plan: Plan, text: data.CalibrationTokens | None) -> dict[str, Any]:
    """Return what decides the codes: model, recipe (without its formats), imatrix, tokens and versions."""
    imatrix = plan.recipe.imatrix
    recipe_ = plan.recipe.model_dump(mode="json", exclude_defaults=True)
    recipe_.pop("formats", None)
    files = sorted({info.file for info in checkpoint.infos.values()})
    return {
        "model": {
            "folder": str(checkpoint.folder.absolute()),
            "hash": work.fingerprint_of_files(checkpoint.folder, ["config.json", *files]),
        },
        "recipe": recipe_,
        "imatrix": None if imatrix is None else hashlib.sha256(imatrix.read_bytes()).hexdigest(),
        "tokens": None if text is None else text.sha256,
        "versions": {"llmquant": llmquant.__version__, "torch": torch.__version__},
    }


def importance(plan: Plan, stream: Stream) -> Mapping[str, Tensor]:
    """Return what the recipe's imatrix says of each weight's columns, by the weight's name."""
    if plan.recipe.imatrix is None:
        return {}
    found: Mapping[str, Tensor] = plugins.load("exporters", "gguf", "imatrix").importance(plan, stream.config)
    return found


class Direct:
    """Quantizes each linear when it is asked for.

    Where no activations are read there is nothing that a work folder would save,
    and no layer of the model needs to be built.
    """

    def __init__(
        self, plan: Plan, checkpoint: Checkpoint, device: torch.device, importance: Mapping[str, Tensor]
    ) -> None:
        self._plan = plan
        self._checkpoint = checkpoint
        self._device = device
        self._importance = importance
        self._records: dict[str, Any] = {}

    def save(self, log: work.Work, progress: Progress) -> None:
        """Quantize all linears into a work folder."""
        for index in [*range(self._plan.layers), None]:
            linears = [x for x in self._plan.of_layer(index) if x.grid]
            if linears and not log.has(index):
                done = {x.name: self.load(x) for x in linears}
                log.save(index, done, {name: self._records[name] for name in done})
            progress("quantizing layers", self._plan.layers if index is None else index, self._plan.layers)

    def load(self, linear: Linear) -> QuantizedTensor:
        """Return a linear, quantized."""
        weight = self._weight(linear, 0, linear.rows)
        done, records = quantize_together([linear], [weight], self._stats(linear))
        self._records |= records
        return done[linear.name]

    def pieces(
        self, linears: Iterable[Linear], pack: Callable[[QuantizedTensor], Tensor]
    ) -> Generator[Iterator[Tensor], None, None]:
        """Yield each linear as pieces of some rows, in order, packed; those of the next are begun before its end."""

        def quantize(part: Linear, start: int) -> tuple[str, Tensor, int, dict[str, Any]]:
            weight = self._weight(part, start, start + part.rows)
            done, told = quantize_together([part], [weight], self._stats(part))
            return part.name, pack(done[part.name]), part.rows, told[part.name]

        def taken(name: str, results: Iterable[tuple[str, Tensor, int, dict[str, Any]]]) -> Iterator[Tensor]:
            records: list[tuple[int, dict[str, Any]]] = []
            for _, packed, rows, record in results:
                records.append((rows, record))
                yield packed
            total = sum(rows for rows, _ in records)
            keys = [key for key in ("error", "seconds", *noise.AVERAGED) if records[0][1][key] is not None]
            mean = {key: sum(n * r[key] for n, r in records) / total for key in keys}
            self._records[name] = records[0][1] | mean | {k: round(mean[k], 8) for k in ("error", "seconds")}

        parts = (part for linear in linears for part in _parts(linear))
        with closing(threads.side_by_side(lambda part: quantize(*part), parts)) as done:
            for name, results in itertools.groupby(done, key=itemgetter(0)):
                yield taken(name, results)

    def _stats(self, linear: Linear) -> Stats:
        known = self._importance.get(linear.weight_name)
        if known is None:
            return Stats.none(linear.cols, self._device)
        return Stats(None, known.to(self._device), known.sqrt().to(self._device), 1)

    def _weight(self, linear: Linear, start: int, stop: int) -> Tensor:
        tied = linear.weight_name not in self._checkpoint
        name = f"{self._plan.spec.embed}.weight" if tied else linear.weight_name
        conv1d = self._plan.spec.conv1d and linear.layer is not None
        weight = self._checkpoint.read(name, None if conv1d else (start, stop))
        weight = (weight.T[start:stop] if conv1d else weight).to(self._device)
        check_finite(weight, f"{self._checkpoint.folder}: {name}")
        return weight

    def all_records(self) -> dict[str, Any]:
        return self._records

    def close(self) -> None:
        """There is nothing to close."""

    def remove(self) -> None:
        """There is nothing to remove."""


def _parts(linear: Linear) -> Iterator[tuple[Linear, int]]:
    """Yield a linear as parts that can be quantized one by one: some of its rows, and the first of them."""
    assert linear.grid is not None
    count = 1 if linear.grid.shared else min(math.ceil(linear.weights / planning.PIECE), linear.rows)
    edges = [linear.rows * i // count for i in range(count + 1)]
    for start, stop in itertools.pairwise(edges):
        yield replace(linear, rows=stop - start), start


@torch.no_grad()
def _quantize_layers(plan: Plan, stream: Stream, log: work.Work, tokens: Tensor, progress: Progress) -> None:
    activations = stream.start(tokens)
    outside = [x for x in plan.of_layer(None) if x.grid]
    heads = [x for x in outside if not x.lookup]
    for index in range(plan.layers):
        progress("quantizing layers", index, plan.layers)
        last = index == plan.layers - 1 and not heads
        if log.has(index) and last:
            continue
        with stream.layer(index) as layer:
            if log.has(index):
                rounding: dict[str, Inputs] = {}
                for linear in plan.of_layer(index):
                    if linear.grid is not None:
                        _put(layer, plan, linear, log.load(linear), rounding)
                _put_floats(layer, plan, index, {name: log.load_float(index, name) for name in log.floats(index)})
                with calibrate.rounded(layer, plan.spec.sites, rounding):
                    stream.run(layer, index, activations)
            else:
                told: dict[str, Any] = {}
                floats: dict[str, Tensor] = {}
                if plan.recipe.transforms:
                    floats, told = _transform_layer(plan, stream, layer, index, activations)
                done, records = _quantize_layer(plan, stream, layer, index, activations, not last)
                log.save(index, done, {name: record | told.get(name, {}) for name, record in records.items()}, floats)
    if outside and not log.has(None):
        done, records = {}, {}
        for linear in outside:
            if linear.lookup:
                weight, stats = stream.embedding_weight(), Stats.none(linear.cols, stream.device)
            else:
                weight, stats = stream.head_weight(), head_stats(stream, tokens, activations, plan)
            quantized, told = quantize_together([linear], [weight], stats)
            done |= quantized
            records |= told
        log.save(None, done, records)
    progress("quantizing layers", plan.layers, plan.layers)


def _transform_layer(
    plan: Plan, stream: Stream, layer: nn.Module, index: int, activations: Activations
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Fold what the transforms find into a layer; return the changed tensors that stay float, and records by linear.

    All sites are searched on the layer while it is float, and before any of its
    linears is quantized: a fold changes the linear that feeds the site too.
    """
    sites = [
        s for s in plan.spec.sites if s.name not in plan.unfoldable and any(x.grid for x in plan.of_layer(index, s))
    ]
    sums = {site.name: _accumulator(plan, stream, plan.of_layer(index, site)) for site in sites}
    samples = {site.name: Sample(sum(len(x) * x.shape[1] for x in activations.batches)) for site in sites}

    def see(site: Site, x: Tensor) -> None:
        sums[site.name].add(x)
        samples[site.name].add(x)

    with calibrate.watch(layer, sites, see):
        stream.run(layer, index, activations, keep=False)
    stats = {site.name: sums[site.name].result() for site in sites}
    inputs = {site.name: samples[site.name].result() for site in sites}
    records: dict[str, Any] = {}
    changed: list[str] = []
    for name, config in plan.recipe.rewrites:
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
            calibrate.fold_scales(layer, site, factors)
            stats[site.name], inputs[site.name] = stats[site.name].divided(factors), inputs[site.name] / factors
            changed += [site.fold.module, *site.linears]
    return _round_floats(plan, stream, layer, index, changed), records


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
    plan: Plan, stream: Stream, layer: nn.Module, index: int, activations: Activations, go_on: bool
) -> tuple[dict[str, QuantizedTensor], dict[str, Any]]:
    """Quantize a layer's linears; with ``go_on`` leave the outputs of the quantized layer in ``activations``.

    A site's statistics are those of its inputs as the quantized layers before it
    make them, with ``true_sequential`` also the quantized sites before it in the
    layer. Then, if memory allows, the layer is computed once for all: every
    batch waits at a site until it is quantized. Otherwise one pass for each site
    sees the same activations.
    """
    done: dict[str, QuantizedTensor] = {}
    records: dict[str, Any] = {}
    rounding: dict[str, Inputs] = {}
    sites = [s for s in plan.spec.sites if any(x.grid for x in plan.of_layer(index, s))]
    scores = calibrate.score_linears(plan.spec)

    def quantize_site(site: Site, stats: Stats) -> None:
        linears = [x for x in plan.of_layer(index, site) if x.grid]
        weights = [calibrate.weight_of(layer.get_submodule(_local(plan, x))) for x in linears]
        uncut = [x.name for x in linears if _local(plan, x) in scores]
        quantized, told = quantize_together(linears, weights, stats, plan.recipe.rewrites, uncut)
        for linear in linears:
            _put(layer, plan, linear, quantized[linear.name], rounding)
        done.update(quantized)
        records.update(told)

    with calibrate.stepwise(layer, sites) as begin, calibrate.rounded(layer, sites, rounding):
        if plan.recipe.true_sequential and plan.waiting_bytes < memory.available_bytes(stream.device) / 2:
            running = [begin(x, activations.call(x, index)) for x in activations.batches]
            for _ in sites:
                stops = [next(steps) for steps in running]
                reached = stops[0][0]
                assert reached is not None
                sums = _accumulator(plan, stream, plan.of_layer(index, reached))
                for _, seen in stops:
                    sums.add(seen)
                quantize_site(reached, sums.result())
            if go_on:
                activations.batches = [next(steps)[1] for steps in running]
            return done, records
        for together in [[s] for s in sites] if plan.recipe.true_sequential or not sites else [sites]:
            wanted = {s.name: _accumulator(plan, stream, plan.of_layer(index, s)) for s in together}
            for x in activations.batches:
                steps = begin(x, activations.call(x, index))
                for _, (reached, seen) in zip(sites[: sites.index(together[-1]) + 1], steps, strict=False):
                    if reached is not None and reached.name in wanted:
                        wanted[reached.name].add(seen)
                steps.close()
            for site in together:
                quantize_site(site, wanted[site.name].result())
    if go_on:
        with calibrate.rounded(layer, sites, rounding):
            stream.run(layer, index, activations)
    return done, records


def _accumulator(plan: Plan, stream: Stream, linears: Sequence[Linear]) -> Accumulator:
    return Accumulator(linears[0].cols, plan.needs, stream.device, sample=any(x.static for x in linears))


def head_stats(stream: Stream, tokens: Tensor, activations: Activations, plan: Plan) -> Stats:
    """Return the statistics of what the output matrix reads."""
    sums = _accumulator(plan, stream, [x for x in plan.of_layer(None) if not x.lookup])
    at = 0
    for x in activations.batches:
        sums.add(stream.before_head(tokens[at : at + len(x)], x).flatten(0, 1))
        at += len(x)
    return sums.result()


def quantize_together(
    linears: Sequence[Linear],
    weights: Sequence[Tensor],
    stats: Stats,
    rewrites: Sequence[tuple[str, Any]] = (),
    uncut: Collection[str] = (),
) -> tuple[dict[str, QuantizedTensor], dict[str, Any]]:
    """Quantize linears that read the same activations.

    Those with the same grid and algorithm are stacked and quantized as one
    matrix: rows do not influence each other, and the work on the Hessian is shared.

    rewrites: the transforms; some clip weights. uncut: linears that are not clipped.
    """
    done: dict[str, QuantizedTensor] = {}
    records: dict[str, Any] = {}
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
            targets = [
                w.float() if x.name in uncut else _clipped(w.float(), stats, rounding, rewrites) for x, w in alike
            ]
            stacked = torch.cat(targets) if len(targets) > 1 else targets[0]
            both: QuantizedTensor = rounding.algorithm.quantize(stacked, stats, grid, rounding.config)
            if choice.activations is not None:
                both = replace(both, inputs=activation_ranges.fit(choice.activations, stats.sample))
        except LlmquantError as error:
            raise type(error)(f"{first.weight_name}: {error}") from None
        seconds = (time.monotonic() - started) / len(alike)
        row = 0
        for linear, w in alike:
            q = rows_of(both, row, row + linear.rows)
            row += linear.rows
            done[linear.name] = q
            records[linear.name] = _record(linear, w, q, stats) | {"seconds": round(seconds, 3)}
    return done, records


def _clipped(w: Tensor, stats: Stats, rounding: Rounding, rewrites: Sequence[tuple[str, Any]]) -> Tensor:
    for name, config in rewrites:
        transform = plugins.load("transforms", name, "transforms")
        if hasattr(transform, "clip"):
            w = transform.clip(w, stats, rounding, config)
    return w


def _record(linear: Linear, w: Tensor, q: QuantizedTensor, stats: Stats) -> dict[str, Any]:
    """Return what a report tells of a linear; raise CalibrationError when its numbers are not finite."""
    w = w.float()
    wrong, loud, lost, heard = error_sums(q, w, stats.square_mean).tolist()
    error = lost / max(heard, 1e-30)
    if stats.hessian is not None:
        error = output_error(dequantize(q).sub_(w), w, stats.hessian)
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
