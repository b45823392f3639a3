"""AWQ: enlarge the columns that read large activations, so that rounding hurts them less.

Source: Lin et al. 2023, https://arxiv.org/abs/2306.00978, sections 3.2 and 4, and
its code (github.com/mit-han-lab/llm-awq): candidates are (mean |x|)^a for exponents
a in [0, 1), alone or over (mean |w|)^(1 - a) of the weights' own magnitude, and the
largest weights of a group are clipped where that lowers the error.
Departures: the loss is exact over all calibration tokens (the squared error of a
linear's output is a quadratic form in their Hessian), and it is that of the
recipe's own grid and algorithm: what helps rounding to nearest can hurt GPTQ (see
``column_costs`` there). No scaling is among the candidates, and the algorithm
itself, without its refinements, has the last word between it and the best of the
others. A row is clipped
where that lowers the error of its whole output, and a linear only where its
algorithm gains by it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from llmquant.grid import Grid
from llmquant.stats import Needs, Stats
from llmquant.transform import ROWS, Rounding, Scales, SiteView, round_to_nearest, row_errors

SMALLEST = 1e-4  # of the factors before they are centred, as a share of the largest
PATIENCE = 3  # exponents in a row without a smaller loss, after which larger ones are not tried
NARROWEST = 0.5  # of the ranges that clipping tries, as a share of the largest weight


@dataclass(frozen=True)
class Config:
    """AWQ scale and clipping search.

    steps: how many exponents are tried.
    duo: try each exponent with the weights' own magnitude too.
    clip: search how much of each group's largest weights to cut off; not for queries and keys.
    inputs: how many times the error counts that llama.cpp makes when it rounds the activations to 8 bits, which scales
        even out, too (``SiteView.input_loss``; eval/results/runtime_floor.md). For GGUF types.
    """

    steps: int = 20
    duo: bool = True
    clip: bool = True
    inputs: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}, not positive")
        if not 0 <= self.inputs < float("inf"):
            raise ValueError(f"inputs is {self.inputs}, not a number from 0 on")


def needs(config: Config) -> Needs:
    return "hessian"


def search(site: SiteView, config: Config) -> Scales:
    """Return the candidate whose rounding changes the site's outputs least; all ones where none beats them."""
    best = Scales(torch.ones_like(site.stats.abs_mean), {"exponent": 0.0, "duo": False})
    costs = site.column_costs()
    unscaled = lowest = site.rounding_loss(costs) + _of_inputs(site, config)
    activations, magnitudes = site.shared(site.stats.abs_mean), site.shared(_magnitudes(site))
    for duo in (False, True) if config.duo else (False,):
        nearest, since = float("inf"), 0
        for step in range(0 if duo else 1, config.steps):
            exponent = step / config.steps
            powers = activations.pow(exponent)
            factors = _centred(powers / (magnitudes.pow(1 - exponent) + 1e-4) if duo else powers)
            loss = site.rounding_loss(costs, factors) + _of_inputs(site, config, factors)
            if loss < lowest:
                best, lowest = Scales(factors, {"exponent": exponent, "duo": duo}), loss
            nearest, since = (loss, 0) if loss < nearest else (nearest, since + 1)
            if since == PATIENCE:
                break
    if bool((best.factors != 1).any()):
        scaled, plain = (at.error() + _of_inputs(at, config) for at in (site.scaled(best.factors), site))
        if scaled > plain:
            best, lowest = Scales(torch.ones_like(best.factors), {"exponent": 0.0, "duo": False}), unscaled
    return Scales(best.factors, {**best.record, "loss": round(lowest / max(unscaled, 1e-30), 6)})


def multiply_adds(rows: int, cols: int, config: Config) -> float:
    """Return about how many of a matrix product take as long as a linear's part of ``search``."""
    return 1.2 * config.steps * min(rows, ROWS) * cols**2


def _of_inputs(site: SiteView, config: Config, factors: Float[Tensor, " cols"] | None = None) -> float:
    """Return what rounding the activations counts for, at columns scaled by ``factors``."""
    if not config.inputs:
        return 0.0
    return config.inputs * (site if factors is None else site.scaled(factors)).input_loss()


def _magnitudes(site: SiteView) -> Float[Tensor, " cols"]:
    """Return the mean |w| of every column, as a share of the largest weight of its group."""
    total = torch.zeros_like(site.stats.abs_mean)
    rows = 0
    for w, rounding in zip(site.weights, site.roundings, strict=True):
        if rounding is not None:
            groups = w.abs().view(len(w), -1, rounding.grid.group)
            total += (groups / groups.amax(2, keepdim=True).clamp(min=1e-30)).view(w.shape).sum(0)
            rows += len(w)
    return total / rows


def _centred(factors: Float[Tensor, " cols"]) -> Float[Tensor, " cols"]:
    """Return factors whose smallest and largest are each other's inverse; columns without activations get no 0."""
    factors = factors.clamp(min=float(factors.max()) * SMALLEST)
    return factors / (factors.max() * factors.min()).sqrt()


def clip(w: Float[Tensor, "rows cols"], stats: Stats, rounding: Rounding, config: Config) -> Float[Tensor, "rows cols"]:
    """Return the weights with the largest of each group cut off where that lowers the error of the row's output."""
    if not config.clip or rounding.grid.per_tensor:
        return w
    clipped = _clipped(w, stats, rounding.grid, config.steps // 2 + 1)
    losses = [row_errors(round_to_nearest(target, stats, rounding.grid) - w, stats) for target in (clipped, w)]
    clipped = torch.where((losses[0] < losses[1])[:, None], clipped, w)
    return clipped if rounding.error(w, stats, clipped) < rounding.error(w, stats, w) else w


def _clipped(w: Float[Tensor, "rows cols"], stats: Stats, grid: Grid, steps: int) -> Float[Tensor, "rows cols"]:
    """Return the weights with each group in the range that costs least, as if the other groups were exact."""
    assert stats.hessian is not None
    groups = w.view(len(w), -1, grid.group)
    largest = groups.abs().amax(2, keepdim=True)
    starts = range(0, w.shape[1], grid.group)
    blocks = torch.stack([stats.hessian[g : g + grid.group, g : g + grid.group] for g in starts])
    lowest, best = torch.full_like(largest, torch.inf), largest
    for width in torch.linspace(1, NARROWEST, steps).tolist():
        limit = width * largest
        rounded = round_to_nearest(groups.clamp(-limit, limit).view(w.shape), stats, grid)
        delta = rounded.view(groups.shape) - groups
        loss = (torch.einsum("rgc,gcd->rgd", delta, blocks) * delta).sum(2, keepdim=True)
        best = torch.where(loss < lowest, limit, best)
        lowest = torch.minimum(loss, lowest)
    return groups.clamp(-best, best).view(w.shape)
