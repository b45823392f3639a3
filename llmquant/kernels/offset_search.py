"""Roundings of many groups at once (the plain twins are in ``llmquant.offset_search``).

Tiles as in ``llmquant.kernels.scale_search``: neighbours in memory are weights of neighbouring groups.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from llmquant.kernels import ONE, TWO, ZERO, Array, compiled, shared_out

TILE = 256  # groups
BLOCKS = 64  # super-blocks
SUMS = 8  # scale, offset, wee, we, weq, w, wq, wqq


def search(
    x: Float[Tensor, "*b size"],
    weight: Float[Tensor, "*b size"],
    top: int,
    most: float,
    starts: Float[Tensor, "starts 2"],
    singular: float,
) -> Float[Tensor, "sums *b 1"]:
    """Return the fields of the rounding at the best of the refits of all starts."""
    found = torch.empty(SUMS, *x.shape[:-1], 1)
    return _run(x, weight, top, most, starts.numpy(), singular, found)


def round_at(
    x: Float[Tensor, "*b size"],
    weight: Float[Tensor, "*b size"],
    scale: Float[Tensor, "*b 1"],
    offset: Float[Tensor, "*b 1"],
    top: int,
) -> Float[Tensor, "sums *b 1"]:
    """Return the fields of the rounding at given scales and offsets."""
    found = torch.empty(SUMS, *x.shape[:-1], 1)
    found[0], found[1] = scale, offset
    return _run(x, weight, top, 0.0, np.empty((0, 2), np.float32), 0.0, found)


def choose(
    rounding: Float[Tensor, "sums n groups 1"],
    offset: Float[Tensor, "n groups 1"],
    d: Float[Tensor, "n trials"],
    dmin: Float[Tensor, "n trials"],
    sub_top: int,
) -> tuple[Float[Tensor, "n 1 1"], Float[Tensor, "n 1 1"]]:
    """Return the pair (d, dmin), of all pairs, whose integers serve best.

    offset: of every group, the best for its codes that is at most 0.
    """
    n = len(offset)
    fields = torch.cat([rounding, offset[None]])[..., 0].transpose(1, 2).contiguous()
    found = torch.zeros(2, n)
    arrays = (fields.numpy(), d.T.contiguous().numpy(), dmin.T.contiguous().numpy(), found.numpy())
    shared_out(lambda start, stop: _choose(*arrays, np.float32(sub_top), start, stop), n, BLOCKS)
    return found[0, :, None, None], found[1, :, None, None]


def _run(x: Tensor, weight: Tensor, top: int, most: float, starts: Array, singular: float, found: Tensor) -> Tensor:
    size = x.shape[-1]
    arrays = (x.reshape(-1, size).numpy(), weight.reshape(-1, size).numpy(), starts, found.view(SUMS, -1).numpy())
    numbers = (np.float32(top), np.float32(most), np.float32(singular))
    shared_out(lambda start, stop: _search(*arrays, *numbers, start, stop), x.numel() // size, TILE)
    return found


@compiled(fused=True)
def _search(
    x: Array,
    weight: Array,
    starts: Array,
    found: Array,
    top: np.float32,
    most: np.float32,
    singular: np.float32,
    start: int,
    stop: int,
) -> None:
    size = x.shape[1]
    tile_x, tile_w = np.zeros((size, TILE), np.float32), np.ones((size, TILE), np.float32)
    code = np.empty(TILE, np.float32)
    sums = np.zeros((SUMS, TILE), np.float32)
    low, step = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    for begin in range(start, stop, TILE):
        n = min(TILE, stop - begin)
        for i in range(n):
            for k in range(size):
                tile_x[k, i] = x[begin + i, k]
                tile_w[k, i] = weight[begin + i, k]
        sums[:2, :n] = found[:2, begin : begin + n]
        if len(starts):
            low[:], step[:] = tile_x[0], tile_x[0]
            for k in range(1, size):
                for i in range(TILE):
                    v = tile_x[k, i]
                    low[i] = v if v < low[i] else low[i]
                    step[i] = v if v > step[i] else step[i]
            for i in range(TILE):
                low[i] = most if low[i] > most else low[i]
                step[i] = (step[i] - low[i]) / top
            least = np.full(TILE, np.inf, np.float32)
            best_scale, best_offset = np.zeros(TILE, np.float32), np.zeros(TILE, np.float32)
            for s in range(len(starts)):
                below, inside = starts[s, 0], (top - (starts[s, 0] + starts[s, 1])) / top
                for i in range(TILE):
                    sums[0, i] = step[i] * inside
                    sums[1, i] = low[i] + step[i] * below
                _round(tile_x, tile_w, top, code, sums)
                for i in range(TILE):
                    wee, we, weq, w, wq, wqq = sums[2, i], sums[3, i], sums[4, i], sums[5, i], sums[6, i], sums[7, i]
                    determinant = w * wqq - wq * wq
                    change = (w * weq - wq * we) / determinant if determinant > singular * w * wqq else ZERO
                    o = sums[1, i] + (we - change * wq) / w
                    o = (most if o > most else o) - sums[1, i]
                    t = sums[0, i] + (weq - o * wq) / wqq if wqq > ZERO else ZERO
                    t = (ZERO if t < ZERO else t) - sums[0, i]
                    error = wee - TWO * (t * weq + o * we) + t * t * wqq + TWO * t * o * wq + o * o * w
                    better = error < least[i]
                    best_scale[i] = sums[0, i] + t if better else best_scale[i]
                    best_offset[i] = sums[1, i] + o if better else best_offset[i]
                    least[i] = error if better else least[i]
            sums[0], sums[1] = best_scale, best_offset
        _round(tile_x, tile_w, top, code, sums)
        found[:, begin : begin + n] = sums[:, :n]


@compiled(fused=True)
def _round(x: Array, weight: Array, top: np.float32, code: Array, sums: Array) -> None:
    """Fill sums[2:] with the sums over the columns of a tile at the scales and offsets in sums[:2]."""
    scale, offset, wee, we, weq, w, wq, wqq = sums[0], sums[1], sums[2], sums[3], sums[4], sums[5], sums[6], sums[7]
    sums[2:] = ZERO
    inverse = np.empty(TILE, np.float32)
    for i in range(TILE):
        inverse[i] = ZERO if scale[i] == ZERO else ONE / scale[i]
    for k in range(len(x)):
        for i in range(TILE):
            q = np.rint((x[k, i] - offset[i]) * inverse[i])
            q = ZERO if q < ZERO else q
            code[i] = top if q > top else q
        for i in range(TILE):
            error = x[k, i] - offset[i] - scale[i] * code[i]
            we_, wq_ = weight[k, i] * error, weight[k, i] * code[i]
            wee[i] += we_ * error
            we[i] += we_
            weq[i] += we_ * code[i]
            w[i] += weight[k, i]
            wq[i] += wq_
            wqq[i] += wq_ * code[i]


@compiled(fused=True)
def _choose(fields: Array, d: Array, dmin: Array, found: Array, sub_top: np.float32, start: int, stop: int) -> None:
    error, least = np.empty(BLOCKS, np.float32), np.empty(BLOCKS, np.float32)
    for begin in range(start, stop, BLOCKS):
        end = min(begin + BLOCKS, stop)
        least[:] = np.inf
        for first in range(len(d)):
            for second in range(len(dmin)):
                d_, dmin_ = d[first, begin:end], dmin[second, begin:end]
                _error(fields, begin, end, d_, dmin_, sub_top, error)
                for i in range(end - begin):
                    better = error[i] < least[i]
                    found[0, begin + i] = d_[i] if better else found[0, begin + i]
                    found[1, begin + i] = dmin_[i] if better else found[1, begin + i]
                    least[i] = error[i] if better else least[i]


@compiled(fused=True)
def _error(fields: Array, begin: int, end: int, d: Array, dmin: Array, sub_top: np.float32, error: Array) -> None:
    """Fill ``error`` with that of super-blocks at the best integers for factors d and dmin."""
    error[:] = ZERO
    inverse, inverse_min = np.zeros(BLOCKS, np.float32), np.zeros(BLOCKS, np.float32)
    for i in range(end - begin):
        inverse[i] = ZERO if d[i] == ZERO else ONE / d[i]
        inverse_min[i] = ZERO if dmin[i] == ZERO else ONE / dmin[i]
    for g in range(fields.shape[1]):
        scale, offset = fields[0, g, begin:end], fields[1, g, begin:end]
        wee, we, weq = fields[2, g, begin:end], fields[3, g, begin:end], fields[4, g, begin:end]
        w, wq, wqq = fields[5, g, begin:end], fields[6, g, begin:end], fields[7, g, begin:end]
        wished = fields[8, g, begin:end]
        for i in range(end - begin):
            lowest = -dmin[i] * sub_top
            o = (lowest if wished[i] < lowest else wished[i]) - offset[i]
            s = np.rint((scale[i] + (weq[i] - o * wq[i]) / wqq[i]) * inverse[i])
            s = ZERO if wqq[i] <= ZERO or s < ZERO else s
            s = d[i] * (sub_top if s > sub_top else s) - scale[i]
            m = np.rint(-(offset[i] + (we[i] - s * wq[i]) / w[i]) * inverse_min[i])
            m = ZERO if m < ZERO else m
            o = -dmin[i] * (sub_top if m > sub_top else m) - offset[i]
            error[i] += wee[i] - TWO * (s * weq[i] + o * we[i]) + s * s * wqq[i] + TWO * s * o * wq[i] + o * o * w[i]
