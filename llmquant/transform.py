"""What a transform sees of a model, one site at a time, and how it measures what rounding would cost there.

A transform module, ``llmquant.transforms.NAME``, has a frozen dataclass ``Config``
(the recipe's keys), ``needs(config)`` (which statistics it reads) and one or both of

``search(site, config) -> Scales``: factors > 0 of the site's columns, by whose
inverse the site's activations are multiplied, so that the layer computes the same
function;

``clip(w, stats, rounding, config) -> w``: the weights that an algorithm is to round
instead, with the largest of a group made smaller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from llmquant.grid import Grid, decode, dequantize, encode_all, fit_all, per_column
from llmquant.stats import Stats

ROWS = 512  # of each linear that a search rounds, evenly spread: rows do not influence each other


class Scales(NamedTuple):
    """What a search found: a factor for every column, and what a report should tell of it."""

    factors: Tensor
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Rounding:
    """What will become of a linear: its grid, and its algorithm (a module) with the recipe's settings."""

    grid: Grid
    algorithm: ModuleType
    config: Any

    def values(self, target: Float[Tensor, "rows cols"], stats: Stats) -> Float[Tensor, "rows cols"]:
        """Return the weights that a runtime will read, or about these: with the algorithm's ``quick`` settings."""
        config = self.algorithm.quick(self.config) if hasattr(self.algorithm, "quick") else self.config
        return dequantize(self.algorithm.quantize(target, stats, self.grid, config))

    def row_errors(
        self, w: Float[Tensor, "rows cols"], stats: Stats, target: Float[Tensor, "rows cols"]
    ) -> Float[Tensor, " rows"]:
        """Return for each row the mean over tokens of (q - w) x squared, q being what is made of ``target``."""
        return row_errors(self.values(target, stats) - w, stats)

    def error(self, w: Float[Tensor, "rows cols"], stats: Stats, target: Float[Tensor, "rows cols"]) -> float:
        """Return their sum, of ``ROWS`` rows where there are more."""
        return float(self.row_errors(some_rows(w, self.grid), stats, some_rows(target, self.grid)).sum())


