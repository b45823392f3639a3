"""Choose scales and offsets for evenly spaced levels, so that sum(importance * error²) is small.

    value = scale * code + offset, code = 0, 1, ... top

Rounding weights at one (scale, offset) gives codes and six sums over the group
(`Rounding`). With the codes held, the error is a quadratic in scale and offset
with those sums as coefficients: its minimum (a least-squares problem of two
unknowns) and its value at any other point cost nothing per weight. So a group is
rounded at a few starts, the start with the best refit wins, and all that a
super-block adds (integer sub-scales, float16 factors) is chosen on quadratics.
Each weight is rounded 9 times for a group, 11 times for a super-block.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from llmquant.blocks import in_units, to_half
from llmquant.grid import Params

STARTS_2_BITS = ((4, 2), (3, 3), (0, 4), (1, 3), (3, -1), (0, 6), (1, 0), (6, 1))
STARTS = ((-1, 0), (-7, 0), (2, 0), (-1, 3), (4, -1), (-8, -8), (-1, -7), (2, 3))
"""Where a group is rounded first: its lowest and highest level lie so many eighths of a step inside its range.

Chosen greedily, for the least mean error after the refit, on weights of two
small trained models (with and without importance), Gaussian and Laplace noise.
"""
SPARE = (0, 1, 2, 3)  # the largest sub-scale of a super-block may be stored as the largest integer minus one of these
LEAST_WEIGHT = 1e-8  # of a column, as a share of the largest in its span: keeps groups without activations solvable
SINGULAR = 1e-5  # a float32 determinant below this share of its terms is noise
LARGEST = torch.finfo(torch.float16).max
CHUNK = 2**20  # weights searched at once


class Rounding(NamedTuple):
    """Groups rounded to their nearest levels, and sums over each group: [..., 1].

    In the names of the sums, w is the importance, e the error, q the code of a weight.
    """

    scale: Tensor
    offset: Tensor
    wee: Tensor
    we: Tensor
    weq: Tensor
    w: Tensor
    wq: Tensor
    wqq: Tensor

    def best_scale(self, offset: Tensor) -> Tensor:
        """Return the scale with the least error for these codes and a given offset (0 where all codes are 0)."""
        change = (self.weq - (offset - self.offset) * self.wq) / self.wqq
        return torch.where(self.wqq > 0, self.scale + change, 0.0)

    def best_offset(self, scale: Tensor) -> Tensor:
        """Return the offset with the least error for these codes and a given scale."""
        return self.offset + (self.we - (scale - self.scale) * self.wq) / self.w

    def best(self, most: float = torch.inf) -> tuple[Tensor, Tensor]:
        """Return the (scale, offset) with the least error for these codes, the offset at most ``most``."""
        determinant = self.w * self.wqq - self.wq * self.wq
        solvable = determinant > SINGULAR * self.w * self.wqq
        change = torch.where(solvable, (self.w * self.weq - self.wq * self.we) / determinant, 0.0)
        offset = self.best_offset(self.scale + change).clamp(max=most)
        return self.best_scale(offset).clamp(min=0), offset

    def error_at(self, scale: Tensor, offset: Tensor) -> Tensor:
        """Return sum(importance * error²) of these codes at another scale and offset."""
        s, o = scale - self.scale, offset - self.offset
        return self.wee - 2 * (s * self.weq + o * self.we) + s * s * self.wqq + 2 * s * o * self.wq + o * o * self.w


class SuperBlock(NamedTuple):
    """Integer scales and minimums [n, groups, 1], and their factors [n, 1, 1], float16 values."""

    d: Tensor
    dmin: Tensor
    scale: Tensor
    minimum: Tensor

    def levels(self) -> tuple[Tensor, Tensor]:
        """Return (scale, offset) of every group."""
        return self.d * self.scale, -self.dmin * self.minimum


T = TypeVar("T", Rounding, SuperBlock)


def fit_group(w: Float[Tensor, "n size"], importance: Float[Tensor, "n size"], top: int) -> Params:
    """Return {"d": scale, "m": offset} of every row, float16 [n, 1]."""

    def fit(x: Tensor, weight: Tensor) -> Params:
        rounding = _search(x, weight, top, most=torch.inf)
        d = to_half(rounding.best()[0])
        return {"d": d, "m": to_half(rounding.best_offset(d.to(x.dtype)))}

    return _in_chunks(fit, w, importance, reach=LARGEST)


def fit_super_block(
    w: Float[Tensor, "n span"], importance: Float[Tensor, "n span"], groups: int, top: int, sub_top: int
) -> Params:
    """Return {"d", "dmin": float16 [n, 1], "scale", "minimum": uint8 [n, groups]} of every row.

        value = (d * scale) * code - (dmin * minimum), scale and minimum = 0, 1, ... sub_top

    d and dmin have the same sign: positive where the offsets lie at the low ends
    of the groups, negative where they lie at the high ends, which is chosen where
    it promises the smaller error: those ends are nearer to zero, so that the
    steps of the offset are finer, or some groups do not reach below zero at all.
    """

    def fit(x: Tensor, weight: Tensor) -> Params:
        x, weight = (value.reshape(len(value), groups, -1) for value in (x, weight))
        low, high, share = x.amin(2), x.amax(2), weight.sum(2)
        upright = _expected_error(low, high, share, top, sub_top)
        mirrored = _expected_error(-high, -low, share, top, sub_top)
        sign = torch.where(mirrored < upright, -1.0, 1.0)[:, :, None]
        block = _fit_super_block(sign * x, weight, top, sub_top)
        return {
            "d": to_half(sign * block.d)[:, :, 0],
            "dmin": to_half(sign * block.dmin)[:, :, 0],
            "scale": block.scale[:, :, 0].to(torch.uint8),
            "minimum": block.minimum[:, :, 0].to(torch.uint8),
        }

    return _in_chunks(fit, w, importance, reach=LARGEST * sub_top)


def store_super_block(scale: Float[Tensor, "n groups"], offset: Float[Tensor, "n groups"], sub_top: int) -> Params:
    """Return the parameters nearest to wished-for scales and offsets, named as in ``fit_super_block``.

    The scales of a super-block share a sign, and so do its offsets: what has not
    the sign of the largest becomes 0.
    """
    tops = range(sub_top, sub_top // 2, -1)
    (d, s), (dmin, m) = (in_units(value, tops, 0, sub_top) for value in (scale, -offset))
    return {"d": d, "dmin": dmin, "scale": s.to(torch.uint8), "minimum": m.to(torch.uint8)}


def super_block_levels(params: Params) -> tuple[Float[Tensor, "*b groups"], Float[Tensor, "*b groups"]]:
    """Return (scale, offset) of every group in float32, as decoders compute them."""
    d, dmin, scale, minimum = (params[name].float() for name in ("d", "dmin", "scale", "minimum"))
    return d * scale, -(dmin * minimum)


def _fit_super_block(x: Tensor, weight: Tensor, top: int, sub_top: int) -> SuperBlock:
    """Return the best super-block with d and dmin >= 0 for x [n, groups, size]."""
    rounding = _search(x, weight, top, most=0.0)
    scale, offset = rounding.best(most=0.0)
    d, dmin = scale.amax(1, keepdim=True), -offset.amin(1, keepdim=True)
    trials = (
        _integers(rounding, _half_above(d / (sub_top - i)), _half_above(dmin / (sub_top - j)), sub_top)
        for i, j in itertools.product(SPARE, SPARE)
    )
    block = _least((trial, rounding.error_at(*trial.levels()).sum(1, keepdim=True)) for trial in trials)
    rounding = _round(x, weight, *block.levels(), top)
    refitted = _integers(rounding, *_best_factors(rounding, block), sub_top)
    rounded_again = _round(x, weight, *refitted.levels(), top)
    return _least(
        (trial, error.wee.sum(1, keepdim=True)) for trial, error in ((block, rounding), (refitted, rounded_again))
    )


def _expected_error(low: Tensor, high: Tensor, share: Tensor, top: int, sub_top: int) -> Tensor:
    """Return 12 times the error of evenly spread weights where offsets lie at the low ends, [n, 1]."""
    offset = low.clamp(max=0)
    step, offset_step = (high - offset) / top, offset.amin(1, keepdim=True) / sub_top
    return (share * (step.square() + offset_step.square())).sum(1, keepdim=True)


def _search(x: Tensor, weight: Tensor, top: int, most: float) -> Rounding:
    """Return the rounding at the best of the refits of all starts, offsets at most ``most``."""
    lowest = x.amin(-1, keepdim=True).clamp(max=most)
    step = (x.amax(-1, keepdim=True) - lowest) / top
    starts = (
        _round(x, weight, step * ((top - (below + above) / 8) / top), lowest + step * (below / 8), top)
        for below, above in (STARTS_2_BITS if top == 3 else STARTS)
    )
    best = _least((start, start.error_at(*start.best(most))) for start in starts)
    return _round(x, weight, *best.best(most), top)


def _round(x: Tensor, weight: Tensor, scale: Tensor, offset: Tensor, top: int) -> Rounding:
    error = x - offset
    code = (error * torch.where(scale == 0, 0.0, 1 / scale)).round_().clamp_(0, top)
    error.addcmul_(code, scale, value=-1)
    we, wq = weight * error, weight * code
    sums = (we * error, we, we * code, weight, wq, wq * code)
    return Rounding(scale, offset, *(value.sum(-1, keepdim=True) for value in sums))


def _integers(rounding: Rounding, d: Tensor, dmin: Tensor, sub_top: int) -> SuperBlock:
    """Return the integers for given factors: the nearest scale, then the minimum that suits it best."""
    offset = rounding.best(most=0.0)[1].clamp(min=-dmin * sub_top)
    scale = _whole(rounding.best_scale(offset), d, sub_top)
    return SuperBlock(d, dmin, scale, _whole(-rounding.best_offset(d * scale), dmin, sub_top))


def _best_factors(rounding: Rounding, block: SuperBlock) -> tuple[Tensor, Tensor]:
    """Return (d, dmin) with the least error for given codes and integers."""

    def total(value: Tensor) -> Tensor:
        return value.sum(1, keepdim=True)

    s, m = block.scale, -block.minimum
    ss, sm, mm = total(s * s * rounding.wqq), total(s * m * rounding.wq), total(m * m * rounding.w)
    se, me = total(s * rounding.weq), total(m * rounding.we)
    determinant = ss * mm - sm * sm
    solvable = determinant > SINGULAR * ss * mm
    d = torch.where(solvable, (mm * se - sm * me) / determinant, 0.0)
    dmin = torch.where(solvable, (ss * me - sm * se) / determinant, 0.0)
    return _half((block.d + d).clamp(min=0)), _half((block.dmin + dmin).clamp(min=0))


def _least(candidates: Iterable[tuple[T, Tensor]]) -> T:
    """Return, element by element, the first candidate with the least error."""
    remaining = iter(candidates)
    chosen, least = next(remaining)
    for trial, error in remaining:
        better = error < least
        chosen = type(chosen)(*(torch.where(better, new, old) for new, old in zip(trial, chosen, strict=True)))
        least = torch.where(better, error, least)
    return chosen


def _whole(value: Tensor, unit: Tensor, top: int) -> Tensor:
    return torch.where(unit == 0, 0.0, value / unit).round().clamp(0, top)


def _half(value: Tensor) -> Tensor:
    return to_half(value).to(value.dtype)


def _half_above(value: Tensor) -> Tensor:
    """Round away from zero to float16: a tiny factor does not become 0, and the largest integer is enough."""
    nearest = to_half(value)
    next_ = (nearest.view(torch.int16) + 1).view(torch.float16)
    short = nearest.to(value.dtype).abs() < value.abs().clamp(max=LARGEST)
    return torch.where(short, next_, nearest).to(value.dtype)


def _in_chunks(fit: Callable[[Tensor, Tensor], Params], w: Tensor, importance: Tensor, reach: float) -> Params:
    """Fit a bounded number of rows at once: weights cut to what offsets reach, importances as shares of the largest."""
    rows = max(CHUNK // w.shape[1], 1)
    parts = []
    for x, weight in zip(torch.split(w, rows), torch.split(importance, rows), strict=True):
        largest = weight.amax(1, keepdim=True)
        share = torch.where(largest > 0, weight / largest, 1.0).clamp(min=LEAST_WEIGHT)
        parts.append(fit(x.clamp(-reach, reach), share.to(x.dtype)))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
