"""The reports of runs as web pages, each one file: no scripts, nothing loaded from anywhere (``templates/``).

A command's page is one function here, which says what is shown, and one template, which says where. Plots are
drawings (``llmquant.plots``); what has a number for every layer and linear is a table whose cells are coloured. Names
come from outside: templates escape everything.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from llmquant import plots
from llmquant.report import Table, allocation_lines, figures, sensitivity_table, size, title, training_line

if TYPE_CHECKING:
    from llmquant.evaluation import Row
    from llmquant.run import Report
    from llmquant.sensitivity import Sensitivity

FILE = "report.html"
STEPS = 8  # colours of a scale
MOST = 12  # units that are listed as the most sensitive
POINTS = 100  # of a curve of losses


def quantized(report: Report, rows: Sequence[Row], format_: str) -> str:
    """Return the page of a written folder.

    rows: the float model's line and the folder's, where they were measured.
    """
    float_row, row = (rows[0], rows[-1]) if rows else (None, None)
    errors, bits = (_of_linears(report, key) for key in ("error", "bits_per_weight"))
    costs = report.costs or _seconds_by_layer(report)
    return _page(
        "quantized.html",
        title=title(report.model),
        recipe_name=report.recipe["name"],
        format=format_,
        report=report,
        tiles=_tiles(report, float_row, row, format_),
        figures=figures(rows),
        protocols=_protocols(rows),
        allocation=allocation_lines(report),
        training=_training(report.training) if report.training else None,
        errors=heat(errors, Scale.of(x for _, x in errors.values()), percent) if errors else None,
        bits=heat(bits, Scale.of((x for _, x in bits.values()), even=True), plots.short) if _differ(bits) else None,
        worst=_worst(report),
        seconds=plots.bars([(_part(cost), cost["seconds"]) for cost in costs]) if costs else None,
        memory=_memory(report.costs),
        costs=_cost_table(costs),
        residual=_residual(report.residual_errors.get(format_, [])),
        recipe=yaml.safe_dump(report.recipe, sort_keys=False, allow_unicode=True).strip(),
        hashes=Table(("file", "SHA-256"), [[n, digest] for n, digest in report.hashes[format_].items() if n != FILE]),
    )


def compared(
    rows: Sequence[Row], reports: Sequence[Report], model: str, command: str, folders: Mapping[str, str]
) -> str:
    """Return the page of a comparison.

    rows: the float model's first. folders: those of the others, as they are named from where this page is, by path.
    """
    float_row, others = rows[0], rows[1:]
    pages = {path: quote(f"./{folder}/{FILE}") for path, folder in folders.items()}
    formats = list(dict.fromkeys(row.format for row in others))
    errors = {report.recipe["name"]: _of_linears(report, "error") for report in reports}
    scale = Scale.of(x for of_report in errors.values() for _, x in of_report.values())
    unit, one = _unit(max(row.bytes for row in others))

    def point(row: Row, y: float, error: float = 0.0) -> plots.Point:
        told = f"{row.recipe}, {row.format}: {size(row.bytes)}, {y:.5g}"
        label = row.recipe if row is first[row.recipe] else ""
        return plots.Point(row.bytes / one, y, error, formats.index(row.format), label, told)

    by_size = sorted(others, key=lambda row: row.bytes)
    first = {row.recipe: row for row in reversed(by_size)}
    divergence = [
        point(row, row.kld_mean, row.kld_error or 0.0)
        for row in by_size
        if row.kld_mean is not None and 0 < row.kld_mean < math.inf
    ]
    perplexity = [point(row, row.perplexity) for row in by_size if row.perplexity < math.inf]
    far = any(p.y > 3 * float_row.perplexity for p in perplexity)
    return _page(
        "compared.html",
        title=title(model),
        figures=replace(figures(rows), links=[pages.get(row.path, "") for row in rows]),
        links={row.recipe: pages[row.path] for row in reversed(others)},
        protocols=_protocols(rows),
        formats=formats,
        unit=unit,
        divergence=plots.scatter(divergence, log=True) if divergence else None,
        perplexity=plots.scatter(perplexity, log=far, level=float_row.perplexity) if perplexity else None,
        maps={name: heat(of_report, scale, percent) for name, of_report in errors.items()},
        reports=reports,
        command=command,
    )


def sensitive(found: Sensitivity, command: str) -> str:
    """Return the page of what each linear, site or layer does alone."""
    layers = {unit.name: unit.layer for unit in found.units}
    scale = Scale.of(result.kld for result in found.results)
    maps = {
        grid: heat({r.unit: (layers[r.unit], r.kld) for r in found.results if r.grid == grid}, scale, two_digits)
        for grid in found.grids
    }
    return _page(
        "sensitive.html",
        title=title(found.model),
        found=found,
        maps={grid: one for grid, one in maps.items() if one.rows or one.outside},
        most=sorted(found.results, key=lambda r: -r.kld)[:MOST],
        table=sensitivity_table(found),
        command=command,
    )


@dataclass(frozen=True)
class Tile:
    """One of the figures at the top."""

    label: str
    value: str
    detail: str


@dataclass(frozen=True)
class Scale:
    """From numbers to ``STEPS`` colours: logarithmic, or even.

    >>> scale = Scale(0.001, 0.1)
    >>> scale.step(0.0001), scale.step(0.0099), scale.step(0.0101), scale.step(0.1)
    (0, 3, 4, 7)
    """

    low: float
    high: float
    even: bool = False

    @classmethod
    def of(cls, values: Iterable[float], even: bool = False) -> Scale:
        """Return a scale for these numbers; a logarithmic one has a factor of ten at least."""
        known = [x for x in values if math.isfinite(x)]
        if even:
            return cls(min(known), max(known), True)
        high = max(known, default=0.0) or 1.0
        return cls(min([x for x in known if x > 0] + [high / 10]), high)

    def step(self, value: float) -> int:
        if not self.low < value < self.high:
            return STEPS - 1 if value >= self.high > self.low else 0
        low, high, here = (x if self.even else math.log(x) for x in (self.low, self.high, value))
        return int(STEPS * (here - low) / (high - low))


@dataclass(frozen=True)
class Cell:
    """A number, and the step of its colour."""

    text: str
    step: int


@dataclass(frozen=True)
class Heat:
    """A coloured table: a row for every layer, a column for every linear of a layer.

    columns: short and full names. outside: what belongs to no layer. ends: of the scale.
    """

    columns: Sequence[tuple[str, str]]
    rows: Sequence[tuple[int, Sequence[Cell | None]]]
    outside: Sequence[tuple[str, Cell]]
    ends: tuple[str, str]


Values = Mapping[str, tuple[int | None, float]]
"""By module its layer, None for what belongs to none, and a number."""


def heat(values: Values, scale: Scale, form: Callable[[float], str]) -> Heat:
    """Return a table of numbers; of all experts' the mean.

    >>> heat({"h.0.up": (0, 0.5), "h.1.e.0.up": (1, 1.0), "h.1.e.1.up": (1, 3.0)}, Scale(0.1, 3.0), plots.short).rows
    [(0, [Cell(text='0.5', step=3), None]), (1, [None, Cell(text='2', step=7)])]
    """
    places: dict[tuple[int, str], list[float]] = {}
    outside = []
    for name, (layer, value) in values.items():
        if layer is None:
            outside.append((name, Cell(form(value), scale.step(value))))
        else:
            places.setdefault((layer, _local(name, layer)), []).append(value)
    columns = list(dict.fromkeys(local for _, local in places))
    means = {place: sum(here) / len(here) for place, here in places.items()}

    def cell(place: tuple[int, str]) -> Cell | None:
        return Cell(form(means[place]), scale.step(means[place])) if place in means else None

    rows = [(layer, [cell((layer, column)) for column in columns]) for layer in sorted({layer for layer, _ in places})]
    return Heat(_shortened(columns), rows, outside, (form(scale.low), form(scale.high)))


def _local(name: str, layer: int) -> str:
    """Return the name of a linear within its layer, the same for all experts.

    >>> _local("model.layers.3.mlp.experts.17.up_proj", 3), _local("model.layers.3", 3)
    ('mlp.experts.*.up_proj', 'layer')
    """
    _, found, local = f"{name}.".partition(f".{layer}.")
    return re.sub(r"\.\d+\.", ".*.", local).rstrip(".") if found and local else "layer" if found else name


def _shortened(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return short and full names: the last parts where they differ.

    >>> _shortened(["attn.q", "mlp.up"]), _shortened(["attn.out", "mlp.out"])
    ([('q', 'attn.q'), ('up', 'mlp.up')], [('attn.out', 'attn.out'), ('mlp.out', 'mlp.out')])
    """
    last = [name.rpartition(".")[2] for name in names]
    return list(zip(last if len(set(last)) == len(last) else names, names, strict=True))


