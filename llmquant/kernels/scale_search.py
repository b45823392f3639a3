"""Roundings of many groups at once (the plain twins are in ``llmquant.scale_search``).

A group's weights lie down a column of a tile, so that every operation runs over
neighbouring groups, and no sum over a group is ever taken across a register.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int8
from torch import Tensor

from llmquant.kernels import ONE, TWO, ZERO, Array, compiled, shared_out

TILE = 256  # groups; with their importances they fit the second-level cache
HALF = (np.float32(2.0**-14), np.float32(2.0**24), np.float32(65504))  # float16: least normal, fine steps in 1, largest


def search(
    x: Float[Tensor, "*b size"],
    weight: Float[Tensor, "*b size"],
    table: Float[Tensor, " levels"],
    starts: Sequence[float],
) -> Float[Tensor, "sums *b 1"]:
    """Return (scale, wee, wet, wtt) of the rounding at the best of the refits of all starts."""
    return _run(x, weight, table, starts, x[..., :1])


def round_at(
    x: Float[Tensor, "*b size"],
    weight: Float[Tensor, "*b size"],
    scale: Float[Tensor, "*b 1"],
    table: Float[Tensor, " levels"],
) -> Float[Tensor, "sums *b 1"]:
    """Return (scale, wee, wet, wtt) of the rounding at given scales."""
    return _run(x, weight, table, (), scale)


def fit_super_block(
    w: Float[Tensor, "n span"],
    importance: Float[Tensor, "n span"],
    table: Float[Tensor, " levels"],
    starts: Sequence[float],
    groups: int,
    lowest: int,
    spare: int,
    favour: float,
    least_weight: float,
    reach: float,
) -> tuple[Float[Tensor, "n 1"], Int8[Tensor, "n groups"]]:
    """Return the factor d of every row, in float32, and the integer scales of its groups."""
    d, scale = torch.empty(len(w), 1), torch.empty(len(w), groups, dtype=torch.int8)
    arrays = (w.contiguous().numpy(), importance.contiguous().numpy(), table.numpy(), np.array(starts, np.float32))
    out = (d.view(-1).numpy(), scale.numpy())
    numbers = (np.float32(lowest), np.float32(favour), np.float32(least_weight), np.float32(reach))
    even = _even(table)
    shared_out(lambda start, stop: _fit(arrays, out, numbers, spare, even, start, stop), len(w), TILE // groups)
    return d, scale


def _run(x: Tensor, weight: Tensor, table: Tensor, starts: Sequence[float], scale: Tensor) -> Tensor:
    """Round at the best refit of the starts, or at ``scale`` where there are none."""
    size = x.shape[-1]
    found = torch.empty(4, x.numel() // size)
    found[0] = scale.flatten()
    flat = (x.reshape(-1, size).numpy(), weight.reshape(-1, size).numpy())
    arrays = (*flat, table.numpy(), np.array(starts, np.float32), found.numpy())
    shared_out(lambda start, stop: _search(*arrays, _even(table), start, stop), found.shape[1], TILE)
    return found.view(4, *x.shape[:-1], 1)


def _even(table: Tensor) -> bool:
    return bool((table.diff() == 1).all())


@compiled(fused=True)
def _search(
    x: Array, weight: Array, table: Array, starts: Array, found: Array, even: bool, start: int, stop: int
) -> None:
    size = x.shape[1]
    tile_x, tile_w = np.zeros((size, TILE), np.float32), np.ones((size, TILE), np.float32)
    sums = np.zeros((4, TILE), np.float32)
    for begin in range(start, stop, TILE):
        n = min(TILE, stop - begin)
        for i in range(n):
            for k in range(size):
                tile_x[k, i] = x[begin + i, k]
                tile_w[k, i] = weight[begin + i, k]
        if len(starts):
            _best_start(tile_x, tile_w, table, starts, even, sums)
        else:
            sums[0, :n] = found[0, begin : begin + n]
            _round(tile_x, tile_w, table, even, sums)
        found[:, begin : begin + n] = sums[:, :n]


@compiled(fused=True)
def _fit(
    arrays: tuple[Array, ...],
    out: tuple[Array, Array],
    numbers: tuple[np.float32, ...],
    spare: int,
    even: bool,
    start: int,
    stop: int,
) -> None:
    w, importance, table, starts = arrays
    d_out, scale_out = out
    lowest, favour, least_weight, reach = numbers
    groups = scale_out.shape[1]
    size, blocks = w.shape[1] // groups, TILE // groups
    x, weight = np.zeros((size, TILE), np.float32), np.ones((size, TILE), np.float32)
    sums, whole = np.zeros((4, TILE), np.float32), np.zeros(TILE, np.float32)
    by_group, whole_by_group = sums.reshape(4, groups, blocks), whole.reshape(groups, blocks)  # neighbours: blocks
    d = np.zeros(blocks, np.float32)
    above, below = np.zeros(blocks, np.float32), np.zeros(blocks, np.float32)
    for begin in range(start, stop, blocks):
        n = min(blocks, stop - begin)
        for b in range(n):
            w_, importance_ = w[begin + b], importance[begin + b]
            for g in range(groups):
                lane = g * blocks + b
                for k in range(size):
                    x[k, lane] = min(max(w_[g * size + k], -reach), reach)
                    weight[k, lane] = importance_[g * size + k]
        _share(x, weight, groups, favour, least_weight)
        _best_start(x, weight, table, starts, even, sums)
        _choose(by_group, lowest, spare, d, whole_by_group)
        for g in range(groups):
            scale, s_ = by_group[0, g], whole_by_group[g]
            for b in range(len(d)):
                scale[b] = d[b] * s_[b]
        _round(x, weight, table, even, sums)
        above[:] = ZERO
        below[:] = ZERO
        for g in range(groups):
            wet, wtt, s_ = by_group[2, g], by_group[3, g], whole_by_group[g]
            for b in range(len(d)):
                above[b] += s_[b] * wet[b]
                below[b] += s_[b] * s_[b] * wtt[b]
        for b in range(n):
            d_out[begin + b] = d[b] + (above[b] / below[b] if below[b] > ZERO else ZERO)
            for g in range(groups):
                scale_out[begin + b, g] = np.int8(whole_by_group[g, b])


@compiled(fused=True)
def _share(x: Array, weight: Array, groups: int, favour: np.float32, least_weight: np.float32) -> None:
    """Turn importances into shares of the largest in the super-block."""
    blocks = TILE // groups
    by_lane, by_block = np.zeros(TILE, np.float32), np.zeros(blocks, np.float32)
    if favour > ZERO:
        for k in range(len(x)):
            for i in range(TILE):
                by_lane[i] += x[k, i] * x[k, i]
        for g in range(groups):
            lanes = by_lane[g * blocks : (g + 1) * blocks]
            for b in range(len(by_block)):
                by_block[b] += lanes[b]
        part = favour / np.float32(len(x) * groups)
        for g in range(groups):
            lanes = by_lane[g * blocks : (g + 1) * blocks]
            for b in range(len(by_block)):
                lanes[b] = by_block[b] * part
        for k in range(len(x)):
            for i in range(TILE):
                weight[k, i] *= np.sqrt(x[k, i] * x[k, i] + by_lane[i])
    by_lane[:] = ZERO
    by_block[:] = ZERO
    for k in range(len(x)):
        for i in range(TILE):
            by_lane[i] = weight[k, i] if weight[k, i] > by_lane[i] else by_lane[i]
    for g in range(groups):
        lanes = by_lane[g * blocks : (g + 1) * blocks]
        for b in range(len(by_block)):
            by_block[b] = lanes[b] if lanes[b] > by_block[b] else by_block[b]
    for g in range(groups):
        lanes = by_lane[g * blocks : (g + 1) * blocks]
        for b in range(len(by_block)):
            lanes[b] = by_block[b] if by_block[b] > ZERO else ONE
    for k in range(len(x)):
        for i in range(TILE):
            share = weight[k, i] / by_lane[i]
            weight[k, i] = least_weight if share < least_weight else share


@compiled(fused=True)
def _best_start(x: Array, weight: Array, table: Array, starts: Array, even: bool, sums: Array) -> None:
    """Fill sums with scale, wee, wet and wtt of the columns of a tile at the best of the refits of all starts."""
    largest, best = np.zeros(TILE, np.float32), np.zeros(TILE, np.float32)
    least = np.full(TILE, np.inf, np.float32)
    for k in range(len(x)):
        for i in range(TILE):
            largest[i] = x[k, i] if abs(x[k, i]) > abs(largest[i]) else largest[i]
    for s in range(len(starts)):
        for i in range(TILE):
            sums[0, i] = largest[i] / starts[s]
        _round(x, weight, table, even, sums)
        for i in range(TILE):
            wtt = sums[3, i]
            change = sums[2, i] / wtt if wtt > ZERO else -sums[0, i]
            error = sums[1, i] - TWO * change * sums[2, i] + change * change * wtt
            better = error < least[i]
            best[i] = sums[0, i] + change if better else best[i]
            least[i] = error if better else least[i]
    sums[0] = best
    _round(x, weight, table, even, sums)


@compiled(fused=True)
def _round(x: Array, weight: Array, table: Array, even: bool, sums: Array) -> None:
    """Fill sums[1:] with wee, wet and wtt of the columns of a tile at the scales in sums[0]."""
    lowest, highest = table[0], table[-1]
    middles, steps = (table[1:] + table[:-1]) / TWO, table[1:] - table[:-1]
    scale, wee, wet, wtt = sums[0], sums[1], sums[2], sums[3]
    inverse, level = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    for i in range(TILE):
        inverse[i] = ONE / scale[i]
        inverse[i] = inverse[i] if abs(inverse[i]) < np.inf else ZERO
        wee[i] = wet[i] = wtt[i] = ZERO
    for k in range(len(x)):
        if even:
            for i in range(TILE):
                t = np.rint(x[k, i] * inverse[i])
                t = lowest if t < lowest else t
                level[i] = highest if t > highest else t
        else:
            for i in range(TILE):
                level[i] = lowest
            for m in range(len(steps)):
                middle, step = middles[m], steps[m]
                for i in range(TILE):
                    level[i] += step if x[k, i] * inverse[i] > middle else ZERO
        for i in range(TILE):
            error = x[k, i] - scale[i] * level[i]
            we = weight[k, i] * error
            wt = weight[k, i] * level[i]
            wee[i] += we * error
            wet[i] += we * level[i]
            wtt[i] += wt * level[i]


@compiled(fused=True)
def _choose(sums: Array, lowest: np.float32, spare: int, d: Array, whole: Array) -> None:
    """Fill d with the factors, float16 values, under which the groups' codes serve best, and whole with the integers.

    sums: scale, wee, wet and wtt [4, groups, blocks].
    """
    highest = -lowest - ONE
    groups, blocks = whole.shape
    wished = np.empty((groups, blocks), np.float32)
    largest, inverse = np.zeros(blocks, np.float32), np.empty(blocks, np.float32)
    trial, error, least = np.empty(blocks, np.float32), np.empty(blocks, np.float32), np.empty(blocks, np.float32)
    for g in range(groups):
        scale, wet, wtt, wished_ = sums[0, g], sums[2, g], sums[3, g], wished[g]
        for b in range(len(largest)):
            wished_[b] = scale[b] + wet[b] / wtt[b] if wtt[b] > ZERO else ZERO
            largest[b] = wished_[b] if abs(wished_[b]) > abs(largest[b]) else largest[b]
    least[:] = np.inf
    d[:] = ZERO
    for step in range(spare):
        for b in range(len(d)):
            trial[b] = _half_above(largest[b] / (lowest + np.float32(step)))
            inverse[b] = ZERO if trial[b] == ZERO else ONE / trial[b]
            error[b] = ZERO
        for g in range(groups):
            scale, wee, wet, wtt, wished_ = sums[0, g], sums[1, g], sums[2, g], sums[3, g], wished[g]
            for b in range(len(d)):
                s = np.rint(wished_[b] * inverse[b])
                s = lowest if s < lowest else s
                change = trial[b] * (highest if s > highest else s) - scale[b]
                error[b] += wee[b] - TWO * change * wet[b] + change * change * wtt[b]
        for b in range(len(d)):
            better = error[b] < least[b]
            d[b] = trial[b] if better else d[b]
            least[b] = error[b] if better else least[b]
    for b in range(len(d)):
        inverse[b] = ZERO if d[b] == ZERO else ONE / d[b]
    for g in range(groups):
        wished_, whole_ = wished[g], whole[g]
        for b in range(len(d)):
            s = np.rint(wished_[b] * inverse[b])
            s = lowest if s < lowest else s
            whole_[b] = highest if s > highest else s


@compiled(fused=False)
def _half_above(x: np.float32) -> np.float32:
    """Round away from zero to a float16 value (``llmquant.blocks.half_above``)."""
    least_normal, fine, top = HALF
    size = abs(x)
    if size < least_normal:
        up = np.ceil(size * fine) / fine
    else:
        _, exponent = math.frexp(size)  # size = 0.5 ... 1 times 2**exponent
        step = np.float32(math.ldexp(1.0, exponent - 11))
        up = np.ceil(size / step) * step
    up = top if up > top else up
    return np.float32(-up if x < ZERO else up)
