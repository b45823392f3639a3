"""The tables and the plot of accuracy.py: a model after the other, then geometric means over the models.

Ours is compared with the file of the same format that llama-quantize made with an
imatrix, and among formats of integer groups with the one of least divergence that
another program made. A file of ours that is larger than the other is not compared.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llmquant.report import markdown

BASELINE = "llama-quantize imatrix"
OURS = "llmquant "
KINDS = ("float", "mixture", "pure", "affine")
VARIANTS = ("rounding", "gptq", "default", "best", "auto")
HOW = {"decoded": "decoded", "as_run": "run by llama.cpp"}
SETTLED = ("files", "outliers", "texts", "sequences", "length", "seed", "imatrix", "peer_dtype", "protocol")
"""What must be the same for all rows of a model."""
COLUMNS = ("format", "program", "bytes", "perplexity", "KLD", "median", "99 %", "top-1")
AGAINST = ("KLD / theirs", "perplexity - theirs")
Row = dict[str, Any]


class Results:
    """The rows of one model, of one or several files."""

    def __init__(self, parts: Sequence[dict[str, Any]]) -> None:
        self.about = parts[0]
        self.model = str(self.about["model"])
        self.commands = dict.fromkeys(command for part in parts for command in part["commands"])
        known: dict[str, Row] = {}
        for row in (row for part in parts for row in part["rows"]):
            before = known.setdefault(row["key"], row)
            if before["error"] is not None:
                known[row["key"]] = row
            elif row["error"] is None and shown(row) != shown(before):
                raise SystemExit(
                    f"{self.model}: two files hold {row['key']}, measured with {before['version']} and with "
                    f"{row['version']}, and their figures are not the same. Remove the row from one of them."
                )
        self.rows: list[Row] = sorted((row for row in known.values() if row["error"] is None), key=place)
        self.failed: list[Row] = [row for row in known.values() if row["error"] is not None]

    def of(self, kind: str, format_: str) -> list[Row]:
        return [row for row in self.rows if (row["kind"], row["format"]) == (kind, format_)]

    def named(self, kind: str, format_: str, program: str) -> Row | None:
        return next((row for row in self.of(kind, format_) if row["program"] == program), None)

    def theirs(self, kind: str, format_: str) -> Row | None:
        """Return the row that ours are compared with, or None where there is none."""
        if kind != "affine":
            return self.named(kind, format_, BASELINE)
        others = [row for row in self.of(kind, format_) if not is_ours(row)]
        return min(others, key=lambda row: float(row["decoded"]["kld_mean"]), default=None)

    def ratio(self, mine: Row, other: Row, how: str) -> tuple[float, float]:
        """Return the ratio of mean KLD and its standard error, by the delta method over windows."""
        a, b = (of_windows(row, how, "kld") for row in (mine, other))
        ratio = a.mean() / b.mean()
        return float(ratio), standard_error(a - ratio * b) / float(b.mean())

    def perplexity_difference(self, mine: Row, other: Row, how: str) -> tuple[float, float]:
        """Return the difference of perplexities and its standard error, paired, by the delta method over windows."""
        a, b = (of_windows(row, how, "nll") for row in (mine, other))
        ppl_a, ppl_b = math.exp(a.mean()), math.exp(b.mean())
        return ppl_a - ppl_b, standard_error(ppl_a * (a - a.mean()) - ppl_b * (b - b.mean()))


def of_windows(row: Row, how: str, name: str) -> np.ndarray:
    """Return the mean of a figure over each window of the text."""
    return np.array(row[how][f"{name}_windows"].split(), np.float64)


def shown(row: Row) -> list[Any]:
    """Return what rows of one file must agree on: its size, and its figures as far as the tables show them."""
    figures = [row[how] for how in HOW if how in row]
    return [row["compared_bytes"], *((f"{f['perplexity']:.3f}", f"{f['kld_mean']:.6f}") for f in figures)]


def place(row: Row) -> tuple[int, str, bool, int, str]:
    """Return what rows are sorted by: format by format, ours behind the others, our variants by what they do."""
    variant = str(row["program"]).removeprefix(OURS).partition("+")[0]
    rank = VARIANTS.index(variant) if is_ours(row) else 0
    return KINDS.index(row["kind"]), row["format"], is_ours(row), rank, row["program"]


def is_ours(row: Row) -> bool:
    return str(row["program"]).startswith(OURS)


def standard_error(x: np.ndarray) -> float:
    return float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else math.nan


def too_large(mine: Row, other: Row) -> bool:
    """Return whether ours is larger than the file it would be compared with."""
    return bool(mine["compared_bytes"] > other["compared_bytes"])


def write_report(files: Sequence[Path], out: Path) -> None:
    """Write the tables to ``out``, and the plot beside it."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in files:
        part = json.loads(path.read_text("utf-8"))
        of_model = found.setdefault(part["model"], [])
        for name in SETTLED:
            if of_model and part[name] != of_model[0][name]:
                raise SystemExit(f"{path}: {part['model']} was measured with another {name} than in the file before")
        of_model.append(part)
    studies = [Results(parts) for parts in found.values()]
    lines = ["# Divergence from the float model at the same size: llmquant beside other programs", ""]
    lines += [f"![KL divergence against size]({out.with_suffix('.svg').name})", ""]
    lines += [*means(studies), *(line for results in studies for line in tables(results))]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines), "utf-8")
    draw(studies, out.with_suffix(".svg"))


