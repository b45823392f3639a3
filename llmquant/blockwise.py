"""What the 4-bit types of bitsandbytes have in common: 16 fixed levels, and for every block its largest magnitude.

    value = absmax * level[code]

With double quantization (QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, section 3) an absmax is itself
8 bits. The mean of all of them is taken off, and 256 of what is left share their own absmax:

    absmax = dynamic[code] * nested_absmax + nested_offset

where ``dynamic`` are the 256 levels of the dynamic map (Dettmers 2015, https://arxiv.org/abs/1511.04561).
The rounding is that of bitsandbytes 0.50 on the CPU, to the bit: `quantize_4bit` in backends/default/ops.py,
`create_dynamic_map` in functional.py and `quantize_cpu_impl` in csrc/cpu_ops.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import pad

from llmquant import scale_search
from llmquant.blocks import in_chunks
from llmquant.errors import ShapeError
from llmquant.grid import Params, nearest

SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # that bitsandbytes has kernels for
NESTED = 256  # absmax values that share a nested one
SMALLEST = 1e-38  # an absmax below this rounds as if it were this
SHARES = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76)  # of the absmax, that observer mse tries


@dataclass(frozen=True)
class Type:
    """One of bitsandbytes' 4-bit types.

    levels: ascending. numbers: the code that files hold for each of them.
    """

    name: str
    levels: tuple[float, ...]
    numbers: tuple[int, ...]


@dataclass(frozen=True)
class Config:
    """Base of the grids' settings; each explains the keys for itself."""

    block_size: int = 64
    double_quant: bool = True
    observer: Literal["absmax", "mse"] = "absmax"

    type: ClassVar[Type]

    def __post_init__(self) -> None:
        if self.block_size not in SIZES:
            raise ValueError(f"block_size is {self.block_size}, not one of {', '.join(map(str, SIZES))}")

    def bind(self, rows: int, cols: int, dtype: torch.dtype) -> Blockwise:
        """Return the grid for weights [rows, cols] of a model in ``dtype``."""
        if cols % self.block_size:
            fitting = [str(size) for size in SIZES if size < self.block_size and cols % size == 0]
            raise ShapeError(
                f"{cols} columns are not a multiple of block_size {self.block_size}. "
                + (f"Give it block_size {fitting[-1]}" if fitting else "Leave it float with `keep: true`")
                + ", by a rule, or set `fallback: keep`"
            )
        blocks = rows * cols // self.block_size
        return Blockwise(self, self.type, dtype, blocks if self.double_quant else None)

    def substitute(self) -> None:
        """Return nothing: no other grid stands in for a shape that ``bind`` refuses."""


