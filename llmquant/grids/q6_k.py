"""Q6_K: a super-block of 256 columns in 16 groups of 16, 6.5625 bits a weight.

    value = (d * scale) * (code - 32)

One block, 210 bytes:

    byte 0+64n+k     c(128n+64+k) c(128n+k), bits 3..0 of each                          4 + 4 bits; k = 0..63; n = 0..1
    byte 128+32n+l   c(128n+96+l) c(128n+64+l) c(128n+32+l) c(128n+l), bits 5..4        2 bits each; l = 0..31
    byte 192+g       scale                                                              int8; g = 0..15
    byte 208..209    d                                                                  float16

Source: ggml-common.h `block_q6_K`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from llmquant import scale_search
from llmquant.blocks import Block, half_bytes, halves, join_bits, join_nibbles, split_bits, split_nibbles
from llmquant.grid import Params
from llmquant.grids import q8_0

STARTS = (-32.0, -31.0, -30.0, -29.0, -28.0, -32.5)


@dataclass(frozen=True, repr=False)
class Q6_K(Block):  # noqa: N801
    """llama.cpp's Q6_K; there is nothing to set."""

    name = "q6_k"
    span = 256
    group = 16
    block_bytes = 210
    fallback = q8_0.Q8_0

    @property
    def table(self) -> Float[Tensor, " levels"]:
        return torch.arange(-32, 32, dtype=torch.float32)

    def fit(self, w: Float[Tensor, "n span"], importance: Float[Tensor, "n span"]) -> Params:
        return scale_search.fit_super_block(w, importance, self.table, STARTS, groups=16, lowest=-128)

    def store(self, scale: Float[Tensor, "n groups"], offset: Float[Tensor, "n groups"]) -> Params:
        return scale_search.store_super_block(scale, lowest=-128)

    def store_near(self, near: Params, scale: Float[Tensor, "n groups"], offset: Float[Tensor, "n groups"]) -> Params:
        return scale_search.store_super_block(scale, lowest=-128, near=near)

    def levels(self, params: Params) -> tuple[Float[Tensor, "*b groups"], Float[Tensor, "*b groups"]]:
        return scale_search.super_block_levels(params)

    def to_bytes(self, codes: UInt8[Tensor, "n span"], params: Params) -> UInt8[Tensor, "n block_bytes"]:
        low = join_nibbles(codes.view(-1, 2, 128)).flatten(1)
        high = join_bits((codes >> 4).view(-1, 2, 4, 32), 2).flatten(1)
        return torch.cat([low, high, params["scale"].view(torch.uint8), half_bytes(params["d"])], dim=1)

    def from_bytes(self, blocks: UInt8[Tensor, "n block_bytes"]) -> tuple[UInt8[Tensor, "n span"], Params]:
        low, high, scale, d = torch.split(blocks, [128, 64, 16, 2], dim=1)
        top = split_bits(high.reshape(-1, 2, 32), 2).flatten(1)
        codes = split_nibbles(low.reshape(-1, 2, 64)).flatten(1) | (top << 4)
        return codes, {"d": halves(d), "scale": scale.contiguous().view(torch.int8)}


Config = Q6_K
