"""Linears and embeddings whose weights stay in memory as their file codes them.

    weight = scale * table[code] + offset

with one scale and offset for a group of columns. A code takes a byte, or half of one
where the table has no more than 16 levels; what a file stores beside the codes stays
as it is, and scales are made of it when a product is. A decoded matrix is never in
memory, only ``PIECE`` weights at a time.

Few tokens are multiplied with the codes, in float32, by a compiled kernel
(``llmquant.kernels.product``); for many, and on other devices than the CPU, rows are
decoded and multiplied in the dtype of the activations.

In bfloat16 on the CPU, codes of 4 bits or fewer go through torch's own kernel
(``Int4Linear``; eval/results/packed_linear.md). In float32 that kernel is a plain loop,
ten times slower than a float matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from llmquant import kernels
from llmquant.errors import CheckpointError
from llmquant.kernels import product as kernel

PIECE = 2**20  # weights decoded at once
FEW = 4  # tokens for which decoding does not pay
INT4_ROWS, INT4_GROUPS = 64, (32, 64, 128, 256)  # of torch's kernel: rows in a block, columns with one scale

Levels: TypeAlias = Callable[[Mapping[str, Tensor]], tuple[Tensor, Tensor]]
"""Makes float32 (scale, offset), each [rows, groups], of what a file stores for some rows."""
Rows: TypeAlias = slice | Tensor


class Coded(nn.Module):
    """A matrix as its file codes it; called, it multiplies.

    packed: the codes, two in a byte where ``table`` has at most 16 levels, the first in the low bits.
    order: the column of the matrix that each column of codes is; None: the same.
    """

    packed: Tensor
    table: Tensor
    order: Tensor | None

    def __init__(
        self,
        codes: UInt8[Tensor, "rows cols"],
        table: Float[Tensor, " levels"],
        params: Mapping[str, Tensor],
        levels: Levels,
        order: Int[Tensor, " cols"] | None = None,
    ) -> None:
        """params: what the file stores, each [rows, ...]. levels: makes scales and offsets of it."""
        super().__init__()
        self.rows, self.cols = codes.shape
        halves = len(table) <= 16 and self.cols // levels({k: v[:1] for k, v in params.items()})[0].shape[1] % 2 == 0
        packed = codes[:, ::2] | (codes[:, 1::2] << 4) if halves else codes
        self.register_buffer("packed", packed.contiguous())
        self.register_buffer("table", table)
        self.register_buffer("order", order)
        self._levels = levels
        self._params = tuple(params)
        for name, value in params.items():
            self.register_buffer(f"param_{name}", value)

    def codes(self, rows: Rows) -> UInt8[Tensor, "rows cols"]:
        """Return the codes of some rows, a byte each."""
        packed = self.packed[rows]
        return packed if packed.shape[1] == self.cols else torch.stack([packed & 15, packed >> 4], 2).flatten(1)

    def levels(self, rows: Rows) -> tuple[Float[Tensor, "rows groups"], Float[Tensor, "rows groups"]]:
        """Return the scale and the offset of every group of some rows."""
        scale, offset = self._levels({name: self.get_buffer(f"param_{name}")[rows] for name in self._params})
        return scale.contiguous(), offset.contiguous()

    def decode(self, rows: Rows) -> Float[Tensor, "rows cols"]:
        """Return the weights of some rows."""
        scale, offset = self.levels(rows)
        if kernels.suit(scale):
            weight = kernel.decode(self.packed[rows], self.cols, self.table, scale, offset)
        else:
            level = self.table[self.codes(rows).long()].view(*scale.shape, -1)
            weight = (level * scale[..., None] + offset[..., None]).flatten(1)
        return weight if self.order is None else torch.empty_like(weight).index_copy_(1, self.order, weight)

    def forward(self, x: Float[Tensor, "*tokens cols"]) -> Float[Tensor, "*tokens rows"]:
        flat = x.reshape(-1, self.cols)
        y = flat.new_empty(len(flat), self.rows)
        if len(flat) <= FEW and x.device.type == "cpu":
            floats = (flat if self.order is None else flat[:, self.order]).float().contiguous()
            for rows in self._pieces(4 * PIECE) if len(flat) else ():
                y[:, rows] = kernel.product(floats, self.packed[rows], self.table, *self.levels(rows)).to(x.dtype)
        else:
            for rows in self._pieces(PIECE):
                y[:, rows] = flat @ self.decode(rows).to(x.dtype).T
        return y.view(*x.shape[:-1], self.rows)

    def _pieces(self, weights: int) -> Iterator[slice]:
        step = max(weights // self.cols, 1)
        return (slice(start, min(start + step, self.rows)) for start in range(0, self.rows, step))


class CodedLinear(nn.Module):
    """A linear with a coded weight."""

    bias: nn.Parameter | None

    def __init__(self, weight: Coded) -> None:
        super().__init__()
        self.coded = weight
        self.in_features, self.out_features = weight.cols, weight.rows
        self.bias = None

    def forward(self, x: Float[Tensor, "*tokens cols"]) -> Float[Tensor, "*tokens rows"]:
        y: Tensor = self.coded(x)
        return y if self.bias is None else y + self.bias


class CodedEmbedding(nn.Module):
    """An embedding that decodes the rows it is asked for. scale: of what it gives."""

    def __init__(self, weight: Coded, dtype: torch.dtype, scale: float = 1.0) -> None:
        super().__init__()
        self.coded = weight
        self._dtype = dtype
        self._scale = scale

    def forward(self, tokens: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape cols"]:
        rows = self.coded.decode(tokens.flatten()).to(self._dtype)
        return (rows * torch.tensor(self._scale, dtype=self._dtype)).view(*tokens.shape, -1)


class Int4Linear(nn.Module):
    """A linear of at most 16 even levels, through torch's kernel for bfloat16 on the CPU.

    It computes (code - 8) * scale + zero, both rounded to bfloat16.
    """

    bias: nn.Parameter | None
    packed: Tensor
    levels: Tensor
    order: Tensor | None

    def __init__(self, weight: Coded) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.cols, weight.rows
        self.bias = None
        packed, levels = [], []
        step = max(PIECE // weight.cols // INT4_ROWS, 1) * INT4_ROWS
        for start in range(0, weight.rows, step):
            rows = slice(start, min(start + step, weight.rows))
            scale, offset = weight.levels(rows)
            self._group = int4_group(weight.cols // scale.shape[1])
            of_groups = torch.stack([scale, offset + (weight.table[0] + 8) * scale], 2)
            again = weight.cols // self._group // scale.shape[1]
            levels.append(_whole_blocks(of_groups.repeat_interleave(again, 1).bfloat16()))
            codes = _whole_blocks(weight.codes(rows).int())
            packed.append(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1))
        self.register_buffer("packed", torch.cat(packed))
        self.register_buffer("levels", torch.cat(levels).transpose(0, 1).contiguous())
        self.register_buffer("order", weight.order)

    def forward(self, x: Float[Tensor, "*tokens cols"]) -> Float[Tensor, "*tokens rows"]:
        flat = x.reshape(-1, self.in_features)
        if not len(flat):
            return x.new_zeros(*x.shape[:-1], self.out_features)
        flat = flat if self.order is None else flat[:, self.order]
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.packed, self._group, self.levels)
        y = y[:, : self.out_features].view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def linear(weight: Coded, dtype: torch.dtype) -> CodedLinear | Int4Linear:
    """Return the fastest linear for activations in ``dtype``."""
    even = len(weight.table) <= 16 and bool((weight.table.diff() == 1).all())
    group = weight.cols // weight.levels(slice(0, 1))[0].shape[1]
    fits = even and weight.packed.device.type == "cpu" and dtype == torch.bfloat16 and int4_group(group)
    return Int4Linear(weight) if fits else CodedLinear(weight)


def int4_group(group: int) -> int:
    """Return how many columns torch's kernel can give one scale where ``group`` have one; 0: it cannot.

    >>> int4_group(128), int4_group(96), int4_group(4096), int4_group(16)
    (128, 32, 256, 0)
    """
    common = math.gcd(group, INT4_GROUPS[-1])
    return common if common in INT4_GROUPS else 0


def _whole_blocks(rows: Tensor) -> Tensor:
    """Return the rows with zeros after them, so that they fill whole blocks of the kernel."""
    more = -len(rows) % INT4_ROWS
    return torch.cat([rows, rows.new_zeros(more, *rows.shape[1:])]) if more else rows


def by_group(group: Int[Tensor, " cols"], groups: int) -> Int[Tensor, " cols"] | None:
    """Return the order of columns in which those of a group are side by side; None where they are.

    group: that of each column. Raises CheckpointError for groups of several sizes.
    """
    sizes = torch.bincount(group, minlength=groups)
    if (sizes != sizes[0]).any():
        raise CheckpointError(
            f"groups have {int(sizes.min())} to {int(sizes.max())} columns, expected the same number in each. "
            "llmquant computes such a file decoded only: `llmquant eval`"
        )
    return None if bool((group.diff() >= 0).all()) else group.argsort(stable=True)


def without_offset(params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the levels of ``scale * table[code]``, of a scale for every group."""
    scale = params["scale"].float()
    return scale, torch.zeros_like(scale)


def affine(params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the levels of ``scale * (code - zero)``, of a scale and a zero point for every group."""
    scale = params["scale"].float()
    return scale, -scale * params["zero"].float()
