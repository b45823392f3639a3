"""Q5_K: llama.cpp's super-block of 256 columns in 8 groups of 32, 5.5 bits a weight.

    value = (d * scale) * code - (dmin * minimum)

One block, 176 bytes; l and h are the low 4 bits and the high bit of a code:

    byte 0..15        d, dmin, scales and minimums, as in Q4_K
    byte 16+j         h(224+j) .. h(32+j) hj    8 x 1 bit, high bits first; j = 0..31
    byte 48+32p+j     l(64p+32+j) l(64p+j)      4 + 4 bits; p = 0..3

Source: ggml-common.h `block_q5_K`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from llmquant import offset_search
from llmquant.blocks import Block, join_bits, join_nibbles, split_bits, split_nibbles
from llmquant.grid import Params
from llmquant.grids import q5_1
from llmquant.grids.q4_k import pack_params, unpack_params


@dataclass(frozen=True, repr=False)
class Q5_K(Block):  # noqa: N801
    """llama.cpp's Q5_K; there is nothing to set."""

    name = "q5_k"
    span = 256
    group = 32
    block_bytes = 176
    fallback = q5_1.Q5_1

    @property
    def table(self) -> Float[Tensor, " levels"]:
        return torch.arange(32, dtype=torch.float32)

    def fit(self, w: Float[Tensor, "n span"], importance: Float[Tensor, "n span"]) -> Params:
        return offset_search.fit_super_block(w, importance, groups=8, top=31, sub_top=63)

    def store(self, scale: Float[Tensor, "n groups"], offset: Float[Tensor, "n groups"]) -> Params:
        return offset_search.store_super_block(scale, offset, sub_top=63)

    def store_near(self, near: Params, scale: Float[Tensor, "n groups"], offset: Float[Tensor, "n groups"]) -> Params:
        return offset_search.store_super_block(scale, offset, sub_top=63, near=near)

    def levels(self, params: Params) -> tuple[Float[Tensor, "*b groups"], Float[Tensor, "*b groups"]]:
        return offset_search.super_block_levels(params)

    def to_bytes(self, codes: UInt8[Tensor, "n span"], params: Params) -> UInt8[Tensor, "n block_bytes"]:
        high = join_bits((codes >> 4).view(-1, 8, 32), 1)
        return torch.cat([pack_params(params), high, join_nibbles(codes.view(-1, 4, 64)).flatten(1)], dim=1)

    def from_bytes(self, blocks: UInt8[Tensor, "n block_bytes"]) -> tuple[UInt8[Tensor, "n span"], Params]:
        high = split_bits(blocks[:, 16:48], 1).flatten(1)
        codes = split_nibbles(blocks[:, 48:].reshape(-1, 4, 32)).flatten(1) | (high << 4)
        return codes, unpack_params(blocks[:, :16])


Config = Q5_K
