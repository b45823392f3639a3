"""Gradients of weights through their rounding (the plain twin is in ``llmquant.fake``)."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from llmquant.kernels import ONE, TWO, ZERO, Array, compiled, shared_out

LEAST = 2**14  # weights for each thread


def pulled(
    table: Float[Tensor, " levels"],
    gap: float,
    w: Float[Tensor, "*shape"],
    codes: UInt8[Tensor, "*shape"],
    scale: Float[Tensor, "*_"],
    offset: Float[Tensor, "*_"],
    gradient: Float[Tensor, "*shape"],
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*_"], Float[Tensor, "*_"]]:
    """Return the gradients of weights, scales and offsets, given that of the weights as they are rounded."""
    found = torch.empty_like(w), torch.empty_like(scale), torch.empty_like(offset)
    flat = [x.contiguous().view(-1).numpy() for x in (w, codes, scale, offset, gradient)]
    own = [x.view(-1).numpy() for x in found]
    levels, half = table.numpy(), np.float32(gap) / TWO
    each = w.numel() // max(scale.numel(), 1)
    shared_out(
        lambda start, stop: _pulled(levels, half, each, start, stop, *flat, *own), scale.numel(), LEAST // each + 1
    )
    return found


@compiled(fused=True)
def _pulled(
    table: Array,
    half: np.float32,
    each: int,
    start: int,
    stop: int,
    w: Array,
    codes: Array,
    scale: Array,
    offset: Array,
    gradient: Array,
    of_weight: Array,
    of_scale: Array,
    of_offset: Array,
) -> None:
    low, high = table[0] - half, table[-1] + half
    for g in range(start, stop):
        s, o = scale[g], offset[g]
        inverse = ZERO if s == ZERO else ONE / s
        w_, codes_ = w[g * each : (g + 1) * each], codes[g * each : (g + 1) * each]
        gradient_, of_weight_ = gradient[g * each : (g + 1) * each], of_weight[g * each : (g + 1) * each]
        scales, offsets = np.float64(0), np.float64(0)  # in 64 bits: one group may be a whole tensor
        for i in range(each):
            place, pull = (w_[i] - o) * inverse, gradient_[i]
            inside = low <= place <= high
            of_weight_[i] = pull if inside else ZERO
            scales += pull * (table[codes_[i]] - (place if inside else ZERO))
            offsets += ZERO if inside else pull
        of_scale[g], of_offset[g] = scales, offsets
