"""The one loop: calibrate a layer, quantize it, go on to the next, write the files."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import platform
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor

import llmquant
from llmquant import (
    calibrate,
    data,
    duration,
    experts,
    export,
    footprint,
    gradients,
    layers,
    memory,
    noise,
    plugins,
    recipe,
    rotation,
    sites,
    threads,
    training,
    work,
)
from llmquant import plan as planning
from llmquant.checkpoint import Checkpoint, check_finite, check_output
from llmquant.errors import CalibrationError, CheckpointError, LlmquantError, OutputError, PlanError, RecipeError
from llmquant.grid import QuantizedTensor
from llmquant.models.spec import Site
from llmquant.packed import PackedCheckpoint, open_model
from llmquant.plan import Linear, Plan
from llmquant.progress import Progress, silent
from llmquant.protocols import Windows
from llmquant.ranks import ALONE, Ranks
from llmquant.stats import Accumulator, Stats
from llmquant.stream import BATCH_TOKENS, Stream

OnError = Literal["stop", "skip"]
REPORT = "llmquant-report.json"
"""The file of a written folder that tells of the run."""


@dataclass
class Report:
    """What a run did.

    linears: module name -> output error (relative, on the calibration tokens; weight error
        where there are none), noise (``llmquant.noise``), damping, bits per weight, seconds.
    histograms: of the worst linears, by name: where their weights lie among the levels (``noise.on_levels``).
    costs: of every layer, then of matrices outside them: seconds and peak memory, calibration included. Empty where
        nothing was kept in a work folder.
    command: what was typed. machine: what computed.
    residual_errors: format -> after each layer, how far the residual stream is from the float model's, as a share
        of its size; where asked for.
    allocation: how the types were chosen (``llmquant.allocation``), where the recipe has a budget.
    outputs: format -> folder. bytes: format -> size of its weights' files. hashes: format -> SHA-256 of every file.
    given_up: linears that could not be quantized and stayed float, and why.
    training: how it went (``llmquant.training``), where the recipe asks for one. The linears' figures are from before.
    """

    model: str
    recipe: dict[str, Any]
    calibration: dict[str, Any]
    linears: dict[str, dict[str, Any]]
    notes: list[str]
    bits_per_weight: float
    command: str = ""
    machine: str = ""
    histograms: dict[str, dict[str, Any]] = field(default_factory=dict)
    costs: list[dict[str, Any]] = field(default_factory=list)
    outputs: dict[str, str] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    hashes: dict[str, dict[str, str]] = field(default_factory=dict)
    seconds: float = 0.0
    peak_rss_bytes: int = 0
    resumed_layers: int = 0
    evaluation: list[dict[str, Any]] = field(default_factory=list)
    residual_errors: dict[str, list[float]] = field(default_factory=dict)
    allocation: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    given_up: dict[str, str] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

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


def open_stream(
    model: str | Path,
    recipe_: recipe.Recipe,
    device: torch.device | None = None,
    trust_remote_code: bool = False,
    memory_limit: int | None = None,
    ranks: Ranks = ALONE,
) -> Stream:
    """Return the stream of a float model, with a recipe's rotations; its weights are not loaded yet."""
    options = (device or torch.device("cpu"), trust_remote_code, False, memory_limit, ranks)
    stream = Stream(load_float(model), *options)
    if recipe_.rotations:
        rotated = rotation.Rotated(stream, recipe_.rotations, untie=recipe_.tied_embeddings == "untie")
        stream = Stream(rotated, *options)
    if recipe_.folds or recipe_.rotations:
        stream.dtype = torch.float32  # a changed weight in 16 bits would be rounded twice
    return stream


def make_plan(
    model: str | Path,
    recipe_: recipe.Recipe,
    trust_remote_code: bool = False,
    memory_limit: int | None = None,
    device: str = "auto",
) -> Plan:
    """Return what a run would do, with the sizes of its files, and about how long it takes here; reads no weights.

    Raises PlanError when it would need more memory than a limit allows.
    """
    stream = open_stream(model, recipe_, device_of(device), trust_remote_code, memory_limit)
    plan = with_files(plan_for(stream, recipe_), stream)
    speed = duration.speed(stream.device)
    times = duration.seconds(plan, stream.hidden_size, stream.vocabulary, text_of(stream, plan), speed)
    plan = replace(plan, seconds=times)
    if memory_limit is not None:
        footprint.check_fits(plan, memory_limit)
    return plan


