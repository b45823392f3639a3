"""Q8_0: a scale for every 32 columns, 8.5 bits a weight.

    value = d * (code - 128)

One block, 34 bytes:

    byte 0..1     d                        float16
    byte 2+j      cj - 128                 int8; j = 0..31

Source: ggml-common.h `block_q8_0`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from llmquant import scale_search
from llmquant.blocks import Block, half_bytes, halves, to_half
from llmquant.grid import Params

STARTS = (-128.0, -126.0, -127.0, -125.0, -124.0, -123.0)


@dataclass(frozen=True, repr=False)
class Q8_0(Block):  # noqa: N801
    """llama.cpp's Q8_0; there is nothing to set."""

    name = "q8_0"
    span = 32
    group = 32
    block_bytes = 34

    @property
    def table(self) -> Float[Tensor, " levels"]:
        return torch.arange(-128, 128, dtype=torch.float32)

    def fit(self, w: Float[Tensor, "n span"], importance: Float[Tensor, "n span"]) -> Params:
        return scale_search.fit_group(w, importance, self.table, STARTS)

    def store(self, scale: Float[Tensor, "n groups"], offset: Float[Tensor, "n groups"]) -> Params:
        return {"d": to_half(scale)}

    def levels(self, params: Params) -> tuple[Float[Tensor, "*b groups"], Float[Tensor, "*b groups"]]:
        return scale_search.without_offset(params["d"].float())

    def to_bytes(self, codes: UInt8[Tensor, "n span"], params: Params) -> UInt8[Tensor, "n block_bytes"]:
        return torch.cat([half_bytes(params["d"]), codes ^ 128], dim=1)  # ^ 128: minus 128 in two's complement

    def from_bytes(self, blocks: UInt8[Tensor, "n block_bytes"]) -> tuple[UInt8[Tensor, "n span"], Params]:
        return blocks[:, 2:] ^ 128, {"d": halves(blocks[:, :2])}


Config = Q8_0
