"""The Python interface: what the command line does, as functions.

import llmquant
llmquant.quantize("org/model", "gptq-w4g128", "out", changes=["calibration.path=text.txt"])
llmquant.evaluate("out", reference="org/model", text="test.txt")
llmquant.compare("org/model", ["rtn-w4g128", "gptq-w4g128"], "out", text="test.txt")
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import ByteSize, TypeAdapter, ValidationError

import llmquant
from llmquant import allocation, data, evaluation, html, hub, plugins, ranks, run
from llmquant import budget as budgets
from llmquant import recipe as recipes
from llmquant import recommend as recommendations
from llmquant import report as reports
from llmquant import sensitivity as sensitivities
from llmquant import work as work_folders
from llmquant.budget import Budgeted
from llmquant.checkpoint import Digest, check_output, locate, read_json
from llmquant.distillation import Training
from llmquant.errors import CheckpointError, DataError, OutputError, RecipeError
from llmquant.evaluation import Reference, Row
from llmquant.files import held, write_json, write_text
from llmquant.plan import Plan
from llmquant.progress import Progress, silent
from llmquant.protocols import Windows
from llmquant.ranks import ALONE, Ranks
from llmquant.recipe import Recipe
from llmquant.recommend import Recommendation
from llmquant.run import REPORT, Report
from llmquant.sensitivity import Cost, Sensitivity

Text = str | Path | data.TextSource
COMPARED = "comparison.json"


def plan(
    model: str | Path,
    recipe: str | Path | Recipe,
    *,
    changes: Iterable[str] = (),
    memory: str | int | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Plan:
    """Return what a run would do to every tensor, and what it would cost. Reads no weights.

    memory, device: as for ``quantize``.

    Of a recipe with a budget: what the uniform recipe would do that its result is compared with.

    >>> plan("org/model", "gptq-w4g128").bits_per_weight  # doctest: +SKIP
    4.125
    """
    chosen = _recipe(recipe, changes)
    if chosen.budget is not None:
        chosen, _ = allocation.within(model, chosen, trust_remote_code)
    return run.make_plan(model, chosen, trust_remote_code, _bytes(memory), device)


def quantize(
    model: str | Path,
    recipe: str | Path | Recipe,
    out: str | Path,
    *,
    changes: Iterable[str] = (),
    work: str | Path | None = None,
    device: str = "auto",
    text: Text | None = None,
    protocol: str = "llama.cpp",
    evaluate: bool = True,
    noise: bool = False,
    restart: bool = False,
    memory: str | int | None = None,
    on_error: run.OnError = "stop",
    verify: bool = True,
    trust_remote_code: bool = False,
    command: str = "",
    progress: Progress = silent,
) -> Report:
    """Quantize a model by a recipe, write it, measure what was written, and return the report.

    model: a folder or a hub id. recipe: a shipped name, a YAML file or a Recipe.
    changes: "key.path=value" for keys of the recipe.
        With ``budget`` ("4.5bpw", "3.2GB", "q4_k_m") a type is chosen for every tensor (``llmquant.allocation``).
    work: a folder to keep the finished layers in; by default it is beside ``out`` and removed at the end.
    text: what to measure on; by default sequences of the calibration text that were not calibrated on.
    memory: what quantizing may take at most, such as "8GB"; by default what is free. With less, layers are computed
        more often, and activations wait in files; where it cannot be done at all, PlanError is raised at once.
    noise: measure too how the error grows from layer to layer (``Report.residual_errors``), on the same text. Needs
        ``evaluate``; both models are computed once more, with the activations of both in memory.
    on_error: "stop" where a linear cannot be quantized (numbers that are not finite, a Hessian that cannot be
        factorised, scales that a format cannot hold), or "skip" it: it stays float, with those that read the same
        activations, and ``Report.given_up`` says why.
    verify: read back what was written, before it gets its name.
    command: what was typed, for the report.

    Where ``torchrun`` started this process, all its processes quantize together, each to be given the same arguments;
    the first one writes and evaluates.

    >>> quantize("org/model", "gptq-w4g128", "out", changes=["calibration.path=text.txt"])  # doctest: +SKIP
    """
    chosen = _recipe(recipe, changes)
    if chosen.budget is not None and work is not None:
        raise RecipeError("budget: keeps no work folder. Quantize by the recipe.yaml that it writes, with --work.")
    if memory is not None and chosen.budget is not None:
        raise RecipeError("memory: a budget measures the whole model again and again, which it does not limit")
    if chosen.budget is not None and on_error == "skip":
        raise RecipeError("budget: would not hold with linears left float. Leave out --on-error skip.")
    if noise and (not evaluate or (text is None and chosen.calibration is None)):
        raise DataError("noise: is measured where the result is evaluated, and there is no text for that. Give text.")

    def evaluated(report: Report, windows: Windows | None) -> Report:
        report.command = command
        rows: list[Row] = []
        if windows is not None:
            _finish(report, rows, model)  # whole, should measuring it be stopped
            reference = Reference(model, device, trust_remote_code)
            rows.append(
                evaluation.evaluate(model, windows, reference, "float", device, trust_remote_code, progress=progress)
            )
            rows += _measure(report, windows, reference, device, trust_remote_code, progress)
            if noise:
                for name, folder in report.outputs.items():
                    report.residual_errors[name] = evaluation.residual_errors(
                        folder, windows, reference, device, trust_remote_code, progress
                    )
        _finish(report, rows, model)
        return report

    with ranks.meeting(device) as together:
        given = None
        if evaluate and text is not None:
            given = together.from_first(lambda: evaluation.read_windows(model, text, protocol))
        options = (on_error, verify, _bytes(memory), together)
        report, held_out = _run(model, chosen, out, work, device, restart, trust_remote_code, progress, *options)
        return together.from_first(lambda: evaluated(report, given or (held_out if evaluate else None)))


def train(
    model: str | Path, recipe: str | Path | Recipe, out: str | Path, *, changes: Iterable[str] = (), **options: Any
) -> Report:
    """Quantize a model by a recipe, train it to predict what the float model does, and write it.

    changes: as for ``quantize``; "training.steps=1000" and the like for the training (``llmquant.distillation``). A
    recipe that says nothing of training gets the usual settings. options: those of ``quantize``, which does the same
    for a recipe with ``training``.

    >>> train("org/model", "gptq-w2g64", "out", changes=["calibration.path=text.txt"])  # doctest: +SKIP
    """
    chosen = _recipe(recipe, changes)
    if chosen.training is None:
        chosen = chosen.model_copy(update={"training": Training()})
    return quantize(model, chosen, out, **options)


def compare(
    model: str | Path,
    recipes: Sequence[str | Path | Recipe],
    out: str | Path,
    *,
    changes: Iterable[str] = (),
    device: str = "auto",
    text: Text | None = None,
    protocol: str = "llama.cpp",
    max_tokens: int | None = None,
    trust_remote_code: bool = False,
    command: str = "",
    progress: Progress = silent,
) -> list[Row]:
    """Quantize a model by several recipes and return one line each, the float model first.

    Writes ``out/RECIPE`` (or ``out/RECIPE/FORMAT``), ``out/report.html``, ``out/report.md`` and ``out/report.json``.
    The same call goes on after a crash with the recipes that are not finished; one with more recipes or another text
    adds those.
    command: as for ``quantize``.

    >>> compare("org/model", ["rtn-w4g128", "gptq-w4g128"], "out", text="test.txt")  # doctest: +SKIP
    """
    changes = list(changes)
    chosen = [_recipe(r, changes) for r in recipes]
    names = [r.name for r in chosen]
    for name in names:
        if names.count(name) > 1:
            raise RecipeError(f"{name}: two of the recipes have this name. Give one another `name`.")
    out = Path(out)
    for one in chosen:  # whatever cannot work stops here, before any work
        plan(model, one, trust_remote_code=trust_remote_code)
    windows = None if text is None else evaluation.read_windows(model, text, protocol, max_tokens)
    if not chosen:
        raise RecipeError("compare: there is no recipe. Name at least one.")
    if windows is None and not any(r.calibration for r in chosen):
        raise DataError("compare: there is no text to evaluate on. Give --text FILE.")
    reference = Reference(model, device, trust_remote_code)
    written = []
    with _taken_up(out, model, chosen):
        for one in chosen:
            report = _finished(out / one.name)
            if report is None:
                shutil.rmtree(out / one.name, ignore_errors=True)
                report, held_out = _run(model, one, out / one.name, None, device, False, trust_remote_code, progress)
                report.command = command
                _finish(report, [], model)
            elif windows is None:
                held_out = _held_out(model, one, trust_remote_code)
            windows = windows or held_out
            written.append(report)
        if windows is None:
            raise DataError("compare: the calibration text leaves nothing to evaluate on. Give --text FILE.")
        rows = [evaluation.evaluate(model, windows, reference, "float", device, trust_remote_code, progress=progress)]
        for report in written:
            measured = _measure(report, windows, reference, device, trust_remote_code, progress)
            _finish(report, [rows[0], *measured], model)
            rows += measured
        told = {"model": str(model), "command": command, "rows": [row.as_dict() for row in rows]}
        folders = {row.path: Path(os.path.relpath(row.path, out)).as_posix() for row in rows[1:]}
        write_json(out / "report.json", told)
        write_text(out / "report.md", reports.comparison(rows, reports.title(str(model))))
        write_text(out / html.FILE, html.compared(rows, written, str(model), command, folders))
    return rows


def evaluate(
    path: str | Path,
    *,
    reference: str | Path | Reference | None = None,
    text: Text | Windows = "wikitext2",
    protocol: str = "llama.cpp",
    max_tokens: int | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Row:
    """Return the perplexity of a model folder, float or packed, and its divergence from a reference.

    >>> evaluate("out", reference="org/model", text="test.txt").kld_mean  # doctest: +SKIP
    0.0021
    """
    if isinstance(reference, str | Path):
        reference = Reference(reference, device, trust_remote_code)
    if not isinstance(text, Windows):
        text = evaluation.read_windows(path, text, protocol, max_tokens)
    return evaluation.evaluate(path, text, reference, None, device, trust_remote_code, progress=progress)


def export(
    work: str | Path,
    formats: Sequence[str],
    out: str | Path,
    *,
    verify: bool = True,
    command: str = "",
    progress: Progress = silent,
) -> Report:
    """Write a finished work folder in other formats, with reports, without calibrating again.

    verify: read back what was written, before it gets its name. command: as for ``quantize``.

    >>> export("work", ["compressed_tensors"], "out")  # doctest: +SKIP
    """
    report = run.export_again(Path(work), formats, Path(out), progress, verify)
    report.command = command
    _finish(report, [], report.model)
    return report


def imatrix(
    model: str | Path,
    text: str | Path,
    out: str | Path,
    *,
    sequences: int = 128,
    length: int = 512,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Path:
    """Measure how large the activations of each column are, and write llama.cpp's imatrix file of it.

    >>> imatrix("org/model", "text.txt", "imatrix.gguf")  # doctest: +SKIP
    """
    out = Path(out)
    if out.exists():
        raise OutputError(f"{out}: is there already. Give another --out")
    if not out.parent.is_dir():
        raise OutputError(f"{out.parent}: there is no such folder")
    source = data.Calibration(path=Path(text), sequences=sequences, length=length)
    stats = run.square_means(model, source, device, trust_remote_code, progress)
    gguf = plugins.load("exporters", "gguf", "format")
    gguf.write_importance(out, run.load_config(model, trust_remote_code), stats, source.label, length)
    return out


def sensitivity(
    model: str | Path,
    recipe: str | Path | Recipe,
    out: str | Path,
    *,
    text: Text,
    by: Literal["linear", "site", "layer"] = "linear",
    grids: str = "recipe",
    changes: Iterable[str] = (),
    protocol: str = "llama.cpp",
    max_tokens: int | None = 8192,
    device: str = "auto",
    restart: bool = False,
    trust_remote_code: bool = False,
    command: str = "",
    announce: Callable[[Cost], None] = lambda cost: None,
    progress: Progress = silent,
) -> Sensitivity:
    """Quantize each linear (or site, or layer) alone, measure what it does to the predictions, and return that.

    Writes ``out/sensitivity.json`` after every measurement; the same call goes on from there. At the end,
    ``out/report.html`` and ``out/report.md``.
    text: what to measure on; not the calibration text.
    grids: separated by commas: "recipe", names of grids, bits for the recipe's own grid ("3", "w3g64"), or "budget"
        for the set that budgets are usually filled with.
    command: as for ``quantize``.
    announce: told what it will cost before the measurements begin.

    >>> sensitivity("org/model", "gguf-q4_k_s", "out", text="dev.txt", grids="budget")  # doctest: +SKIP
    """
    chosen = _recipe(recipe, changes)
    calibration = chosen.calibration and chosen.calibration.path
    if calibration and not isinstance(text, data.TextSource) and calibration.absolute() == Path(text).absolute():
        raise DataError(f"--text {text}: the recipe calibrates on this text. Measure on another one.")
    windows = evaluation.read_windows(model, text, protocol, max_tokens)
    out = Path(out)
    found = sensitivities.measure(
        model, chosen, windows, out, by, grids, device, restart, trust_remote_code, announce, progress
    )
    write_text(out / "report.md", reports.sensitivity(found))
    write_text(out / html.FILE, html.sensitive(found, command))
    return found


def budget(
    model: str | Path,
    recipe: str | Path | Recipe,
    size: str,
    sensitivity: str | Path | Sensitivity,
    out: str | Path,
    *,
    changes: Iterable[str] = (),
    trust_remote_code: bool = False,
) -> Budgeted:
    """Return the mixed-precision recipe with the least expected divergence within a size, and write it as YAML.

    size: of the weights' files, headers included: "4.5bpw" (in bits, over all weights of the model), "3.2GB", "3GiB".
    sensitivity: what was measured with this model and recipe, or its sensitivity.json.

    >>> budget("org/model", "gguf-q4_k_s", "4.5bpw", "out/sensitivity.json", "mixed.yaml")  # doctest: +SKIP
    """
    out = Path(out)
    if out.suffix not in (".yaml", ".yml"):
        raise OutputError(f"{out}: a recipe is a file whose name ends in .yaml")
    found = sensitivity if isinstance(sensitivity, Sensitivity) else sensitivities.read(Path(sensitivity))
    filled = budgets.fill(model, _recipe(recipe, changes), found, size, out.stem, trust_remote_code)
    write_text(out, recipes.dump(filled.recipe))
    return filled


def recommend(
    model: str | Path,
    memory: str | int,
    *,
    target: str | None = None,
    context: int | None = None,
    reports: Iterable[str | Path] = (),
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Recommendation:
    """Return which recipes make a model that fits into so much memory where it is to run, best first.

    memory: what the run may take, such as "8GB". target: see ``llmquant.targets``; None for all.
    context: tokens that it is to hold, by default 4096. reports: folders of earlier runs on this model, whose measured
        divergences are told.

    >>> recommend("org/model", "8GB", target="laptop").best("laptop").recipe  # doctest: +SKIP
    'gptq-q5_k_m'
    """
    room = _bytes(memory)
    assert room is not None
    return recommendations.recommend(model, room, target, context, reports, trust_remote_code, progress)


def push(folder: str | Path, repo: str, *, private: bool = False, progress: Progress = silent) -> str:
    """Upload a finished folder with its model card to the Hugging Face hub; return its address.

    >>> push("out", "me/model-gguf", private=True)  # doctest: +SKIP
    'https://huggingface.co/me/model-gguf'
    """
    return hub.push(Path(folder), repo, private, progress)


def _recipe(recipe: str | Path | Recipe, changes: Iterable[str]) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else recipes.load(recipe, list(changes))


def _run(
    model: str | Path,
    recipe: Recipe,
    out: str | Path,
    work: str | Path | None,
    device: str,
    restart: bool,
    trust_remote_code: bool,
    progress: Progress,
    on_error: run.OnError = "stop",
    verify: bool = True,
    memory_limit: int | None = None,
    together: Ranks = ALONE,
) -> tuple[Report, Windows | None]:
    """Quantize by a recipe, with a budget or without; return the report, and held-out text if there is."""
    if recipe.budget is not None:
        return together.from_first(
            lambda: allocation.quantize(model, recipe, out, device, restart, trust_remote_code, progress)
        )
    options = (on_error, verify, memory_limit, together)
    return run.quantize(model, recipe, out, work, device, restart, trust_remote_code, progress, *options)


def _bytes(size: str | int | None) -> int | None:
    """Return a size such as "8GB" or "3GiB" in bytes."""
    if size is None:
        return None
    try:
        return int(TypeAdapter(ByteSize).validate_python(size))
    except ValidationError:
        raise RecipeError(f"memory: {size!r} is not a size such as 8GB or 3GiB") from None


def _measure(
    report: Report, windows: Windows, reference: Reference, device: str, trust_remote_code: bool, progress: Progress
) -> list[Row]:
    """Return a line for every folder that a run wrote, with the run's own time and memory."""
    name = str(report.recipe["name"])
    rows = [
        evaluation.evaluate(folder, windows, reference, name, device, trust_remote_code, progress=progress)
        for folder in report.outputs.values()
    ]
    return [dataclasses.replace(row, seconds=report.seconds, peak_rss_bytes=report.peak_rss_bytes) for row in rows]


