"""Q3_K: a super-block of 256 columns in 16 groups of 16, 3.4375 bits a weight.

    value = (d * scale) * (code - 4)

One block, 110 bytes; u = scale + 32 has 6 bits:

    byte 0+l      bit m is bit 2 of c(32m+l)                                l = 0..31; m = 0..7
    byte 32+32n+l c(128n+96+l) c(128n+64+l) c(128n+32+l) c(128n+l)          bits 1..0 of each, high bits first; n = 0..1
    byte 96+i     u(8+i) ui, bits 3..0 of each                              4 + 4 bits; i = 0..7
    byte 104+i    u(12+i) u(8+i) u(4+i) ui, bits 5..4 of each               2 bits each; i = 0..3
    byte 108..109 d                                                         float16

Source: ggml-common.h `block_q3_K`; ggml-quants.c for the scales.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from llmquant import scale_search
from llmquant.blocks import Block, half_bytes, halves, join_bits, join_nibbles, split_bits, split_nibbles
from llmquant.grid import Params
from llmquant.grids import q4_0

STARTS = (-4.25, -3.25, -3.75, -4.75, -4.0, -3.0, -5.5, 4.25)


@dataclass(frozen=True, repr=False)
class Q3_K(Block):  # noqa: N801
    """llama.cpp's Q3_K; there is nothing to set."""

    name = "q3_k"
    span = 256
    group = 16
    block_bytes = 110
    fallback = q4_0.Q4_0

    @property
    def table(self) -> Float[Tensor, " levels"]:
        return torch.arange(-4, 4, dtype=torch.float32)

    def fit(self, w: Float[Tensor, "n span"], importance: Float[Tensor, "n span"]) -> Params:
        return scale_search.fit_super_block(w, importance, self.table, STARTS, groups=16, lowest=-32, favour=2.0)

    def store(self, scale: Float[Tensor, "n groups"], offset: Float[Tensor, "n groups"]) -> Params:
        return scale_search.store_super_block(scale, lowest=-32)

    def store_near(self, near: Params, scale: Float[Tensor, "n groups"], offset: Float[Tensor, "n groups"]) -> Params:
        return scale_search.store_super_block(scale, lowest=-32, near=near)

    def levels(self, params: Params) -> tuple[Float[Tensor, "*b groups"], Float[Tensor, "*b groups"]]:
        return scale_search.super_block_levels(params)

    def to_bytes(self, codes: UInt8[Tensor, "n span"], params: Params) -> UInt8[Tensor, "n block_bytes"]:
        u = (params["scale"] + 32).view(torch.uint8)
        high = join_bits((codes >> 2).view(-1, 8, 32), 1)
        low = join_bits((codes & 3).view(-1, 2, 4, 32), 2).flatten(1)
        scale_high = join_bits((u >> 4).view(-1, 4, 4), 2)
        return torch.cat([high, low, join_nibbles(u), scale_high, half_bytes(params["d"])], dim=1)

    def from_bytes(self, blocks: UInt8[Tensor, "n block_bytes"]) -> tuple[UInt8[Tensor, "n span"], Params]:
        high, low, scale_low, scale_high, d = torch.split(blocks, [32, 64, 8, 4, 2], dim=1)
        codes = split_bits(low.reshape(-1, 2, 32), 2).flatten(1) | (split_bits(high, 1).flatten(1) << 2)
        u = split_nibbles(scale_low) | (split_bits(scale_high, 2).flatten(1) << 4)
        return codes, {"d": halves(d), "scale": u.view(torch.int8) - 32}


Config = Q3_K
