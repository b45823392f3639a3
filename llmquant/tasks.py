"""Right and wrong answers: tasks of lm-evaluation-harness, and questions of one's own, for any model that can be read.

Where a reference is given, both models answer the same items, so that what changed can
be counted, and tested.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmquant import answers, inference, items
from llmquant.answers import Answers, TaskRow
from llmquant.errors import DataError, LlmquantError
from llmquant.progress import Progress, silent


def measure(
    paths: Sequence[str | Path],
    reference: str | Path | None = None,
    *,
    tasks: Sequence[str] = (),
    files: Sequence[Path] = (),
    include_path: Path | None = None,
    limit: int | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> list[TaskRow]:
    """Return what models score, the reference first.

    tasks: of lm-evaluation-harness. files: of items (``llmquant.items``). include_path: a folder with further tasks.
    limit: use only so many items of each.

    Raises DataError for a task or file that is not there or broken, LlmquantError where lm-evaluation-harness is not.
    """
    questions = {path.name: items.read(path)[:limit] for path in files}
    if len(questions) < len(files):
        raise DataError("--items: two of the files have the same name")
    harness = _Harness(tasks, include_path, limit) if tasks else None
    every = [str(path) for path in paths]
    if reference is not None:
        every = [str(reference), *(path for path in every if path != str(reference))]
    rows: list[TaskRow] = []
    theirs: dict[tuple[str, tuple[str, ...]], Answers] = {}
    for path in every:
        model = inference.load(path, device=device, trust_remote_code=trust_remote_code)
        tokenizer = inference.load_tokenizer(path, trust_remote_code)
        asked = items.Asked(model, tokenizer)
        found = [one for name, some in questions.items() for one in items.ask(asked, some, name, progress)]
        if harness is not None:
            progress(f"tasks: {Path(path).name}", 0, 1)
            found += harness.run(model, tokenizer)
            progress(f"tasks: {Path(path).name}", 1, 1)
        is_reference = path == str(reference)
        for one in found:
            key = one.task, tuple(one.scores)
            if is_reference:
                theirs[key] = one
            rows += answers.rows("float" if is_reference else Path(path).name, one, theirs.get(key))
        del model, asked
    return rows


class _Harness:
    """Tasks of lm-evaluation-harness, found before any model is loaded."""

    def __init__(self, names: Sequence[str], include_path: Path | None, limit: int | None) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError:
            raise LlmquantError(
                "--tasks needs lm-evaluation-harness, which is not installed here. Run: pip install 'llmquant[tasks]'. "
                "Questions of your own need nothing: --items FILE.jsonl"
            ) from None
        if include_path is not None and not include_path.is_dir():
            raise DataError(f"--include-path {include_path}: there is no such folder")
        self._names, self._limit = list(names), limit
        if include_path is not None:  # to look through all the tasks that it brings takes long
            self._manager = TaskManager(include_path=str(include_path), include_defaults=False)
        if include_path is None or self._missing():
            self._manager = TaskManager(include_path=None if include_path is None else str(include_path))
        if missing := self._missing():
            raise DataError(
                f"--tasks {missing[0]}: lm-evaluation-harness has no such task. `lm-eval ls tasks` lists them; "
                "--include-path FOLDER adds some"
            )

    def _missing(self) -> list[str]:
        return [name for name in self._names if not self._manager.match_tasks([name])]

    def run(self, model: Any, tokenizer: Any) -> list[Answers]:
        """Return what a transformers model answers; raise DataError where a task cannot be done."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        adapter = HFLM(pretrained=model, tokenizer=tokenizer, device=str(model.device), batch_size=1)
        try:
            found = simple_evaluate(
                adapter,
                tasks=self._manager.match_tasks(self._names),
                limit=self._limit,
                task_manager=self._manager,
                bootstrap_iters=0,
                log_samples=True,
                random_seed=None,  # this process's generators stay as they are
                numpy_random_seed=None,
                torch_random_seed=None,
            )
        except (
            OSError,
            ValueError,
            KeyError,
            ArithmeticError,
            ImportError,
        ) as error:  # a dataset, or a task's own code
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(f"--tasks {','.join(self._names)}: lm-evaluation-harness cannot do it: {first}") from None
        samples: Mapping[str, Sequence[Mapping[str, Any]]] = found["samples"]
        of_tasks = [_of_task(task, found["results"][task], samples[task]) for task in samples]
        groups = (name for name in found.get("groups", {}) if name not in samples)
        return of_tasks + [_of_group(name, found["groups"][name]) for name in groups]


def _of_task(task: str, results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> Answers:
    """Return the answers of a task from the harness's results and samples."""
    scores: dict[str, list[float]] = {}
    known = {}
    for key, (value, error) in _metrics(results).items():
        metric, _, filter_ = key.partition(",")
        name = metric if filter_ in ("", "none") else f"{metric} ({filter_})"
        mine = sorted((one for one in samples if one.get("filter", "none") == filter_), key=lambda one: one["doc_id"])
        values = [one.get(metric) for one in mine]
        figures = [float(one) for one in values if isinstance(one, int | float)]
        if figures and len(figures) == len(values) and abs(sum(figures) / len(figures) - value) < 1e-9:
            scores[name] = figures
        else:  # not the mean of a figure for each item
            known[name] = value, error
    filters = Counter(one.get("filter", "none") for one in samples)
    first = [one for one in samples if one.get("filter", "none") == next(iter(filters))]
    return Answers(task, scores, [_given(one) for one in sorted(first, key=lambda one: one["doc_id"])], known)


def _of_group(name: str, results: Mapping[str, Any]) -> Answers:
    metrics = {key.removesuffix(",none"): told for key, told in _metrics(results).items()}
    return Answers(name, {}, [], metrics)


def _metrics(results: Mapping[str, Any]) -> dict[str, tuple[float, float | None]]:
    """Return (value, standard error) by the harness's names, "metric,filter"."""
    found = {}
    for key, value in results.items():
        metric, comma, filter_ = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = results.get(f"{metric}_stderr,{filter_}")
        found[key] = float(value), float(error) if isinstance(error, int | float) else None
    return found


def _given(sample: Mapping[str, Any]) -> str:
    """Return what a model answered to one item: the number of the likeliest choice, or what it wrote."""
    responses = sample["filtered_resps"]
    if all(isinstance(one, list | tuple) and one and isinstance(one[0], int | float) for one in responses):
        return str(max(range(len(responses)), key=lambda i: responses[i][0]))
    return str(responses[0])
