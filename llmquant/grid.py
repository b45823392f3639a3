"""The numbers a format can hold, and how a float weight becomes one of them.

A grid splits every weight row into spans of ``grid.span`` columns. Inside a
span, columns share a scale and an offset in groups of ``grid.group`` columns.
One stored weight is read back as

    value = scale * table[code] + offset

That line covers every scalar format we export: integer groups (table 0..15,
offset -scale * zero), k-quants (the same, but the scale is itself stored in 6
bits) and NF4 (16 uneven levels, offset 0). So a new format says what its table
is, how to choose its scales (``fit``), how to store given ones (``store``) and
how a decoder reads them (``levels``).

Rows never influence each other, so exporters may permute, split or stack rows
after quantization without changing any value. (Where spans share stored values,
such as the one scale of a whole tensor, ``shared`` says so: such a grid is fitted
to a whole matrix.)

A grid module, ``llmquant.grids.NAME``, has a frozen dataclass ``Config`` (the
recipe's keys) whose ``bind(rows, cols, dtype)`` returns the Grid for weights of
one shape in a model of one dtype, or raises ShapeError.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float64, UInt8
from torch import Tensor

from llmquant import kernels
from llmquant.activations import Inputs
from llmquant.kernels import grid as kernel

Params = dict[str, Tensor]
"""What a format stores beside the codes, e.g. {"scale": ..., "zero": ...}; each [rows, spans, k]."""


@runtime_checkable
class Grid(Protocol):
    """A format's numbers, bound to one weight's shape (a grid module's ``Config.bind`` makes one)."""

    @property
    def span(self) -> int:
        """Columns fitted together: a group, or a super-block of 256."""

    @property
    def group(self) -> int:
        """Columns that share one scale; divides ``span``."""

    @property
    def table(self) -> Float[Tensor, " levels"]:
        """The levels, ascending; no two are equal but where a format has two zeros."""

    @property
    def bits_per_weight(self) -> float:
        """Codes and stored parameters together, in bits, for one weight of the bound shape."""

    @property
    def per_tensor(self) -> bool:
        """Whether all rows share one set of stored parameters."""

    @property
    def shared(self) -> Mapping[str, int]:
        """How many spans, row by row of the whole matrix, have a stored parameter in common; no entry: just one.

        With any entry, ``fit`` and ``store`` need all spans of the matrix at once, in that order.
        """

    def fit(self, w: Float[Tensor, "n span"], importance: Float[Tensor, "n span"]) -> Params:
        """Choose the stored parameters of ``n`` spans, each [n, k], for a small sum(importance * error²)."""

    def store(self, scale: Float[Tensor, "n groups"], offset: Float[Tensor, "n groups"]) -> Params:
        """Return the stored parameters nearest to wished-for scales and offsets of the ``n`` spans' groups."""

    def levels(self, params: Params) -> tuple[Float[Tensor, "*b groups"], Float[Tensor, "*b groups"]]:
        """Read (scale, offset) of every group, exactly as a decoder will."""


@runtime_checkable
class BlockGrid(Grid, Protocol):
    """A grid that fixes the bytes of a span too, the same in every file that holds it: a GGUF tensor type."""

    @property
    def name(self) -> str:
        """The type's name in lower case, e.g. "q4_k"; also that of its module."""

    @property
    def block_bytes(self) -> int:
        """Bytes of one span."""

    def to_bytes(self, codes: UInt8[Tensor, "n span"], params: Params) -> UInt8[Tensor, "n block_bytes"]:
        """Return the blocks of ``n`` spans; params each [n, k]. Meta tensors give meta tensors."""

    def from_bytes(self, blocks: UInt8[Tensor, "n block_bytes"]) -> tuple[UInt8[Tensor, "n span"], Params]:
        """Return the codes and parameters of ``n`` blocks: the inverse of ``to_bytes``."""


@runtime_checkable
class RoundingGrid(Grid, Protocol):
    """A grid whose own encoder rounds at other scales than a decoder reads."""

    def rounding(
        self, w: Float[Tensor, "n span"], params: Params
    ) -> tuple[Float[Tensor, "n groups"], Float[Tensor, "n groups"]]:
        """Return the (scale, offset) at which plain rounding encodes ``n`` spans; params each [n, k]."""


@runtime_checkable
class NestedGrid(Grid, Protocol):
    """A grid with values that spans share and others for each span, which can be chosen anew beside the shared ones."""

    def store_beside(
        self, shared: Params, scale: Float[Tensor, "n groups"], offset: Float[Tensor, "n groups"]
    ) -> Params:
        """Return the stored parameters nearest to wished-for scales and offsets of any ``n`` spans.

        shared: their parameters so far, each [n, k]; of these, what spans share stays.
        """


@runtime_checkable
class UnitGrid(Grid, Protocol):
    """A grid that stores scales as integers, in units that it has to choose as well."""

    def store_near(self, near: Params, scale: Float[Tensor, "n groups"], offset: Float[Tensor, "n groups"]) -> Params:
        """As ``store``, in the units at which the integers of ``near``, each [n, k], are nearest to what is wished for.

        Where levels change little, little of what is stored changes.
        """


@dataclass(frozen=True)
class QuantizedTensor:
    """One quantized weight matrix, in no file format yet.

    params: each [rows, spans, k].
    record: what the algorithm did that a report should tell, e.g. {"damping": 0.01}.
    inputs: how a runtime rounds the activations before it multiplies; None: not at all.
    """

    grid: Grid
    codes: UInt8[Tensor, "rows cols"]
    params: Params
    record: Mapping[str, Any] = field(default_factory=dict)
    inputs: Inputs | None = None

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """Return it on a device."""
        params = {name: value.to(device) for name, value in self.params.items()}
        return replace(self, codes=self.codes.to(device), params=params)


def nearest(
    table: Float[Tensor, " levels"],
    w: Float[Tensor, "*shape"],
    scale: Float[Tensor, "*_"],
    offset: Float[Tensor, "*_"],
) -> UInt8[Tensor, "*shape"]:
    """Return the code of the level nearest to each weight (nearest to 0 where the scale is 0).

    scale, offset: of the weights' shape, or with a last dimension of 1.
    """
    middles = (table[1:] + table[:-1]) / 2
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    return torch.bucketize((w - offset) * inverse, middles).to(torch.uint8)


def encode(
    grid: Grid,
    w: Float[Tensor, "*shape"],
    scale: Float[Tensor, "*_"],
    offset: Float[Tensor, "*_"],
) -> UInt8[Tensor, "*shape"]:
    """Return the code of the level nearest to each weight; scale and offset as for ``nearest``."""
    find = kernel.nearest if kernels.suit(w) else nearest
    return find(grid.table.to(w.device, w.dtype), w, scale, offset)


def decode(
    grid: Grid,
    codes: UInt8[Tensor, "*shape"],
    scale: Float[Tensor, "*_"],
    offset: Float[Tensor, "*_"],
) -> Float[Tensor, "*shape"]:
    """Return the weights that the codes stand for; scale and offset as for ``nearest``."""
    table = grid.table.to(scale.device)
    if kernels.suit(scale):
        return kernel.decode(table, codes, scale, offset)
    return scale * table[codes.long()] + offset


def fit_all(grid: Grid, w: Float[Tensor, "rows cols"], importance: Float[Tensor, " cols"]) -> Params:
    """Fit every span of a matrix at once. Each returned value is [rows, spans, k]."""
    rows, cols = w.shape
    if grid.per_tensor:
        params = grid.fit(w.reshape(1, -1), importance.repeat(rows)[None])
        return {name: value.view(1, 1, -1).expand(rows, 1, -1) for name, value in params.items()}
    spans = cols // grid.span
    weight = importance.view(1, spans, grid.span).expand(rows, -1, -1)
    params = grid.fit(w.reshape(-1, grid.span), weight.reshape(-1, grid.span))
    return {name: value.view(rows, spans, -1) for name, value in params.items()}


def per_column(grid: Grid, params: Params) -> tuple[Float[Tensor, "rows cols"], Float[Tensor, "rows cols"]]:
    """Spread (scale, offset) of every group over its columns."""
    scale, offset = grid.levels(params)
    return (
        scale.flatten(1).repeat_interleave(grid.group, dim=1),
        offset.flatten(1).repeat_interleave(grid.group, dim=1),
    )


def encode_all(grid: Grid, w: Float[Tensor, "rows cols"], params: Params) -> UInt8[Tensor, "rows cols"]:
    """Return the codes of a matrix on stored parameters."""
    if isinstance(grid, RoundingGrid):
        of_spans = {name: value.flatten(0, 1) for name, value in params.items()}
        levels = grid.rounding(w.reshape(-1, grid.span), of_spans)
    else:
        levels = grid.levels(params)
    scale, offset = (level[..., None] for level in levels)
    return encode(grid, w.reshape(*scale.shape[:-1], grid.group), scale, offset).view(w.shape)


def dequantize(q: QuantizedTensor) -> Float[Tensor, "rows cols"]:
    """Return the float weights that a runtime will compute from ``q``."""
    scale, offset = (level[..., None] for level in q.grid.levels(q.params))
    return decode(q.grid, q.codes.reshape(*scale.shape[:-1], q.grid.group), scale, offset).view(q.codes.shape)


def error_sums(
    q: QuantizedTensor, w: Float[Tensor, "rows cols"], importance: Float[Tensor, " cols"]
) -> Float64[Tensor, " sums"]:
    """Return the sums over all weights of error², w², importance * error² and importance * w²."""
    if kernels.suit(w) and q.grid.group % kernel.LANES == 0:
        scale, offset = (level.flatten(1) for level in q.grid.levels(q.params))
        return kernel.error_sums(q.grid.table, q.codes, scale, offset, w, importance)
    error, power = (dequantize(q) - w).square(), w.square()
    sums = [x.sum(dtype=torch.float64) for x in (error, power, error @ importance, power @ importance)]
    return torch.stack(sums)


def rows_of(q: QuantizedTensor, start: int, stop: int) -> QuantizedTensor:
    """Return the rows [start, stop): what one of several stacked weights became."""
    params = {name: value[start:stop] for name, value in q.params.items()}
    return replace(q, codes=q.codes[start:stop], params=params)
