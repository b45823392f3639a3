"""How loud the rounding is: signal-to-quantization-noise ratios, and what a uniform error would give."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llmquant.grid import QuantizedTensor, per_column

AVERAGED = ("mean_square", "mse", "mse_uniform")
"""What ``of_weights`` measures; means, so that pieces of a matrix can be put together."""

COUNTED = ("weights", "codes")
"""What ``on_levels`` counts."""
BINS = 96  # about
SAMPLE = 1 << 15  # weights that are looked at, in whole rows
WORST = 4  # linears of which the histogram is kept: of each layer, then of all


def of_weights(q: QuantizedTensor, mse: float, mean_square: float) -> dict[str, float | None]:
    """Return the mean square of a matrix and of its error as given, and the mean square error of uniform noise.

    Rounding to steps of equal size s leaves an error spread evenly over [-s/2, s/2], of mean square s²/12, as long as
    nothing is clipped and a step is small beside the weights (Bennett, "Spectra of quantized signals", 1948).
    More than that is clipping, or error feedback, which moves weights by more than half a step.
    mse_uniform: None for a grid whose levels are not evenly spaced.
    """
    steps = q.grid.table.diff()
    scale, _ = q.grid.levels(q.params)
    even = torch.allclose(steps, steps[:1])
    uniform = float((scale.float().square() * steps[0].square().to(scale.device)).mean()) / 12 if even else None
    return {"mean_square": mean_square, "mse": mse, "mse_uniform": uniform}


def on_levels(q: QuantizedTensor, w: Float[Tensor, "rows cols"]) -> dict[str, Any]:
    """Return where the weights of some rows lie among the levels, and how many of them got each.

    levels: the grid's table. low, high: on the same axis the ends of bins of equal width, about a step beyond the
        outermost levels; evenly spaced levels are in the middle of a bin.
    weights: how many (w - offset) / scale are in each bin; those beyond the ends are in the first and the last.
    codes: how many weights have each level.
    """
    some = torch.linspace(0, len(w) - 1, max(min(SAMPLE // w.shape[1], len(w)), 1), device=w.device).long()
    part = replace(q, codes=q.codes[some], params={name: value[some] for name, value in q.params.items()})
    scale, offset = per_column(part.grid, part.params)
    x = ((w[some].float() - offset) / scale)[scale != 0].cpu()
    table = q.grid.table
    step = float(table[-1] - table[0]) / (len(table) - 1)
    parts = max(BINS // (len(table) + 1), 1)  # of a step
    margin = step * (1 + 0.5 / parts)
    low, high, count = float(table[0]) - margin, float(table[-1]) + margin, parts * (len(table) + 1) + 1
    bins = ((x - low) * (count / (high - low))).clamp(0, count - 1).long()
    return {
        "levels": [round(level, 6) for level in table.tolist()],
        "low": round(low, 6),
        "high": round(high, 6),
        "weights": torch.bincount(bins, minlength=count).tolist(),
        "codes": torch.bincount(part.codes.flatten().cpu(), minlength=len(table)).tolist(),
    }


def is_histogram(found: Any) -> bool:
    """Whether a value is like those that ``on_levels`` returns."""
    ends, lists = ("low", "high"), ("levels", "weights", "codes")
    if not isinstance(found, dict) or found.keys() != {*ends, *lists}:
        return False
    if not all(isinstance(found[key], list) and len(found[key]) > 1 for key in lists):
        return False
    numbers = [found[key] for key in ends] + [number for key in lists for number in found[key]]
    if not all(isinstance(x, int | float) and abs(x) < math.inf for x in numbers):
        return False
    counted = min(found["weights"] + found["codes"]) >= 0 and len(found["codes"]) == len(found["levels"])
    return bool(counted and found["low"] <= found["levels"][0] < found["levels"][-1] <= found["high"])


def worst(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the linears, at most ``WORST``, with the largest errors of those whose records have a histogram."""
    known = [name for name, record in records.items() if "histogram" in record]
    return sorted(known, key=lambda name: (-records[name]["error"], name))[:WORST]


def added(histograms: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what ``on_levels`` tells of pieces of one matrix as one."""
    counts = {key: [sum(of_bin) for of_bin in zip(*(h[key] for h in histograms), strict=True)] for key in COUNTED}
    return {**histograms[0], **counts}


def in_decibels(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a linear's record with its signal-to-quantization-noise ratios in dB.

    sqnr_weight_db: of the weights. sqnr_output_db: of what the linear computes from the calibration's activations,
        None where none were read. Both None for an error of zero.
    """
    share = record["mse"] / record["mean_square"] if record["mean_square"] else 0.0
    return {
        **record,
        "sqnr_weight_db": _decibels(share),
        "sqnr_output_db": _decibels(record["error"]) if record["tokens"] else None,
    }


def _decibels(noise_over_signal: float) -> float | None:
    return round(-10 * math.log10(noise_over_signal), 2) if noise_over_signal > 0 else None
