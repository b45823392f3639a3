"""GPTQ: round one column at a time and let the columns to come absorb the error.

Source: Frantar et al. 2022, https://arxiv.org/abs/2210.17323, algorithm 1.
Departures: the Cholesky factor of the inverse Hessian comes from one float64
factorisation of the Hessian with its columns in reverse (no inverse is formed);
a Hessian that cannot be factorised climbs a ladder of dampings, never falls back
to plain rounding; a column without activations is rounded to its nearest level
instead of being set to zero; with act-order all scales are fixed beforehand, so
groups stay contiguous and no file needs a column index.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from llmquant import kernels
from llmquant.errors import CalibrationError
from llmquant.grid import Grid, Params, QuantizedTensor, fit_all, nearest, per_column
from llmquant.kernels import gptq as kernel
from llmquant.stats import Needs, Stats

LADDER = 10**0.5  # each further try multiplies the damping by this, up to 1


@dataclass(frozen=True)
class Config:
    """GPTQ error feedback.

    dampening_frac: added to the Hessian's diagonal, as a share of its mean.
    actorder: visit the columns with the largest activations first.
    static_groups: fit all scales to the original weights, before the first
        column is rounded. Off: a group's scale is fitted when its first column
        is reached, to weights that already absorb errors. ``actorder`` implies it.
    block_size: columns updated together; changes speed, not the result.
    """

    dampening_frac: float = 0.01
    actorder: bool = False
    static_groups: bool = False
    block_size: int = 128

    def __post_init__(self) -> None:
        if not 0 <= self.dampening_frac <= 1:
            raise ValueError(f"dampening_frac is {self.dampening_frac}, not in [0, 1]")
        if self.block_size < 1:
            raise ValueError(f"block_size is {self.block_size}, not positive")


def needs(config: Config) -> Needs:
    return "hessian"


def quantize(w: Float[Tensor, "rows cols"], stats: Stats, grid: Grid, config: Config) -> QuantizedTensor:
    """Return codes whose output error on the calibration tokens is small.

    w: weight [out_features, in_features]; not changed. float64 is computed in
        float64, everything else in float32.
    stats: statistics of the inputs of this linear, with the Hessian.

    Raises CalibrationError when the Hessian cannot be factorised at any damping.
    """
    assert stats.hessian is not None
    w = w if w.dtype == torch.float64 else w.float()
    importance = stats.hessian.diagonal()
    static = config.static_groups or config.actorder
    order = importance.argsort(descending=True, stable=True) if config.actorder else _in_order(w)
    factor, damping = _inverse_factor(stats.hessian[order][:, order], config.dampening_frac)
    factor = factor.to(w.dtype)

    # Work on the transpose, so that one column of the weight is contiguous.
    w_t = w.T[order].contiguous()
    codes = torch.empty_like(w_t, dtype=torch.uint8)
    fitted: list[Params] = []
    scale, offset = torch.empty_like(w_t), torch.empty_like(w_t)
    if static:
        fitted.append(fit_all(grid, w, importance))
        for of_all, one in zip((scale, offset), per_column(grid, fitted[0]), strict=True):
            of_all.copy_(one.T[order])

    advance = kernel.round_columns if kernels.suit(w) else round_columns
    table = grid.table.to(w.device, w.dtype)
    for start, stop in _blocks(w.shape[1], grid.span, config.block_size):
        error = torch.empty_like(w_t[start:stop])
        step = stop - start if static else min(grid.span, stop - start)
        for c in range(start, stop, step):
            if not static and c % grid.span == 0:
                span = slice(c, c + grid.span)
                fitted.append(fit_all(grid, w_t[span].T, importance[span]))
                scale[span], offset[span] = (t.T for t in per_column(grid, fitted[-1]))
            these = slice(c, c + step)
            inside = factor[start:stop, start:stop]
            advance(
                w_t[start:stop],
                scale[these],
                offset[these],
                table,
                inside,
                codes[these],
                error[c - start :][:step],
                c - start,
            )
        w_t[stop:].addmm_(factor[start:stop, stop:].T, error, alpha=-1)

    params = {name: torch.cat([p[name] for p in fitted], dim=1) for name in fitted[0]}
    back = torch.empty_like(order).scatter_(0, order, _in_order(w))
    return QuantizedTensor(grid, codes[back].T.contiguous(), params, {"damping": damping})


def round_columns(
    w: Float[Tensor, "block rows"],
    scale: Float[Tensor, "columns rows"],
    offset: Float[Tensor, "columns rows"],
    table: Float[Tensor, " levels"],
    factor: Float[Tensor, "block block"],
    codes: UInt8[Tensor, "columns rows"],
    error: Float[Tensor, "columns rows"],
    first: int,
) -> None:
    """Round columns first, first + 1, ... of a block to ``codes``, and let the block's later columns absorb the error.

    w: the transposed weights of the block; its later columns are changed.
    factor: the block's part of U. error: receives each column's error over its diagonal element of U.
    """
    for i in range(len(codes)):
        c = first + i
        codes[i] = nearest(table, w[c], scale[i], offset[i])
        torch.sub(w[c], scale[i] * table[codes[i].long()] + offset[i], out=error[i])
        error[i] /= factor[c, c]
        w[c + 1 :].addr_(factor[c, c + 1 :], error[i], alpha=-1)


def _in_order(w: Tensor) -> Tensor:
    return torch.arange(w.shape[1], device=w.device)


def _blocks(cols: int, span: int, width: int) -> Iterator[tuple[int, int]]:
    """Cut the columns into blocks of about ``width`` such that no span begins inside a block it does not end in.

    >>> list(_blocks(8, 2, 5)), list(_blocks(6, 3, 2))
    ([(0, 4), (4, 8)], [(0, 2), (2, 3), (3, 5), (5, 6)])
    """
    if whole_spans := width // span * span:
        yield from ((start, min(start + whole_spans, cols)) for start in range(0, cols, whole_spans))
        return
    for first in range(0, cols, span):
        yield from ((start, min(start + width, first + span)) for start in range(first, first + span, width))


def _inverse_factor(hessian: Float[Tensor, "cols cols"], damp: float) -> tuple[Float[Tensor, "cols cols"], float]:
    """Return upper U with UᵀU = inverse(hessian + d * mean diagonal), float64, and the damping d that was used.

    With the columns reversed, hessian = L Lᵀ; reversed back, hessian = R Rᵀ with R
    upper triangular, so U = R⁻¹.
    """
    reversed_ = hessian.double().flip(0, 1)
    diagonal = reversed_.diagonal()
    mean = diagonal.mean()
    if not torch.isfinite(mean):
        raise CalibrationError("its activations are not finite on the calibration text")
    diagonal[diagonal == 0] = mean if mean > 0 else 1.0  # a column without activations stands alone
    while True:
        damped = reversed_ + torch.diag((damp * mean).expand(len(diagonal)))
        lower, info = torch.linalg.cholesky_ex(damped)
        if info == 0:
            break
        if damp >= 1:
            raise CalibrationError(
                f"its Hessian of {len(diagonal)} columns is not positive definite at any damping up to {damp:g}. "
                "Use more calibration tokens (calibration.sequences, calibration.length)"
            )
        damp = min(max(damp * LADDER, 1e-6), 1.0)
    one = torch.eye(len(diagonal), dtype=lower.dtype, device=lower.device)
    upper = torch.linalg.solve_triangular(lower, one, upper=False)
    return upper.flip(0, 1), damp
