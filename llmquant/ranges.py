"""Choose the range [low, high] that a grid of evenly spaced levels should cover.

Every function takes rows of values and returns one range a row; the same rows
may be weights or samples of activations. Zero always lies in the range, so that
it is a level. A narrow range makes finer steps and clips the largest values.
A symmetric range [-high, high] has ``levels / 2`` steps of the same size on either
side of zero, of which the last above zero has no level.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

BINS = 2048  # of the histogram that `kl` searches
ROWS = 64  # whose histograms are searched together
STEPS = 48  # shrunken ranges that `mse` tries
SMALLEST = 0.35  # the narrowest of them, as a share of [min, max]
E4M3_TOP = torch.finfo(torch.float8_e4m3fn).max

Range = tuple[Tensor, Tensor]


def minmax(x: Float[Tensor, "n values"], symmetric: bool) -> Range:
    """Return the smallest range that clips nothing, each [n, 1]."""
    low = x.amin(1, keepdim=True).clamp(max=0)
    high = x.amax(1, keepdim=True).clamp(min=0)
    return _mirrored(low, high, symmetric)


def percentile(x: Float[Tensor, "n values"], symmetric: bool, percent: float) -> Range:
    """Return the range that holds ``percent`` % of the values, the rest shared by both ends.

    Symmetric: ``percent`` % of the absolute values.
    """
    if symmetric:
        return _mirrored(torch.zeros_like(x[:, :1]), _quantile(x.abs(), percent / 100), True)
    tail = (1 - percent / 100) / 2
    return _quantile(x, tail).clamp(max=0), _quantile(x, 1 - tail).clamp(min=0)


def mse(x: Float[Tensor, "n values"], symmetric: bool, importance: Float[Tensor, "n values"], levels: int) -> Range:
    """Return the shrunken [min, max] whose ``levels`` even steps leave the least sum(importance * error²)."""
    low, high = minmax(x, symmetric)
    if not symmetric:
        low = with_a_level_below_zero(low, high, levels)
    whole = (high / (levels / 2) if symmetric else (high - low) / (levels - 1)).clamp(min=torch.finfo(x.dtype).tiny)
    zero = torch.full_like(low, levels // 2) if symmetric else (-low / whole).round().clamp(min=1)

    def rounded(share: float) -> Tensor:
        step = whole * share
        return ((x / step).round() + zero).clamp(0, levels - 1).sub_(zero).mul_(step)

    share = _best_share(x, importance, rounded)
    return low * share, high * share


def mse_e4m3(x: Float[Tensor, "n values"], importance: Float[Tensor, "n values"]) -> Range:
    """Return the shrunken symmetric range, its ends E4M3's last levels, that leaves the least error; see ``mse``."""
    low, high = minmax(x, True)
    whole = (high / E4M3_TOP).clamp(min=torch.finfo(x.dtype).tiny)

    def rounded(share: float) -> Tensor:
        scale = whole * share
        return (x / scale).clamp_(-E4M3_TOP, E4M3_TOP).to(torch.float8_e4m3fn).to(x.dtype).mul_(scale)

    share = _best_share(x, importance, rounded)
    return low * share, high * share


def _best_share(x: Tensor, importance: Tensor, rounded: Callable[[float], Tensor]) -> Float[Tensor, "n 1"]:
    """Return the share of the whole range whose rounding leaves each row the least sum(importance * error²)."""
    best = torch.full_like(x[:, :1], torch.inf)
    best_share = torch.ones_like(best)
    for share in torch.linspace(1, SMALLEST, STEPS).tolist():
        error = (importance * rounded(share).sub_(x).square_()).sum(1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        best_share = torch.where(better, share, best_share)
    return best_share


def with_a_level_below_zero(low: Tensor, high: Tensor, levels: int) -> Tensor:
    """Return ``low``, or one step below zero where it is nearer to zero than that."""
    return torch.minimum(low, -high / (levels - 2))


def kl(x: Float[Tensor, "n values"], symmetric: bool, levels: int) -> Range:
    """Return the range that changes the distribution of the values least, by KL divergence.

    A histogram of ``BINS`` bins is clipped at growing thresholds, merged into
    ``levels`` bins and spread again over the bins that were not empty; the
    threshold with the smallest divergence between both wins.
    Source: Migacz, "8-bit inference with TensorRT" (GTC 2017).
    """
    if not symmetric:
        return (
            -kl((-x).clamp(min=0), True, 2 * levels)[1],
            kl(x.clamp(min=0), True, 2 * levels)[1],
        )
    magnitude = x.abs()
    # a few rows at a time: each needs some arrays of BINS float64
    high = torch.cat([_kl_threshold(rows, max(levels // 2, 2)) for rows in torch.split(magnitude, ROWS)])
    return -high, high


def _kl_threshold(magnitude: Float[Tensor, "n values"], levels: int) -> Float[Tensor, "n 1"]:
    top = magnitude.amax(1, keepdim=True)
    unit = BINS / torch.where(top == 0, 1, top).double()
    index = (magnitude * unit).long().clamp(max=BINS - 1)
    # exact zeros cost nothing at any threshold
    counts = torch.zeros(len(magnitude), BINS, dtype=torch.double, device=magnitude.device)
    counts.scatter_add_(1, index, (magnitude > 0).double())
    total = counts.sum(1, keepdim=True).clamp(min=1)
    occupied = (counts > 0).double()
    above = total - counts.cumsum(1)
    best = torch.full_like(total, torch.inf)
    chosen = torch.full_like(total, BINS)
    for width in range(levels, BINS + 1, max(BINS // 128, 1)):
        kept = counts[:, :width].clone()
        kept[:, -1] += above[:, width - 1]
        merged = torch.arange(width, device=counts.device) * levels // width
        mass = counts.new_zeros(len(counts), levels).index_add_(1, merged, counts[:, :width])
        bins = counts.new_zeros(len(counts), levels).index_add_(1, merged, occupied[:, :width])
        spread = (mass / bins.clamp(min=1))[:, merged] * occupied[:, :width]
        held = spread.sum(1, keepdim=True)
        p, q = kept / total, spread / held.clamp(min=1)
        # bins that only hold clipped mass have q = 0; a small floor keeps their cost finite
        cost = (p * (p.clamp(min=1e-12).log() - q.clamp(min=1e-12).log())).sum(1, keepdim=True)
        better = (cost < best) & (held > 0)
        best = torch.where(better, cost, best)
        chosen = torch.where(better, width, chosen)
    return top * (chosen / BINS).to(top.dtype)


def _quantile(x: Float[Tensor, "n values"], share: float) -> Float[Tensor, "n 1"]:
    """Return a quantile of each row without interpolation (torch.quantile refuses large rows)."""
    rank = min(max(round(share * (x.shape[1] - 1)), 0), x.shape[1] - 1)
    return x.kthvalue(rank + 1, dim=1, keepdim=True).values


def _mirrored(low: Tensor, high: Tensor, symmetric: bool) -> Range:
    if not symmetric:
        return low, high
    high = torch.maximum(-low, high)
    return -high, high
