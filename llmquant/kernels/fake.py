"""Gradients of weights through their rounding (the plain twin is in ``llmquant.fake``)."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from llmquant.kernels import TWO, ZERO, Array, compiled, shared_out

LEAST = 2**14  # weights for each thread


def pulled(
    table: Float[Tensor, " levels"],
    gap: float,
    places: Float[Tensor, "*shape"],
    codes: UInt8[Tensor, "*shape"],
    scale: Float[Tensor, "*_"],
    gradient: Float[Tensor, "*shape"],
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*_"], Float[Tensor, "*_"]]:
    """Return the gradients of places, scales and offsets, given that of the weights as they are decoded."""
    found = torch.empty_like(places), torch.empty_like(scale), torch.empty_like(scale)
    flat = [x.contiguous().view(-1).numpy() for x in (places, codes, scale, gradient)]
    own = [x.view(-1).numpy() for x in found]
    levels, half = table.numpy(), np.float32(gap) / TWO
    each = places.numel() // max(scale.numel(), 1)
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
    places: Array,
    codes: Array,
    scale: Array,
    gradient: Array,
    of_place: Array,
    of_scale: Array,
    of_offset: Array,
) -> None:
    low, high = table[0] - half, table[-1] + half
    for g in range(start, stop):
        s = scale[g]
        places_, codes_ = places[g * each : (g + 1) * each], codes[g * each : (g + 1) * each]
        gradient_, of_place_ = gradient[g * each : (g + 1) * each], of_place[g * each : (g + 1) * each]
        scales, offsets = np.float64(0), np.float64(0)  # in 64 bits: one group may be a whole tensor
        for i in range(each):
            pull = gradient_[i]
            of_place_[i] = pull * s if low <= places_[i] <= high else ZERO
            scales += pull * table[codes_[i]]
            offsets += pull
        of_scale[g], of_offset[g] = scales, offsets