def means(studies: Sequence[Results]) -> list[str]:
    """Return the table of geometric means over the models, and of the worst model."""
    lines = ["## Over the models", ""]
    lines.append(
        f"Ratio of mean KLD, ours over theirs (GGUF: {BASELINE}, the same imatrix text; integer groups: the best of "
        f"the other programs), geometric mean over {', '.join(results.model for results in studies)}; behind it the "
        "ratio on the worst model. `against default`: over llmquant's own default, decoded."
    )
    columns = ["format", "program", *(f"{told}: {x}" for told in HOW.values() for x in ("ratio", "worst"))]
    columns += ["against default", "models"]
    rows = []
    keys = dict.fromkeys(
        (row["kind"], row["format"], row["program"])
        for row in sorted((row for results in studies for row in results.rows if is_ours(row)), key=place)
    )
    for kind, format_, program in keys:
        line = [label(kind, format_), program]
        for how in HOW:
            found = [ratio for results in studies for ratio in ratios(results, kind, format_, program, None, how)]
            line += [number(geometric_mean(found)), number(max(found))] if found else ["", ""]
        own = [r for results in studies for r in ratios(results, kind, format_, program, f"{OURS}default", "decoded")]
        line.append(number(geometric_mean(own)) if own else "")
        count = sum(bool(ratios(results, kind, format_, program, None, "decoded")) for results in studies)
        rows.append([*line, f"{count} of {len(studies)}"])
    return [*lines, "", markdown(columns, rows), ""]


def ratios(results: Results, kind: str, format_: str, program: str, against: str | None, how: str) -> list[float]:
    """Return the ratio of one model in a list, or none where a file is missing or ours is the larger."""
    mine = results.named(kind, format_, program)
    other = results.theirs(kind, format_) if against is None else results.named(kind, format_, against)
    if mine is None or other is None or how not in mine or how not in other or too_large(mine, other):
        return []
    return [results.ratio(mine, other, how)[0]]


def tables(results: Results) -> list[str]:
    """Return the tables of one model."""
    about = results.about
    versions = sorted({f"{r['program'].split()[0]} {r['version']}" for r in results.rows if r["kind"] != "float"})
    texts = about["texts"]
    peers = f"peers computing in {about['peer_dtype']}"
    if any(row["program"].startswith("auto-round") for row in results.rows):
        peers += " (auto-round by its own default, `amp`, in bfloat16 where the processor has instructions for it)"
    lines = [
        f"## {results.model}",
        "",
        f"{'; '.join(versions)}; {', '.join(f'{name} {v}' for name, v in about['versions'].items())}. "
        f"{about['sequences']} sequences of {about['length']} tokens of {texts['calib']['name']} to calibrate on (seed "
        f"{about['seed']}), {texts['select']['name']} to select on, imatrix by {about['imatrix']}, {peers}, "
        f"{about['threads']} thread(s). Protocol: {about['protocol']}.",
        "",
        *(f"    {command}" for command in results.commands),
        "",
        "Bytes: GGUF the whole file, integer groups everything stored for the quantized linears. ±: standard error; of "
        "perplexity and KLD over tokens, of comparisons paired and over windows of the text.",
        "",
    ]
    for how, told in HOW.items():
        rows = [cells(results, row, how) for row in results.rows if how in row]
        if rows:
            lines += [f"### {results.model}, {told}", "", markdown((*COLUMNS, *AGAINST, "seconds"), rows), ""]
    refused = [row for row in results.rows if is_ours(row) and larger_than(results, row)]
    for row in refused:
        other = larger_than(results, row)
        lines += [
            f"- {label(row['kind'], row['format'])}: {row['program']} has {row['compared_bytes']:,} bytes, "
            f"{other['program']} {other['compared_bytes']:,}: not compared."  # type: ignore[index]
        ]
    for row in results.failed:
        why = row["error"].splitlines()[-1]
        lines.append(f"- {label(row['kind'], row['format'])}: {row['program']} failed: {why}")
    return [*lines, *([""] if refused or results.failed else [])]


