"""Products with coded matrices, and their weights (the plain twins are in ``llmquant.runtime.coded``)."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from llmquant.kernels import ZERO, Array, compiled, shared_out

LEAST = 2**18  # weights for each thread
LOW, HALF = np.uint8(15), np.uint8(4)


def product(
    x: Float[Tensor, "tokens cols"],
    packed: UInt8[Tensor, "rows bytes"],
    table: Float[Tensor, " levels"],
    scale: Float[Tensor, "rows groups"],
    offset: Float[Tensor, "rows groups"],
) -> Float[Tensor, "tokens rows"]:
    """Return x weightᵀ; every weight is read once for each token."""
    nibbles, even, levels = _kind(packed, table, x.shape[1])
    y = torch.empty(len(packed), len(x))
    sums = x.view(len(x), scale.shape[1], -1).sum(2)
    sides = [x[:, ::2].contiguous(), x[:, 1::2].contiguous()] if nibbles else [x, x]
    arrays = [t.numpy() for t in (packed, scale, offset, *sides, sums, y)]
    run = partial(_products, nibbles, even, levels)
    shared_out(lambda start, stop: run(start, stop, *arrays), len(packed), LEAST // x.shape[1] + 1)
    return y.T


def decode(
    packed: UInt8[Tensor, "rows bytes"],
    cols: int,
    table: Float[Tensor, " levels"],
    scale: Float[Tensor, "rows groups"],
    offset: Float[Tensor, "rows groups"],
) -> Float[Tensor, "rows {cols}"]:
    """Return the weights."""
    nibbles, even, levels = _kind(packed, table, cols)
    w = torch.empty(len(packed), cols)
    arrays = [t.numpy() for t in (packed, scale, offset, w)]
    run = partial(_weights, nibbles, even, levels)
    shared_out(lambda start, stop: run(start, stop, *arrays), len(packed), LEAST // cols + 1)
    return w


def _kind(packed: Tensor, table: Tensor, cols: int) -> tuple[bool, bool, Array]:
    """Return whether a byte holds two codes, whether the levels are one apart, and all levels that a code may have."""
    nibbles = packed.shape[1] < cols
    levels = np.zeros(16 if nibbles else 256, np.float32)
    levels[: len(table)] = table.numpy()
    return nibbles, bool((table.diff() == 1).all()), levels


@compiled(fused=True, reordered=True)
def _products(
    nibbles: bool,
    even: bool,
    levels: Array,
    start: int,
    stop: int,
    packed: Array,
    scale: Array,
    offset: Array,
    x: Array,
    odd: Array,
    sums: Array,
    y: Array,
) -> None:
    groups = scale.shape[1]
    each = x.shape[1] // groups  # bytes
    first = levels[0]
    for row in range(start, stop):
        line, scales, offsets = packed[row], scale[row], offset[row]
        for token in range(len(x)):
            x_, odd_, sums_ = x[token], odd[token], sums[token]  # of one dimension, a slice is known to be contiguous
            total = ZERO
            for g in range(groups):
                codes, left = line[g * each : (g + 1) * each], x_[g * each : (g + 1) * each]
                acc = ZERO
                if nibbles:
                    right = odd_[g * each : (g + 1) * each]
                    if even:
                        for i in range(each):
                            acc += np.float32(codes[i] & LOW) * left[i] + np.float32(codes[i] >> HALF) * right[i]
                    else:
                        for i in range(each):
                            acc += levels[codes[i] & LOW] * left[i] + levels[codes[i] >> HALF] * right[i]
                elif even:
                    for i in range(each):
                        acc += np.float32(codes[i]) * left[i]
                else:
                    for i in range(each):
                        acc += levels[codes[i]] * left[i]
                if even:
                    acc += first * sums_[g]
                total += scales[g] * acc + offsets[g] * sums_[g]
            y[row, token] = total


@compiled(fused=True)
def _weights(
    nibbles: bool,
    even: bool,
    levels: Array,
    start: int,
    stop: int,
    packed: Array,
    scale: Array,
    offset: Array,
    w: Array,
) -> None:
    groups = scale.shape[1]
    cols = w.shape[1] // groups
    first = levels[0]
    for row in range(start, stop):
        line, w_ = packed[row], w[row]
        for g in range(groups):
            s, o, out = scale[row, g], offset[row, g], w_[g * cols : (g + 1) * cols]
            if even:
                o += s * first
            if nibbles:
                codes = line[g * cols // 2 : (g + 1) * cols // 2]
                if even:
                    for i in range(len(codes)):
                        out[2 * i] = s * np.float32(codes[i] & LOW) + o
                        out[2 * i + 1] = s * np.float32(codes[i] >> HALF) + o
                else:
                    for i in range(len(codes)):
                        out[2 * i] = s * levels[codes[i] & LOW] + o
                        out[2 * i + 1] = s * levels[codes[i] >> HALF] + o
            else:
                codes = line[g * cols : (g + 1) * cols]
                if even:
                    for i in range(cols):
                        out[i] = s * np.float32(codes[i]) + o
                else:
                    for i in range(cols):
                        out[i] = s * levels[codes[i]] + o
