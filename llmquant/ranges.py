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

TOGETHER = 1 << 17  # values that `hqq` searches together: what is computed of them stays in a cache
POWER = 0.7  # of the errors that `hqq` adds up
BETA, GROWTH, ROUNDS = 10.0, 1.01, 20  # weight of its splitting, what each round multiplies it by, rounds

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


def hqq(x: Float[Tensor, "n values"], symmetric: bool, levels: int) -> Range:
    """Return the range whose ``levels`` even steps leave the least sum(|error| ** 0.7), by half-quadratic splitting.

    A power below one counts few large errors for less than squares do, so that outliers do not stretch the steps.
    With e as a second variable, min |e|^p + beta/2 (x - dequantized - e)² is solved in turns: e by the generalised
    soft-thresholding operator, then zero point and step for the values x - e, as beta grows.
    Source: Badri and Shaji, "Half-quadratic quantization of large machine learning models" (2023).

    Departures: errors are measured in steps, so that the result does not depend on the unit of x; it starts from the
    range of least squares instead of [min, max], as it only finds a minimum near its start; a whole zero point is
    what files store, so the float one leads to the two next to it, and the step, which the original holds, is solved
    for at each of them; the best of all by the sum itself is taken, [min, max] and the start included.
    """
    found = [_hqq(part, symmetric, levels) for part in torch.split(x, max(TOGETHER // x.shape[1], 1))]
    return torch.cat([low for low, _ in found]), torch.cat([high for _, high in found])


def _hqq(x: Float[Tensor, "n values"], symmetric: bool, levels: int) -> Range:
    spans = [minmax(x, symmetric), mse(x, symmetric, torch.ones_like(x), levels)]
    if not symmetric:
        spans = [(with_a_level_below_zero(low, high, levels), high) for low, high in spans]
    intervals = levels / 2 if symmetric else levels - 1
    tiny = torch.finfo(x.dtype).tiny
    tries = []
    for low, high in spans:
        step = ((high if symmetric else high - low) / intervals).clamp(min=tiny)
        tries.append((step, torch.full_like(low, levels // 2) if symmetric else _whole_zero(-low / step, levels)))
    step, zero = tries[-1]
    zeros = [zero]
    if not symmetric:
        wished = _hqq_zero(x, step, -spans[-1][0] / step, levels)
        zeros += [_whole_zero(wished.floor(), levels), _whole_zero(wished.ceil(), levels)]
    tries += [(_hqq_step(x, step, zero, levels), zero) for zero in zeros]
    step, zero = tries[0]
    least = _power_error(x, step, zero, levels)
    for other, at in tries[1:]:
        error = _power_error(x, other, at, levels)
        better = error < least
        least, step, zero = (torch.where(better, a, b) for a, b in ((error, least), (other, step), (at, zero)))
    if symmetric:
        return -step * intervals, step * intervals
    return -step * zero, step * (intervals - zero)


def _whole_zero(zero: Tensor, levels: int) -> Tensor:
    return zero.round().clamp(1, levels - 1)


def _hqq_zero(x: Tensor, step: Tensor, zero: Tensor, levels: int) -> Tensor:
    """Return the float zero point at a given step."""
    for beta in (BETA * GROWTH**i for i in range(ROUNDS)):
        codes = (x / step + zero).round().clamp(0, levels - 1)
        e = _shrink(x / step - (codes - zero), beta)
        zero = (codes - x / step + e).mean(1, keepdim=True)
    return zero


def _hqq_step(x: Tensor, step: Tensor, zero: Tensor, levels: int) -> Tensor:
    """Return the step at a given zero point."""
    for beta in (BETA * GROWTH**i for i in range(ROUNDS)):
        codes = ((x / step + zero).round().clamp(0, levels - 1)).sub_(zero)
        target = x - step * _shrink(x / step - codes, beta)
        power = codes.square().sum(1, keepdim=True)
        solved = (target * codes).sum(1, keepdim=True) / power.clamp(min=1)
        step = torch.where((power > 0) & (solved > 0), solved, step)
    return step


def _shrink(error: Tensor, beta: float) -> Tensor:
    """Return the generalised soft-thresholding of errors: sign(e) max(|e| - |e|^(p - 1) / beta, 0)."""
    size = error.abs().clamp(min=1e-12)
    return error.sign() * (size - size.pow(POWER - 1) / beta).clamp(min=0)


def _power_error(x: Tensor, step: Tensor, zero: Tensor, levels: int) -> Tensor:
    rounded = ((x / step).round() + zero).clamp(0, levels - 1).sub_(zero).mul_(step)
    return rounded.sub_(x).abs_().pow_(POWER).sum(1, keepdim=True)
