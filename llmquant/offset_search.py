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

from collections.abc import Iterable
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from llmquant import kernels
from llmquant.blocks import half_above, in_chunks, in_near_units, in_units, to_half
from llmquant.grid import Params
from llmquant.kernels import offset_search as kernel

STARTS_2_BITS = ((4, 2), (3, 3), (0, 4), (1, 3), (3, -1), (0, 6), (1, 0), (6, 1))
STARTS = ((-1, 0), (-7, 0), (2, 0), (-1, 3), (4, -1), (-8, -8), (-1, -7), (2, 3))
"""Where a group is rounded first: its lowest and highest level lie so many eighths of a step inside its range.

Chosen greedily, for the least mean error after the refit, on weights of two
small trained models (with and without importance), Gaussian and Laplace noise.
"""
SPARE = 4  # the largest sub-scale of a super-block may be stored as so many different integers, from the largest
SINGULAR = 1e-5  # a float32 determinant below this share of its terms is noise
LARGEST = torch.finfo(torch.float16).max


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
        rounding = best_rounded(x, weight, top, most=torch.inf)
        d = to_half(rounding.best()[0])
        return {"d": d, "m": to_half(rounding.best_offset(d.to(x.dtype)))}

    return in_chunks(fit, w, importance, reach=LARGEST)


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

    return in_chunks(fit, w, importance, reach=LARGEST * sub_top)


