"""Q5_1: a scale and an offset for every 32 columns, 6 bits a weight.

    value = d * code + m

One block, 24 bytes; l and h are the low 4 bits and the high bit of a code:

    byte 0..1     d                        float16
    byte 2..3     m                        float16
    byte 4+i      h(8i+7) .. h(8i+1) h(8i)  8 x 1 bit, high bits first; i = 0..3
    byte 8+j      l(16+j) lj               4 + 4 bits; j = 0..15

Source: ggml-common.h `block_q5_1`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from llmquant import offset_search
from llmquant.blocks import Block, half_bytes, halves, join_bits, join_nibbles, split_bits, split_nibbles, to_half
from llmquant.grid import Params


@dataclass(frozen=True, repr=False)
class Q5_1(Block):  # noqa: N801
    """llama.cpp's Q5_1; there is nothing to set."""

    name = "q5_1"
    span = 32
    group = 32
    block_bytes = 24

    @property
    def table(self) -> Float[Tensor, " levels"]:
        return torch.arange(32, dtype=torch.float32)

    def fit(self, w: Float[Tensor, "n span"], importance: Float[Tensor, "n span"]) -> Params:
        return offset_search.fit_group(w, importance, top=31)

    def store(self, scale: Float[Tensor, "n groups"], offset: Float[Tensor, "n groups"]) -> Params:
        return {"d": to_half(scale), "m": to_half(offset)}

    def levels(self, params: Params) -> tuple[Float[Tensor, "*b groups"], Float[Tensor, "*b groups"]]:
        return params["d"].float(), params["m"].float()

    def to_bytes(self, codes: UInt8[Tensor, "n span"], params: Params) -> UInt8[Tensor, "n block_bytes"]:
        high = join_bits((codes >> 4).view(-1, 4, 8).mT, 1)
        return torch.cat([half_bytes(params["d"]), half_bytes(params["m"]), high, join_nibbles(codes)], dim=1)

    def from_bytes(self, blocks: UInt8[Tensor, "n block_bytes"]) -> tuple[UInt8[Tensor, "n span"], Params]:
        high = split_bits(blocks[:, 4:8], 1).mT.flatten(1)
        codes = split_nibbles(blocks[:, 8:]) | (high << 4)
        return codes, {"d": halves(blocks[:, :2]), "m": halves(blocks[:, 2:4])}


Config = Q5_1
