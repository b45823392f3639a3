"""Codes of weights, and weights of codes (the plain twins are in ``llmquant.grid``)."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from llmquant.kernels import ONE, TWO, ZERO, Array, compiled, shared_out

LEAST = 2**14  # weights for each thread
RUN = 256  # weights compared with all levels together


def nearest(
    table: Float[Tensor, " levels"],
    w: Float[Tensor, "*shape"],
    scale: Float[Tensor, "*_"],
    offset: Float[Tensor, "*_"],
) -> UInt8[Tensor, "*shape"]:
    """Return the code of the level nearest to each weight (nearest to 0 where the scale is 0)."""
    codes = torch.empty(w.shape, dtype=torch.uint8)
    levels = table.numpy()
    even = bool(np.all(np.diff(levels) == 1))
    flat = [x.contiguous().view(-1).numpy() for x in (w, scale, offset, codes)]
    each = w.numel() // max(scale.numel(), 1)
    shared_out(lambda start, stop: _nearest(levels, even, each, start, stop, *flat), scale.numel(), LEAST // each + 1)
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