def store_super_block(
    scale: Float[Tensor, "n groups"], offset: Float[Tensor, "n groups"], sub_top: int, near: Params | None = None
) -> Params:
    """Return the parameters nearest to wished-for scales and offsets, named as in ``fit_super_block``.

    The scales of a super-block share a sign, and so do its offsets: what has not
    the sign of the largest becomes 0.

    near: parameters of the same spans, whose integers say the units.
    """
    wanted = {"scale": scale, "minimum": -offset}
    if near is None:
        tops = range(sub_top, sub_top // 2, -1)
        (d, s), (dmin, m) = (in_units(value, tops, 0, sub_top) for value in wanted.values())
    else:
        (d, s), (dmin, m) = (in_near_units(value, near[name], 0, sub_top) for name, value in wanted.items())
    return {"d": d, "dmin": dmin, "scale": s.to(torch.uint8), "minimum": m.to(torch.uint8)}


def super_block_levels(params: Params) -> tuple[Float[Tensor, "*b groups"], Float[Tensor, "*b groups"]]:
    """Return (scale, offset) of every group in float32, as decoders compute them."""
    d, dmin, scale, minimum = (params[name].float() for name in ("d", "dmin", "scale", "minimum"))
    return d * scale, -(dmin * minimum)


def _fit_super_block(x: Tensor, weight: Tensor, top: int, sub_top: int) -> SuperBlock:
    """Return the best super-block with d and dmin >= 0 for x [n, groups, size]."""
    rounding = best_rounded(x, weight, top, most=0.0)
    scale, offset = rounding.best(most=0.0)
    d, dmin = scale.amax(1), -offset.amin(1)
    tops = sub_top - torch.arange(SPARE, dtype=x.dtype, device=x.device)
    block = _choose(rounding, half_above(d / tops).to(x.dtype), half_above(dmin / tops).to(x.dtype), sub_top)
    rounding = rounded(x, weight, *block.levels(), top)
    refitted = _integers(rounding, rounding.best(most=0.0)[1], *_best_factors(rounding, block), sub_top)
    rounded_again = rounded(x, weight, *refitted.levels(), top)
    return _least(
        (trial, error.wee.sum(1, keepdim=True)) for trial, error in ((block, rounding), (refitted, rounded_again))
    )


def _expected_error(low: Tensor, high: Tensor, share: Tensor, top: int, sub_top: int) -> Tensor:
    """Return 12 times the error of evenly spread weights where offsets lie at the low ends, [n, 1]."""
    offset = low.clamp(max=0)
    step, offset_step = (high - offset) / top, offset.amin(1, keepdim=True) / sub_top
    return (share * (step.square() + offset_step.square())).sum(1, keepdim=True)


def best_rounded(x: Tensor, weight: Tensor, top: int, most: float) -> Rounding:
    """Return the rounding at the best of the refits of all starts, offsets at most ``most``."""
    starts = torch.tensor(STARTS_2_BITS if top == 3 else STARTS, dtype=x.dtype) / 8
    if kernels.suit(x):
        return Rounding(*kernel.search(x, weight, top, most, starts, SINGULAR))
    return search(x, weight, top, most, starts)


def rounded(x: Tensor, weight: Tensor, scale: Tensor, offset: Tensor, top: int) -> Rounding:
    if kernels.suit(x):
        return Rounding(*kernel.round_at(x, weight, scale, offset, top))
    return round_at(x, weight, scale, offset, top)


def search(
    x: Float[Tensor, "*b size"],
    weight: Float[Tensor, "*b size"],
    top: int,
    most: float,
    starts: Float[Tensor, "starts 2"],
) -> Rounding:
    """Return the rounding at the best of the refits of all starts.

    most: of an offset. starts: how far the lowest and the highest level lie inside a group's range, in steps.
    """
    lowest = x.amin(-1, keepdim=True).clamp(max=most)
    step = (x.amax(-1, keepdim=True) - lowest) / top
    trials = (
        round_at(x, weight, step * ((top - (below + above)) / top), lowest + step * below, top)
        for below, above in starts.tolist()
    )
    best = _least((trial, trial.error_at(*trial.best(most))) for trial in trials)
    return round_at(x, weight, *best.best(most), top)


def round_at(
    x: Float[Tensor, "*b size"],
    weight: Float[Tensor, "*b size"],
    scale: Float[Tensor, "*b 1"],
    offset: Float[Tensor, "*b 1"],
    top: int,
) -> Rounding:
    """Return the rounding at given scales and offsets."""
    error = x - offset
    code = (error * torch.where(scale == 0, 0.0, 1 / scale)).round_().clamp_(0, top)
    error.addcmul_(code, scale, value=-1)
    we, wq = weight * error, weight * code
    sums = (we * error, we, we * code, weight, wq, wq * code)
    return Rounding(scale, offset, *(value.sum(-1, keepdim=True) for value in sums))


def _choose(rounding: Rounding, d: Tensor, dmin: Tensor, sub_top: int) -> SuperBlock:
    """Return the best of the super-blocks that any pair of factors [n, trials] gives."""
    offset = rounding.best(most=0.0)[1]
    if kernels.suit(d):
        pair = kernel.choose(torch.stack(rounding), offset, d, dmin, sub_top)
    else:
        pair = choose(rounding, offset, d, dmin, sub_top)
    return _integers(rounding, offset, *pair, sub_top)


def choose(
    rounding: Rounding,
    offset: Float[Tensor, "n groups 1"],
    d: Float[Tensor, "n trials"],
    dmin: Float[Tensor, "n trials"],
    sub_top: int,
) -> tuple[Float[Tensor, "n 1 1"], Float[Tensor, "n 1 1"]]:
    """Return the pair (d, dmin), of all pairs, whose integers serve best.

    offset: of every group, the best for its codes that is at most 0.
    """
    d, dmin = d.repeat_interleave(dmin.shape[1], 1), dmin.repeat(1, d.shape[1])
    block = _integers(rounding, offset, d[:, None], dmin[:, None], sub_top)
    best = rounding.error_at(*block.levels()).sum(1).argmin(1, keepdim=True)
    return d.gather(1, best)[..., None], dmin.gather(1, best)[..., None]


def _integers(rounding: Rounding, offset: Tensor, d: Tensor, dmin: Tensor, sub_top: int) -> SuperBlock:
    """Return the integers for given factors: the nearest scale, then the minimum that suits it best."""
    scale = _whole(rounding.best_scale(torch.maximum(offset, -dmin * sub_top)), d, sub_top)
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
    d = block.d + torch.where(solvable, (mm * se - sm * me) / determinant, 0.0)
    dmin = block.dmin + torch.where(solvable, (ss * me - sm * se) / determinant, 0.0)
    return to_half(d.clamp(min=0)).to(d.dtype), to_half(dmin.clamp(min=0)).to(d.dtype)


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