@dataclass(frozen=True)
class SiteView:
    """A site before any of its weights is rounded.

    weights: of its linears, float32. roundings: theirs; None where a linear stays float.
    stats: of what the linears read. sample: some tokens of it.
    sharing: columns with the same number must get the same scale.
    behind_norm: the activations come from a norm.
    """

    weights: tuple[Float[Tensor, "_rows cols"], ...]
    roundings: tuple[Rounding | None, ...]
    stats: Stats
    sample: Float[Tensor, "tokens cols"]
    sharing: Int64[Tensor, " cols"]
    behind_norm: bool

    def shared(self, values: Float[Tensor, " cols"]) -> Float[Tensor, " cols"]:
        """Return the mean over the columns that must share a scale, for each of them."""
        count = int(self.sharing.max()) + 1
        sums = values.new_zeros(2, count)
        sums[0].index_add_(0, self.sharing, values)
        sums[1].index_add_(0, self.sharing, torch.ones_like(values))
        return (sums[0] / sums[1])[self.sharing]

    def scaled(self, factors: Float[Tensor, " cols"]) -> SiteView:
        """Return the site with its columns multiplied by ``factors`` and its activations divided by them."""
        return replace(
            self,
            weights=tuple(w * factors for w in self.weights),
            stats=self.stats.divided(factors),
            sample=self.sample / factors,
        )

    def column_costs(self) -> list[Float[Tensor, " cols"] | None]:
        """Return for each linear what a squared rounding error in a column costs.

        None where an error stays as it is, so that the Hessian says it: the
        algorithm lets no other columns absorb it.
        """
        found: dict[tuple[ModuleType, Any], Tensor] = {}
        for rounding in self.roundings:
            if rounding is not None and hasattr(rounding.algorithm, "column_costs"):
                key = rounding.algorithm, rounding.config
                found[key] = found[key] if key in found else key[0].column_costs(self.stats, key[1])
        return [None if r is None else found.get((r.algorithm, r.config)) for r in self.roundings]

    def rounding_loss(
        self, costs: Sequence[Float[Tensor, " cols"] | None], factors: Float[Tensor, " cols"] | None = None
    ) -> float:
        """Return about what rounding costs at the site's outputs: the mean squared error, summed over the outputs.

        Measured by rounding to nearest, which is exact for that algorithm, by the
        Hessian of all calibration tokens; for others by the costs of their columns.

        costs: ``column_costs`` of the site. factors: with which its columns are scaled first.
        """
        if factors is not None:
            costs = [None if of_linear is None else of_linear / factors.square() for of_linear in costs]
            return self.scaled(factors).rounding_loss(costs)
        total = 0.0
        for w, rounding, of_linear in zip(self.weights, self.roundings, costs, strict=True):
            if rounding is not None:
                rows = some_rows(w, rounding.grid)
                delta = round_to_nearest(rows, self.stats, rounding.grid) - rows
                error = row_errors(delta, self.stats) if of_linear is None else delta.square() @ of_linear
                total += float(error.mean()) * len(w)
        return total

    def input_loss(self) -> float:
        """Return about what it costs at the site's outputs that a runtime rounds the activations: as ``rounding_loss``.

        llama.cpp gives them 8 bits and a scale for each span of the weights' type, 256 columns or 32 (ggml-quants.c,
        `quantize_row_q8_K` and `quantize_row_q8_0`). Codes are off by a twelfth of a squared step on average.
        """
        total = 0.0
        for w, rounding in zip(self.weights, self.roundings, strict=True):
            if rounding is not None:
                blocks = self.sample.view(len(self.sample), -1, rounding.grid.span)
                errors = (blocks.abs().amax(2) / 127).square().mean(0) / 12
                total += float((w.square().view(len(w), *blocks.shape[1:]).sum((0, 2)) * errors).sum())
        return total

    def error(self) -> float:
        """Return what rounding costs at the site's outputs, each linear rounded by its own algorithm."""
        alike: dict[tuple[Rounding, int], list[Tensor]] = {}  # stacked, where rows share nothing
        for i, (w, rounding) in enumerate(zip(self.weights, self.roundings, strict=True)):
            if rounding is not None:
                alike.setdefault((rounding, i if rounding.grid.shared else 0), []).append(w)
        total = 0.0
        for (rounding, _), weights in alike.items():
            some = [some_rows(w, rounding.grid) for w in weights]
            stacked = torch.cat(some)
            errors = torch.split(rounding.row_errors(stacked, self.stats, stacked), [len(w) for w in some])
            total += sum(float(of.mean()) * len(w) for of, w in zip(errors, weights, strict=True))
        return total


def some_rows(w: Float[Tensor, "rows cols"], grid: Grid) -> Float[Tensor, "some cols"]:
    """Return ``ROWS`` rows, evenly spread, or all where there are no more or where they share their scale."""
    if len(w) <= ROWS or grid.shared:
        return w
    return w[torch.linspace(0, len(w) - 1, ROWS, device=w.device).long()]


def round_to_nearest(w: Float[Tensor, "rows cols"], stats: Stats, grid: Grid) -> Float[Tensor, "rows cols"]:
    """Return the levels nearest to the weights."""
    params = fit_all(grid, w, stats.square_mean)
    return decode(grid, encode_all(grid, w, params), *per_column(grid, params))


def row_errors(delta: Float[Tensor, "rows cols"], stats: Stats) -> Float[Tensor, " rows"]:
    """Return the mean over tokens of (delta x)² for every row: the diagonal of delta H deltaᵀ."""
    if stats.hessian is None:
        return delta.square() @ stats.square_mean
    return ((delta @ stats.hessian) * delta).sum(1)
