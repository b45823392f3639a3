"""Fake quantization: a weight that computes as what a grid stores of it, and that gradients can change.

The forward pass is what a runtime decodes, to the bit: the scales and offsets are stored (``Grid.store``) and read
back, every weight takes its nearest level at these. The backward pass goes straight through both roundings. With
v = scale * table[code] + offset, the code nearest to w, and u = (w - offset) / scale:

    within the table:          dv/dw = 1, dv/dscale = table[code] - u, dv/doffset = 0
    half a step beyond it:     dv/dw = 0, dv/dscale = table[end],      dv/doffset = 1

Source: LSQ, Esser et al. 2020, https://arxiv.org/abs/1902.08153, section 2.1; with offsets LSQ+, Bhalgat et al. 2020,
https://arxiv.org/abs/2004.09576. Departures: any table of levels in the place of integers, and parameters are in
units of the grid, so that one rate suits all tensors, where theirs scale gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from llmquant import kernels
from llmquant.grid import Grid, Params, QuantizedTensor, decode, dequantize, encode
from llmquant.kernels import fake as kernel


class FakeQuantized(nn.Module):
    """A weight matrix on its way from one quantized tensor to a better one.

    places: where the weights are, in mean steps between levels. growth: of the scales, as a share of what they were.
    shift: of the offsets, in the same steps.
    """

    def __init__(self, q: QuantizedTensor) -> None:
        """Begin with weights in the middle of their levels."""
        super().__init__()
        self.grid, self.inputs, self.shape = q.grid, q.inputs, q.codes.shape
        params = {name: value[:1, :1] for name, value in q.params.items()} if q.grid.per_tensor else q.params
        scale, offset = (level[..., None] for level in q.grid.levels(params))
        steps = scale.abs() * _gap(q.grid)
        self.step: Tensor
        self.scale: Tensor
        self.offset: Tensor
        self.register_buffer("step", torch.where(steps > 0, steps, steps.mean().clamp(min=torch.finfo().tiny)))
        self.register_buffer("scale", scale)
        self.register_buffer("offset", offset)
        weights = dequantize(q).view(*(scale.shape[:-1] if not q.grid.per_tensor else (len(q.codes), 1, 1)), -1)
        self.places = nn.Parameter(weights / self.step)
        self.growth = nn.Parameter(torch.zeros_like(scale))
        self.shift = nn.Parameter(torch.zeros_like(offset))
        self._levels = _Levels(q.grid)

    def forward(self) -> Float[Tensor, "rows cols"]:
        """Return the weights as they would be decoded."""
        values: Tensor = _Rounded.apply(self.places * self.step, *self._wanted(), self._levels)  # type: ignore[no-untyped-call]
        return values.view(self.shape)

    @torch.no_grad()
    def quantized(self) -> QuantizedTensor:
        """Return what is to be stored."""
        params, scale, offset = _stored(self.grid, *self._wanted())
        codes = encode(self.grid, self.places * self.step, scale, offset)
        if self.grid.per_tensor:
            params = {name: value.expand(self.shape[0], *value.shape[1:]) for name, value in params.items()}
        return QuantizedTensor(self.grid, codes.view(self.shape), params, inputs=self.inputs)

    @torch.no_grad()
    def draw(self, share: float) -> None:
        """Draw the weights a share of the way to the middle of the levels that the last forward pass gave them."""
        middle = decode(self.grid, *self._levels.found)
        self.places.lerp_(middle.mul_(1 / self.step), share)

    def _wanted(self) -> tuple[Tensor, Tensor]:
        return self.scale * (1 + self.growth), self.offset + self.step * self.shift


class _Levels:
    """What a pass needs to know of a grid, and what the last one found: codes, scales and offsets."""

    found: tuple[Tensor, Tensor, Tensor]

    def __init__(self, grid: Grid) -> None:
        self.grid, self.gap, self.stores_offsets = grid, _gap(grid), _stores_offsets(grid)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, scale: Tensor, offset: Tensor, levels: _Levels) -> Tensor:
        _, scale, offset = _stored(levels.grid, scale, offset)
        codes = encode(levels.grid, weights, scale, offset)
        ctx.levels, levels.found = levels, (codes, scale, offset)
        ctx.save_for_backward(weights, codes, scale, offset)
        return decode(levels.grid, codes, scale, offset)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        weights, codes, scale, offset = ctx.saved_tensors
        find = kernel.pulled if kernels.suit(weights) else pulled
        table = ctx.levels.grid.table.to(weights)
        of_weights, of_scale, of_offset = find(table, ctx.levels.gap, weights, codes, scale, offset, gradient)
        if not ctx.levels.stores_offsets:  # then an offset is a multiple of its scale
            of_scale = of_scale + of_offset * torch.where(scale == 0, 0.0, offset / scale)
        return of_weights, of_scale, of_offset, None


def pulled(
    table: Float[Tensor, " levels"],
    gap: float,
    w: Float[Tensor, "*shape"],
    codes: UInt8[Tensor, "*shape"],
    scale: Float[Tensor, "*_"],
    offset: Float[Tensor, "*_"],
    gradient: Float[Tensor, "*shape"],
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*_"], Float[Tensor, "*_"]]:
    """Return the gradients of weights, scales and offsets, given that of the weights as they are rounded.

    gap: the mean distance between levels. An offset is taken to be stored apart from its scale.
    """
    place = (w - offset) * torch.where(scale == 0, 0.0, 1 / scale)
    inside = (place >= table[0] - gap / 2) & (place <= table[-1] + gap / 2)
    level = table[codes.long()]
    of_scale = gradient * torch.where(inside, level - place, level)
    return gradient * inside, of_scale.sum_to_size(scale.shape), (gradient * ~inside).sum_to_size(offset.shape)


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


def _stored(grid: Grid, scale: Tensor, offset: Tensor) -> tuple[Params, Tensor, Tensor]:
    """Return the parameters nearest to wished-for scales and offsets, and what a decoder reads of them."""
    shape = scale.shape[:-1]  # [rows, spans, groups]
    params = grid.store(scale.reshape(-1, shape[-1]), offset.reshape(-1, shape[-1]))
    params = {name: value.view(*shape[:2], -1) for name, value in params.items()}
    scale, offset = (level[..., None] for level in grid.levels(params))
    return params, scale, offset


def _gap(grid: Grid) -> float:
    """Return the mean distance between levels."""
    return float(grid.table[-1] - grid.table[0]) / (len(grid.table) - 1)


def _stores_offsets(grid: Grid) -> bool:
    """Whether a grid stores offsets apart from scales."""
    scale = torch.ones(2, grid.span // grid.group)
    _, stored = grid.levels(grid.store(scale, -scale.cumsum(0)))
    return not torch.equal(stored[0], stored[1])
