"""GPTQ: round one column at a time and let the columns to come absorb the error.

Source: Frantar et al. 2022, https://arxiv.org/abs/2210.17323, algorithm 1.
Departures: the Cholesky factor of the inverse Hessian comes from one float64
factorisation of the Hessian with its columns in reverse (no inverse is formed);
a Hessian that cannot be factorised climbs a ladder of dampings, never falls back
to plain rounding; a column without activations is rounded to its nearest level
instead of being set to zero; with act-order all scales are fixed beforehand, so
groups stay contiguous and no file needs a column index.

After the columns, two ways to a smaller error, both judged by the error itself,
tr((Q - W) H (Q - W)ᵀ) with the damped Hessian, row by row, so that no row gets worse:

``scale_search`` goes through the columns once more, one whole span after the other.
A span's scales are tried at some multiples, each with the feedback inside the span
on the weights as the spans before it left them. The loss of GPTQ is the sum of the
squared errors over U's diagonal, so what a multiple costs is known at once, clipped
weights and all that can still absorb it included.

``sweeps`` visits the spans again with all other columns held (block coordinate
descent). Around their errors, a span's own error is a quadratic whose minimum lies
off the original weights by - H_BB⁻¹ (H (Q - W))_B: rounding towards it is GPTQ again.
Compare CDQuant, Nair and Suggala 2024, https://arxiv.org/abs/2406.17542, which
changes codes only.

``refit`` goes on from a span that either of the two has rounded. With its codes held, its weights are linear in scales
and offsets, and the loss is a quadratic in these: a small linear system for each row, with the Hessian of the span in
the place of the importances by which grids fit (where ``scale_search`` visits the span, what of it is left when later
columns absorb what they can). The solution is stored, the span rounded again at what was stored, and each row keeps the
best. Closed-form least squares; no paper is followed.

``two_sided`` does for rows what the feedback does for columns. With H the Hessian of
the inputs and G the Fisher information of the outputs, an error E of the weights
costs the model about tr(G E H Eᵀ) / 2 (Tseng et al. 2025, YAQA,
https://arxiv.org/abs/2505.22988), and rows that are still to be rounded can absorb
what those before them err, by the factor of G⁻¹. Departures: rows are rounded in
``BLOCKS``, each with everything above, so that later rows see what remains; G is per
token and of some rows after the other (``gradients``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int, Int64, UInt8
from torch import Tensor

from llmquant import kernels
from llmquant.errors import CalibrationError
from llmquant.grid import Grid, NestedGrid, Params, QuantizedTensor, decode, dequantize, fit_all, nearest, per_column
from llmquant.kernels import gptq as kernel
from llmquant.stats import Needs, Stats

DAMPING = 0.01
LADDER = 10**0.5  # each further try multiplies the damping by this, up to 1
MULTIPLES = (1.0, 0.95, 0.9)  # of a span's scales and offsets; larger ones gained nothing
COARSE = (1.0, 0.5, 2.0)  # the same where only powers of two are stored: 0.5 % less loss on MXFP4

ROUNDS = 3  # of refitting scales and rounding at these, at most; more lower the loss by 0.1 % or less
GAIN = 0.02  # as a share of a row's loss in the span: who gains less is not refitted again
RIDGE = 1e-6  # of a least-squares system, in units of its diagonal: a group of equal codes has no best pair
TOGETHER = 1024  # rows that are refitted together

BLOCKS = 8  # of rows that are rounded one after the other where later rows absorb the errors of earlier ones
HELD = 128  # columns that a sweep rounds together where no span limits them


@dataclass(frozen=True)
class Config:
    """GPTQ error feedback.

    dampening_frac: added to the Hessian's diagonal, as a share of its mean. By default 0.01 or, where
        tokens are few, a linear's columns over four times their number.
    actorder: visit the columns with the largest activations first.
    static_groups: fit all scales to the original weights, before the first
        column is rounded. Off: a group's scale is fitted when its first column
        is reached, to weights that already absorb errors. ``actorder`` implies it.
    block_size: columns updated together; changes speed, not the result.
    scale_search: visit the columns a second time, span by span, with scales tried
        at some multiples; each row keeps the better of both results. With one span
        a row there is nothing to visit: the sweeps do the same.
    sweeps: how often every span is rounded again with all other columns held, its
        scales tried at the same multiples.
    two_sided: round some rows at a time and let the rows to come absorb their errors, too, by how much the model minds
        errors of each output and of which together. Not where rows share a scale.

    refit: after each of these, refit the span's scales and offsets to its codes by least squares, and round it again
        at what is stored of them, as long as a row gains by it. Not where only powers of two are stored.

    Parameters that spans share stay as they were fitted to the original weights; where all are shared, the sweeps
    change codes only.
    """

    dampening_frac: float | None = None
    actorder: bool = False
    static_groups: bool = False
    block_size: int = 128
    scale_search: bool = True
    sweeps: int = 1
    two_sided: bool = False
    refit: bool = False

    def __post_init__(self) -> None:
        if self.dampening_frac is not None and not 0 <= self.dampening_frac <= 1:
            raise ValueError(f"dampening_frac is {self.dampening_frac}, not in [0, 1]")
        if self.block_size < 1:
            raise ValueError(f"block_size is {self.block_size}, not positive")
        if self.sweeps < 0:
            raise ValueError(f"sweeps is {self.sweeps}, negative")
        if self.refit and not (self.scale_search or self.sweeps):
            raise ValueError("refit is a part of scale_search and of sweeps, and there is neither")


def needs(config: Config) -> Needs:
    return "fisher" if config.two_sided else "hessian"


def quantize(w: Float[Tensor, "rows cols"], stats: Stats, grid: Grid, config: Config) -> QuantizedTensor:
    """Return codes whose output error on the calibration tokens is small.

    w: weight [out_features, in_features]; not changed. float64 is computed in
        float64, everything else in float32.
    stats: statistics of the inputs of this linear, with the Hessian.

    Recorded: ``damping`` of the Hessian. Where the settings ask for two-sided feedback, ``two_sided``: whether there
    was any; and ``outputs_damping``: the largest of the outputs' matrices.

    Raises CalibrationError when the Hessian, or an outputs' matrix, cannot be factorised at any damping.
    """
    assert stats.hessian is not None
    w = w if w.dtype == torch.float64 else w.float()
    columns = _Columns(stats.hessian, grid, config, _damping(stats, config), w.dtype)
    if not config.two_sided:
        return _rounded_rows(w, columns)
    outputs = None if grid.shared else stats.outputs
    q = _rounded_rows(w, columns) if outputs is None else _two_sided(w, outputs, columns)
    return replace(q, record={**q.record, "two_sided": outputs is not None})


class _Factors(NamedTuple):
    """U of the columns in the order of each visit, all with the same damping.

    by_spans: None where columns are visited once. blocks: of each block's columns alone; none without sweeps.
    """

    damping: float
    first: Float[Tensor, "cols cols"]
    by_spans: Float[Tensor, "cols cols"] | None
    blocks: list[Float[Tensor, "_width _width"]]


@dataclass(frozen=True)
class _Columns:
    """The columns of a linear: their Hessian, and what is computed of it once for all rows.

    Computed in float64, given in ``dtype``. damping: that is wished for.
    """

    given: Float[Tensor, "cols cols"]
    grid: Grid
    config: Config
    damping: float
    dtype: torch.dtype

    @property
    def importance(self) -> Float[Tensor, " cols"]:
        return self.given.diagonal()

    @cached_property
    def order(self) -> Int64[Tensor, " cols"]:
        """In which the columns are visited the first time."""
        return _order(self.importance, self.config)

    @cached_property
    def spans(self) -> tuple[Int64[Tensor, " spans"], Int64[Tensor, "spans span"]]:
        """The spans, and the columns of each, those that matter most first."""
        of_span = self.importance.view(-1, self.grid.span)
        first = of_span.mean(1).argsort(descending=True, stable=True)
        return first, of_span.argsort(dim=1, descending=True, stable=True)

    @cached_property
    def multiples(self) -> tuple[float, ...]:
        """Those that are tried of a span's scales: where the grid is too coarse to tell some apart, powers of two."""
        if self.grid.shared:
            return MULTIPLES if isinstance(self.grid, NestedGrid) else MULTIPLES[:1]
        scale = torch.tensor(MULTIPLES)[:, None].repeat(1, self.grid.span // self.grid.group)
        stored, _ = self.grid.levels(self.grid.store(scale, torch.zeros_like(scale)))
        return MULTIPLES if len(torch.unique(stored, dim=0)) == len(MULTIPLES) else COARSE

    @cached_property
    def refitted(self) -> bool:
        """Whether spans are refitted."""
        return self.config.refit and self.multiples == MULTIPLES

    @cached_property
    def offsets(self) -> bool:
        """Whether the grid stores offsets apart from scales."""
        scale = torch.ones(2, self.grid.span // self.grid.group)
        _, stored = self.grid.levels(self.grid.store(scale, -scale.cumsum(0)))
        return not torch.equal(stored[0], stored[1])

    @property
    def searched(self) -> bool:
        """Whether the columns are visited a second time."""
        return self.config.scale_search and len(self.multiples) > 1 and self.grid.span < len(self.given)

    @cached_property
    def blocks(self) -> list[tuple[slice, Int64[Tensor, " width"]]]:
        """The columns that a sweep rounds together, and in which order."""
        width = min(self.grid.span, HELD) if self.grid.per_tensor else self.grid.span
        slices = [slice(start, min(start + width, len(self.given))) for start in range(0, len(self.given), width)]
        return [(block, self.importance[block].argsort(descending=True, stable=True)) for block in slices]

    @cached_property
    def factors(self) -> _Factors:
        orders = [self.order]
        if self.searched:
            first, inside = self.spans
            orders.append((first[:, None] * self.grid.span + inside[first]).flatten())
        if self.config.sweeps:
            orders += [block.start + order for block, order in self.blocks]
        found, damping = _factored(self.given, orders, self.damping, lambda lower: _upper(lower, self.dtype))
        return _Factors(damping, found[0], found[1] if self.searched else None, found[1 + self.searched :])

    @cached_property
    def hessian(self) -> Float[Tensor, "cols cols"]:
        """The damped Hessian, in the dtype of the weights."""
        damped = self.given.to(self.dtype, copy=True)
        damped.diagonal().copy_(_damped_diagonal(self.given, self.factors.damping))
        return damped


def _two_sided(
    w: Float[Tensor, "rows cols"], outputs: Sequence[Float[Tensor, "_n _n"]], columns: _Columns
) -> QuantizedTensor:
    """Return the rows rounded in blocks, those that matter most first, the later ones with the errors to absorb.

    outputs: of some rows after the other; the blocks of all are rounded side by side.
    """
    left = w.clone()
    parts, dampings = [], []
    first = 0
    for fisher in outputs:
        order = fisher.diagonal().argsort(descending=True, stable=True)
        name = "the Fisher information of its outputs"
        (factor,), damping = _factored(fisher, [order], DAMPING, lambda lower: _upper(lower, w.dtype), name)
        parts.append((first + order, factor))
        dampings.append(damping)
        first += len(fisher)
    done, visited = [], []
    for step in range(BLOCKS):
        here = [slice(len(rows) * step // BLOCKS, len(rows) * (step + 1) // BLOCKS) for rows, _ in parts]
        visited.append(torch.cat([rows[block] for (rows, _), block in zip(parts, here, strict=True)]))
        if not len(visited[-1]):
            continue
        done.append(_rounded_rows(left[visited[-1]], columns))
        left[visited[-1]] -= dequantize(done[-1])  # their errors
        for (rows, factor), block in zip(parts, here, strict=True):
            error = torch.linalg.solve_triangular(factor[block, block].T, left[rows[block]], upper=False)
            left[rows[block.stop :]] -= factor[block, block.stop :].T @ error
    back = _inverse(torch.cat(visited))
    params = {name: torch.cat([q.params[name] for q in done])[back] for name in done[0].params}
    record = {**done[0].record, "outputs_damping": max(dampings)}
    return replace(done[0], codes=torch.cat([q.codes for q in done])[back], params=params, record=record)


def _rounded_rows(w: Float[Tensor, "rows cols"], columns: _Columns) -> QuantizedTensor:
    """Return the rows rounded with feedback from column to column, and with the searches that the settings ask for."""
    grid, config, importance, order = columns.grid, columns.config, columns.importance, columns.order
    static = config.static_groups or config.actorder or bool(grid.shared)
    factor = columns.factors.first

    # Work on the transpose, so that one column of the weight is contiguous.
    w_t = w.T[order].contiguous()
    codes = torch.empty_like(w_t, dtype=torch.uint8)
    fitted: list[Params] = []
    scale, offset = torch.empty_like(w_t), torch.empty_like(w_t)
    if static:
        fitted.append(fit_all(grid, w, importance))
        for of_all, one in zip((scale, offset), per_column(grid, fitted[0]), strict=True):
            of_all.copy_(one.T[order])

    advance = _advance(w)
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
    q = QuantizedTensor(grid, codes[_inverse(order)].T.contiguous(), params, {"damping": columns.factors.damping})
    if columns.searched:
        q = _better_rows(w, columns.hessian, q, _by_spans(w, columns))
    if config.sweeps:
        q = _swept(w, q, columns)
    return q


def multiply_adds(rows: int, cols: int, config: Config) -> float:
    """Return about how many of a matrix product take as long as ``quantize`` (see ``llmquant.duration``)."""
    visits = 1 + config.scale_search + config.sweeps
    by_weight = 2100 * visits + 28_000 * config.two_sided
    by_weight += 12_000 * (visits - 1) * config.refit  # 6 to 17 thousand: super-blocks have the largest systems
    return (0.5 + 1.7 * visits) * (cols + rows) * cols**2 + by_weight * rows * cols


def quick(config: Config) -> Config:
    """Return settings by which searches judge what this algorithm makes of their candidates: without refinements."""
    return replace(config, scale_search=False, sweeps=0, two_sided=False, refit=False)


def column_costs(stats: Stats, config: Config) -> Float[Tensor, " cols"]:
    """Return what a squared error of each column costs when the columns after it have absorbed what they can.

    The loss of GPTQ is the sum of these products: a column's squared rounding error over its squared diagonal element
    of U. Scaling columns scales U's too, so the costs tell without another factorisation which scales help.
    """
    assert stats.hessian is not None
    order = _order(stats.hessian.diagonal(), config)
    (diagonal,), _ = _factored(stats.hessian, [order], _damping(stats, config), lambda lower: lower.diagonal().flip(0))
    return diagonal.square().float()[_inverse(order)]  # U's diagonal is that of its inverse, inverted


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


def _by_spans(w: Float[Tensor, "rows cols"], columns: _Columns) -> QuantizedTensor:
    """Return codes and searched scales: the columns of a span one after the other, those that matter most first."""
    grid = columns.grid
    (first, inside), factor = columns.spans, columns.factors.by_spans
    assert factor is not None
    order = (first[:, None] * grid.span + inside[first]).flatten()
    fitted = fit_all(grid, w, columns.importance)
    params = {name: value.clone() for name, value in fitted.items()}
    w_t = w.T[order].contiguous()
    codes = torch.empty_like(w, dtype=torch.uint8)
    for place, span in enumerate(first.tolist()):
        start, stop = place * grid.span, (place + 1) * grid.span
        block = factor[start:stop, start:stop].contiguous()
        given = {name: value[:, span] for name, value in fitted.items()}
        trial = _search(w_t[start:stop], inside[span], block, grid, given, columns.multiples)
        if columns.refitted:
            trial = _refitted(w_t[start:stop], inside[span], block, trial, columns)
        codes[:, order[start:stop]] = trial.codes.T
        for name, value in trial.params.items():
            params[name][:, span] = value
        w_t[stop:].addmm_(factor[start:stop, stop:].T, trial.error, alpha=-1)
    return QuantizedTensor(grid, codes, params)


def _swept(w: Float[Tensor, "rows cols"], q: QuantizedTensor, columns: _Columns) -> QuantizedTensor:
    """Return the result of rounding every span again, ``sweeps`` times, with all other columns held."""
    grid, of = q.grid, columns.hessian
    params = {name: value.clone() for name, value in q.params.items()}
    codes = q.codes.T.contiguous()
    error = (dequantize(q).to(w.dtype) - w).T.contiguous()
    for _ in range(columns.config.sweeps):
        for (block, order), factor in zip(columns.blocks, columns.factors.blocks, strict=True):
            slope = (of[block] @ error)[order]
            away = factor @ slope  # U slope: its squares sum to the loss above the minimum, Uᵀ of it leads there
            target = w.T[block][order] + error[block][order] - factor.T @ away
            at = block.start // grid.span
            given = {name: value[:, at] for name, value in params.items()}
            inside = order + block.start % grid.span
            trial = _search(target, inside, factor, grid, given, columns.multiples)
            here = torch.arange(block.start, block.stop, device=w.device)[order]
            if columns.refitted:
                held = _Trial(codes[here], -away, given)
                trial = _refitted(target, inside, factor, _better(held, trial), columns)
            better = trial.losses < away.square().sum(0)
            codes[here] = torch.where(better, trial.codes, codes[here])
            values = decode(grid, trial.codes, *_of_columns(grid, trial.params, inside, w.dtype))
            error[here] = torch.where(better, values - w.T[here], error[here])
            for name, value in trial.params.items():
                params[name][:, at] = torch.where(better[:, None], value, params[name][:, at])
    return QuantizedTensor(grid, codes.T.contiguous(), params, q.record)


class _Trial(NamedTuple):
    """A span's columns in the order of their visit, rounded: codes, errors over U's diagonal; parameters."""

    codes: UInt8[Tensor, "span rows"]
    error: Float[Tensor, "span rows"]
    params: Params

    @property
    def losses(self) -> Float[Tensor, " rows"]:
        return self.error.square().sum(0)


def _search(
    w_t: Float[Tensor, "span rows"],
    order: Int64[Tensor, " span"],
    factor: Float[Tensor, "span span"],
    grid: Grid,
    given: Params,
    multiples: Sequence[float],
) -> _Trial:
    """Return the span rounded with feedback at that multiple of the given scales which costs each row least.

    multiples: the first is 1.
    """
    best = _rounded(w_t, order, factor, grid, given)
    for multiple in multiples[1:]:
        params = _stored(grid, given, *(value * multiple for value in grid.levels(given)))
        best = _better(best, _rounded(w_t, order, factor, grid, params))
    return best


def _refitted(
    w_t: Float[Tensor, "span rows"],
    order: Int64[Tensor, " span"],
    factor: Float[Tensor, "span span"],
    trial: _Trial,
    columns: _Columns,
) -> _Trial:
    """Return the span with its scales refitted to its codes, and rounded again, in turn, as long as a row gains."""
    back = _inverse(order)
    hessian = torch.cholesky_inverse(factor, upper=True)[back][:, back]
    codes, error, params = trial.codes.clone(), trial.error.clone(), {n: v.clone() for n, v in trial.params.items()}
    for rows in torch.split(torch.arange(w_t.shape[1], device=w_t.device), TOGETHER):
        for _ in range(ROUNDS):
            before = _Trial(codes[:, rows], error[:, rows], {name: value[rows] for name, value in params.items()})
            after = _better(before, _refit(w_t[:, rows], order, factor, hessian, before, columns))
            codes[:, rows], error[:, rows] = after.codes, after.error
            for name, value in after.params.items():
                params[name][rows] = value
            rows = rows[after.losses < (1 - GAIN) * before.losses]
            if not len(rows):
                break
    return _Trial(codes, error, params)


def _refit(
    w_t: Float[Tensor, "span rows"],
    order: Int64[Tensor, " span"],
    factor: Float[Tensor, "span span"],
    hessian: Float[Tensor, "span span"],
    trial: _Trial,
    columns: _Columns,
) -> _Trial:
    """Return, of each row, the better: the same codes with refitted scales, or those that rounding at these gives.

    hessian: of the span's columns in their own order. The scales of each group are refitted, and what is stored of
    them once more, all by one multiple: a super-block stores small integers, and their common factors are finer.
    """
    grid, back, params = columns.grid, _inverse(order), trial.params
    for size in dict.fromkeys((grid.group, grid.span)):
        scale, offset = grid.levels(params)
        of_columns = [value.to(w_t.dtype).T.repeat_interleave(grid.group, 0) for value in (scale, offset)]
        values = decode(grid, trial.codes[back], *of_columns)
        parts = [values - of_columns[1], of_columns[1]] if columns.offsets else [values]
        change = 1 + least_squares(torch.stack(parts), w_t[back] - values, hessian, size).to(scale.dtype)
        params = _stored(grid, params, scale * change[0], offset * change[-1])
    values = decode(grid, trial.codes, *_of_columns(grid, params, order, w_t.dtype))
    error = torch.linalg.solve_triangular(factor.T, w_t - values, upper=False)
    return _better(_Trial(trial.codes, error, params), _rounded(w_t, order, factor, grid, params))


def least_squares(
    parts: Float[Tensor, "parts span rows"],
    left: Float[Tensor, "span rows"],
    hessian: Float[Tensor, "span span"],
    size: int,
) -> Float64[Tensor, "parts rows groups"]:
    """Return how much of each part to add in every ``size`` columns, for the least (left - added)ᵀ H (left - added).

    Solved in float64, slightly drawn towards 0 (``RIDGE``); 0 where a system is not positive definite.
    """
    kinds, span, rows = parts.shape
    groups = span // size

    def sums(of_columns: Float[Tensor, "parts _some rows"]) -> Float[Tensor, "_groups parts rows"]:
        return of_columns.view(kinds, -1, size, rows).sum(2).transpose(0, 1)

    normal = parts.new_zeros(groups, kinds, groups, kinds, rows)  # what lies below the diagonal is not read
    for group in range(groups):
        start, stop = group * size, (group + 1) * size
        for kind, part in enumerate(parts):
            pulled = hessian[start:, start:stop] @ part[start:stop]
            normal[group:, :, group, kind] = sums(parts[:, start:] * pulled)
    unknowns = groups * kinds
    matrix = normal.view(unknowns, unknowns, rows).permute(2, 0, 1).double()
    wanted = sums(parts * (hessian @ left)).reshape(unknowns, rows).T.double()
    diagonal = matrix.diagonal(dim1=1, dim2=2).clone()
    unit = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()
    matrix.mul_(unit[:, :, None]).mul_(unit[:, None])
    matrix.diagonal(dim1=1, dim2=2).add_(torch.where(diagonal > 0, RIDGE, 1.0))
    lower, info = torch.linalg.cholesky_ex(matrix)
    solved = torch.cholesky_solve((wanted * unit)[:, :, None], lower)[:, :, 0] * unit
    return torch.where(info[:, None] == 0, solved, 0.0).view(rows, groups, kinds).permute(2, 0, 1)


def _stored(
    grid: Grid, given: Params, scale: Float[Tensor, "rows groups"], offset: Float[Tensor, "rows groups"]
) -> Params:
    """Return the parameters of a span for wished-for scales and offsets; what spans share stays as it is given."""
    return grid.store_beside(given, scale, offset) if isinstance(grid, NestedGrid) else grid.store(scale, offset)


def _better(best: _Trial, trial: _Trial) -> _Trial:
    """Return of each row the trial with the smaller loss."""
    better = trial.losses < best.losses
    return _Trial(
        torch.where(better, trial.codes, best.codes),
        torch.where(better, trial.error, best.error),
        {name: torch.where(better[:, None], value, best.params[name]) for name, value in trial.params.items()},
    )


def _rounded(
    w_t: Float[Tensor, "span rows"],
    order: Int64[Tensor, " span"],
    factor: Float[Tensor, "span span"],
    grid: Grid,
    params: Params,
) -> _Trial:
    scale, offset = _of_columns(grid, params, order, w_t.dtype)
    table = grid.table.to(w_t.device, w_t.dtype)
    left, error, codes = w_t.clone(), torch.empty_like(w_t), torch.empty_like(w_t, dtype=torch.uint8)
    _advance(w_t)(left, scale, offset, table, factor, codes, error, 0)
    return _Trial(codes, error, params)


def _of_columns(
    grid: Grid, params: Params, order: Int64[Tensor, " span"], dtype: torch.dtype
) -> tuple[Float[Tensor, "span rows"], Float[Tensor, "span rows"]]:
    """Return (scale, offset) of a span's columns in the order of their visit."""
    groups = order // grid.group
    scale, offset = (value.to(dtype).T[groups].contiguous() for value in grid.levels(params))
    return scale, offset


def _better_rows(
    w: Float[Tensor, "rows cols"], hessian: Float[Tensor, "cols cols"], first: QuantizedTensor, second: QuantizedTensor
) -> QuantizedTensor:
    """Return of each row the quantization with the smaller error."""
    losses = []
    for q in (first, second):
        delta = dequantize(q).to(w.dtype) - w
        losses.append(((delta @ hessian) * delta).sum(1))
    better = losses[1] < losses[0]
    params = {
        name: torch.where(better[:, None, None], second.params[name], value) for name, value in first.params.items()
    }
    return QuantizedTensor(first.grid, torch.where(better[:, None], second.codes, first.codes), params, first.record)


def _advance(w: Tensor) -> Callable[..., None]:
    return kernel.round_columns if kernels.suit(w) else round_columns


def _order(importance: Float[Tensor, " cols"], config: Config) -> Int64[Tensor, " cols"]:
    if config.actorder:
        return importance.argsort(descending=True, stable=True)
    return torch.arange(len(importance), device=importance.device)


def _inverse(order: Tensor) -> Tensor:
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


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


def _damping(stats: Stats, config: Config) -> float:
    """Return the damping that is asked for, or that suits the number of tokens: few say little of many columns.

    On the demo model's Q3_K_M, this lowers the divergence by 10 and 2 % with 1024 and 4096 tokens; with 16384, it
    raises it by 2 %, within the noise. Twice as much damping lowers it by 15 and 3 %, but on docs-22m, with 16384, it
    raises it by 8 %.
    """
    if config.dampening_frac is not None:
        return config.dampening_frac
    return min(max(DAMPING, len(stats.square_mean) / max(4 * stats.tokens, 1)), 1.0)


def _factored(
    hessian: Float[Tensor, "cols cols"],
    orders: Sequence[Int64[Tensor, " _some"]],
    damp: float,
    use: Callable[[Float64[Tensor, "_some _some"]], Tensor],
    name: str = "its Hessian",
) -> tuple[list[Tensor], float]:
    """Return what ``use`` makes of L (see ``_lower``) of these columns in each order, and the damping.

    That is the first, from ``damp`` on, that serves all of them: what can be factorised in one order by a hair may not
    be in another. Raises CalibrationError when none does. name: of the matrix, in errors.
    """
    if not torch.isfinite(hessian.diagonal().double().mean()):
        raise CalibrationError(f"{name} is not finite on the calibration text")
    while True:
        diagonal = _damped_diagonal(hessian, damp)
        found = []
        for order in orders:
            lower, info = _lower(hessian, diagonal, order)
            if info != 0:
                break
            found.append(use(lower))
            del lower
        else:
            return found, damp
        if damp >= 1:
            raise CalibrationError(
                f"{name} ({len(hessian)} x {len(hessian)}) is not positive definite at any damping up to {damp:g}. "
                "Use more calibration tokens (calibration.sequences, calibration.length)"
            )
        damp = min(max(damp * LADDER, 1e-6), 1.0)


def _damped_diagonal(hessian: Float[Tensor, "cols cols"], damp: float) -> Float64[Tensor, " cols"]:
    """Return the diagonal plus damp times its mean; a column without activations stands alone."""
    diagonal = hessian.diagonal().double()
    mean = diagonal.mean()
    return torch.where(diagonal == 0, mean if mean > 0 else 1.0, diagonal) + damp * mean


def _lower(
    hessian: Float[Tensor, "cols cols"], diagonal: Float64[Tensor, " cols"], columns: Int64[Tensor, " some"]
) -> tuple[Float64[Tensor, "some some"], Int[Tensor, ""]]:
    """Return L with L Lᵀ = these columns of a symmetric matrix, with another diagonal, the last one first.

    And 0, or something else if the matrix is not positive definite. Computed in place, as it may be large.
    """
    backwards = columns.flip(0)
    part = hessian[backwards][:, backwards].double()
    part.diagonal().copy_(diagonal[backwards])
    info = torch.empty((), dtype=torch.int32, device=part.device)
    torch.linalg.cholesky_ex(part.mT, out=(part.mT, info))
    return part.mT, info


def _upper(lower: Float64[Tensor, "cols cols"], dtype: torch.dtype) -> Float[Tensor, "cols cols"]:
    """Return upper U with UᵀU = inverse(H) from L Lᵀ = H with its columns reversed.

    Reversed back, H = R Rᵀ with R upper triangular, so U = R⁻¹.
    """
    inverse = torch.eye(len(lower), dtype=lower.dtype, device=lower.device).mT
    torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
    inverse = inverse.to(dtype)
    return inverse.flip(0, 1)