def percent(share: float) -> str:
    """Return a share in percent, without the sign."""
    return two_digits(100 * share)


def two_digits(value: float) -> str:
    """Return a number in two digits, or as many as it has before the point.

    >>> [two_digits(x) for x in (123.0, 12.5, 0.3, 0.001_25, 0.000_03, 0.0)]
    ['123', '12', '0.30', '0.0013', '3.0e-5', '0']
    """
    if value >= 99.5 or not value:
        return f"{value:.0f}"
    return f"{value:#.2g}".rstrip(".").replace("e-0", "e-")


def duration(seconds: float) -> str:
    """Return a time for people.

    >>> duration(7.31), duration(754.0), duration(10_000.0)
    ('7.3 s', '12.6 min', '2.8 h')
    """
    for unit, one in (("h", 3600), ("min", 60)):
        if seconds >= 2 * one:
            return f"{seconds / one:.1f} {unit}"
    return f"{seconds:.1f} s"


def _of_linears(report: Report, key: str) -> Values:
    return {name: (record["layer"], record[key]) for name, record in report.linears.items()}


def _differ(values: Values) -> bool:
    return len({value for _, value in values.values()}) > 1


def _tiles(report: Report, float_row: Row | None, row: Row | None, format_: str) -> list[Tile]:
    written = report.bytes[format_]
    tiles = []
    if row is not None and float_row is not None and row.kld_mean is not None:
        tiles += [
            Tile("KL divergence", f"{row.kld_mean:.5f}", f"± {row.kld_error or 0:.5f} nats a token"),
            Tile("top-1", f"{row.top1 or 0:.1%}", "same likeliest token"),
            Tile("perplexity", f"{row.perplexity:.3f}", f"float {float_row.perplexity:.3f}"),
        ]
    of_float = "" if float_row is None else f"{written / float_row.bytes:.0%} of the float model's"
    whole = "" if row is None else f"{row.bpw:.2f} with all that is float"
    return [
        *tiles,
        Tile("size", size(written), of_float),
        Tile("bits a weight", f"{report.bits_per_weight:.3f}", whole),
        Tile("time", duration(report.seconds), f"{size(report.peak_rss_bytes)} of memory"),
    ]


