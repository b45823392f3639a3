"""What people read at the end: tables for the screen and for Markdown, and the card of a written model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from llmquant import plugins
from llmquant.targets import TARGETS

if TYPE_CHECKING:
    from llmquant.answers import TaskRow
    from llmquant.bench import Cost
    from llmquant.evaluation import Row
    from llmquant.plan import Plan
    from llmquant.recommend import Recommendation
    from llmquant.recommend import Row as Choice
    from llmquant.run import Report
    from llmquant.sensitivity import Measured, Sensitivity

COLUMNS = ("recipe", "format", "size", "bpw", "perplexity", "KLD", "KLD 99 %", "top-1", "seconds", "peak memory")


@dataclass(frozen=True)
class Table:
    """texts: how many columns, from the left, are text; the others are numbers. links: of the rows' first cells."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int = 2
    links: Sequence[str] = ()

    def markdown(self) -> str:
        """Return it without its links."""
        return markdown(self.columns, self.rows, self.texts)


def size(count: int) -> str:
    """Return a number of bytes for people.

    >>> size(999), size(18_337_560), size(4_200_000_000)
    ('999 B', '18.3 MB', '4.20 GB')
    """
    for unit, one in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= one:
            value = count / one
            return f"{value:.2f} {unit}" if value < 10 else f"{value:.1f} {unit}"
    return f"{count} B"


def title(model: str) -> str:
    """Return the name of a model for people: of its folder, or of two where that says nothing.

    >>> title("org/name"), title("runs/7/model/")
    ('name', '7/model')
    """
    *before, name = model.rstrip("/").split("/")
    return "/".join([*before[-1:], name]) if name == "model" else name


def origin(model: str) -> str:
    """Return the hub id that a folder in the hub's cache is a copy of; what is no such folder stays as it is.

    >>> origin("/cache/hub/models--org--name/snapshots/0a1b2c"), origin("runs/model")
    ('org/name', 'runs/model')
    """
    found = re.search(r"/models--([^/]+)/snapshots/[^/]+$", model)
    return found[1].replace("--", "/", 1) if found else model


def cells(row: Row) -> list[str]:
    """Return one line of a comparison, in the order of ``COLUMNS``."""
    return [
        row.recipe,
        row.format,
        size(row.bytes),
        f"{row.bpw:.2f}",
        f"{row.perplexity:.3f}",
        _optional(row.kld_mean, ".5f"),
        _optional(row.kld_p99, ".4f"),
        _optional(row.top1, ".2%"),
        f"{row.seconds:.1f}",
        size(row.peak_rss_bytes),
    ]


def answers_table(rows: Sequence[TaskRow]) -> Table:
    """Return a line for every model, task and metric."""
    columns = ("model", "task", "metric", "items", "value", "difference", "changed", "lost", "gained", "p")
    cells = [
        (
            *(row.model, row.task, row.metric, str(row.items)),
            f"{row.value:.4f}{_interval(row.low, row.high)}",
            _optional(row.difference, "+.4f") + _interval(row.difference_low, row.difference_high),
            *("" if count is None else str(count) for count in (row.changed, row.lost, row.gained)),
            _optional(row.p, ".3g"),
        )
        for row in rows
    ]
    return Table(columns, cells, 3)


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f" [{low:.4f}, {high:.4f}]"


def figures(rows: Sequence[Row]) -> Table:
    """Return a line for every measured model."""
    return Table(COLUMNS, [cells(row) for row in rows])


def costs_table(costs: Sequence[Cost]) -> Table:
    """Return a line for every model whose speed was measured."""
    measured = costs[0].perplexity is not None
    columns = ["model", "format", "weights", "peak memory", "first token", "prompt tok/s", "generated tok/s"]
    rows = [
        [
            Path(cost.path).name,
            cost.format + ("" if cost.runtime == "torch" else f" in {cost.runtime}"),
            size(cost.weight_bytes),
            size(cost.peak_bytes),
            f"{1000 * cost.first_token_seconds:.0f} ms",
            f"{cost.prompt_rate:.1f} ({cost.prompt_ratio:.2f})",
            f"{cost.generation_rate:.1f} ({cost.generation_ratio:.2f})",
            *([_optional(cost.perplexity, ".3f"), _optional(cost.kld_mean, ".5f")] if measured else []),
        ]
        for cost in costs
    ]
    return Table([*columns, *(["perplexity", "KLD"] if measured else [])], rows)


