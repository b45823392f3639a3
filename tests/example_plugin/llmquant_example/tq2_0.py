"""TQ2_0: ternary weights, a scale for every 256 columns, 2.0625 bits a weight.

    value = d * (code - 1)

One block, 66 bytes:

    byte 32i+j    c3 c2 c1 c0, where ck is of column 128i+32k+j    2 bits each, high bits first; i = 0, 1; j = 0..31
    byte 64..65   d                                                float16

Source: ggml-common.h `block_tq2_0`. Departure: llama.cpp's d is the largest magnitude, made for weights that are
ternary already (BitNet b1.58, arXiv 2402.17764). Here it is the one of least error, which is the same for those.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from llmquant.blocks import Block, half_bytes, halves, in_chunks, join_bits, split_bits, to_half
from llmquant.grid import Params


@dataclass(frozen=True, repr=False)
class Tq2_0(Block):  # noqa: N801
    """llama.cpp's TQ2_0; there is nothing to set."""

    name = "tq2_0"
    span = 256
    group = 256
    block_bytes = 66

    @property
    def table(self) -> Float[Tensor, " levels"]:
        return torch.tensor([-1.0, 0.0, 1.0])

    def fit(self, w: Float[Tensor, "n span"], importance: Float[Tensor, "n span"]) -> Params:
        return in_chunks(least_error, w, importance, reach=torch.finfo(torch.float16).max)

    def store(self, scale: Float[Tensor, "n groups"], offset: Float[Tensor, "n groups"]) -> Params:
        return {"d": to_half(scale)}

    def levels(self, params: Params) -> tuple[Float[Tensor, "*b groups"], Float[Tensor, "*b groups"]]:
        d = params["d"].float()
        return d, torch.zeros_like(d)

    def to_bytes(self, codes: UInt8[Tensor, "n span"], params: Params) -> UInt8[Tensor, "n block_bytes"]:
        return torch.cat([join_bits(codes.view(-1, 2, 4, 32), 2).flatten(1), half_bytes(params["d"])], dim=1)

    def from_bytes(self, blocks: UInt8[Tensor, "n block_bytes"]) -> tuple[UInt8[Tensor, "n span"], Params]:
        return split_bits(blocks[:, :64].view(-1, 2, 32), 2).flatten(1), {"d": halves(blocks[:, 64:])}


def least_error(w: Float[Tensor, "n span"], importance: Float[Tensor, "n span"]) -> Params:
    """Return the d of least sum(importance * error²): the weighted mean of the largest magnitudes, as many as suit."""
    magnitude, order = w.abs().sort(descending=True)
    weight = importance.gather(1, order)
    total, product = weight.cumsum(1), (weight * magnitude).cumsum(1)
    count = (product.square() / total).argmax(1, keepdim=True)  # what they take off the error
    return {"d": to_half((product / total).gather(1, count))}


Config = Tq2_0
