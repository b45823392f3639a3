"""NF4: 16 levels at quantiles of a normal distribution, one absmax for 64 weights; 4.127 bits a weight.

    value = absmax * level[code]

How an absmax is stored is in ``llmquant.blockwise``. Source: QLoRA, Dettmers et al. 2023,
https://arxiv.org/abs/2305.14314, section 3 and appendix E; bitsandbytes, which reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llmquant import blockwise

NF4 = blockwise.Type(
    "nf4",
    levels=(
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    numbers=tuple(range(16)),
)


@dataclass(frozen=True)
class Config(blockwise.Config):
    """NF4.

    block_size: columns that share an absmax, 32 to 4096.
    double_quant: an absmax is stored in 8 bits instead of 32.
    observer: "absmax" puts the largest weight on the outermost level, as bitsandbytes does; "mse" searches what
        leaves the least error (weighted by the calibration's activations when there are some).
    """

    type: ClassVar[blockwise.Type] = NF4
