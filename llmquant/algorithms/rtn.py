"""Round to nearest: each weight takes the nearest level. The baseline every algorithm must beat."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from llmquant.grid import Grid, QuantizedTensor, encode_all, fit_all
from llmquant.stats import Needs, Stats


@dataclass(frozen=True)
class Config:
    """Round to nearest.

    calibrated: weigh each column by its mean squared activation when a grid
        searches its scales (what llama.cpp calls an imatrix). Off: needs no data.
    """

    calibrated: bool = False


def needs(config: Config) -> Needs:
    return "diagonal" if config.calibrated else "nothing"


def quantize(w: Float[Tensor, "rows cols"], stats: Stats, grid: Grid, config: Config) -> QuantizedTensor:
    """Return the nearest codes on scales fitted to the weights alone."""
    w = w.float()
    params = fit_all(grid, w, stats.square_mean)
    return QuantizedTensor(grid, encode_all(grid, w, params), params)