def targets_table(found: Recommendation) -> Table:
    """Return what is best on every target."""

    def told(name: str, row: Choice | None) -> list[str]:
        place = [name, f"{TARGETS[name].about}, {TARGETS[name].runtime}"]
        if row is None:
            return [*place, "nothing fits", "", "", "", "", ""]
        return [*place, row.recipe, row.format, size(row.file_bytes), size(row.total_bytes), *_rate_and_kld(row)]

    columns = ("target", "device", "recipe", "format", "file", "memory", "tokens/s", "KLD")
    return Table(columns, [told(name, found.best(name)) for name in found.rows], 4)


def target_table(rows: Iterable[Choice]) -> Table:
    """Return a line for every recipe on a target."""
    columns = ("recipe", "format", "bpw", "file", "keys, values", "runtime", "memory", "tokens/s", "KLD")
    cells = [
        [
            *(row.recipe, row.format, f"{row.bits_per_weight:.2f}"),
            *map(size, (row.file_bytes, row.cache_bytes, row.runtime_bytes, row.total_bytes)),
            *_rate_and_kld(row),
        ]
        for row in rows
    ]
    return Table(columns, cells)


def _rate_and_kld(row: Choice) -> list[str]:
    return [f"{row.rate:.1f}", _optional(row.kld, ".5f")]


def plan_table(plan: Plan) -> Table:
    """Return a line for the linears that are treated alike: how many, and how."""
    groups: Counter[tuple[str, ...]] = Counter()
    for linear in plan.linears:
        if linear.grid is None or linear.choice is None:
            groups["float", "", "float", str(8 * linear.dtype.itemsize)] += 1
        else:
            grid = f"{linear.choice.grid} {linear.choice.grid_config}"
            inputs = linear.activations.label if linear.activations else "float"
            groups[grid, f"{linear.choice.algorithm}", inputs, f"{linear.grid.bits_per_weight:.4f}"] += 1
    columns = ("linears", "grid", "algorithm", "activations", "bits per weight")
    return Table(columns, [[str(count), *group] for group, count in groups.items()], 4)


def inspection_table(described: Mapping[str, Any]) -> Table:
    """Return a line for every tensor of what ``packed.describe`` tells."""
    tensors = described["tensors"].items()
    rows = [[name, x["dtype"], " x ".join(map(str, x["shape"])), f"{x['bytes']:,}"] for name, x in tensors]
    return Table(("tensor", "type", "shape", "bytes"), rows, 3)


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 2) -> str:
    """Return a Markdown table; the first columns are text, the others numbers."""
    lines = [columns, ["---" if i < texts else "--:" for i in range(len(columns))], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def comparison(rows: Sequence[Row], model: str) -> str:
    """Return the Markdown report of a comparison."""
    protocols = sorted({row.protocol for row in rows})
    return "\n".join(
        [
            f"# {model}, quantized",
            "",
            figures(rows).markdown(),
            "",
            *(f"Perplexity protocol: {protocol}." for protocol in protocols),
            "",
            "Size: the weights' files. bpw: these, in bits, over the number of weights. KLD: mean KL divergence from "
            "the float model's predictions, in nats a token (0 is identical). top-1: share of tokens for which both "
            "models find the same next token likeliest. Seconds and peak memory: of quantizing and writing (float: of "
            "evaluating). Every figure is measured on the written files, decoded.",
            "",
        ]
    )


def sensitivity_table(found: Sensitivity) -> Table:
    """Return a line for every unit: name, weights, the divergence on every grid and its standard error."""

    def told(result: Measured | None) -> str:
        return "" if result is None else f"{result.kld:.6f} ± {result.kld_error:.6f}"

    table = found.table()
    rows = [[u.name, f"{u.weights:,}", *(told(table[u.name].get(grid)) for grid in found.grids)] for u in found.units]
    return Table(["unit", "weights", *(f"KLD {grid}" for grid in found.grids)], rows, 1)


def sensitivity(found: Sensitivity) -> str:
    """Return the Markdown report of what each unit does alone."""
    return "\n".join(
        [
            f"# What each {found.by} of {found.model} does alone, quantized as {found.recipe} does",
            "",
            sensitivity_table(found).markdown(),
            "",
            f"KLD: mean KL divergence of the whole model's predictions from the float model's, in nats a token, all "
            f"other weights being float. {found.protocol}.",
            "",
        ]
    )


def model_card(report: Report, rows: Sequence[Row], format_: str, base: str, inherited: Mapping[str, Any]) -> str:
    """Return the README.md of a written folder.

    inherited: front matter of the float model's card, of which licence and language are carried over.
    """
    base = origin(base)
    method = plugins.load("exporters", format_, "format").METHOD
    bits = {round(r["bits_per_weight"], 3) for r in report.linears.values()}
    front = {
        **{key: inherited[key] for key in ("license", "license_name", "license_link", "language") if key in inherited},
        "base_model": base,
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["llmquant", "quantized", method],
    }
    name = report.recipe["name"]
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        f"# {base.rstrip('/').rpartition('/')[2]} {name}",
        "",
        f"Quantized from `{base}` by llmquant {report.versions['llmquant']} with the recipe `{name}` "
        f"({report.bits_per_weight} bits per quantized weight{'' if len(bits) == 1 else ', mixed'}), "
        f"format `{format_}`.",
        "",
    ]
    if rows:
        lines += [figures(rows).markdown(), "", f"Protocol: {rows[0].protocol}.", ""]
    if report.training:
        lines += [f"{training_line(report.training)}.", ""]
    lines += [*(f"- {line}" for line in allocation_lines(report)), "", *noise_table(report, format_), ""]
    if report.calibration:
        c = report.calibration
        lines += [
            f"Calibrated on {c['text']}: {c['sequences']} sequences of {c['length']} tokens "
            f"({'with' if c['bos'] else 'without'} BOS), SHA-256 of the tokens `{c['sha256'][:16]}`.",
            "",
        ]
    if report.notes:
        lines += ["Departures from the recipe's grid:", "", *(f"- {note}" for note in report.notes), ""]
    recipe = yaml.safe_dump(report.recipe, sort_keys=False).strip()
    more = "More in [report.html](report.html): the error of every linear, time and memory, hashes, the command."
    return "\n".join([*lines, more, "", "The recipe as run:", "", "```yaml", recipe, "```", ""])