def _finish(report: Report, rows: Sequence[Row], model: str | Path) -> None:
    """Put the reports and the model card into every folder that a run wrote."""

    def write(folder: Path, name: str, text: str, hashes: dict[str, str]) -> None:
        write_text(folder / name, text)
        hashes[name] = Digest(folder / name).hexdigest()

    report.evaluation = [row.as_dict() for row in rows]
    readme = locate(model) / "README.md"
    inherited = reports.front_matter(readme.read_text("utf-8", errors="replace")) if readme.is_file() else {}
    for format_, path in report.outputs.items():
        mine = [row for row in rows if row.recipe == "float" or row.path == path]
        folder, hashes = Path(path), report.hashes[format_]
        write(folder, "README.md", reports.model_card(report, mine, format_, str(model), inherited), hashes)
        write(folder, html.FILE, html.quantized(report, mine, format_), hashes)
        write_json(folder / REPORT, report.as_dict())


@contextmanager
def _taken_up(out: Path, model: str | Path, chosen: Sequence[Recipe]) -> Iterator[None]:
    """Note in ``out`` what is compared there, for a context in which no one else does.

    Raises OutputError where it is not free, or where the note tells another model, or other recipes by these names.
    """
    files = {one.name: [one.imatrix, *(x.path for x in one.texts)] for one in chosen}
    recipes_ = {
        one.name: {
            "recipe": one.model_dump(mode="json", exclude_defaults=True),
            "files": {str(path): Digest(path).hexdigest() for path in files[one.name] if path and path.is_file()},
        }
        for one in chosen
    }
    note = {
        "model": work_folders.fingerprint_of_model(run.load_float(model)),
        "recipes": recipes_,
        "llmquant": llmquant.__version__,
    }
    path = out / COMPARED
    if path.exists():
        known = read_json(path, "a folder that `llmquant compare` has begun holds one")
        earlier = known.get("recipes")
        if not isinstance(earlier, dict):
            raise CheckpointError(f"{path}: does not tell the recipes. Choose another --out, or remove this folder.")
        same = known | {"recipes": {name: one for name, one in earlier.items() if name in recipes_}}
        now = note | {"recipes": {name: one for name, one in recipes_.items() if name in earlier}}
        work_folders.check_same(out, same, now, "or choose another --out.")
        note["recipes"] = earlier | recipes_
    else:
        check_output(out)
    with held(out):
        write_json(path, note)
        yield


def _finished(folder: Path) -> Report | None:
    """Return the report on what a recipe wrote, where that is complete."""
    paths = [folder / REPORT, *folder.glob(f"*/{REPORT}")]
    found = [Report(**read_json(path, "llmquant wrote it")) for path in paths if path.exists()]
    whole = found and all((Path(path) / REPORT).exists() for path in found[0].outputs.values())
    return found[0] if whole else None


def _held_out(model: str | Path, recipe: Recipe, trust_remote_code: bool) -> Windows | None:
    """Return the held-out text that ``_run`` returns."""
    if recipe.budget is not None:
        return allocation.splits(model, recipe, trust_remote_code).held_out
    return run.held_out(model, recipe, trust_remote_code)


__all__ = [
    *("Budgeted", "Recommendation", "Reference", "Report", "Row", "Sensitivity"),
    *("budget", "compare", "evaluate", "export", "imatrix", "plan", "push", "quantize", "recommend", "sensitivity"),
]
