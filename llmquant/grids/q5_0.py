"""Q5_0: a scale for every 32 columns, 5.5 bits a weight.

    value = d * (code - 16)

One block, 22 bytes; h(i) is bit 4 of code i:

    byte 0..1     d                        float16
    byte 2+k      h(8k+7) ... h(8k)        8 bits, high bits first; k = 0..3
    byte 6+j      c(16+j) cj               4 + 4 bits, the lower bits of the codes; j = 0..15

Source: ggml-common.h `block_q5_0`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from llmquant import scale_search
from llmquant.blocks import Block, half_bytes, halves, join_bits, join_nibbles, split_bits, split_nibbles, to_half
from llmquant.grid import Params

STARTS = (-16.0, -15.0, -16.5, -14.0, -15.75, -16.25)


@dataclass(frozen=True, repr=False)
class Q5_0(Block):  # noqa: N801
    """llama.cpp's Q5_0; there is nothing to set."""

    name = "q5_0"
    span = 32
    group = 32
    block_bytes = 22

    @property
    def table(self) -> Float[Tensor, " levels"]:
        return torch.arange(-16, 16, dtype=torch.float32)

    def fit(self, w: Float[Tensor, "n span"], importance: Float[Tensor, "n span"]) -> Params:
        return scale_search.fit_group(w, importance, self.table, STARTS)

    def store(self, scale: Float[Tensor, "n groups"], offset: Float[Tensor, "n groups"]) -> Params:
        return {"d": to_half(scale)}

    def levels(self, params: Params) -> tuple[Float[Tensor, "*b groups"], Float[Tensor, "*b groups"]]:
        return scale_search.without_offset(params["d"].float())

    def to_bytes(self, codes: UInt8[Tensor, "n span"], params: Params) -> UInt8[Tensor, "n block_bytes"]:
        high = join_bits((codes >> 4).view(-1, 4, 8).mT, 1)
        return torch.cat([half_bytes(params["d"]), high, join_nibbles(codes)], dim=1)

    def from_bytes(self, blocks: UInt8[Tensor, "n block_bytes"]) -> tuple[UInt8[Tensor, "n span"], Params]:
        high = split_bits(blocks[:, 2:6], 1).mT.flatten(1)
        return split_nibbles(blocks[:, 6:]) | (high << 4), {"d": halves(blocks[:, :2])}


Config = Q5_0
