"""Fake quantization: a weight that computes as what a grid stores of it, and that gradients can change.

The forward pass is what a runtime decodes, to the bit: the scales and offsets are stored (``Grid.store``) and read
back, and every weight has a place on the axis of the grid's levels, of which the nearest is its code. The backward
pass goes straight through both roundings. With v = scale * table[code] + offset:

    dv/dscale = table[code], dv/doffset = 1
    dv/dplace = scale, and 0 for a place that is more than half a step outside the table

A scale thus carries all weights of its group along, as it does in what is stored. Where a place is on the axis of the
weights instead (LSQ, Esser et al. 2020, https://arxiv.org/abs/1902.08153, section 2.1), dv/dscale = table[code] - place
/ scale: of weights in the middle of their levels, which is where they begin and are drawn to, that tells nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from llmquant import kernels
from llmquant.grid import Grid, Params, QuantizedTensor, UnitGrid, decode, encode
from llmquant.kernels import fake as kernel


class FakeQuantized(nn.Module):
    """A weight matrix on its way from one quantized tensor to a better one, on the device of the first.

    places: where the weights are on the axis of the grid's levels. growth: of the scales, as a share of what they were.
    shift: of the offsets, in mean steps between levels; None where they are not stored apart, and grow with the scales.
    gap: the mean distance between levels.
    """

    def __init__(self, q: QuantizedTensor) -> None:
        """Begin with weights in the middle of their levels."""
        super().__init__()
        self.grid, self.inputs, self.shape = q.grid, q.inputs, q.codes.shape
        self.gap = float(q.grid.table[-1] - q.grid.table[0]) / (len(q.grid.table) - 1)
        self._first = {name: value[:1, :1] for name, value in q.params.items()} if q.grid.per_tensor else q.params
        scale, offset = (level[..., None] for level in q.grid.levels(self._first))
        steps = scale.abs() * self.gap
        self.step: Tensor
        self.scale: Tensor
        self.offset: Tensor
        self.register_buffer("step", torch.where(steps > 0, steps, steps.mean().clamp(min=torch.finfo().tiny)))
        self.register_buffer("scale", scale)
        self.register_buffer("offset", offset)
        shape = (len(q.codes), 1, 1) if q.grid.per_tensor else scale.shape[:-1]
        self.places = nn.Parameter(q.grid.table.to(scale.device)[q.codes.long()].view(*shape, -1))
        self.growth = nn.Parameter(torch.zeros_like(scale))
        self.shift = nn.Parameter(torch.zeros_like(offset)) if _free_offsets(q.grid) else None

    def forward(self) -> Float[Tensor, "rows cols"]:
        """Return the weights as they would be decoded."""
        values: Tensor = _Rounded.apply(self.places, *self._wanted(), self)  # type: ignore[no-untyped-call]
        return values.view(self.shape)

    @torch.no_grad()
    def quantized(self) -> QuantizedTensor:
        """Return what is to be stored."""
        params, _, _ = self.store(*self._wanted())
        if self.grid.per_tensor:
            params = {name: value.expand(self.shape[0], *value.shape[1:]) for name, value in params.items()}
        return QuantizedTensor(self.grid, _codes(self.grid, self.places).view(self.shape), params, inputs=self.inputs)

    @torch.no_grad()
    def draw(self, share: float) -> None:
        """Draw the weights a share of the way to the middle of their levels."""
        self.places.lerp_(decode(self.grid, _codes(self.grid, self.places), *_axis(self.places)), share)

    def _wanted(self) -> tuple[Tensor, Tensor]:
        grown = 1 + self.growth
        offset = self.offset * grown if self.shift is None else self.offset + self.step * self.shift
        return self.scale * grown, offset

    def store(self, scale: Tensor, offset: Tensor) -> tuple[Params, Tensor, Tensor]:
        """Return the parameters nearest to wished-for scales and offsets, and what a decoder reads of them."""
        shape = scale.shape[:-1]  # [rows, spans, groups]
        wished = scale.reshape(-1, shape[-1]), offset.reshape(-1, shape[-1])
        near = {name: value.flatten(0, 1) for name, value in self._first.items()}
        grid = self.grid
        params = grid.store_near(near, *wished) if isinstance(grid, UnitGrid) else grid.store(*wished)
        params = {name: value.view(*shape[:2], -1) for name, value in params.items()}
        scale, offset = (level[..., None] for level in grid.levels(params))
        return params, scale, offset

    @property
    def levels(self) -> list[nn.Parameter]:
        """The parameters that say where the levels are."""
        return [self.growth] if self.shift is None else [self.growth, self.shift]


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, places: Tensor, scale: Tensor, offset: Tensor, fake: FakeQuantized) -> Tensor:
        ctx.table, ctx.gap = fake.grid.table.to(scale.device), fake.gap
        with torch.autocast(places.device.type, enabled=False):  # what is stored does not depend on a step's precision
            _, scale, offset = fake.store(scale, offset)
            codes = _codes(fake.grid, places)
            ctx.save_for_backward(places, codes, scale)
            return decode(fake.grid, codes, scale, offset)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        find = kernel.pulled if kernels.suit(gradient) else pulled
        places, codes, scale = ctx.saved_tensors
        return *find(ctx.table, ctx.gap, places, codes, scale, gradient), None


def pulled(
    table: Float[Tensor, " levels"],
    gap: float,
    places: Float[Tensor, "*shape"],
    codes: UInt8[Tensor, "*shape"],
    scale: Float[Tensor, "*_"],
    gradient: Float[Tensor, "*shape"],
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*_"], Float[Tensor, "*_"]]:
    """Return the gradients of places, scales and offsets, given that of the weights as they are decoded."""
    inside = (places >= table[0] - gap / 2) & (places <= table[-1] + gap / 2)
    of_scale = (gradient * table[codes.long()]).sum_to_size(scale.shape)
    return gradient * scale * inside, of_scale, gradient.sum_to_size(scale.shape)


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def straight(x: Float[Tensor, "*shape"], rounded: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return ``rounded``, with the gradient of ``x``."""
    result: Tensor = _Straight.apply(x, rounded)  # type: ignore[no-untyped-call]
    return result


def _axis(places: Float[Tensor, "*shape"]) -> tuple[Tensor, Tensor]:
    """Return the scales and offsets at which places are weights."""
    one = torch.ones(places.shape[:1], device=places.device).view(-1, *[1] * (places.dim() - 1))
    return one, torch.zeros_like(one)


def _codes(grid: Grid, places: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Return the codes of the levels nearest to places."""
    return encode(grid, places, *_axis(places))


def _free_offsets(grid: Grid) -> bool:
    """Whether a grid stores offsets apart from scales, and between whole steps of these."""
    wanted = torch.full((2, grid.span // grid.group), -0.3)
    _, stored = grid.levels(grid.store(torch.ones_like(wanted), wanted))
    return torch.allclose(stored, wanted, atol=0.1)
