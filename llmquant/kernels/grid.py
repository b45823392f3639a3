"""Codes of weights, and weights of codes (the plain twins are in ``llmquant.grid``)."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Float64, UInt8
from torch import Tensor

from llmquant.kernels import ONE, TWO, ZERO, Array, compiled, shared_out

LEAST = 2**14  # weights for each thread
RUN = 256  # weights compared with all levels together
LANES = 16  # weights in a loop of known length: the compiler's own would be too long for groups of 16


def nearest(
    table: Float[Tensor, " levels"],
    w: Float[Tensor, "*shape"],
    scale: Float[Tensor, "*_"],
    offset: Float[Tensor, "*_"],
) -> UInt8[Tensor, "*shape"]:
    """Return the code of the level nearest to each weight (nearest to 0 where the scale is 0)."""
    codes = torch.empty(w.shape, dtype=torch.uint8)
    levels = table.numpy()
    flat = [x.contiguous().view(-1).numpy() for x in (w, scale, offset, codes)]
    each = w.numel() // max(scale.numel(), 1)
    even = _even(levels)
    work = partial(_nearest_even, levels) if even and each % LANES == 0 else partial(_nearest, levels, even)
    shared_out(lambda start, stop: work(each, start, stop, *flat), scale.numel(), LEAST // each + 1)
    return codes


@compiled(fused=True)
def _nearest(
    table: Array, even: bool, each: int, start: int, stop: int, w: Array, scale: Array, offset: Array, codes: Array
) -> None:
    middles = (table[1:] + table[:-1]) / TWO
    first, top = middles[0], np.float32(len(middles))
    x, count = np.empty(max(each, RUN), np.float32), np.empty(max(each, RUN), np.int32)
    run = each if each > 1 else RUN  # one group, or weights that each have a scale
    for begin in range(start * each, stop * each, run):
        end = min(begin + run, stop * each)
        w_, codes_ = w[begin:end], codes[begin:end]
        if each > 1:
            s, o = scale[begin // each], offset[begin // each]
            inverse = ZERO if s == ZERO else ONE / s
            for i in range(len(w_)):
                x[i] = (w_[i] - o) * inverse
        else:
            scale_, offset_ = scale[begin:end], offset[begin:end]
            for i in range(len(w_)):
                inverse = ZERO if scale_[i] == ZERO else ONE / scale_[i]
                x[i] = (w_[i] - offset_[i]) * inverse
        if even:
            for i in range(len(w_)):
                q = np.ceil(x[i] - first)
                q = ZERO if q < ZERO else q
                count[i] = np.int32(top if q > top else q)
        else:
            count[:] = 0
            for m in range(len(middles)):
                middle = middles[m]
                for i in range(len(w_)):
                    count[i] += x[i] > middle
        for i in range(len(w_)):
            codes_[i] = count[i]


@compiled(fused=True)
def _nearest_even(
    table: Array, each: int, start: int, stop: int, w: Array, scale: Array, offset: Array, codes: Array
) -> None:
    first, top = (table[0] + table[1]) / TWO, np.float32(len(table) - 1)
    inverse, shift = np.empty(RUN, np.float32), np.empty(RUN, np.float32)
    for begin in range(start * each, stop * each, RUN):
        end = min(begin + RUN, stop * each)
        _spread(scale, offset, each, begin, end, inverse, shift)
        w_, codes_ = w[begin:end], codes[begin:end]
        for i in range(len(w_)):
            q = np.ceil((w_[i] - shift[i]) * inverse[i] - first)
            q = ZERO if q < ZERO else q
            codes_[i] = np.uint8(np.int32(top if q > top else q))


@compiled(fused=False)
def _spread(scale: Array, offset: Array, each: int, begin: int, end: int, inverse: Array, shift: Array) -> None:
    """Give each of some weights 1 / scale (0 where that is 0) and the offset of its group."""
    for lane in range(0, end - begin, LANES):
        group = (begin + lane) // each
        one = ZERO if scale[group] == ZERO else ONE / scale[group]
        inverse_, shift_ = inverse[lane : lane + LANES], shift[lane : lane + LANES]
        for i in range(LANES):
            inverse_[i] = one
            shift_[i] = offset[group]


def decode(
    table: Float[Tensor, " levels"],
    codes: UInt8[Tensor, "*shape"],
    scale: Float[Tensor, "*_"],
    offset: Float[Tensor, "*_"],
) -> Float[Tensor, "*shape"]:
    """Return the weights that the codes stand for."""
    w = torch.empty(codes.shape)
    flat = [x.contiguous().view(-1).numpy() for x in (codes, scale, offset, w)]
    each = codes.numel() // max(scale.numel(), 1)
    shared_out(lambda start, stop: _decode(table.numpy(), each, start, stop, *flat), scale.numel(), LEAST // each + 1)
    return w


def error_sums(
    table: Float[Tensor, " levels"],
    codes: UInt8[Tensor, "rows cols"],
    scale: Float[Tensor, "rows groups"],
    offset: Float[Tensor, "rows groups"],
    w: Float[Tensor, "rows cols"],
    importance: Float[Tensor, " cols"],
) -> Float64[Tensor, " sums"]:
    """Return the sums over all weights of error², w², importance * error² and importance * w².

    The columns of a group must be a multiple of ``LANES``.
    """
    sums = np.zeros((len(w), 4))
    arrays = [x.contiguous().numpy() for x in (table, codes, scale, offset, w, importance)]
    even = _even(arrays[0])
    shared_out(lambda start, stop: _error_sums(even, start, stop, sums, *arrays), len(w), LEAST // w.shape[1] + 1)
    return torch.from_numpy(sums.sum(0))


def _even(levels: Array) -> bool:
    return bool(np.all(np.diff(levels) == 1))


@compiled(fused=False)
def _decode(
    table: Array, each: int, start: int, stop: int, codes: Array, scale: Array, offset: Array, w: Array
) -> None:
    if each > 1:
        for g in range(start, stop):
            s, o = scale[g], offset[g]
            codes_, w_ = codes[g * each : (g + 1) * each], w[g * each : (g + 1) * each]
            for i in range(each):
                w_[i] = s * table[codes_[i]] + o
        return
    codes_, scale_, offset_, w_ = codes[start:stop], scale[start:stop], offset[start:stop], w[start:stop]
    for i in range(len(w_)):
        w_[i] = scale_[i] * table[codes_[i]] + offset_[i]


@compiled(fused=True)
def _error_sums(
    even: bool,
    start: int,
    stop: int,
    sums: Array,
    table: Array,
    codes: Array,
    scale: Array,
    offset: Array,
    w: Array,
    importance: Array,
) -> None:
    cols, groups = w.shape[1], scale.shape[1]
    sub = cols // groups
    scale_, offset_ = np.empty(RUN, np.float32), np.empty(RUN, np.float32)
    level, lanes = np.empty(RUN, np.float32), np.zeros((4, RUN), np.float32)
    error, power, weighted_error, weighted_power = lanes
    for row in range(start, stop):
        lanes[:] = ZERO
        for begin in range(0, cols, RUN):
            end = min(begin + RUN, cols)
            for lane in range(0, end - begin, LANES):
                s, o = scale[row, (begin + lane) // sub], offset[row, (begin + lane) // sub]
                s_, o_ = scale_[lane : lane + LANES], offset_[lane : lane + LANES]
                for i in range(LANES):
                    s_[i] = s
                    o_[i] = o
            codes_, w_, importance_ = codes[row, begin:end], w[row, begin:end], importance[begin:end]
            if even:
                first = table[0]
                for i in range(len(w_)):
                    level[i] = np.float32(codes_[i]) + first
            else:
                for i in range(len(w_)):
                    level[i] = table[codes_[i]]
            for i in range(len(w_)):
                e = scale_[i] * level[i] + offset_[i] - w_[i]
                error[i] += e * e
                power[i] += w_[i] * w_[i]
                weighted_error[i] += importance_[i] * (e * e)
                weighted_power[i] += importance_[i] * (w_[i] * w_[i])
        for k in range(4):
            half = RUN // 2
            while half >= LANES:
                lower, upper = lanes[k, :half], lanes[k, half : 2 * half]
                for i in range(len(lower)):
                    lower[i] += upper[i]
                half //= 2
            for i in range(LANES):
                sums[row, k] += lanes[k, i]
