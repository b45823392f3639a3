"""Inference in integers alone: what a chip without floats computes between two matrix products.

    value = scale * (code - zero)

Every function is within one level of the same in floats.
Source: Jacob et al. 2018, https://arxiv.org/abs/1712.05877, sections 2.2 and 2.4. Departure: one rounding,
half up, of the whole 64-bit product, where theirs rounds twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int8, Int32
from torch import Tensor

LOW, HIGH = -128, 127


def fixed_point(multiplier: float) -> tuple[int, int]:
    """Return (mantissa, shift) with multiplier = mantissa / 2^shift, the mantissa in [2^30, 2^31), within 2^-31 of it.

    >>> fixed_point(0.375)
    (1610612736, 32)
    """
    if not 2**-31 < multiplier < 2**30:
        raise ValueError(f"multiplier is {multiplier}, not between 2^-31 and 2^30")
    fraction, exponent = math.frexp(multiplier)
    mantissa = round(fraction * 2**31)
    if mantissa == 2**31:
        mantissa, exponent = 2**30, exponent + 1
    return mantissa, 31 - exponent


def requantize(accumulator: Int32[Tensor, "*shape"], mantissa: int, shift: int, zero: int) -> Int8[Tensor, "*shape"]:
    """Return the int8 codes nearest to accumulator * mantissa / 2^shift + zero, saturated.

    The multiplier is scale_x * scale_w / scale_y of a product; see ``fixed_point``.
    """
    product = accumulator.long() * mantissa
    return ((product + (1 << (shift - 1))) >> shift).add_(zero).clamp_(LOW, HIGH).to(torch.int8)


def relu(codes: Int8[Tensor, "*shape"], zero: int) -> Int8[Tensor, "*shape"]:
    """Return the codes of max(value, 0)."""
    return codes.clamp(min=zero)


def table(
    function: Callable[[Tensor], Tensor], scale: float, zero: int, scale_out: float, zero_out: int
) -> Int8[Tensor, " codes"]:
    """Return the code of ``function`` of every code from -128 to 127, for ``look_up``."""
    values = scale * (torch.arange(LOW, HIGH + 1, dtype=torch.float64) - zero)
    return ((function(values) / scale_out).round() + zero_out).clamp(LOW, HIGH).to(torch.int8)


def sigmoid_table(scale: float, zero: int) -> Int8[Tensor, " codes"]:
    """Return the table of the sigmoid; its results have the scale 1/256 and the zero point -128."""
    return table(torch.sigmoid, scale, zero, 1 / 256, LOW)


def silu_table(scale: float, zero: int, scale_out: float, zero_out: int) -> Int8[Tensor, " codes"]:
    """Return the table of SiLU, x sigmoid(x)."""
    return table(torch.nn.functional.silu, scale, zero, scale_out, zero_out)


def look_up(table: Int8[Tensor, " codes"], codes: Int8[Tensor, "*shape"]) -> Int8[Tensor, "*shape"]:
    """Return the table's entry for every code."""
    return table[codes.long() - LOW]


def quantize(values: Float[Tensor, "*shape"], scale: float, zero: int) -> Int8[Tensor, "*shape"]:
    """Return the nearest codes of floats, saturated: the way in."""
    return ((values / scale).round() + zero).clamp(LOW, HIGH).to(torch.int8)


def dequantize(codes: Int8[Tensor, "*shape"], scale: float, zero: int) -> Float[Tensor, "*shape"]:
    """Return the floats that codes stand for: the way out."""
    return scale * (codes.float() - zero)
