"""The columns of one GPTQ block, rounded one after the other (the plain twin is in ``llmquant.algorithms.gptq``)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

from llmquant.kernels import ONE, ZERO, Array, compiled, shared_out

TILE = 256  # rows that pass through all columns together; a block of 128 columns of them fits the second-level cache


def round_columns(
    w: Float[Tensor, "block rows"],
    scale: Float[Tensor, "columns rows"],
    offset: Float[Tensor, "columns rows"],
    table: Float[Tensor, " levels"],
    factor: Float[Tensor, "block block"],
    codes: UInt8[Tensor, "columns rows"],
    error: Float[Tensor, "columns rows"],
    first: int,
) -> None:
    """Round columns first, first + 1, ... of a block; see the plain twin."""
    levels = table.numpy()
    uniform = bool(np.all(np.diff(levels) == 1))
    arrays = (w.numpy(), scale.numpy(), offset.numpy(), levels, factor.numpy(), codes.numpy(), error.numpy())
    shared_out(lambda start, stop: _round_columns(*arrays, first, uniform, start, stop), w.shape[1], TILE)


@compiled(fused=True)
def _round_columns(
    w: Array,
    scale: Array,
    offset: Array,
    table: Array,
    factor: Array,
    codes: Array,
    error: Array,
    first: int,
    uniform: bool,
    start: int,
    stop: int,
) -> None:
    top = len(table) - 1
    middles = (table[1:] + table[:-1]) / np.float32(2)
    for begin in range(start, stop, TILE):
        end = min(begin + TILE, stop)
        for i in range(len(codes)):
            c = first + i
            w_, scale_, offset_ = w[c, begin:end], scale[i, begin:end], offset[i, begin:end]
            codes_, error_ = codes[i, begin:end], error[i, begin:end]
            for r in range(len(w_)):
                s = scale_[r]
                inverse = ZERO if s == 0 else ONE / s
                x = (w_[r] - offset_[r]) * inverse
                code = 0
                if uniform:
                    code = int(min(max(np.ceil(x - middles[0]), ZERO), np.float32(top)))
                else:
                    for k in range(top):
                        code += x > middles[k]
                codes_[r] = code
                error_[r] = (w_[r] - (s * table[code] + offset_[r])) / factor[c, c]
            for j in range(c + 1, len(w)):
                f, w_ = factor[c, j], w[j, begin:end]
                for r in range(len(w_)):
                    w_[r] -= f * error_[r]
