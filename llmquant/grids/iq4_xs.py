"""IQ4_XS: a super-block of 256 columns in 8 groups of 32, with the levels of IQ4_NL, 4.25 bits a weight.

    value = (d * scale) * level[code]

One block, 136 bytes; u = scale + 32 has 6 bits:

    byte 0..1     d                                     float16
    byte 2        u3 u2 u1 u0, bits 5..4 of each        2 bits each, high bits first
    byte 3        u7 u6 u5 u4, bits 5..4 of each
    byte 4+i      u(2i+1) u(2i), bits 3..0 of each      4 + 4 bits; i = 0..3
    byte 8+16g+j  c(32g+16+j) c(32g+j)                  4 + 4 bits; g = 0..7; j = 0..15

Source: ggml-common.h `block_iq4_xs`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from llmquant import scale_search
from llmquant.blocks import Block, half_bytes, halves, join_bits, join_nibbles, split_bits, split_nibbles
from llmquant.grid import Params
from llmquant.grids import iq4_nl


@dataclass(frozen=True, repr=False)
class IQ4_XS(Block):  # noqa: N801
    """llama.cpp's IQ4_XS; there is nothing to set."""

    name = "iq4_xs"
    span = 256
    group = 32
    block_bytes = 136
    fallback = iq4_nl.IQ4_NL

    @property
    def table(self) -> Float[Tensor, " levels"]:
        return torch.tensor(iq4_nl.LEVELS, dtype=torch.float32)

    def fit(self, w: Float[Tensor, "n span"], importance: Float[Tensor, "n span"]) -> Params:
        return scale_search.fit_super_block(w, importance, self.table, iq4_nl.STARTS, groups=8, lowest=-32)

    def store(self, scale: Float[Tensor, "n groups"], offset: Float[Tensor, "n groups"]) -> Params:
        return scale_search.store_super_block(scale, lowest=-32)

    def store_near(self, near: Params, scale: Float[Tensor, "n groups"], offset: Float[Tensor, "n groups"]) -> Params:
        return scale_search.store_super_block(scale, lowest=-32, near=near)

    def levels(self, params: Params) -> tuple[Float[Tensor, "*b groups"], Float[Tensor, "*b groups"]]:
        return scale_search.super_block_levels(params)

    def to_bytes(self, codes: UInt8[Tensor, "n span"], params: Params) -> UInt8[Tensor, "n block_bytes"]:
        u = (params["scale"] + 32).view(torch.uint8)
        high = join_bits((u >> 4).view(-1, 2, 4).mT, 2)
        low = (u[:, 0::2] & 15) | (u[:, 1::2] << 4)
        return torch.cat([half_bytes(params["d"]), high, low, join_nibbles(codes.view(-1, 8, 32)).flatten(1)], dim=1)

    def from_bytes(self, blocks: UInt8[Tensor, "n block_bytes"]) -> tuple[UInt8[Tensor, "n span"], Params]:
        high = split_bits(blocks[:, 2:4], 2).mT.flatten(1)
        low = torch.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], dim=2).flatten(1)
        codes = split_nibbles(blocks[:, 8:].reshape(-1, 8, 16)).flatten(1)
        return codes, {"d": halves(blocks[:, :2]), "scale": (low | (high << 4)).view(torch.int8) - 32}


Config = IQ4_XS