def _protocols(rows: Iterable[Row]) -> list[str]:
    return sorted({row.protocol for row in rows})


def _training(told: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is shown of a training: what it gained, and its curves."""
    losses = told["losses"]
    each = -(-len(losses) // POINTS)
    runs = [losses[i : i + each] for i in range(0, len(losses), each)] if losses else []
    means = [(sum(step for step, _ in run) / len(run), sum(loss for _, loss in run) / len(run)) for run in runs]
    return {
        "told": training_line(told),
        "held_out": plots.lines([("held-out KLD", [(float(step), kld) for step, kld in told["held_out"]])]),
        "losses": plots.lines([("loss", means)]) if means else None,
    }


def _worst(report: Report) -> list[tuple[str, str, plots.Histogram]]:
    found = []
    for name, told in report.histograms.items():
        record = report.linears[name]
        caption = f"error {percent(record['error'])} %, {plots.short(record['bits_per_weight'])} bits"
        found.append((name, caption, plots.histogram(**told)))
    return found


def _seconds_by_layer(report: Report) -> list[dict[str, Any]]:
    """Return how long the linears of each layer took, for a run that kept no time of whole layers."""
    sums: dict[str, float] = {}
    layers = {name: record["layer"] for name, record in report.linears.items()}
    for name in sorted(layers, key=lambda name: (layers[name] is None, layers[name] or 0)):
        part = name if layers[name] is None else str(layers[name])
        sums[part] = sums.get(part, 0.0) + report.linears[name]["seconds"]
    return [{"part": part, "seconds": seconds} for part, seconds in sums.items()]


def _memory(costs: Sequence[Mapping[str, Any]]) -> tuple[str, plots.Bars] | None:
    """Return the unit and the bars of peak memory."""
    if not costs:
        return None
    unit, one = _unit(max(cost["peak_bytes"] for cost in costs))
    return unit, plots.bars([(_part(cost), cost["peak_bytes"] / one) for cost in costs])


def _part(cost: Mapping[str, Any]) -> str:
    """Return the number of a layer, or a short name of a matrix outside them."""
    return str(cost["part"]).rpartition(".")[2]


def _cost_table(costs: Sequence[Mapping[str, Any]]) -> Table:
    known = costs and "peak_bytes" in costs[0]
    rows = [[str(c["part"]), f"{c['seconds']:.2f}", *([size(c["peak_bytes"])] if known else [])] for c in costs]
    return Table(("layer", "seconds", *(["peak memory"] if known else [])), rows, texts=1)


def _residual(errors: Sequence[float]) -> plots.Lines | None:
    return plots.lines([("error", [(float(i), 100 * error) for i, error in enumerate(errors)])]) if errors else None


def _unit(largest: int) -> tuple[str, int]:
    """Return the unit in which sizes up to this one are told, in bytes."""
    return next(((unit, one) for unit, one in (("GB", 10**9), ("MB", 10**6)) if largest >= one), ("kB", 1000))


def _page(template: str, **facts: Any) -> str:
    return _templates().get_template(template).render(facts)


@cache
def _templates() -> Environment:
    return Environment(
        loader=PackageLoader("llmquant"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _printable(value: object) -> object:
    """Return a value that is shown; text with characters that are not letters or signs, without them."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in value)
