"""AWQ: enlarge the columns that read large activations, so that rounding hurts them less.

Source: Lin et al. 2023, https://arxiv.org/abs/2306.00978, sections 3.2 and 4, and
its code (github.com/mit-han-lab/llm-awq): candidates are (mean |x|)^a for exponents
a in [0, 1), alone or over (mean |w|)^(1 - a) of the weights' own magnitude, and the
largest weights of a group are clipped where that lowers the error.
Departures: the loss is exact over all calibration tokens (the squared error of a
linear's output is a quadratic form in their Hessian), and it is that of the
recipe's own grid. No scaling is among the candidates, and clipping is decided a
row at a time by the whole row's error: nothing gets worse on the calibration text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from llmquant.grid import Grid
from llmquant.stats import Needs, Stats
from llmquant.transform import Scales, SiteView, round_to_nearest

SMALLEST = 1e-4  # of the factors before they are centred, as a share of the largest
NARROWEST = 0.5  # of the ranges that clipping tries, as a share of the largest weight


@dataclass(frozen=True)
class Config:
    """AWQ scale and clipping search.

    steps: how many exponents are tried.
    duo: try each exponent with the weights' own magnitude too.
    clip: search how much of each group's largest weights to cut off; not for queries and keys. For `rtn`: GPTQ
        searches its scales itself, with what its error feedback leaves.
    """

    steps: int = 20
    duo: bool = True
    clip: bool = True

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}, not positive")


def needs(config: Config) -> Needs:
    return "hessian"


def search(site: SiteView, config: Config) -> Scales:
    """Return the candidate whose rounding changes the site's outputs least; all ones where none beats them."""
    best = Scales(torch.ones_like(site.stats.abs_mean), {"exponent": 0.0})
    unscaled = lowest = site.rounding_loss()
    for candidate in _candidates(site, config):
        loss = site.scaled(candidate.factors).rounding_loss()
        if loss < lowest:
            best, lowest = candidate, loss
    return Scales(best.factors, {**best.record, "loss": round(lowest / max(unscaled, 1e-30), 6)})


def _candidates(site: SiteView, config: Config) -> Iterator[Scales]:
    activations = site.shared(site.stats.abs_mean)
    magnitudes = site.shared(_magnitudes(site))
    for step in range(config.steps):
        exponent = step / config.steps
        powers = activations.pow(exponent)
        if step:
            yield Scales(_centred(powers), {"exponent": exponent, "duo": False})
        if config.duo:
            yield Scales(_centred(powers / (magnitudes.pow(1 - exponent) + 1e-4)), {"exponent": exponent, "duo": True})


def _magnitudes(site: SiteView) -> Float[Tensor, " cols"]:
    """Return the mean |w| of every column, as a share of the largest weight of its group."""
    total = torch.zeros_like(site.stats.abs_mean)
    rows = 0
    for w, grid in zip(site.weights, site.grids, strict=True):
        if grid is not None:
            groups = w.abs().view(len(w), -1, min(grid.group, w.shape[1]))
            total += (groups / groups.amax(2, keepdim=True).clamp(min=1e-30)).view(w.shape).sum(0)
            rows += len(w)
    return total / rows


def _centred(factors: Float[Tensor, " cols"]) -> Float[Tensor, " cols"]:
    """Return factors whose smallest and largest are each other's inverse; columns without activations get no 0."""
    factors = factors.clamp(min=float(factors.max()) * SMALLEST)
    return factors / (factors.max() * factors.min()).sqrt()


def clip(w: Float[Tensor, "rows cols"], stats: Stats, grid: Grid, config: Config) -> Float[Tensor, "rows cols"]:
    """Return the weights with the largest of each group cut off where that lowers the error of the row's output."""
    if not config.clip or grid.per_tensor or stats.hessian is None:
        return w
    cols = w.shape[1]
    groups = w.view(len(w), -1, grid.group)
    largest = groups.abs().amax(2, keepdim=True)
    blocks = torch.stack([stats.hessian[g : g + grid.group, g : g + grid.group] for g in range(0, cols, grid.group)])
    best, share = torch.full_like(largest, torch.inf), torch.ones_like(largest)
    for step in range(config.steps // 2 + 1):
        width = 1 - (1 - NARROWEST) * step / (config.steps // 2 or 1)
        limit = width * largest
        clipped = groups.clamp(-limit, limit).view(w.shape)
        delta = (round_to_nearest(clipped, stats, grid) - w).view(groups.shape)
        loss = (torch.einsum("rgc,gcd->rgd", delta, blocks) * delta).sum(2, keepdim=True)
        share = torch.where(loss < best, width, share)
        best = torch.minimum(loss, best)
    limit = share * largest
    clipped = groups.clamp(-limit, limit).view(w.shape)
    better = _row_errors(round_to_nearest(clipped, stats, grid) - w, stats) < _row_errors(
        round_to_nearest(w, stats, grid) - w, stats
    )
    return torch.where(better[:, None], clipped, w)


def _row_errors(delta: Float[Tensor, "rows cols"], stats: Stats) -> Float[Tensor, " rows"]:
    assert stats.hessian is not None
    return ((delta @ stats.hessian) * delta).sum(1)
