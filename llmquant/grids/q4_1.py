"""Q4_1: a scale and an offset for every 32 columns, 5 bits a weight.

    value = d * code + m

One block, 20 bytes:

    byte 0..1     d                        float16
    byte 2..3     m                        float16
    byte 4+j      c(16+j) cj               4 + 4 bits, high bits first; j = 0..15

Source: ggml-common.h `block_q4_1`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from llmquant import offset_search
from llmquant.blocks import Block, half_bytes, halves, join_nibbles, split_nibbles, to_half
from llmquant.grid import Params


@dataclass(frozen=True, repr=False)
class Q4_1(Block):  # noqa: N801
    """llama.cpp's Q4_1; there is nothing to set."""

    name = "q4_1"
    span = 32
    group = 32
    block_bytes = 20

    @property
    def table(self) -> Float[Tensor, " levels"]:
        return torch.arange(16, dtype=torch.float32)

    def fit(self, w: Float[Tensor, "n span"], importance: Float[Tensor, "n span"]) -> Params:
        return offset_search.fit_group(w, importance, top=15)

    def store(self, scale: Float[Tensor, "n groups"], offset: Float[Tensor, "n groups"]) -> Params:
        return {"d": to_half(scale), "m": to_half(offset)}

    def levels(self, params: Params) -> tuple[Float[Tensor, "*b groups"], Float[Tensor, "*b groups"]]:
        return params["d"].float(), params["m"].float()

    def to_bytes(self, codes: UInt8[Tensor, "n span"], params: Params) -> UInt8[Tensor, "n block_bytes"]:
        return torch.cat([half_bytes(params["d"]), half_bytes(params["m"]), join_nibbles(codes)], dim=1)

    def from_bytes(self, blocks: UInt8[Tensor, "n block_bytes"]) -> tuple[UInt8[Tensor, "n span"], Params]:
        return split_nibbles(blocks[:, 4:]), {"d": halves(blocks[:, :2]), "m": halves(blocks[:, 2:4])}


Config = Q4_1