def larger_than(results: Results, mine: Row) -> Row | None:
    """Return the file that ours is not compared with for its size, if so."""
    other = results.theirs(mine["kind"], mine["format"])
    return other if other is not None and too_large(mine, other) else None


def cells(results: Results, row: Row, how: str) -> list[str]:
    """Return a line of a model's table."""
    f = row[how]
    line = [label(row["kind"], row["format"]), row["program"], f"{row['compared_bytes']:,}"]
    line += [f"{f['perplexity']:.3f} ± {f['perplexity_error']:.3f}", f"{f['kld_mean']:.6f} ± {f['kld_error']:.6f}"]
    line += [f"{f['kld_median']:.6f}", f"{f['kld_p99']:.5f}", f"{f['top1']:.2%}"]
    other = results.theirs(row["kind"], row["format"])
    if is_ours(row) and other is not None and not too_large(row, other):
        ratio, error = results.ratio(row, other, how)
        difference, noise = results.perplexity_difference(row, other, how)
        line += [f"{ratio:.3f} ± {error:.3f}", f"{difference:+.3f} ± {noise:.3f}"]
    else:
        line += ["theirs" if row is other else "", ""]
    return [*line, f"{row['seconds']:.1f}" if "seconds" in row else ""]


def without_folders(text: str) -> str:
    """Return a text with only the last part of every absolute path: where files lay is nobody's concern.

    >>> without_folders("run /home/me/model --set text=/data/a.txt")
    'run model --set text=a.txt'
    """
    return re.sub(r"(?<![\w.])/(?:[^\s/'\"]+/)+", "", text)


def label(kind: str, format_: str) -> str:
    return f"{format_} pure" if kind == "pure" else format_


def number(ratio: float) -> str:
    return f"{ratio:.3f}"


def geometric_mean(ratios: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def draw(studies: Sequence[Results], path: Path) -> None:
    """Plot mean KLD against size, a column of axes for each model, a line of them for each kind of format."""
    kinds = [kind for kind in ("mixture", "pure", "affine") if any(r["kind"] == kind for s in studies for r in s.rows)]
    programs = list(dict.fromkeys(row["program"] for s in studies for row in s.rows if row["kind"] != "float"))
    figure = Figure(figsize=(3.1 * len(studies) + 1.6, 2.9 * len(kinds)), layout="constrained")
    grid = figure.subplots(len(kinds), len(studies), squeeze=False)
    known: dict[str, Artist] = {}
    for kind, line in zip(kinds, grid, strict=True):
        for results, axes in zip(studies, line, strict=True):
            known |= plot(axes, [row for row in results.rows if row["kind"] == kind], programs)
            axes.set_title(f"{results.model}: {TITLES[kind]}", fontsize=8)
        line[0].set_ylabel("mean KLD, decoded, nats", fontsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("size, MB", fontsize=8)
    shown = [program for program in programs if program in known]
    figure.legend([known[program] for program in shown], shown, loc="outside right upper", fontsize=7)
    figure.savefig(path, metadata={"Date": None})


TITLES = {"mixture": "GGUF mixtures", "pure": "GGUF, one type", "affine": "integer groups, linears only"}
THEIRS = ("tab:gray", "black", "tab:brown", "tab:olive", "tab:pink", "tab:cyan", "tab:purple", "darkkhaki", "lightgray")
THEIRS += ("teal", "indigo")
MINE = ("tab:blue", "tab:orange", "tab:green", "tab:red", "gold")


def plot(axes: Axes, rows: Sequence[Row], programs: Sequence[str]) -> dict[str, Artist]:
    """Plot a line for each program, decoded, and return it; its colour is the same in all axes."""
    drawn: dict[str, Artist] = {}
    mine, theirs = ([p for p in programs if p.startswith(OURS) is own] for own in (True, False))
    for programs_, colours, style in ((theirs, THEIRS, "o--"), (mine, MINE, "s-")):
        for i, program in enumerate(programs_):
            points = sorted(
                (row["compared_bytes"] / 1e6, row["decoded"]["kld_mean"]) for row in rows if row["program"] == program
            )
            if points:
                (drawn[program],) = axes.plot(*zip(*points, strict=True), style, color=colours[i % len(colours)], ms=4)
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=7, which="both")
    return drawn
