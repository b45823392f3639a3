"""Roundings of many groups at once (the plain twins are in ``llmquant.scale_search``).

A group's weights lie down a column of a tile, so that every operation runs over
neighbouring groups, and no sum over a group is ever taken across a register.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from llmquant.kernels import ONE, TWO, ZERO, Array, compiled, shared_out

TILE = 256  # groups; with their importances they fit the second-level cache
BLOCKS = 64  # super-blocks


def search(
    x: Float[Tensor, "*b size"],
    weight: Float[Tensor, "*b size"],
    table: Float[Tensor, " levels"],
    starts: Sequence[float],
) -> Float[Tensor, "sums *b 1"]:
    """Return (scale, wee, wet, wtt) of the rounding at the best of the refits of all starts."""
    return _run(x, weight, table, np.array(starts, np.float32), x[..., :1])


def round_at(
    x: Float[Tensor, "*b size"],
    weight: Float[Tensor, "*b size"],
    scale: Float[Tensor, "*b 1"],
    table: Float[Tensor, " levels"],
) -> Float[Tensor, "sums *b 1"]:
    """Return (scale, wee, wet, wtt) of the rounding at given scales."""
    return _run(x, weight, table, np.empty(0, np.float32), scale)


def choose(
    rounding: Float[Tensor, "sums n groups 1"],
    wished: Float[Tensor, "n groups 1"],
    trials: Float[Tensor, "n trials"],
    lowest: int,
) -> Float[Tensor, "n 1 1"]:
    """Return the factor d under which the integers nearest to the wished-for scales serve best."""
    n = len(trials)
    fields = torch.cat([rounding, wished[None]])[..., 0].transpose(1, 2).contiguous()
    found = torch.zeros(n)
    arrays = (fields.numpy(), trials.T.contiguous().numpy(), found.numpy())
    shared_out(lambda start, stop: _choose(*arrays, np.float32(lowest), start, stop), n, BLOCKS)
    return found[:, None, None]


def _run(x: Tensor, weight: Tensor, table: Tensor, starts: Array, scale: Tensor) -> Tensor:
    """Round at the best refit of the starts, or at ``scale`` where there are none."""
    size = x.shape[-1]
    levels = table.numpy()
    uniform = bool(np.all(np.diff(levels) == 1))
    found = torch.empty(4, x.numel() // size)
    found[0] = scale.flatten()
    arrays = (x.reshape(-1, size).numpy(), weight.reshape(-1, size).numpy(), levels, starts, found.numpy())
    shared_out(lambda start, stop: _search(*arrays, uniform, start, stop), found.shape[1], TILE)
    return found.view(4, *x.shape[:-1], 1)


@compiled(fused=True)
def _search(
    x: Array, weight: Array, table: Array, starts: Array, found: Array, uniform: bool, start: int, stop: int
) -> None:
    size = x.shape[1]
    tile_x, tile_w = np.zeros((size, TILE), np.float32), np.ones((size, TILE), np.float32)
    level = np.empty(TILE, np.float32)
    sums = np.zeros((4, TILE), np.float32)
    largest = np.zeros(TILE, np.float32)
    for begin in range(start, stop, TILE):
        n = min(TILE, stop - begin)
        for i in range(n):
            for k in range(size):
                tile_x[k, i] = x[begin + i, k]
                tile_w[k, i] = weight[begin + i, k]
        sums[0, :n] = found[0, begin : begin + n]
        if len(starts):
            largest[:] = ZERO
            for k in range(size):
                for i in range(TILE):
                    largest[i] = tile_x[k, i] if abs(tile_x[k, i]) > abs(largest[i]) else largest[i]
            least, best = np.full(TILE, np.inf, np.float32), np.zeros(TILE, np.float32)
            for s in range(len(starts)):
                for i in range(TILE):
                    sums[0, i] = largest[i] / starts[s]
                _round(tile_x, tile_w, table, uniform, level, sums)
                for i in range(TILE):
                    wtt = sums[3, i]
                    change = sums[2, i] / wtt if wtt > ZERO else -sums[0, i]
                    error = sums[1, i] - TWO * change * sums[2, i] + change * change * wtt
                    better = error < least[i]
                    best[i] = sums[0, i] + change if better else best[i]
                    least[i] = error if better else least[i]
            sums[0] = best
        _round(tile_x, tile_w, table, uniform, level, sums)
        found[:, begin : begin + n] = sums[:, :n]


@compiled(fused=True)
def _round(x: Array, weight: Array, table: Array, uniform: bool, level: Array, sums: Array) -> None:
    """Fill sums[1:] with wee, wet and wtt of the columns of a tile at the scales in sums[0]."""
    lowest, highest = table[0], table[-1]
    middles, steps = (table[1:] + table[:-1]) / TWO, table[1:] - table[:-1]
    scale, wee, wet, wtt = sums[0], sums[1], sums[2], sums[3]
    inverse = np.empty(TILE, np.float32)
    for i in range(TILE):
        inverse[i] = ONE / scale[i]
        inverse[i] = inverse[i] if abs(inverse[i]) < np.inf else ZERO
        wee[i] = wet[i] = wtt[i] = ZERO
    for k in range(len(x)):
        if uniform:
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
def _choose(fields: Array, trials: Array, found: Array, lowest: np.float32, start: int, stop: int) -> None:
    highest = -lowest - ONE
    inverse, error, least = np.empty(BLOCKS, np.float32), np.empty(BLOCKS, np.float32), np.empty(BLOCKS, np.float32)
    for begin in range(start, stop, BLOCKS):
        end = min(begin + BLOCKS, stop)
        best = found[begin:end]
        least[:] = np.inf
        for trial in range(len(trials)):
            d = trials[trial, begin:end]
            for i in range(len(d)):
                inverse[i] = ZERO if d[i] == ZERO else ONE / d[i]
                error[i] = ZERO
            for g in range(fields.shape[1]):
                scale, wee, wet = fields[0, g, begin:end], fields[1, g, begin:end], fields[2, g, begin:end]
                wtt, wished = fields[3, g, begin:end], fields[4, g, begin:end]
                for i in range(len(d)):
                    s = np.rint(wished[i] * inverse[i])
                    s = lowest if s < lowest else s
                    change = d[i] * (highest if s > highest else s) - scale[i]
                    error[i] += wee[i] - TWO * change * wet[i] + change * change * wtt[i]
            for i in range(len(d)):
                better = error[i] < least[i]
                best[i] = d[i] if better else best[i]
                least[i] = error[i] if better else least[i]
