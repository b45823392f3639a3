"""Which recipe to quantize a model by for a place where it is to run: exact sizes, and what follows from them.

Exact: the size of the files (``export.file_bytes``), and of keys and values in 16 bits.
Estimated: what a runtime takes beside them. Predicted: the rate of tokens, by what has
to be read for each over the bandwidth of the memory, which no runtime exceeds and none
quite reaches.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from llmquant import plugins, run, shipped
from llmquant import recipe as recipes
from llmquant.checkpoint import read_json
from llmquant.errors import DataError, LlmquantError, PlanError, RecipeError
from llmquant.plan import Linear, Plan, packed_bytes
from llmquant.progress import Progress, silent
from llmquant.stream import Stream
from llmquant.targets import TARGETS, Target

CONTEXT = 4096  # tokens, where the model takes so many
HALF = 2  # bytes of a key's or value's element
UBATCH, CELLS = 512, 256  # llama.cpp: tokens computed together, and what the length of a cache is a multiple of


@dataclass(frozen=True)
class Sized:
    """A recipe, applied to a model.

    bits_per_weight: of the quantized linears. read_bytes: of the tensors that a token needs (``read_bytes``).
    same: key of those whose files are alike but for the numbers in them.
    order: the least is expected to diverge least.
    """

    recipe: str
    format: str
    kind: str
    bits_per_weight: float
    file_bytes: int
    read_bytes: int
    same: Hashable
    order: tuple[float, bool, bool]


@dataclass(frozen=True)
class Row:
    """A recipe on a target.

    bits_per_weight: of the quantized linears. file_bytes, cache_bytes: of weights, and of keys and values; exact.
    runtime_bytes: what the runtime takes beside them; an estimate. fits: whether all that does.
    rate: the most tokens a second that the memory's bandwidth allows with the whole context filled; a prediction.
    kld: from the float model, measured by a report; protocol: on what.
    """

    target: str
    recipe: str
    format: str
    bits_per_weight: float
    file_bytes: int
    cache_bytes: int
    runtime_bytes: int
    total_bytes: int
    fits: bool
    rate: float
    kld: float | None
    protocol: str
    commands: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Measured:
    """A KL divergence that a report tells."""

    kld: float
    protocol: str


@dataclass(frozen=True)
class Recommendation:
    """What there is for a model: by target, the rows that fit, best first, then the others, smallest first.

    refused: recipes that cannot be applied to this model -> why.
    """

    model: str
    memory: int
    context: int
    rows: Mapping[str, Sequence[Row]]
    refused: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        rows = {name: [row.as_dict() for row in some] for name, some in self.rows.items()}
        return vars(self) | {"rows": rows, "refused": dict(self.refused)}

    def best(self, target: str) -> Row | None:
        """Return the row to take, where one fits."""
        return next((row for row in self.rows[target] if row.fits), None)


def recommend(
    model: str | Path,
    memory: int,
    target: str | None = None,
    context: int | None = None,
    reports: Iterable[str | Path] = (),
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Recommendation:
    """Size every shipped recipe for a model, and return which of them run where, and how well; reads no weights.

    memory: bytes that the run may take. target: one of ``TARGETS``, or None for all.
    context: tokens, by default 4096, or the model's most. reports: folders with reports of earlier runs.

    Raises RecipeError for a target that there is not, DataError for a context or reports that do not fit the model,
    PlanError where nothing fits.
    """
    if target is not None and target not in TARGETS:
        raise RecipeError(f"--target {target}: there is no such target.{plugins.hint(target, TARGETS)}")
    stream = Stream(run.load_float(model), torch.device("cpu"), trust_remote_code, weights=False)
    context = min(CONTEXT, stream.context) if context is None else context
    if not 1 <= context <= stream.context:
        raise DataError(f"--context {context}: this model takes 1 to {stream.context} tokens")
    measured = _measured(reports, model)
    refused: dict[str, str] = {}
    places = {name: place for name, place in TARGETS.items() if target in (None, name)}
    read = {kind for place in places.values() for kind in place.runs}
    sized = [one for one in _sized(stream, read, refused, progress) if one.kind in read]
    rows = {
        name: rows
        for name, place in places.items()
        if (rows := _rows(name, place, sized, measured, model, stream, memory, context))
    }
    found = Recommendation(str(model), memory, context, rows, refused)
    if not any(found.best(name) for name in rows):
        smallest = min((row for some in rows.values() for row in some), key=lambda row: row.total_bytes, default=None)
        if smallest is None:
            raise PlanError(f"{model}: no shipped recipe makes a file of this model that {target or 'a target'} reads")
        raise PlanError(
            f"{model}: nothing fits in {memory / 1e9:.2f} GB. The least is {smallest.recipe} on {smallest.target}: "
            f"{smallest.file_bytes / 1e9:.2f} GB of weights, {smallest.cache_bytes / 1e9:.2f} GB for {context} tokens, "
            f"about {smallest.runtime_bytes / 1e9:.2f} GB for the runtime. Give more --memory, less --context or "
            "another --target"
        )
    return found


def cache_bytes(config: Any, context: int, padded: bool = False) -> int:
    """Return the size of the keys and values of so many tokens in 16 bits.

    Layers with a sliding window keep no more than that. llama.cpp gives a window only to models in which other layers
    see everything, adds room for the tokens that it computes together, and rounds lengths up (llama-kv-cache-iswa.cpp).

    config: of transformers. padded: as long as llama.cpp makes them.
    """
    text = config.get_text_config()
    heads: int = text.num_attention_heads
    shared = getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False)
    known = (1 if shared else None, getattr(text, "num_key_value_heads", None), getattr(text, "num_kv_heads", None))
    kv_heads = next((number for number in known if number), heads)
    head: int = getattr(text, "head_dim", None) or text.hidden_size // heads
    window = getattr(text, "sliding_window", None) or 0
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * text.num_hidden_layers
    sliding = sum(kind == "sliding_attention" for kind in kinds) if window else 0
    if padded:
        sliding = 0 if sliding == len(kinds) else sliding
        context, window = _multiple(context), _multiple(window + UBATCH)
    tokens = (len(kinds) - sliding) * context + sliding * min(context, window)
    return 2 * HALF * kv_heads * head * tokens


def _multiple(tokens: int) -> int:
    return -(-tokens // CELLS) * CELLS


def kind(plan: Plan, format_: str) -> str:
    """Return what ``Target.runs`` calls the files of a plan in one of its formats."""
    linear = next(iter(plan.quantized.values()), None)
    if format_ != "compressed_tensors" or linear is None or linear.choice is None:
        return format_
    if linear.choice.grid == "fp8":
        return f"{format_}: float-quantized"
    bits = linear.choice.grid_config.bits
    return f"{format_}: int-quantized" if linear.activations else f"{format_}: pack-quantized, {bits} bits"


def read_bytes(plan: Plan, format_: str, config: Any) -> int:
    """Return how many bytes of tensors a runtime reads for one token.

    config: the model's transformers configuration.
    """
    exporter = plugins.load("exporters", format_, "format")
    known: dict[Hashable, int] = {}

    def stored(linear: Linear) -> int:
        if linear.grid is None:
            return linear.weights * linear.dtype.itemsize
        key = linear.grid, linear.activations, linear.rows, linear.cols
        if key not in known:
            known[key] = packed_bytes(linear, exporter)
        return known[key]

    idle = 0.0
    embed, head = f"{plan.spec.embed}.weight", f"{plan.spec.head}.weight"
    if any(x.weight_name == head for x in plan.linears) or head in plan.kept:  # else the embedding is the output matrix
        idle += next((stored(x) for x in plan.linears if x.lookup), plan.kept[embed].bytes if embed in plan.kept else 0)
    active = getattr(config.get_text_config(), "num_experts_per_tok", None)
    for layer in range(plan.layers):
        sites = [site for site in plan.spec.sites_of(layer) if site.expert]
        count = len({site.expert for site in sites})
        if active and count > active:
            idle += sum(stored(x) for site in sites for x in plan.of_layer(layer, site)) * (1 - active / count)
    return plan.sizes[format_] - round(idle)


def _sized(stream: Stream, read: Collection[str], refused: dict[str, str], progress: Progress) -> Iterator[Sized]:
    """Yield every shipped recipe in each of its formats.

    read: kinds of files that are asked for. refused: gets the recipes that this model does not allow.
    """
    names = shipped.recipes()
    formats = {kind.partition(":")[0] for kind in read}
    known: dict[Hashable, tuple[int, int]] = {}
    for i, name in enumerate(names):
        progress("sizing recipes", i, len(names))
        recipe = recipes.load(name)
        if recipe.budget is not None or not formats & set(recipe.formats):
            continue
        try:
            plan = run.plan_for(stream, recipe)
            types = tuple(plan.types.items())
            for format_ in recipe.formats:
                tensors = format_, types, tuple((x.grid, x.activations) for x in plan.linears)
                if tensors not in known:
                    size = run.with_files(plan, stream).files[format_]
                    known[tensors] = size, read_bytes(plan, format_, stream.config)
                bits = tuple((x.grid.bits_per_weight if x.grid else 0, x.activations) for x in plan.linears)
                same = kind(plan, format_), types, bits
                sizes = round(plan.bits_per_weight, 4), *known[tensors]
                yield Sized(name, format_, kind(plan, format_), *sizes, same, _order(plan))
        except LlmquantError as error:
            refused[name] = str(error)
    progress("sizing recipes", len(names), len(names))


def _order(plan: Plan) -> tuple[float, bool, bool]:
    """Return the key by which recipes are expected to diverge less: minus their bits a weight, first of all.

    Where a recipe diverges a quarter as much as another one with as many bits, it counts for one bit more, as rounding
    errors halve with each. By eval/results/methods.md and accuracy.md: GPTQ with mismatch correction one more, FP8 two
    less than integers, activations in 8 bits one less. Learned rounding has gained nothing there and takes minutes.
    """
    recipe = plan.recipe
    fp8 = any(x.choice.grid == "fp8" for x in plan.quantized.values() if x.choice)
    gained = recipe.mismatch_correction - 2 * fp8 - (recipe.activations is not None)
    return -plan.bits_per_weight - gained, recipe.learned_rounding is not None, plan.needs == "nothing"


def _rows(
    name: str,
    target: Target,
    sized: Sequence[Sized],
    measured: Mapping[tuple[str, str], Measured],
    model: str | Path,
    stream: Stream,
    memory: int,
    context: int,
) -> list[Row]:
    """Return the rows of a target: of recipes for the same tensors those that were measured, and the best."""
    ours = sorted((one for one in sized if one.kind in target.runs), key=lambda one: (one.order, one.recipe))
    alike = {one.same: one.recipe for one in reversed(ours)}  # the best of them
    shown = [one for one in ours if (one.recipe, one.format) in measured or alike[one.same] == one.recipe]
    text = stream.config.get_text_config()
    cache = cache_bytes(stream.config, context, target.runtime == "llama.cpp")
    runtime = target.program + 4 * target.batch * (text.vocab_size + context)
    rows = []
    for one in shown:
        known = measured.get((one.recipe, one.format))
        total = one.file_bytes + cache + runtime
        out = f"{Path(model).name}-{one.recipe}"
        rows.append(
            Row(
                target=name,
                recipe=one.recipe,
                format=one.format,
                bits_per_weight=one.bits_per_weight,
                file_bytes=one.file_bytes,
                cache_bytes=cache,
                runtime_bytes=runtime,
                total_bytes=total,
                fits=total <= memory,
                rate=round(target.bandwidth / (one.read_bytes + cache), 2),
                kld=known.kld if known else None,
                protocol=known.protocol if known else "",
                commands=(
                    f"llmquant quantize {shlex.quote(str(model))} {one.recipe} --out {shlex.quote(out)}",
                    *(command.format(out=shlex.quote(out), context=context) for command in target.commands),
                ),
            )
        )
    fitting = _by_measured([row for row in rows if row.fits])
    return fitting + sorted((row for row in rows if not row.fits), key=lambda row: row.total_bytes)


def _by_measured(rows: list[Row]) -> list[Row]:
    """Return rows in which those with a measured divergence have changed places by it, among themselves."""
    places = [i for i, row in enumerate(rows) if row.kld is not None]
    for place, row in zip(places, sorted((rows[i] for i in places), key=lambda row: row.kld or 0.0), strict=True):
        rows[place] = row
    return rows


def _measured(folders: Iterable[str | Path], model: str | Path) -> dict[tuple[str, str], Measured]:
    """Return what reports in folders, or below them, tell of a model's recipes, by recipe and format.

    Raises DataError for a folder without a report on this model, and for figures on several texts.
    """
    found: dict[tuple[str, str], Measured] = {}
    for folder in map(Path, folders):
        reports = [read_json(path, "llmquant wrote it") for path in sorted(folder.rglob(run.REPORT))]
        ours = [report for report in reports if _same_model(report.get("model"), model)]
        if not ours:
            raise DataError(
                f"--reports {folder}: of the {len(reports)} reports of `llmquant quantize` or `compare` in it, none is "
                f"on {model}"
            )
        for row in (row for report in ours for row in report.get("evaluation", [])):
            if isinstance(kld := row.get("kld_mean"), float) and row.get("recipe") != "float":
                found[str(row.get("recipe")), str(row.get("format"))] = Measured(kld, str(row.get("protocol")))
    protocols = sorted({one.protocol for one in found.values()})
    if len(protocols) > 1:
        raise DataError(
            f"--reports: divergences on different texts cannot be compared: {protocols[0]}; {protocols[1]}. Give "
            "reports on one text, e.g. of one `llmquant compare`"
        )
    return found


def _same_model(told: Any, model: str | Path) -> bool:
    return isinstance(told, str) and (told == str(model) or Path(told).resolve() == Path(model).resolve())
