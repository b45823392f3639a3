"""Q4_K: llama.cpp's super-block of 256 columns in 8 groups of 32, 4.5 bits a weight.

    value = (d * scale) * code - (dmin * minimum)

One block, 144 bytes; s and m are the scale and the minimum of a group, c a code:

    byte 0..1         d                         float16
    byte 2..3         dmin                      float16
    byte 4+i          s(4+i) bits 5..4, si      2 + 6 bits, high bits first; i = 0..3
    byte 8+i          m(4+i) bits 5..4, mi      2 + 6 bits
    byte 12+i         m(4+i) bits 3..0, s(4+i) bits 3..0      4 + 4 bits
    byte 16+32p+j     c(64p+32+j) c(64p+j)      4 + 4 bits; p = 0..3; j = 0..31

Source: ggml-common.h `block_q4_K`; ggml-quants.c `get_scale_min_k4` for bytes 4 to 15.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from llmquant import offset_search
from llmquant.blocks import Block, half_bytes, halves, join_nibbles, split_nibbles
from llmquant.grid import Params
from llmquant.grids import q5_0


@dataclass(frozen=True, repr=False)
class Q4_K(Block):  # noqa: N801
    """llama.cpp's Q4_K; there is nothing to set."""

    name = "q4_k"
    span = 256
    group = 32
    block_bytes = 144
    fallback = q5_0.Q5_0

    @property
    def table(self) -> Float[Tensor, " levels"]:
        return torch.arange(16, dtype=torch.float32)

    def fit(self, w: Float[Tensor, "n span"], importance: Float[Tensor, "n span"]) -> Params:
        return offset_search.fit_super_block(w, importance, groups=8, top=15, sub_top=63)

    def store(self, scale: Float[Tensor, "n groups"], offset: Float[Tensor, "n groups"]) -> Params:
        return offset_search.store_super_block(scale, offset, sub_top=63)

    def store_near(self, near: Params, scale: Float[Tensor, "n groups"], offset: Float[Tensor, "n groups"]) -> Params:
        return offset_search.store_super_block(scale, offset, sub_top=63, near=near)

    def levels(self, params: Params) -> tuple[Float[Tensor, "*b groups"], Float[Tensor, "*b groups"]]:
        return offset_search.super_block_levels(params)

    def to_bytes(self, codes: UInt8[Tensor, "n span"], params: Params) -> UInt8[Tensor, "n block_bytes"]:
        return torch.cat([pack_params(params), join_nibbles(codes.view(-1, 4, 64)).flatten(1)], dim=1)

    def from_bytes(self, blocks: UInt8[Tensor, "n block_bytes"]) -> tuple[UInt8[Tensor, "n span"], Params]:
        codes = split_nibbles(blocks[:, 16:].reshape(-1, 4, 32)).flatten(1)
        return codes, unpack_params(blocks[:, :16])


Config = Q4_K


def pack_params(params: Params) -> UInt8[Tensor, "n 16"]:
    """Return bytes 0 to 15 of a block."""
    d, dmin, s, m = half_bytes(params["d"]), half_bytes(params["dmin"]), params["scale"], params["minimum"]
    first = [value[:, :4] | (value[:, 4:] >> 4 << 6) for value in (s, m)]
    return torch.cat([d, dmin, *first, (s[:, 4:] & 15) | (m[:, 4:] << 4)], dim=1)


def unpack_params(head: UInt8[Tensor, "n 16"]) -> Params:
    """Return the parameters in bytes 0 to 15 of a block."""
    d, dmin, s, m, low = torch.split(head, [2, 2, 4, 4, 4], dim=1)
    return {
        "d": halves(d),
        "dmin": halves(dmin),
        "scale": torch.cat([s & 63, (low & 15) | (s >> 6 << 4)], dim=1),
        "minimum": torch.cat([m & 63, (low >> 4) | (m >> 6 << 4)], dim=1),
    }
