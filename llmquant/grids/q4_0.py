"""Q4_0: a scale for every 32 columns, 4.5 bits a weight.

    value = d * (code - 8)

One block, 18 bytes:

    byte 0..1     d                        float16
    byte 2+j      c(16+j) cj               4 + 4 bits, high bits first; j = 0..15

Source: ggml-common.h `block_q4_0`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from llmquant import scale_search
from llmquant.blocks import Block, half_bytes, halves, join_nibbles, split_nibbles, to_half
from llmquant.grid import Params

STARTS = (-8.25, -7.75, -8.75, -7.25, -8.0, -7.0, -8.5, -9.25)


@dataclass(frozen=True, repr=False)
class Q4_0(Block):  # noqa: N801
    """llama.cpp's Q4_0; there is nothing to set."""

    name = "q4_0"
    span = 32
    group = 32
    block_bytes = 18

    @property
    def table(self) -> Float[Tensor, " levels"]:
        return torch.arange(-8, 8, dtype=torch.float32)

    def fit(self, w: Float[Tensor, "n span"], importance: Float[Tensor, "n span"]) -> Params:
        return scale_search.fit_group(w, importance, self.table, STARTS)

    def store(self, scale: Float[Tensor, "n groups"], offset: Float[Tensor, "n groups"]) -> Params:
        return {"d": to_half(scale)}

    def levels(self, params: Params) -> tuple[Float[Tensor, "*b groups"], Float[Tensor, "*b groups"]]:
        return scale_search.without_offset(params["d"].float())

    def to_bytes(self, codes: UInt8[Tensor, "n span"], params: Params) -> UInt8[Tensor, "n block_bytes"]:
        return torch.cat([half_bytes(params["d"]), join_nibbles(codes)], dim=1)

    def from_bytes(self, blocks: UInt8[Tensor, "n block_bytes"]) -> tuple[UInt8[Tensor, "n span"], Params]:
        return split_nibbles(blocks[:, 2:]), {"d": halves(blocks[:, :2])}


Config = Q4_0