@dataclass(frozen=True)
class Blockwise:
    """The grid of one weight.

    dtype: of the model; decoders round to it.
    blocks: in the whole weight; None without double quantization, where it does not matter.
    """

    config: Config
    type: Type
    dtype: torch.dtype
    blocks: int | None

    per_tensor: ClassVar[bool] = False

    @property
    def span(self) -> int:
        return self.config.block_size

    @property
    def group(self) -> int:
        return self.config.block_size

    @property
    def table(self) -> Float[Tensor, " levels"]:
        return torch.tensor(self.type.levels, dtype=torch.float32)

    @property
    def bits_per_weight(self) -> float:
        if self.blocks is None:
            return 4 + 32 / self.span
        return 4 + (8 * self.blocks + 32 * math.ceil(self.blocks / NESTED) + 32) / (self.blocks * self.span)

    @property
    def shared(self) -> Mapping[str, int]:
        return {} if self.blocks is None else {"nested_absmax": NESTED, "nested_offset": self.blocks}

    def fit(self, w: Float[Tensor, "n span"], importance: Float[Tensor, "n span"]) -> Params:
        """Return each block's largest magnitude, or (observer mse) what of it leaves the least error."""
        if self.config.observer == "mse":
            absmax = in_chunks(self._least_error, w, importance, reach=scale_search.FAR)["absmax"]
        else:
            absmax = w.abs().amax(1, keepdim=True)
        return self.store(absmax, absmax)

    def _least_error(self, w: Float[Tensor, "n span"], importance: Float[Tensor, "n span"]) -> Params:
        table, absmax = self.table.to(w), w.abs().amax(1, keepdim=True)
        best = scale_search.rounded(w, importance, absmax, table)
        for share in SHARES[1:]:
            trial = scale_search.rounded(w, importance, share * absmax, table)
            better = trial.error_at(trial.best_scale()) < best.error_at(best.best_scale())
            best = scale_search.Rounding(*(torch.where(better, a, b) for a, b in zip(trial, best, strict=True)))
        return {"absmax": best.best_scale()}

    def store(self, scale: Float[Tensor, "n groups"], offset: Float[Tensor, "n groups"]) -> Params:
        """Return the scales as absmax; there are no offsets."""
        absmax = scale.float()
        if self.blocks is None:
            return {"absmax": absmax}
        mean = absmax.flatten().mean()
        nested, codes = quantize_nested(absmax.flatten() - mean)
        return {
            "absmax": codes.view_as(absmax),
            "nested_absmax": spread_nested(nested, absmax.numel()).view_as(absmax),
            "nested_offset": mean.expand_as(absmax),
        }

    def store_beside(
        self, shared: Params, scale: Float[Tensor, "n groups"], offset: Float[Tensor, "n groups"]
    ) -> Params:
        if self.blocks is None:
            return self.store(scale, offset)
        codes = nearest(DYNAMIC.to(scale.device), scale, shared["nested_absmax"], shared["nested_offset"])
        return {**shared, "absmax": codes}

    def levels(self, params: Params) -> tuple[Float[Tensor, "*b groups"], Float[Tensor, "*b groups"]]:
        absmax = params["absmax"]
        if self.blocks is not None:
            dynamic = DYNAMIC.to(absmax.device)
            absmax = dynamic[absmax.long()] * params["nested_absmax"] + params["nested_offset"]
        return scale_search.without_offset(absmax)

    def rounding(
        self, w: Float[Tensor, "n span"], params: Params
    ) -> tuple[Float[Tensor, "n groups"], Float[Tensor, "n groups"]]:
        """Return the (scale, offset) that plain rounding takes: bitsandbytes rounds before it quantizes twice."""
        if self.config.observer != "absmax":
            return self.levels(params)
        return scale_search.without_offset(w.abs().amax(1, keepdim=True).clamp(min=SMALLEST))


def dynamic_map() -> Float[Tensor, " levels"]:
    """Return the 256 levels of the dynamic map: 0, 1, and ± the centres of 1, 2, 4 ... 64 bins of seven decades."""
    levels = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        centres = 10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        levels += [centres, -centres]
    return torch.cat(levels).sort().values


DYNAMIC = dynamic_map()


def quantize_nested(x: Float[Tensor, " n"]) -> tuple[Float[Tensor, " nested"], UInt8[Tensor, " n"]]:
    """Return the largest magnitude of every 256 values, and codes of the dynamic map.

    bitsandbytes looks a code up in a table of 65536 evenly spaced values, so that is what is rounded to first.
    """
    absmax = pad(x, (0, -len(x) % NESTED)).view(-1, NESTED).abs().amax(1)
    share = (x * spread_nested(1 / absmax, len(x))).clamp(-1, 1)
    place = ((share + 1) * 0.5 * 65535 + 0.5).to(torch.int32)
    middles = 0.5 * (DYNAMIC[:-1] + DYNAMIC[1:])
    codes = torch.bucketize(-1 + 2 * place.float() / 65535, middles.to(x.device)).to(torch.uint8)
    return absmax, torch.where(spread_nested(absmax, len(x)) == 0, 0, codes)


def spread_nested(nested: Tensor, n: int) -> Tensor:
    """Return what holds for each of ``n`` absmax values."""
    return nested.repeat_interleave(NESTED)[:n]
