"""FP4 of bitsandbytes: 4-bit floats (sign, 2 exponent bits, 1 mantissa bit) over 12, one absmax for 64 weights.

    value = absmax * level[code]         level = 0, 1/192, 1/6, 1/4, 1/3, 1/2, 2/3, 1 and their negatives

How an absmax is stored is in ``llmquant.blockwise``. Zero has two codes: like bitsandbytes on the CPU, 8 is taken for
what is rounded down to zero and 0 for what is rounded up. MXFP4 and NVFP4 have other levels.
Source: bitsandbytes 0.50, `get_4bit_type` in functional.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llmquant import blockwise

FP4 = blockwise.Type(
    "fp4",
    levels=tuple(n / 192 for n in (-192, -128, -96, -64, -48, -32, -1, 0, 0, 1, 32, 48, 64, 96, 128, 192)),
    numbers=(11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3),
)


@dataclass(frozen=True)
class Config(blockwise.Config):
    """FP4.

    block_size: columns that share an absmax, 32 to 4096.
    double_quant: an absmax is stored in 8 bits instead of 32.
    observer: "absmax" puts the largest weight on the outermost level, as bitsandbytes does; "mse" searches what
        leaves the least error (weighted by the calibration's activations when there are some).
    """

    type: ClassVar[blockwise.Type] = FP4
