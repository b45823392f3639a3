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

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from llmquant.blocks import in_units, to_half
from llmquant.grid import Params

LEAST_WEIGHT = 1e-8  # of a column, as a share of the largest in its span: keeps groups without activations solvable
FAR = 1e9  # larger weights would only overflow the sums: no float16 factor reaches them
CHUNK = 2**20  # weights searched at once
SPARE = range(8)  # the largest sub-scale may be stored as the largest integer less one of these


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
        return {"d": to_half(_search(x, weight, table.to(x), starts).best_scale())}

    return in_chunks(fit, w, importance)


def fit_super_block(
    w: Float[Tensor, "n span"],
    importance: Float[Tensor, "n span"],
    table: Float[Tensor, " levels"],
    starts: Sequence[float],
    groups: int,
    lowest: int,
) -> Params:
    """Return {"d": float16 [n, 1], "scale": int8 [n, groups]} of every row.

    value = (d * scale) * table[code], scale = lowest ... -lowest - 1
    """

    def fit(x: Tensor, weight: Tensor) -> Params:
        x, weight = (value.reshape(len(value), groups, -1) for value in (x, weight))
        levels = table.to(x)
        d, scale = _integers(_search(x, weight, levels, starts), lowest)
        rounding = _round(x, weight, d * scale, levels)
        d = d + _share((scale * rounding.wet).sum(1, keepdim=True), (scale * scale * rounding.wtt).sum(1, keepdim=True))
        return {"d": to_half(d)[:, :, 0], "scale": scale[:, :, 0].to(torch.int8)}

    return in_chunks(fit, w, importance)


def store_super_block(scale: Float[Tensor, "n groups"], lowest: int) -> Params:
    """Return the parameters nearest to wished-for scales, named as in ``fit_super_block``."""
    d, whole = in_units(scale, range(lowest, lowest // 2), lowest, -lowest - 1)
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


def _search(x: Tensor, weight: Tensor, table: Tensor, starts: Sequence[float]) -> Rounding:
    """Return the rounding at the best of the refits of all starts."""
    largest = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    best = _round(x, weight, largest / starts[0], table)
    for start in starts[1:]:
        trial = _round(x, weight, largest / start, table)
        better = trial.error_at(trial.best_scale()) < best.error_at(best.best_scale())
        best = Rounding(*(torch.where(better, new, old) for new, old in zip(trial, best, strict=True)))
    return _round(x, weight, best.best_scale(), table)


def _round(x: Tensor, weight: Tensor, scale: Tensor, table: Tensor) -> Rounding:
    inverse = (1 / scale).nan_to_num(posinf=0.0, neginf=0.0)  # a scale of 0, or too small to be stored
    level = nearest_level(x * inverse, table)
    error = torch.addcmul(x, scale, level, value=-1)
    we, wt = weight * error, weight * level
    return Rounding(scale, *(value.sum(-1, keepdim=True) for value in (we * error, we * level, wt * level)))


def _integers(rounding: Rounding, lowest: int) -> tuple[Tensor, Tensor]:
    """Return (d, integers): the factor, of a few, under which the groups' codes serve best."""
    wished = rounding.best_scale()
    largest = wished.gather(1, wished.abs().argmax(1, keepdim=True))
    tries = []
    for spare in SPARE:
        d = _half_above(largest / (lowest + spare))
        scale = _whole(wished, d, lowest)
        tries.append((rounding.error_at(d * scale).sum(1, keepdim=True), d, scale))
    error, d, scale = tries[0]
    for other, d2, scale2 in tries[1:]:
        better = other < error
        error, d, scale = (torch.where(better, new, old) for new, old in ((other, error), (d2, d), (scale2, scale)))
    return d, scale


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / whole, 0.0)


def _whole(value: Tensor, unit: Tensor, lowest: int) -> Tensor:
    return torch.where(unit == 0, 0.0, value / unit).round().clamp(lowest, -lowest - 1)


def _half(value: Tensor) -> Tensor:
    return to_half(value).to(value.dtype)


def _half_above(value: Tensor) -> Tensor:
    """Round away from zero to float16, so that the largest integer is always enough."""
    return _half(value + value * 2**-11 + value.sign() * 2**-25)


def in_chunks(
    fit: Callable[[Tensor, Tensor], Params],
    w: Float[Tensor, "n size"],
    importance: Float[Tensor, "n size"],
    reach: float = FAR,
) -> Params:
    """Fit a bounded number of rows at once, with importances as shares of the largest in the row.

    reach: larger weights are cut to this.
    """
    rows = max(CHUNK // w.shape[1], 1)
    parts = []
    for x, weight in zip(torch.split(w, rows), torch.split(importance, rows), strict=True):
        largest = weight.amax(1, keepdim=True)
        share = torch.where(largest > 0, weight / largest, 1.0).clamp(min=LEAST_WEIGHT)
        parts.append(fit(x.clamp(-reach, reach), share.to(x.dtype)))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
