"""What a terminal shows: tables, a bar while something is done, how a run ended. It obeys nothing that a file says."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from logging import ERROR, getLogger
from typing import TYPE_CHECKING

import typer
from rich import markup
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from llmquant import report as reports
    from llmquant.answers import TaskRow
    from llmquant.evaluation import Row
    from llmquant.plan import Plan
    from llmquant.progress import Progress as Tell
    from llmquant.recommend import Recommendation
    from llmquant.run import Report

RANK = int(os.environ.get("RANK", "0"))  # among the processes that torchrun started
WIDE = 150  # columns of a table that goes into a file
out, err = Console(), Console(stderr=True)


def escape(text: str) -> str:
    """Return a text from a file as one that a terminal shows and does not obey."""
    return markup.escape("".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text))


def say(text: str) -> None:
    """Print a line; the terminal breaks it where it is too long."""
    out.print(escape(text), soft_wrap=True)


def show(table: reports.Table, breaks: Sequence[str] = ()) -> None:
    """Print a table; a file gets whole lines. breaks: columns whose texts may take several lines."""
    shown = Table()
    for i, column in enumerate(table.columns):
        shown.add_column(column, justify="left" if i < table.texts else "right", no_wrap=column not in breaks)
    for row in table.rows:
        shown.add_row(*map(escape, row))
    (out if out.is_terminal else Console(width=max(out.width, WIDE), quiet=out.quiet)).print(shown)


def show_figures(rows: Sequence[Row]) -> None:
    """Print what was measured on a text."""
    from llmquant.report import figures

    show(figures(rows))
    for protocol in sorted({row.protocol for row in rows}):
        say(f"Protocol: {protocol}")


def show_answers(rows: Sequence[TaskRow]) -> None:
    """Print what models answered, and what the intervals are."""
    from llmquant.report import answers_table

    show(answers_table(rows))
    notes = {
        "Wilson": "of shares by Wilson",
        "bootstrap": "of other means by 2000 bootstrap resamples",
        "standard error": "of the rest by the task's own standard error",
    }
    used = {row.interval for row in rows}
    intervals = ", ".join(note for name, note in notes.items() if name in used)
    say(f"In brackets: 95 % intervals, {intervals}; of differences by paired bootstrap.")
    if any(row.p is not None for row in rows):
        say("lost, gained: right before and wrong now, and the other way. p: McNemar's exact test.")


def show_recommendation(found: Recommendation, target: str | None) -> None:
    """Print the best recipe for every target; or all that fit on one, and the commands for the best."""
    from llmquant.report import size, target_table, targets_table
    from llmquant.targets import TARGETS

    if target is None:
        show(targets_table(found), breaks=["device"])
    else:
        show(target_table(row for row in found.rows[target] if row.fits))
        if more := [row for row in found.rows[target] if not row.fits]:
            say(f"{len(more)} more do not fit; {more[0].recipe} would take {size(more[0].total_bytes)}.")
    say(
        f"For {found.context} tokens. Files, keys and values (16 bits): exact. Runtime: an estimate. tokens/s: "
        "predicted from the bandwidth of the memory, with the context filled; no run is faster. Order: the divergence "
        "to be expected from bits and method; measured ones (KLD) among themselves."
    )
    for protocol in sorted({row.protocol for rows in found.rows.values() for row in rows if row.protocol}):
        say(f"KLD: {protocol}")
    if found.refused:
        say(f"{len(found.refused)} recipes cannot be applied to this model; --json tells why.")
    if target is None:
        say("Give a --target to see all that fits there, and the commands.")
        return
    place, best = TARGETS[target], found.best(target)
    assert best is not None
    say(f"{target}: {place.runtime}, {place.about}. {place.note}".rstrip())
    for command in best.commands:
        say(f"  {command}")


def show_plan(planned: Plan) -> None:
    """Print what would happen, and what it would cost."""
    from llmquant.report import plan_table, size

    show(plan_table(planned), breaks=["grid"])
    for note in planned.notes:
        say(f"note: {note}")
    say(f"{planned.bits_per_weight:.4f} bits per quantized weight; {planned.weights:,} weights in all")
    for name, count in planned.files.items():
        say(f"{name}: {size(count)}, {planned.file_bits_per_weight(name):.4f} bits per weight over everything")
    where = {"waiting": "", "memory": ", each layer once for each site", "files": ", activations in files"}
    disk = planned.work_bytes + planned.scratch_bytes + sum(planned.files.values())
    host = f" of the GPU and {size(planned.host_bytes)} of the host" if planned.host_bytes else ""
    say(f"peak memory about {size(planned.peak_bytes)}{host}{where[planned.placement]}; disk {size(disk)}")
    if planned.seconds:
        say(f"time about {timedelta(seconds=round(sum(planned.seconds.values())))} on this machine")


def show_report(report: Report, evaluated: bool) -> None:
    """Print what a run has done. evaluated: whether that was asked for."""
    from llmquant.evaluation import Row
    from llmquant.report import allocation_lines, training_line

    if report.resumed_layers:
        say(f"{report.resumed_layers} finished layers were taken from the work folder.")
    for note in report.notes:
        say(f"note: {note}")
    for line in allocation_lines(report):
        say(line)
    if report.evaluation:
        show_figures([Row(**row) for row in report.evaluation])
    elif evaluated:
        say("Not evaluated: this recipe reads no text. Add --text FILE.")
    if report.training:
        say(training_line(report.training))
    for name, errors in report.residual_errors.items():
        say(f"{name}: error of the residual stream after each layer: {', '.join(f'{e:.2%}' for e in errors)}")
    for name, target in report.outputs.items():
        say(f"{name}: {target}, in {report.seconds:.1f} s")


signals: list[int] = []
"""Those that this process was told to stop by: a library may turn the exception into one of its own."""


def listen() -> None:
    """Let Ctrl-C and SIGTERM raise KeyboardInterrupt, and remember which it was."""
    signals.clear()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)


def _stop(number: int, frame: object) -> None:
    signals.append(number)
    raise KeyboardInterrupt


@contextmanager
def progress(again: bool = True) -> Iterator[Tell]:
    """Show a bar for what is being done, on a terminal; nothing elsewhere.

    again: whether the same command can be given again when it was stopped.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()  # this process is the command line's own
    getLogger("lm_eval").setLevel(ERROR)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal or err.quiet) as bars:
        task = bars.add_task("starting", total=None)
        doing, at = "", 0

        def tell(what: str, done: int, total: int) -> None:
            nonlocal doing, at
            at = done
            if what.partition(":")[0] != doing.partition(":")[0]:
                bars.reset(task, total=total)
            bars.update(task, description=what)
            doing = what
            bars.update(task, completed=done, total=total)

        try:
            yield tell
        except BaseException:
            if not signals:
                raise
            bars.stop()
            err.print(f"Stopped{f' while {doing}' if doing else ''}. {_how_to_go_on(doing, at, again)}", soft_wrap=True)
            raise typer.Exit(128 + signals[0]) from None


def _how_to_go_on(doing: str, done: int, again: bool) -> str:
    if not again:
        return "What is finished stays as it is, but the same command needs another --out."
    if doing == "quantizing layers":
        return f"Finished layers are kept; the same command goes on from layer {done}."
    if doing.startswith("training"):
        return "The same command goes on from at most a minute before."
    if doing.startswith(("evaluating", "scoring", "residual")):
        return "What was quantized is complete, and `llmquant eval` can measure it."
    return "Nothing is half-written; the same command goes on with what is finished."
