"""Choose scales for given levels, so that sum(importance * error²) is small.

    value = scale * table[code]

Rounding weights at one scale gives codes, and with the codes held the error is a
quadratic in the scale, whose minimum costs nothing more. So a group is rounded at
a few starts, the start with the best refit wins, and its weights are rounded once
more at that refit. A super-block's sub-scales are integers: they and their factor
d are chosen on the groups' quadratics, the weights rounded at them, d refitted.
Scales may be negative: the format's one level more on the negative side then
serves whichever sign is the larger.

A format's starts were chosen greedily, each for the least mean error after the
refit beside those before it, on weights of two small trained models (with and
without importance), Gaussian and Laplace noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from llmquant import kernels
from llmquant.blocks import LEAST_WEIGHT, favour_large, half_above, in_chunks, in_near_units, in_units, to_half
from llmquant.grid import Params
from llmquant.kernels import scale_search as kernel

FAR = 1e9  # larger weights would only overflow the sums: no float16 factor reaches them
SPARE = 8  # the largest sub-scale may be stored as so many different integers, from the largest


class Rounding(NamedTuple):
    """Groups rounded to their nearest levels, [..., 1] each: the scale, and sums over the group.

    In their names w is the importance, e the error of a weight and t its level.
    """

    scale: Tensor
    wee: Tensor
    wet: Tensor
    wtt: Tensor

    def best_scale(self) -> Tensor:
        """Return the scale with the least error for these codes (0 where all levels are 0)."""
        return torch.where(self.wtt > 0, self.scale + self.wet / self.wtt, 0.0)

    def error_at(self, scale: Tensor) -> Tensor:
        """Return sum(importance * error²) of these codes at another scale."""
        change = scale - self.scale
        return self.wee - 2 * change * self.wet + change * change * self.wtt


def fit_group(
    w: Float[Tensor, "n size"],
    importance: Float[Tensor, "n size"],
    table: Float[Tensor, " levels"],
    starts: Sequence[float],
) -> Params:
    """Return {"d": scale} of every row, float16 [n, 1].

    starts: levels that the weight of largest magnitude may be put on, to begin with; need not be in the table.
    """

    def fit(x: Tensor, weight: Tensor) -> Params:
        return {"d": to_half(best_rounded(x, weight, table.to(x), starts).best_scale())}

    return in_chunks(fit, w, importance, reach=FAR)


def fit_super_block(
    w: Float[Tensor, "n span"],
    importance: Float[Tensor, "n span"],
    table: Float[Tensor, " levels"],
    starts: Sequence[float],
    groups: int,
    lowest: int,
    favour: float = 0.0,
) -> Params:
    """Return {"d": float16 [n, 1], "scale": int8 [n, groups]} of every row.

        value = (d * scale) * table[code], scale = lowest ... -lowest - 1

    favour: how much large weights count for more (the base of ``blocks.favour_large``), if more than 0.
    """
    if kernels.suit(w):
        numbers = (groups, lowest, SPARE, favour, LEAST_WEIGHT, FAR)
        d, scale = kernel.fit_super_block(w, importance, table, starts, *numbers)
        return {"d": to_half(d), "scale": scale}

    def fit(x: Tensor, weight: Tensor) -> Params:
        d, scale = best_super_block(x, weight, table.to(x), starts, groups, lowest)
        return {"d": to_half(d), "scale": scale}

    return in_chunks(fit, w, favour_large(w, importance, favour) if favour else importance, reach=FAR)


def best_super_block(
    x: Float[Tensor, "n span"],
    weight: Float[Tensor, "n span"],
    table: Float[Tensor, " levels"],
    starts: Sequence[float],
    groups: int,
    lowest: int,
) -> tuple[Float[Tensor, "n 1"], Int8[Tensor, "n groups"]]:
    """Return the factor d of every row, and the integer scales of its groups."""
    x, weight = (value.reshape(len(value), groups, -1) for value in (x, weight))
    d, scale = _integers(search(x, weight, table, starts), lowest)
    rounding = round_at(x, weight, d * scale, table)
    d = d + _share((scale * rounding.wet).sum(1, keepdim=True), (scale * scale * rounding.wtt).sum(1, keepdim=True))
    return d[:, :, 0], scale[:, :, 0].to(torch.int8)


def store_super_block(scale: Float[Tensor, "n groups"], lowest: int, near: Params | None = None) -> Params:
    """Return the parameters nearest to wished-for scales, named as in ``fit_super_block``.

    near: parameters of the same spans, whose integers say the unit.
    """
    if near is None:
        d, whole = in_units(scale, range(lowest, lowest // 2), lowest, -lowest - 1)
    else:
        d, whole = in_near_units(scale, near["scale"], lowest, -lowest - 1)
    return {"d": d, "scale": whole.to(torch.int8)}


def super_block_levels(params: Params) -> tuple[Float[Tensor, "*b groups"], Float[Tensor, "*b groups"]]:
    """Return (scale, offset) of every group in float32, as decoders compute them."""
    return without_offset(params["d"].float() * params["scale"].float())


def without_offset(scale: Float[Tensor, "*b groups"]) -> tuple[Float[Tensor, "*b groups"], Float[Tensor, "*b groups"]]:
    """Return (scale, offset) with an offset that leaves every float as it is, which +0 would not: -0 + 0 = +0."""
    return scale, torch.full_like(scale, -0.0)


def nearest_level(x: Tensor, table: Tensor) -> Tensor:
    """Return the level nearest to each value."""
    if bool((table.diff() == 1).all()):
        return x.round().clamp_(float(table[0]), float(table[-1]))
    return table[torch.bucketize(x.contiguous(), (table[1:] + table[:-1]) / 2)]


def best_rounded(x: Tensor, weight: Tensor, table: Tensor, starts: Sequence[float]) -> Rounding:
    if kernels.suit(x):
        return Rounding(*kernel.search(x, weight, table, starts))
    return search(x, weight, table, starts)


def rounded(x: Tensor, weight: Tensor, scale: Tensor, table: Tensor) -> Rounding:
    if kernels.suit(x):
        return Rounding(*kernel.round_at(x, weight, scale, table))
    return round_at(x, weight, scale, table)


def search(
    x: Float[Tensor, "*b size"],
    weight: Float[Tensor, "*b size"],
    table: Float[Tensor, " levels"],
    starts: Sequence[float],
) -> Rounding:
    """Return the rounding at the best of the refits of all starts."""
    largest = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    best = round_at(x, weight, largest / starts[0], table)
    for start in starts[1:]:
        trial = round_at(x, weight, largest / start, table)
        better = trial.error_at(trial.best_scale()) < best.error_at(best.best_scale())
        best = Rounding(*(torch.where(better, new, old) for new, old in zip(trial, best, strict=True)))
    return round_at(x, weight, best.best_scale(), table)


def round_at(
    x: Float[Tensor, "*b size"],
    weight: Float[Tensor, "*b size"],
    scale: Float[Tensor, "*b 1"],
    table: Float[Tensor, " levels"],
) -> Rounding:
    """Return the rounding at given scales."""
    inverse = (1 / scale).nan_to_num(posinf=0.0, neginf=0.0)  # a scale of 0, or too small to be stored
    level = nearest_level(x * inverse, table)
    error = torch.addcmul(x, scale, level, value=-1)
    we, wt = weight * error, weight * level
    return Rounding(scale, *(value.sum(-1, keepdim=True) for value in (we * error, we * level, wt * level)))


def _integers(rounding: Rounding, lowest: int) -> tuple[Tensor, Tensor]:
    """Return (d, integers): the factor, of a few, under which the groups' codes serve best."""
    wished = rounding.best_scale()
    largest = wished.gather(1, wished.abs().argmax(1, keepdim=True))[:, 0]
    tops = torch.arange(lowest, lowest + SPARE, dtype=wished.dtype, device=wished.device)
    trials = half_above(largest / tops).to(wished.dtype)
    error = rounding.error_at(trials[:, None] * _whole(wished, trials[:, None], lowest)).sum(1)
    d = trials.gather(1, error.argmin(1, keepdim=True))[..., None]
    return d, _whole(wished, d, lowest)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / whole, 0.0)


def _whole(value: Tensor, unit: Tensor, lowest: int) -> Tensor:
    return torch.where(unit == 0, 0.0, value / unit).round().clamp(lowest, -lowest - 1)
