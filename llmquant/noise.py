"""How loud the rounding is: signal-to-quantization-noise ratios, and what a uniform error would give."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from llmquant.grid import QuantizedTensor

AVERAGED = ("mean_square", "mse", "mse_uniform")
"""What ``of_weights`` measures; means, so that pieces of a matrix can be put together."""


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