def allocation_lines(report: Report) -> list[str]:
    """Return how the types were chosen, where a budget asked for that."""
    if not report.allocation:
        return []
    found = report.allocation
    selection, check = found["splits"]
    lines = [f"A type for every tensor within {found['budget']:,} bytes; KLD on two texts ({selection}; {check}):"]
    for trial in found["trials"]:
        types = ", ".join(f"{count} {name}" for name, count in sorted(trial["types"].items()))
        expected = "" if trial["expected"] is None else f", {trial['expected']:.6f} expected"
        lines.append(
            f"{trial['name']}: {trial['bytes']:,} bytes, {trial['selection']:.6f}{expected}; {trial['check']:.6f}"
            + (f"; {types}" if types else "")
        )
    return [*lines, f"written: {found['chosen']}"]


def noise_table(report: Report, format_: str) -> list[str]:
    """Return the lines of a Markdown table: how loud the rounding is, layer by layer."""
    layers: dict[int | None, list[dict[str, Any]]] = {}
    for record in report.linears.values():
        layers.setdefault(record["layer"], []).append(record)
    grown = report.residual_errors.get(format_, [])
    columns = ["layer", "linears", "weights, dB", "outputs, dB", "outputs at worst, dB", "error / uniform"]
    rows = []
    for layer in sorted(layers, key=lambda i: (i is None, i)):
        weights, outputs, ratios = (
            [value for value in values if value is not None]
            for values in (
                [r["sqnr_weight_db"] for r in layers[layer]],
                [r["sqnr_output_db"] for r in layers[layer]],
                [r["mse"] / r["mse_uniform"] if r["mse_uniform"] else None for r in layers[layer]],
            )
        )
        row = ["outside" if layer is None else str(layer), str(len(layers[layer]))]
        row += [_mean(weights, ".1f"), _mean(outputs, ".1f"), _mean(outputs and [min(outputs)], ".1f")]
        row += [_mean(ratios, ".2f")]
        if grown:
            row.append("" if layer is None else f"{grown[layer]:.2%}")
        rows.append(row)
    told = (
        "Signal-to-quantization-noise ratio of the weights and of what they compute from the calibration text, mean "
        "over a layer's linears; mean square error over that of uniform noise (scale²/12)"
    )
    after = "; error of the residual stream after the layer, as a share of its size" if grown else ""
    return [markdown([*columns, *(["residual error"] if grown else [])], rows), "", f"{told}{after}."]


def _mean(values: Sequence[float], form: str) -> str:
    return format(sum(values) / len(values), form) if values else ""


def training_line(training: Mapping[str, Any]) -> str:
    """Return what training has gained."""
    return (
        f"Trained for {training['step']} steps: KLD on held-out text {training['held_out'][0][1]:.5f} before, "
        f"{training['best']:.5f} at the best step"
    )


def front_matter(card: str) -> dict[str, Any]:
    """Return the YAML at the head of a model card, every value a text, or nothing where there is none.

    >>> front_matter("---\\nlicense: mit\\nlanguage: no\\n---\\n# A model")
    {'license': 'mit', 'language': 'no'}
    """
    parts = card.split("---", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        found = yaml.load(parts[1], yaml.BaseLoader)  # Norwegian is not a boolean, nor a version a number
    except (yaml.YAMLError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _optional(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
