"""MXFP4: a power of two for every 32 columns and the 15 values of a 4-bit float, 4.25 bits a weight.

    value = 2^(e - 128) * level[code]        level = 0, 1, 2, 3, 4, 6, 8, 12 and their negatives

One block, 17 bytes; n is the sign of a code's level and the place of its magnitude in that list:

    byte 0        e
    byte 1+j      n(16+j) nj               4 + 4 bits, high bits first; j = 0..15

Source: OCP Microscaling Formats 1.0; ggml-common.h `block_mxfp4` (whose levels are twice the standard's).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from llmquant import scale_search
from llmquant.blocks import Block, in_chunks, join_nibbles, split_nibbles
from llmquant.grid import Params

LEVELS = (-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12)
NUMBERS = (15, 14, 13, 12, 11, 10, 9, 0, 1, 2, 3, 4, 5, 6, 7)  # how the levels are stored; 8, minus zero, is not used
HIGHEST = 254  # 255 means NaN


@dataclass(frozen=True, repr=False)
class MXFP4(Block):
    """llama.cpp's MXFP4; there is nothing to set."""

    name = "mxfp4"
    span = 32
    group = 32
    block_bytes = 17

    @property
    def table(self) -> Float[Tensor, " levels"]:
        return torch.tensor(LEVELS, dtype=torch.float32)

    def fit(self, w: Float[Tensor, "n span"], importance: Float[Tensor, "n span"]) -> Params:
        return in_chunks(_best_exponent, w, importance, reach=torch.inf)

    def store(self, scale: Float[Tensor, "n groups"], offset: Float[Tensor, "n groups"]) -> Params:
        return {"e": _exponent(scale.abs())}

    def levels(self, params: Params) -> tuple[Float[Tensor, "*b groups"], Float[Tensor, "*b groups"]]:
        return scale_search.without_offset(_power(params["e"]))

    def to_bytes(self, codes: UInt8[Tensor, "n span"], params: Params) -> UInt8[Tensor, "n block_bytes"]:
        numbers = torch.tensor(NUMBERS, dtype=torch.uint8, device=codes.device)
        return torch.cat([params["e"], join_nibbles(numbers[codes.long()])], dim=1)

    def from_bytes(self, blocks: UInt8[Tensor, "n block_bytes"]) -> tuple[UInt8[Tensor, "n span"], Params]:
        places = torch.tensor(NUMBERS, device=blocks.device).argsort()
        number = split_nibbles(blocks[:, 1:]).long()
        number = torch.where(number == 8, 0, number)  # minus zero
        return places[number - (number > 8).long()].to(torch.uint8), {"e": blocks[:, :1]}


Config = MXFP4


def _power(e: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return 2^(e - 128) in float32, exactly as ggml makes it of bits."""
    bits = torch.where(e < 2, 0x00200000 << e.int(), (e.int() - 1) << 23)
    return bits.to(torch.int32).view(torch.float32)


def _exponent(scale: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Return the e whose power of two is nearest to a scale, by ratio."""
    tiny = torch.finfo(torch.float32).tiny
    return (scale.float().clamp(min=tiny).log2().round() + 128).clamp(0, HIGHEST).to(torch.uint8)


def _best_exponent(w: Tensor, importance: Tensor) -> Params:
    """Return the e with the least weighted error: the nearest to what puts the largest weight on 12, or its neighbours.

    Wider searches found nothing more on trained weights.
    """
    table = torch.tensor(LEVELS, dtype=w.dtype, device=w.device)
    first = _exponent(w.abs().amax(1, keepdim=True) / LEVELS[-1])
    unit = _power(first)
    x = w / unit  # neither huge nor tiny: exact, as all factors are powers of two
    chosen, least = first, torch.full_like(unit, torch.inf)
    for step in (0, 1, -1):
        e = (first.int() + step).clamp(0, HIGHEST).to(torch.uint8)
        factor = _power(e) / unit
        total = scale_search.rounded(x, importance, factor, table).wee
        chosen, least = torch.where(total < least, e, chosen), torch.minimum(total, least)
    return {"e": chosen}
