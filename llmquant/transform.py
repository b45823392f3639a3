"""What a transform sees of a model, one site at a time, and how it measures what rounding would cost there.

A transform module, ``llmquant.transforms.NAME``, has a frozen dataclass ``Config``
(the recipe's keys), ``needs(config)`` (which statistics it reads) and
``search(site, config) -> Scales``: factors > 0 of the site's columns, by whose
inverse the site's activations are multiplied, so that the layer computes the same
function. It may have ``clip(w, stats, grid, config) -> w`` too: the weights that
an algorithm is to round instead, with the largest of a group cut off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from llmquant.grid import Grid, decode, encode_all, fit_all, per_column
from llmquant.stats import Stats


class Scales(NamedTuple):
    """What a search found: a factor for every column, and what a report should tell of it."""

    factors: Tensor
    record: Mapping[str, Any]


@dataclass(frozen=True)
class SiteView:
    """A site before any of its weights is rounded.

    weights: of its linears, float32. grids: theirs; None where a linear stays float.
    stats: of what the linears read. sample: some tokens of it.
    sharing: columns with the same number must get the same scale.
    behind_norm: the activations come from a norm.
    """

    weights: tuple[Float[Tensor, "_rows cols"], ...]
    grids: tuple[Grid | None, ...]
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

    def rounding_loss(self) -> float:
        """Return the mean squared error of the site's outputs if its weights were rounded to nearest.

        The mean over all calibration tokens, by their Hessian, summed over the outputs.
        """
        return sum(
            error_of(round_to_nearest(w, self.stats, grid) - w, self.stats)
            for w, grid in zip(self.weights, self.grids, strict=True)
            if grid is not None
        )


def round_to_nearest(w: Float[Tensor, "rows cols"], stats: Stats, grid: Grid) -> Float[Tensor, "rows cols"]:
    """Return the weights that a runtime would read."""
    params = fit_all(grid, w, stats.square_mean)
    return decode(grid, encode_all(grid, w, params), *per_column(grid, params))


def error_of(delta: Float[Tensor, "rows cols"], stats: Stats) -> float:
    """Return the mean over tokens of ||delta x||²: tr(delta H deltaᵀ)."""
    if stats.hessian is None:
        return float((delta.square() @ stats.square_mean).sum())
    return float(((delta @ stats.hessian) * delta).sum())
