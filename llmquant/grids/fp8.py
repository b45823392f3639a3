"""FP8, the E4M3 floats of 4 exponent and 3 mantissa bits, with one scale for a row or for the whole tensor.

    value = scale * code

The code is a float itself: 253 levels from -448 to 448, no infinity, one zero.
Source: Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from llmquant import ranges
from llmquant.grid import Params
from llmquant.grids.affine import stored_dtype


@dataclass(frozen=True)
class Config:
    """8-bit floats, E4M3.

    strategy: "channel" (one scale a row) or "tensor" (one for all).
    observer: how the largest value is chosen: "minmax", or "mse" (weighted by the calibration's activations when
        there are some), which seldom gains: the steps shrink with the values anyway.
    scale_dtype: what a scale is stored in. "auto": bfloat16 for a bfloat16 model, else float16.
    """

    strategy: Literal["channel", "tensor"] = "channel"
    observer: Literal["minmax", "mse"] = "minmax"
    scale_dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"

    def bind(self, rows: int, cols: int, dtype: torch.dtype) -> Fp8:
        """Return the grid for weights [rows, cols] of a model in ``dtype``; any shape will do."""
        weights_per_scale = rows * cols if self.strategy == "tensor" else cols
        return Fp8(self, cols, stored_dtype(self.scale_dtype, dtype), weights_per_scale)


@dataclass(frozen=True)
class Fp8:
    """The grid of one weight with ``group`` columns."""

    config: Config
    group: int
    scale_dtype: torch.dtype
    weights_per_scale: int

    @property
    def span(self) -> int:
        return self.group

    @property
    def per_tensor(self) -> bool:
        return self.config.strategy == "tensor"

    @property
    def shared(self) -> Mapping[str, int]:
        return {"scale": self.weights_per_scale // self.group} if self.per_tensor else {}

    @property
    def table(self) -> Float[Tensor, " levels"]:
        positive = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # 127 is NaN
        return torch.cat([-positive[1:].flip(0), positive])

    @property
    def bits_per_weight(self) -> float:
        return 8 + 8 * self.scale_dtype.itemsize / self.weights_per_scale

    def fit(self, w: Float[Tensor, "n span"], importance: Float[Tensor, "n span"]) -> Params:
        """Put the last level where the observer says."""
        _, high = ranges.mse_e4m3(w, importance) if self.config.observer == "mse" else ranges.minmax(w, True)
        return self.store(high / ranges.E4M3_TOP, torch.zeros_like(high))

    def store(self, scale: Float[Tensor, "n groups"], offset: Float[Tensor, "n groups"]) -> Params:
        """Round scales to their dtype; there is no offset."""
        return {"scale": scale.to(self.scale_dtype)}

    def levels(self, params: Params) -> tuple[Float[Tensor, "*b groups"], Float[Tensor, "*b groups"]]:
        scale = params["scale"].float()
        return scale, torch.zeros_like(scale)
