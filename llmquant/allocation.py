"""A type for every tensor such that the files have a given size and the predictions change least.

What a matrix costs on each type is first measured and predicted (``llmquant.sensitivity``): alone quantized, under the
recipe's own transforms and algorithm. Dynamic programming over the exact sizes fills the budget (``llmquant.budget``).
The model is then quantized by the uniform recipe of that size and by the allocation, both are measured as written,
and on text that nothing was chosen by the allocation must not be worse: otherwise the uniform model is the result.

Nothing is measured again around the chosen types: that would quantize the model once for each neighbour. In a trial on
the demo model (at the size of Q3_K_M; not kept as a study) none of seven other allocations was better beyond the noise.

Three splits of text: calibration; selection, which sensitivities and allocations are measured on; check. No sequence
of one has a passage of another.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from llmquant import budget as budgets
from llmquant import data, evaluation, plugins, run, sensitivity
from llmquant import recipe as recipes
from llmquant.checkpoint import check_output, read_json
from llmquant.errors import DataError, RecipeError
from llmquant.evaluation import Reference
from llmquant.files import held, write_json
from llmquant.progress import Progress, silent
from llmquant.protocols import Windows
from llmquant.recipe import Recipe
from llmquant.run import Report
from llmquant.stream import Stream

TYPES = ("q2_k", "q3_k", "iq4_xs", "q4_k", "q5_k", "q6_k", "q8_0")
TOKENS = 8192  # of the selection split, and of the check split
LENGTH = 512  # of their sequences, where the recipe calibrates on none
LEAST = 2  # sequences that a split must have
PASSAGE = 64  # tokens that two splits may not share


@dataclass(frozen=True)
class Texts:
    """Splits that nothing is calibrated on.

    held_out: what a run is evaluated on; None where there is no text to calibrate on, or no more of it.
    """

    selection: Windows
    check: Windows
    held_out: Windows | None


@dataclass(frozen=True)
class Trial:
    """A model that was quantized and measured.

    expected: sum of the units' divergences, nats a token.
    selection, check: divergence of the written files on these splits.
    types: how many of the units have each; those of a uniform recipe are its own.
    """

    name: str
    bytes: int
    selection: float
    check: float
    expected: float | None = None
    types: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Allocation:
    """How the types were chosen.

    budget: bytes of the weights' files. splits: the texts. trials: the best uniform recipe within the budget, and the
        allocation. chosen: which of these was written.
    """

    budget: int
    splits: Sequence[str]
    trials: Sequence[Trial]
    chosen: str


def quantize(
    model: str | Path,
    recipe: Recipe,
    out: str | Path,
    device: str = "auto",
    restart: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> tuple[Report, Windows | None]:
    """Quantize a model by a recipe with a budget, as ``run.quantize`` does by one without.

    What is measured and tried is kept beside ``out`` until the end; the same call after a crash goes on from there.
    """
    started = time.monotonic()
    out = Path(out)
    check_output(out)
    folder = out.with_name(f"{out.name}.trials")
    if restart:
        shutil.rmtree(folder, ignore_errors=True)
    with held(folder):
        uniform, limit = within(model, recipe, trust_remote_code)
        texts = splits(model, recipe, trust_remote_code)
        found = sensitivity.measure(
            model,
            uniform,
            texts.selection,
            folder / "sensitivity",
            grids=",".join(TYPES) if uniform.mixture else "budget",
            device=device,
            trust_remote_code=trust_remote_code,
            progress=progress,
            quick=True,
        )
        filled = budgets.fill(model, uniform, found, f"{limit}B", uniform.name, trust_remote_code)
        names = {"uniform": uniform, "allocated": filled.recipe}
        reports = {
            name: _tried(model, one, folder / name, device, trust_remote_code, progress) for name, one in names.items()
        }
        reference = Reference(model, device, trust_remote_code)
        klds = {
            (name, split): _divergence(folder / name, windows, reference, device, trust_remote_code, progress)
            for split, windows in (("selection", texts.selection), ("check", texts.check))
            for name in names
        }
        sizes = {name: next(iter(report.bytes.values())) for name, report in reports.items()}
        trials = {name: Trial(name, sizes[name], klds[name, "selection"], klds[name, "check"]) for name in names}
        trials["allocated"] = replace(
            trials["allocated"], expected=filled.kld, types=dict(Counter(filled.choices.values()))
        )
        chosen = min(names, key=lambda name: trials[name].check)
        report = reports[chosen]
        (format_,) = uniform.formats
        (folder / chosen).replace(out)
        shutil.rmtree(folder)
        labels = [windows.label for windows in (texts.selection, texts.check)]
        report.allocation = asdict(Allocation(limit, labels, list(trials.values()), chosen))
        report.outputs = {format_: str(out)}
        report.seconds = round(time.monotonic() - started, 2)
        return report, texts.held_out


def within(model: str | Path, recipe: Recipe, trust_remote_code: bool = False) -> tuple[Recipe, int]:
    """Return the uniform recipe with the largest files within a recipe's budget, and the budget in bytes.

    Uniform are the mixtures of k-quants and of q8_0, or without a mixture the recipe with the same bits everywhere.
    Raises RecipeError where none is small enough.
    """
    if len(recipe.formats) != 1 or recipe.budget is None:
        raise RecipeError(f"budget: is for one container, and the recipe has {len(recipe.formats)}")
    (format_,) = recipe.formats
    stream = run.open_stream(model, recipe, trust_remote_code=trust_remote_code)
    values = recipe.model_dump(exclude_defaults=True, exclude={"budget", "selection"})
    values["name"] = f"{recipe.name}-{recipe.budget.replace(' ', '')}"
    plain: Recipe = plugins.validate(Recipe, values, "")
    own = run.plan_for(stream, plain)

    def size(one: Recipe) -> int:
        return run.with_files(run.plan_for(stream, one), stream).files[format_]

    def mixed(**keys: Any) -> Recipe:
        made: Recipe = plugins.validate(Recipe, values | {"mixture": values["mixture"] | keys}, "")
        return made

    if recipe.mixture is None:
        limit = budgets.to_bytes(recipe.budget, own.weights)
        units = sensitivity.units_of(own, "linear")
        labels = sensitivity.grids_of("budget", plain)
        candidates = [plain, *(sensitivity.uniform(plain, units, label) for label in labels)]
    else:
        known = plugins.load("exporters", format_, "formats").mixtures.MIXTURES
        if recipe.budget.upper() in known and known[recipe.budget.upper()].base in plugins.names("grids"):
            like = mixed(name=recipe.budget)
            return like, size(like)
        limit = budgets.to_bytes(recipe.budget, own.weights)
        candidates = [mixed(name=name.lower()) for name, mixture in known.items() if mixture.base in TYPES]
        candidates.append(mixed(name=TYPES[0], pure=True))
    sizes = [size(one) for one in candidates]
    if limit < min(sizes):
        raise RecipeError(
            f"budget: {recipe.budget} is {limit:,} bytes, and the smallest files have {min(sizes):,}: "
            f"{8 * min(sizes) / own.weights:.4f}bpw"
        )
    best = max((i for i in range(len(sizes)) if sizes[i] <= limit), key=lambda i: sizes[i])
    return candidates[best], limit


def splits(model: str | Path, recipe: Recipe, trust_remote_code: bool = False) -> Texts:
    """Return text to choose by and text to check by, disjoint from each other, from what is calibrated on, and from
    the sequences of that text which a run is evaluated on."""
    stream = Stream(run.load_float(model), torch.device("cpu"), trust_remote_code, weights=False)
    tokenizer = data.load_tokenizer(stream.checkpoint.folder, trust_remote_code)
    source, length, label = recipe.calibration, min(LENGTH, stream.context), recipe.name
    held_out = None
    taken = pool = torch.empty(0, length, dtype=torch.int64)
    if source is not None:
        count = 2 * -(-TOKENS // (source.length or min(stream.context, 2048)))
        text = data.calibration_tokens(source, tokenizer, stream.context, data.HELD_OUT + count)
        first = text.held_out[: data.HELD_OUT]
        held_out = data.held_out_windows(replace(text, held_out=first))
        taken, pool, label = torch.cat([text.tokens, first]), text.held_out[data.HELD_OUT :], text.source
        length = taken.shape[1]
    if recipe.selection is not None:
        wanted = data.Calibration(**recipe.selection.model_dump(), sequences=1, length=length)
        text = data.calibration_tokens(wanted, tokenizer, stream.context, 2 * -(-TOKENS // length) - 1)
        pool, label = torch.cat([text.tokens, text.held_out]), text.source
    pool = without_passages(pool, taken)
    half = len(pool) // 2
    selection = pool[:half]
    check = without_passages(pool[half:], selection)
    if min(len(selection), len(check)) < LEAST:
        raise DataError(
            f"budget: {label} leaves {len(pool)} sequences of {length} tokens that share nothing with what is "
            "calibrated on, too few to choose types by. Add --select FILE of another text, or calibrate on less "
            "(--set calibration.sequences=...)"
        )
    return Texts(_windows(selection, f"selection: {label}"), _windows(check, f"check: {label}"), held_out)


def _windows(tokens: Tensor, label: str) -> Windows:
    count, length = tokens.shape
    return Windows(tokens, torch.ones(count, length - 1, dtype=torch.bool), f"{label}, {count} sequences of {length}")


def without_passages(
    tokens: Int[Tensor, "sequences length"], others: Int[Tensor, "_others _length"]
) -> Int[Tensor, "rest length"]:
    """Return the sequences that have no ``PASSAGE`` tokens in a row in common with any of ``others``."""

    def passages(row: Tensor) -> set[int]:
        return {hash(part.numpy().tobytes()) for part in row.unfold(0, min(PASSAGE, len(row)), 1)}

    known = set[int]().union(*(passages(row) for row in others))
    return tokens[[i for i, row in enumerate(tokens) if known.isdisjoint(passages(row))]]


def _tried(
    model: str | Path, recipe: Recipe, folder: Path, device: str, trust_remote_code: bool, progress: Progress
) -> Report:
    """Quantize a model into a folder, unless that was done before, and return the report."""

    def tell(what: str, done: int, total: int) -> None:
        progress(f"{folder.name}: {what}", done, total)

    path = folder.with_name(f"{folder.name}.json")
    if folder.exists() and path.exists() and recipes.load(folder / "recipe.yaml") == recipe:
        return Report(**read_json(path, "a finished trial has one"))
    shutil.rmtree(folder, ignore_errors=True)
    report, _ = run.quantize(model, recipe, folder, None, device, False, trust_remote_code, tell)
    write_json(path, report.as_dict())
    return report


def _divergence(
    folder: Path, windows: Windows, reference: Reference, device: str, trust_remote_code: bool, progress: Progress
) -> float:
    row = evaluation.evaluate(folder, windows, reference, None, device, trust_remote_code, progress=progress)
    assert row.kld_mean is not None
    return row.kld_mean
