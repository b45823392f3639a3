"""Linears whose weights and inputs both have 8 bits.

int8: y = scale_x * scale_w * Σ (x - zero) w, the sum in int32 (exact below 130,000
columns), one float32 multiplication for each output. On a CPU with instructions for
it (VNNI) the sum is oneDNN's kernel on weights laid out once; elsewhere it is
``torch._int_mm``, which has to lay them out again for every product.
fp8: CPUs multiply no 8-bit floats, so both sides are decoded (``llmquant.runtime.coded``) and multiplied in float32.
Products of two E4M3 numbers are exact there: an accelerator differs by the order of its sum.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int8, Int32, Shaped
from torch import Tensor, nn
from torch.nn import functional

from llmquant import activations
from llmquant.activations import Inputs
from llmquant.runtime.coded import Coded, without_offset

Product = Callable[[Tensor], Tensor]
"""From codes of inputs [tokens, cols], int8 or decoded, to [tokens, rows], in float32 the sums of their products."""


class QuantizedLinear(nn.Module):
    """A linear that rounds what it reads.

    weight: int8 or float8_e4m3fn, the type of the inputs' scheme. scale: of each row [rows, 1], or of all [1].
    kernel_bytes: of the weight, where a kernel keeps it in a form of its own.
    """

    bias: nn.Parameter | None
    _scale: Tensor
    _sums: Tensor

    def __init__(self, weight: Shaped[Tensor, "rows cols"], scale: Float[Tensor, "*_"], inputs: Inputs) -> None:
        super().__init__()
        self.inputs = inputs
        self.bias = None
        self.register_buffer("_scale", scale.float().flatten())
        integers = weight.dtype == torch.int8
        self._product: Product = int8_product(weight) if integers else _fp8_product(weight)
        self.kernel_bytes = weight.nbytes if integers else 0
        self.register_buffer("_sums", weight.float().sum(1))  # what one of the zero point amounts to; exact below 2^24

    def forward(self, x: Float[Tensor, "*tokens cols"]) -> Float[Tensor, "*tokens rows"]:
        codes, params = activations.encode(self.inputs, x)
        flat = codes.flatten(0, -2)
        y = self._product(flat if codes.dtype == torch.int8 else flat.float()).view(*x.shape[:-1], len(self._sums))
        if "zero" in params:
            y -= params["zero"].float() * self._sums
        y = (y * self._scale).mul_(params["scale"]).to(x.dtype)
        return y if self.bias is None else y + self.bias


def int8_product(weight: Int8[Tensor, "rows cols"]) -> Product:
    """Return the fastest product with ``weight`` on its device."""
    if weight.device.type != "cpu" or not torch.cpu._is_vnni_supported():
        return lambda x: int32_product(x, weight).float()
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    ones = torch.ones(len(weight))
    zeros = torch.zeros(len(weight), dtype=torch.long)

    def product(x: Int8[Tensor, "tokens cols"]) -> Float[Tensor, "tokens rows"]:
        shifted = x.view(torch.uint8) ^ 128  # the kernel is fast for unsigned numbers only; 128 is their zero point
        sums: Tensor = torch.ops.onednn.qlinear_pointwise(
            shifted, 1.0, 128, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return sums

    return product


def int32_product(x: Int8[Tensor, "tokens cols"], weight: Int8[Tensor, "rows cols"]) -> Int32[Tensor, "tokens rows"]:
    """Return x weightᵀ in int32."""
    tokens, rows = len(x), len(weight)
    if x.device.type == "cuda":  # which wants more than 16 tokens, and multiples of 8
        more = -x.shape[1] % 8
        x = functional.pad(x, (0, more, 0, max(17 - tokens, 0)))
        weight = functional.pad(weight, (0, more, 0, -rows % 8))
    return torch._int_mm(x, weight.T)[:tokens, :rows]


def _fp8_product(weight: Shaped[Tensor, "rows cols"]) -> Coded:
    table = torch.arange(256, dtype=torch.uint8, device=weight.device).view(weight.dtype).float()
    ones = torch.ones(len(weight), 1, device=weight.device)
    return Coded(weight.view(torch.uint8), table, {"scale": ones}, without_offset)