def plan_for(stream: Stream, recipe_: recipe.Recipe, lessons: data.CalibrationTokens | None = None) -> Plan:
    """Return what a run would do to the model of a stream, which is built only if that depends on its modules.

    lessons: the text of a training; without it, one that is not read twice is reckoned with.
    """
    exporters = {name: plugins.load("exporters", name, "formats") for name in recipe_.formats}
    told = any(hasattr(exporter, "quantization_config") for exporter in exporters.values())
    plan = planning.make(
        recipe_,
        stream.spec,
        stream.config,
        stream.tied,
        stream.checkpoint.infos,
        stream.other_linears if told else (),
        stream.foldable if recipe_.folds else (),
    )
    text = text_of(stream, plan, None if lessons is None else len(lessons.tokens))
    computing = footprint.Computing(
        stream.hidden_size, stream.vocabulary, stream.dtype.itemsize, stream.device.type != "cpu"
    )
    return footprint.placed(plan, computing, text, exporters, stream.room_bytes)


def text_of(stream: Stream, plan: Plan, lessons: int | None = None) -> footprint.Text:
    """Return how many tokens each rank computes; lessons: sequences to train on that there are, if that is known."""
    recipe_, ranks = plan.recipe, stream.ranks.size
    calibration = recipe_.calibration or data.Calibration()
    length = calibration.length or min(stream.context, 2048)
    read = 0
    if recipe_.training is not None and recipe_.trains_model:
        steps = recipe_.training.steps * training.sequences_of_step(recipe_.training, length, ranks)
        read = (min(steps, lessons or steps) + data.HELD_OUT) * length
    if recipe_.calibration is None:
        return footprint.Text(length=length, ranks=ranks, lessons=read)
    tokens = math.ceil(calibration.sequences / stream.ranks.size) * length
    batch = max(BATCH_TOKENS // length, 1) * length
    batch, aimed, pulled = (min(tokens, n) for n in (batch, layers.enough_for(plan.linears), gradients.TOKENS))
    return footprint.Text(tokens, length, batch, aimed, pulled, ranks, read)


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
    on_error: OnError = "stop",
    verify: bool = True,
    memory_limit: int | None = None,
    ranks: Ranks = ALONE,
) -> tuple[Report, Windows | None]:
    """Quantize a model and write it in every format of the recipe; return the report, and held-out text if there is.

    out: the new folder; with several formats, one folder in it for each.
    work_folder: where finished layers are kept (``OUT.work``, removed at the end,
        if not given). The same call after a crash goes on from there.
    memory_limit: bytes that the process should take at most, of the GPU where that computes; by default all that are
        free. Where activations are depends on it, and PlanError is raised if the run needs more.
    on_error: what to do where a linear cannot be quantized. "stop" raises the error, "skip" leaves it float, and those
        that read the same activations; ``Report.given_up`` names them.
    verify: read back what was written.
    ranks: the processes that do this together. Where nothing is calibrated, the first one does it alone.
    """
    meter = memory.Meter(device_of(device))
    out = Path(out)
    ranks.from_first(lambda: check_output(out))
    stream = _opened(model, recipe_, device_of(device), trust_remote_code, memory_limit, ranks)
    plan = plan_for(stream, recipe_)
    if plan.needs == "nothing" and not recipe_.trains_model and ranks.size > 1:
        options = (work_folder, device, restart, trust_remote_code, progress, on_error, verify, stream.room_bytes)
        return ranks.from_first(lambda: quantize(model, recipe_, out, *options))
    folder = Path(work_folder) if work_folder else out.with_name(out.name + ".work")
    saves = plan.needs != "nothing" or work_folder is not None or len(recipe_.formats) > 1 or on_error == "skip"
    saves |= recipe_.trains_model
    if saves:
        _check_apart(out, folder)
    footprint.check_fits(plan, stream.room_bytes)
    if plan.host_bytes > (host := memory.room_bytes(torch.device("cpu")) // ranks.local):
        raise PlanError(
            f"this run needs about {plan.host_bytes / 1e9:.2f} GB of the host's memory, and there are {host / 1e9:.2f} "
            "GB. Use another machine."
        )
    text = None
    if plan.needs != "nothing":
        text = ranks.from_first(lambda: _calibration_tokens(stream, recipe_, trust_remote_code))
    lessons = None
    if recipe_.trains_model:
        lessons = ranks.from_first(lambda: _training_tokens(stream, recipe_, trust_remote_code))
        plan = replace(plan, scratch_bytes=plan_for(stream, recipe_, lessons).scratch_bytes)
    ranks.from_first(lambda: footprint.check_disk(plan, out, folder if saves else None))
    checkpoint = stream.checkpoint
    direct = Direct(plan, checkpoint, stream.device, importance(plan, stream))
    resumed = 0
    trained: dict[str, Any] = {}
    with ExitStack() as stack:
        source: work.Work | Direct = direct
        if saves:
            source = log = work.Work(folder, fingerprint(checkpoint, plan, text, lessons), restart, ranks, meter)
            stack.callback(log.close)
            resumed = sum(log.has(i) for i in range(plan.layers))
            plan = _saved(plan, stream, direct, log, text, progress, on_error)
            if lessons is not None:
                assert recipe_.training is not None
                trained = training.train(plan, stream, log, lessons, recipe_.training, progress)
            if text is not None or trained:
                checkpoint = work.Transformed(checkpoint, log, plan.float_parts)
        report = ranks.from_first(
            lambda: _written(model, plan, checkpoint, source, stream.config, text, out, resumed, progress, verify)
        )
        report.training = trained
        if saves and work_folder is None:
            log.remove()
    report.machine = machine(stream.device, ranks)
    report.seconds = meter.seconds
    report.peak_rss_bytes = meter.peak_rss_bytes
    if lessons is not None:
        text = replace(lessons, held_out=lessons.held_out[1::2])
    return report, None if text is None else data.held_out_windows(text)


def _check_apart(out: Path, folder: Path) -> None:
    """Raise OutputError where the output would be in the work folder, or this in that."""
    places = [path.absolute().resolve() for path in (out, folder)]
    if any(one == other or one in other.parents for one, other in (places, places[::-1])):
        raise OutputError(
            f"{folder}: a work folder is neither in the output folder {out} nor around it. Choose another --work"
        )


def _opened(
    model: str | Path,
    recipe_: recipe.Recipe,
    device: torch.device,
    trust_remote_code: bool,
    memory_limit: int | None,
    ranks: Ranks,
) -> Stream:
    """Return the stream that a run reads; raise for what no run of this kind can do."""
    if recipe_.budget is not None:
        raise RecipeError("budget: is for `llmquant quantize`, which makes a recipe with a type for every tensor of it")
    if ranks.size > 1 and recipe_.tunes_layers:
        key = "learned_rounding" if recipe_.learned_rounding else "training.scope=layers"
        raise RecipeError(f"{key}: is done by one process. Leave it out, or start without torchrun.")
    if ranks.size > 1 and memory_limit is None:  # one decision for all, while they take each other's memory
        memory_limit = ranks.least(memory.room_bytes(device) // ranks.local)
    return open_stream(model, recipe_, device, trust_remote_code, memory_limit, ranks)


def _saved(
    plan: Plan,
    stream: Stream,
    direct: Direct,
    log: work.Work,
    text: data.CalibrationTokens | None,
    progress: Progress,
    on_error: OnError,
) -> Plan:
    """Quantize into a work folder what is not there yet; return the plan of what is."""
    if text is None:
        direct.save(log, progress, on_error == "skip")
    else:
        layers.quantize_layers(plan, stream, log, text.tokens, progress, on_error == "skip")
    if (given_up := log.given_up()) and on_error == "stop":
        raise CalibrationError(
            f"{log.folder}: an earlier run with --on-error skip left {len(given_up)} linears float; the first: "
            f"{next(iter(given_up.values()))} Give --on-error skip again, or begin anew with --restart."
        )
    log.all_records()  # what is damaged shows before anything is written
    return plan.without(given_up)


def _training_tokens(stream: Stream, recipe_: recipe.Recipe, trust_remote_code: bool) -> data.CalibrationTokens:
    assert recipe_.training is not None
    source = recipe_.calibration or data.Calibration()
    if recipe_.training.text is not None:
        source = source.model_copy(update=recipe_.training.text.model_dump())
    tokenizer = data.load_tokenizer(stream.checkpoint.folder, trust_remote_code)
    export.check_tokenizer(recipe_.formats, tokenizer, stream.config)
    return data.training_tokens(source, tokenizer, stream.context, recipe_.training.steps * recipe_.training.tokens)


def held_out(model: str | Path, recipe_: recipe.Recipe, trust_remote_code: bool = False) -> Windows | None:
    """Return the held-out text that ``quantize`` returns, without quantizing."""
    stream = open_stream(model, recipe_, None, trust_remote_code)
    if plan_for(stream, recipe_).needs == "nothing":
        return None
    return data.held_out_windows(_calibration_tokens(stream, recipe_, trust_remote_code))


def _calibration_tokens(stream: Stream, recipe_: recipe.Recipe, trust_remote_code: bool) -> data.CalibrationTokens:
    assert recipe_.calibration is not None
    tokenizer = data.load_tokenizer(stream.checkpoint.folder, trust_remote_code)
    export.check_tokenizer(recipe_.formats, tokenizer, stream.config)
    return data.calibration_tokens(recipe_.calibration, tokenizer, stream.context)


def _written(
    model: str | Path,
    plan: Plan,
    checkpoint: Checkpoint,
    source: work.Work | Direct,
    config: Any,
    text: data.CalibrationTokens | None,
    out: Path,
    resumed: int,
    progress: Progress,
    verify: bool,
) -> Report:
    """Write a model that has been quantized in every format of the recipe, and return the report."""
    recipe_ = plan.recipe
    report = Report(
        model=str(model),
        recipe=recipe_.model_dump(mode="json", exclude_defaults=True),
        calibration={} if text is None else text.as_dict(),
        linears={},
        notes=list(plan.notes),
        bits_per_weight=round(plan.bits_per_weight, 4),
        costs=source.costs(),
        resumed_layers=resumed,
        versions={**_versions(), "python": platform.python_version()},
        given_up=dict(plan.given_up),
    )
    every = export.write_all(plan, checkpoint, source, recipe_.formats, config, out, progress, verify)
    for name, (target, written) in every.items():
        report.outputs[name] = str(target)
        report.bytes[name] = written.bytes
        report.hashes[name] = written.hashes
    records = source.all_records()
    report.histograms = {name: records[name]["histogram"] for name in noise.worst(records)}
    for told in records.values():
        told.pop("histogram", None)
    report.linears = {name: noise.in_decibels(told) for name, told in records.items()}
    report.notes += experts.notes(report.linears)
    return report


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

            sites = [site for site in stream.spec.sites_of(index) if site.linears]
            with calibrate.watch(layer, sites, see):
                stream.run(layer, index, activations)
        for site in sites:
            stats = sums[site.name].result()
            for local in site.linears:
                found[f"{stream.spec.layers}.{index}.{local}.weight"] = stats
    progress("measuring layers", stream.layers, stream.layers)
    return found


def export_again(
    folder: Path, formats: Sequence[str], out: Path, progress: Progress = silent, verify: bool = True
) -> Report:
    """Write a finished work folder in other formats, without calibrating again; return the report.

    out, verify: as for ``quantize``.
    """
    meter = memory.Meter(torch.device("cpu"))
    check_output(out)
    note = work.read_note(folder)
    recipe_ = plugins.validate(recipe.Recipe, note["recipe"] | {"formats": list(formats)}, "")
    stream = open_stream(note["model"]["folder"], recipe_)
    model = work.fingerprint_of_model(stream.checkpoint)
    work.check_same(folder, {"model": note["model"]}, {"model": model}, "or quantize the model anew.")
    plan = plan_for(stream, recipe_)
    with closing(work.Work(folder, note)) as log:
        _check_finished(plan, log)
        plan = plan.without(log.given_up())
        checkpoint = work.Transformed(stream.checkpoint, log, plan.float_parts)
        of = stream.checkpoint.folder, plan, checkpoint, log, stream.config
        report = _written(*of, None, out, plan.layers, progress, verify)
        if recipe_.trains_model:
            report.training = training.outcome(log)
    report.machine = machine(torch.device("cpu"))
    report.seconds = meter.seconds
    report.peak_rss_bytes = meter.peak_rss_bytes
    return report


def _check_finished(plan: Plan, log: work.Work) -> None:
    """Raise CheckpointError for a work folder that lacks something."""
    # a layer of which nothing is quantized may have no file
    missing = [part for part in plan.parts if not log.has(part)]
    if missing:
        what = missing[0] if isinstance(missing[0], str) else f"layer {missing[0]} of {plan.layers}"
        raise CheckpointError(
            f"{log.folder}: {what} is not finished. Run `llmquant quantize` with the same settings and --work "
            f"{log.folder} to go on."
        )
    if plan.recipe.trains_model and not training.finished(log):
        raise CheckpointError(
            f"{log.folder}: its training is not finished. Run the same `llmquant train` with --work {log.folder} to "
            "go on."
        )


def fingerprint(
    checkpoint: Checkpoint, plan: Plan, text: data.CalibrationTokens | None, lessons: data.CalibrationTokens | None
) -> dict[str, Any]:
    """Return what decides the codes: model, recipe (but for how they are written), imatrix, tokens and versions."""
    imatrix = plan.recipe.imatrix
    written = {"description", "formats", "max_shard_size"}
    recipe_ = plan.recipe.model_dump(mode="json", exclude_defaults=True, exclude=written)
    return {
        "model": work.fingerprint_of_model(checkpoint),
        "recipe": recipe_,
        "imatrix": None if imatrix is None else hashlib.sha256(imatrix.read_bytes()).hexdigest(),
        "tokens": None if text is None else text.sha256,
        "training tokens": None if lessons is None else lessons.sha256,
        "versions": _versions(),
    }


def machine(device: torch.device, ranks: Ranks = ALONE) -> str:
    """Return what computed, for people: the GPU or the processor, the threads, the processes."""
    gpu = [torch.cuda.get_device_name(device)] if device.type == "cuda" else []
    threads = f"threads: {torch.get_num_threads()} of {os.cpu_count()}"
    processes = [f"processes: {ranks.size}"] if ranks.size > 1 else []
    return ", ".join([*gpu, f"{platform.system()} {platform.machine()}", threads, *processes])


def _versions() -> dict[str, str]:
    return {
        "llmquant": llmquant.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
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
        self._records: dict[str, dict[str, Any]] = {}
        self._shown: list[str] = []

    def save(self, log: work.Work, progress: Progress, skip: bool = False) -> None:
        """Quantize all linears into a work folder. skip: leave out what cannot be quantized."""
        parts = self._plan.parts
        for i, (part, linears) in enumerate(parts.items()):
            progress("quantizing", i, len(parts))
            if log.has(part):
                continue
            log.begin()
            done: dict[str, QuantizedTensor] = {}
            given_up: dict[str, str] = {}
            for linear in linears:
                try:
                    q = self.load(linear)
                    if skip:
                        sites.check_packable(self._plan, {linear.name: q})
                except sites.GIVEN_UP as error:
                    if not skip:
                        raise
                    sites.check_can_stay_float(self._plan, linear, error)
                    given_up[linear.name] = str(error)
                else:
                    done[linear.name] = q
            log.save(part, done, {name: self._records[name] for name in done}, given_up=given_up)
        progress("quantizing", len(parts), len(parts))

    def load(self, linear: Linear, rows: int | None = None) -> QuantizedTensor:
        """Return a linear, or the first rows of it, quantized."""
        part = linear if rows is None else replace(linear, rows=rows)
        weight = self._weight(part, 0, part.rows)
        done, records, _ = sites.quantize_together([part], [weight], self._stats(linear))
        if rows is None:
            self._record(linear.name, records[linear.name])
        return done[linear.name]

    def _record(self, name: str, told: dict[str, Any]) -> None:
        """Keep what a report tells of a linear; the histogram only while it is one of the worst."""
        self._records[name] = told
        candidates = {n: self._records[n] for n in (*self._shown, name)}
        self._shown = noise.worst(candidates)
        for n in candidates.keys() - set(self._shown):
            del self._records[n]["histogram"]

    def pieces(
        self, linears: Iterable[Linear], pack: Callable[[QuantizedTensor], Tensor]
    ) -> Generator[Iterator[Tensor], None, None]:
        """Yield each linear as pieces of some rows, in order, packed; those of the next are begun before its end."""

        def quantize(part: Linear, start: int) -> tuple[str, Tensor, int, dict[str, Any]]:
            weight = self._weight(part, start, start + part.rows)
            done, told, _ = sites.quantize_together([part], [weight], self._stats(part))
            return part.name, pack(done[part.name]), part.rows, told[part.name]

        def taken(name: str, results: Iterable[tuple[str, Tensor, int, dict[str, Any]]]) -> Iterator[Tensor]:
            records: list[tuple[int, dict[str, Any]]] = []
            for _, packed, rows, record in results:
                records.append((rows, record))
                yield packed
            total = sum(rows for rows, _ in records)
            keys = [key for key in ("error", *noise.AVERAGED) if records[0][1][key] is not None]
            mean = {key: sum(n * r[key] for n, r in records) / total for key in keys}
            mean["error"] = round(mean["error"], 8)
            seconds = round(sum(r["seconds"] for _, r in records), 3)
            histogram = noise.added([r["histogram"] for _, r in records])
            self._record(name, records[0][1] | mean | {"seconds": seconds, "histogram": histogram})

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
        return {name: dict(record) for name, record in self._records.items()}

    def costs(self) -> list[dict[str, Any]]:
        return []


def _parts(linear: Linear) -> Iterator[tuple[Linear, int]]:
    """Yield a linear as parts that can be quantized one by one: some of its rows, and the first of them."""
    assert linear.grid is not None
    count = 1 if linear.grid.shared else min(math.ceil(linear.weights / planning.PIECE), linear.rows)
    edges = [linear.rows * i // count for i in range(count + 1)]
    for start, stop in itertools.pairwise(edges):
        yield replace(linear, rows=stop - start), start
