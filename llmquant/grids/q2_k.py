"""Q2_K: llama.cpp's super-block of 256 columns in 16 groups of 16, 2.625 bits a weight.

    value = (d * scale) * code - (dmin * minimum)

One block, 84 bytes; s and m are the scale and the minimum of a group, c a code:

    byte 0+g        mg sg                      4 + 4 bits, high bits first; g = 0..15
    byte 16+32h+j   c(96+i) c(64+i) c(32+i) ci   4 x 2 bits; i = 128h + j; h = 0, 1; j = 0..31
    byte 80..81     d                          float16
    byte 82..83     dmin                       float16

Source: ggml-common.h `block_q2_K`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from llmquant import offset_search
from llmquant.blocks import Block, favour_large, half_bytes, halves, join_bits, split_bits
from llmquant.grid import Params
from llmquant.grids import q4_0


@dataclass(frozen=True, repr=False)
class Q2_K(Block):  # noqa: N801
    """llama.cpp's Q2_K; there is nothing to set."""

    name = "q2_k"
    span = 256
    group = 16
    block_bytes = 84
    fallback = q4_0.Q4_0

    @property
    def table(self) -> Float[Tensor, " levels"]:
        return torch.arange(4, dtype=torch.float32)

    def fit(self, w: Float[Tensor, "n span"], importance: Float[Tensor, "n span"]) -> Params:
        importance = favour_large(w, importance, base=1.0)
        return offset_search.fit_super_block(w, importance, groups=16, top=3, sub_top=15)

    def store(self, scale: Float[Tensor, "n groups"], offset: Float[Tensor, "n groups"]) -> Params:
        return offset_search.store_super_block(scale, offset, sub_top=15)

    def store_near(self, near: Params, scale: Float[Tensor, "n groups"], offset: Float[Tensor, "n groups"]) -> Params:
        return offset_search.store_super_block(scale, offset, sub_top=15, near=near)

    def levels(self, params: Params) -> tuple[Float[Tensor, "*b groups"], Float[Tensor, "*b groups"]]:
        return offset_search.super_block_levels(params)

    def to_bytes(self, codes: UInt8[Tensor, "n span"], params: Params) -> UInt8[Tensor, "n block_bytes"]:
        packed = join_bits(codes.view(-1, 2, 4, 32), 2)
        sub = params["scale"] | (params["minimum"] << 4)
        return torch.cat([sub, packed.flatten(1), half_bytes(params["d"]), half_bytes(params["dmin"])], dim=1)

    def from_bytes(self, blocks: UInt8[Tensor, "n block_bytes"]) -> tuple[UInt8[Tensor, "n span"], Params]:
        sub, packed, d, dmin = torch.split(blocks, [16, 64, 2, 2], dim=1)
        codes = split_bits(packed.reshape(-1, 2, 32), 2).flatten(1)
        return codes, {"d": halves(d), "dmin": halves(dmin), "scale": sub & 15, "minimum": sub >> 4}


Config = Q2_K
