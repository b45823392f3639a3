"""Integer groups: one scale and one zero point per group of columns.

    value = scale * (code - zero)

The grid of GPTQ, AWQ and compressed-tensors files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from llmquant import ranges
from llmquant.errors import ShapeError
from llmquant.grid import Params

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def stored_dtype(scale_dtype: str, dtype: torch.dtype) -> torch.dtype:
    """Return what a setting ``scale_dtype`` means for a model in ``dtype``: "auto" is its own 16 bits, or float16."""
    return DTYPES.get(scale_dtype, torch.bfloat16 if dtype == torch.bfloat16 else torch.float16)


@dataclass(frozen=True)
class Config:
    """Integer groups: a step and a zero point for every ``group_size`` columns.

    bits: 2 to 8.
    group_size: columns that share a scale, 16 or more. -1 means strategy channel.
    strategy: "group", "channel" (one scale a row) or "tensor" (one for all).
    symmetric: the zero point is the middle code and is not chosen.
    observer: how the range of a group is chosen: "minmax", "percentile", "mse"
        (weighted by the calibration's activations when there are some), "kl", or "hqq"
        (half-quadratic quantization: a norm of the errors that outliers hardly count in; no activations).
    percentile: share of the weights inside the range, in %, for that observer.
    scale_dtype: what a scale is stored in. "auto": bfloat16 for a bfloat16
        model, else float16; so that a runtime in the model's dtype reads the
        scale that the codes were chosen for.
    """

    bits: int = 4
    group_size: int = 128
    strategy: Literal["group", "channel", "tensor"] = "group"
    symmetric: bool = True
    observer: Literal["minmax", "percentile", "mse", "kl", "hqq"] = "minmax"
    percentile: float = 99.9
    scale_dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits is {self.bits}, not 2 to 8")
        if self.group_size == -1:
            object.__setattr__(self, "strategy", "channel")
        elif self.group_size < 1:
            raise ValueError(f"group_size is {self.group_size}, neither positive nor -1 (one group a row)")
        if not 0 < self.percentile <= 100:
            raise ValueError(f"percentile is {self.percentile}, not in (0, 100]")

    def bind(self, rows: int, cols: int, dtype: torch.dtype) -> Affine:
        """Return the grid for weights [rows, cols] of a model in ``dtype``."""
        if self.strategy == "group" and cols % self.group_size:
            divisors = [str(g) for g in (256, 128, 64, 32, 16) if cols % g == 0]
            raise ShapeError(
                f"{cols} columns are not a multiple of group_size {self.group_size}. Give it "
                + (f"group_size {' or '.join(divisors)}, or " if divisors else "")
                + "one scale a row (strategy: channel), by a rule, or set `fallback: substitute` (that) or `keep`"
            )
        group = self.group_size if self.strategy == "group" else cols
        weights_per_scale = rows * cols if self.strategy == "tensor" else group
        return Affine(self, group, stored_dtype(self.scale_dtype, dtype), weights_per_scale)

    def substitute(self) -> tuple[str, Config]:
        """Return what stands in for a shape that ``bind`` refuses: one scale a row."""
        return "affine", replace(self, strategy="channel")


@dataclass(frozen=True)
class Affine:
    """The grid of one weight: ``group`` columns share a scale and a zero point."""

    config: Config
    group: int
    scale_dtype: torch.dtype
    weights_per_scale: int

    @property
    def bits(self) -> int:
        return self.config.bits

    @property
    def symmetric(self) -> bool:
        return self.config.symmetric

    @property
    def span(self) -> int:
        return self.group

    @property
    def per_tensor(self) -> bool:
        return self.config.strategy == "tensor"

    @property
    def shared(self) -> Mapping[str, int]:
        rows = self.weights_per_scale // self.group
        return {"scale": rows, "zero": rows} if self.per_tensor else {}

    @property
    def table(self) -> Float[Tensor, " levels"]:
        return torch.arange(2**self.bits, dtype=torch.float32)

    @property
    def bits_per_weight(self) -> float:
        zero_bits = 0 if self.symmetric else self.bits
        return self.bits + (8 * self.scale_dtype.itemsize + zero_bits) / self.weights_per_scale

    def fit(self, w: Float[Tensor, "n span"], importance: Float[Tensor, "n span"]) -> Params:
        """Cover the range that the observer chooses. Zero is always a level.

        Symmetric codes have one level more below zero than above: the sign of the
        scale turns it to the side of the weight of largest magnitude.
        """
        levels = 2**self.bits
        if self.symmetric:
            largest = w.gather(1, w.abs().argmax(1, keepdim=True))
            side = torch.where(largest > 0, -1.0, 1.0).to(w.dtype)
            low, high = self._range(side * w, importance)
            return self.store(side * high / (levels / 2), low)
        low, high = self._range(w, importance)
        # `store` has no zero point 0: without this the largest weights were cut by a step
        low = ranges.with_a_level_below_zero(low, high, levels)
        return self.store((high - low) / (levels - 1), low)

    def _range(self, w: Float[Tensor, "n span"], importance: Float[Tensor, "n span"]) -> ranges.Range:
        levels = 2**self.bits
        match self.config.observer:
            case "minmax":
                return ranges.minmax(w, self.symmetric)
            case "percentile":
                return ranges.percentile(w, self.symmetric, self.config.percentile)
            case "mse":
                return ranges.mse(w, self.symmetric, importance, levels)
            case "kl":
                return ranges.kl(w, self.symmetric, levels)
            case "hqq":
                return ranges.hqq(w, self.symmetric, levels)

    def store(self, scale: Float[Tensor, "n groups"], offset: Float[Tensor, "n groups"]) -> Params:
        """Round scales to their dtype and offsets to a whole zero point of at least 1.

        GPTQ files store the zero point minus one, so 0 has no place in them; only
        a group without any negative weight would want it.
        """
        top = 2**self.bits - 1
        stored = scale.to(self.scale_dtype)
        if self.symmetric:
            return {"scale": stored, "zero": torch.full_like(stored, (top + 1) // 2, dtype=torch.uint8)}
        step = torch.where(stored == 0, 1, stored).to(offset.dtype)
        return {"scale": stored, "zero": (-offset / step).round().clamp(1, top).to(torch.uint8)}

    def levels(self, params: Params) -> tuple[Float[Tensor, "*b groups"], Float[Tensor, "*b groups"]]:
        scale = params["scale"].float()
        return scale, -scale * params["zero"].float()
