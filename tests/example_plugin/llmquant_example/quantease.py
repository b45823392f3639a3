"""QuantEase: each column in turn is rounded to where the error of the outputs, all other columns held, is least.

Source: Behdin et al. 2023, https://arxiv.org/abs/2309.01885, algorithm 1. Departures: begins at the nearest codes;
no iterations that leave weights unrounded.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from llmquant.grid import Grid, QuantizedTensor, decode, encode, encode_all, fit_all, per_column
from llmquant.stats import Needs, Stats


@dataclass(frozen=True)
class Config:
    """Cyclic coordinate descent on codes.

    sweeps: how often every column is rounded again.
    """

    sweeps: int = 3


def needs(config: Config) -> Needs:
    return "hessian"


def quantize(w: Float[Tensor, "rows cols"], stats: Stats, grid: Grid, config: Config) -> QuantizedTensor:
    """Return codes on scales fitted to the weights alone; no visit of a column adds to tr((Q - W) H (Q - W)ᵀ)."""
    w, hessian = w.float(), stats.hessian
    params = fit_all(grid, w, stats.square_mean)
    scale, offset = per_column(grid, params)
    codes = encode_all(grid, w, params)
    error = decode(grid, codes, scale, offset) - w
    seen = hessian.diagonal().nonzero()[:, 0].tolist()  # columns without activations keep the nearest codes
    for j in seen * config.sweeps:
        now = slice(j, j + 1)
        wished = w[:, now] + error[:, now] - error @ hessian[:, now] / hessian[j, j]
        codes[:, now] = encode(grid, wished, scale[:, now], offset[:, now])
        error[:, now] = decode(grid, codes[:, now], scale[:, now], offset[:, now]) - w[:, now]
    return QuantizedTensor(grid, codes, params)
