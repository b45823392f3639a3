"""MagR: make the largest weights of a row or group smaller while its outputs stay about the same.

Source: Zhang et al. 2024, https://arxiv.org/abs/2406.00800, section 3: the largest
magnitude is a penalty beside the outputs' squared error, and the sum of both is
minimised by proximal gradient steps, whose proximal map cuts off the largest
weights by a projection onto the l1 ball.
Departures: the penalty is for each group that has a scale of its own. Its weight is
relative to the group's l1 norm, so that it does not depend on the model, and of a
few weights that one is taken whose result the linear's own grid and algorithm round
best; none may be. The Hessian is damped, since directions in which the calibration
text has no activations are not free for other text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from llmquant.stats import Needs, Stats
from llmquant.transform import Rounding, some_rows


@dataclass(frozen=True)
class Config:
    """Reduction of the largest weights.

    strengths: weights of the penalty that are tried, as shares of a group's l1 norm.
    iterations: proximal gradient steps.
    dampening_frac: added to the Hessian's diagonal, as a share of its mean.
    """

    strengths: tuple[float, ...] = (1e-5, 1e-4, 1e-3)
    iterations: int = 30
    dampening_frac: float = 0.01

    def __post_init__(self) -> None:
        if not self.strengths or min(self.strengths) <= 0:
            raise ValueError(f"strengths are {self.strengths}, not some positive numbers")
        if self.iterations < 1:
            raise ValueError(f"iterations is {self.iterations}, not positive")
        if not 0 <= self.dampening_frac <= 1:
            raise ValueError(f"dampening_frac is {self.dampening_frac}, not in [0, 1]")


def needs(config: Config) -> Needs:
    return "hessian"


def clip(w: Float[Tensor, "rows cols"], stats: Stats, rounding: Rounding, config: Config) -> Float[Tensor, "rows cols"]:
    """Return the weights with smaller largest magnitudes where the algorithm rounds these better."""
    assert stats.hessian is not None
    if rounding.grid.per_tensor:
        return w
    hessian = stats.hessian.clone()
    hessian.diagonal().add_(config.dampening_frac * hessian.diagonal().mean())
    hessian /= torch.linalg.matrix_norm(hessian.double(), 2).clamp(min=1e-30).float()
    some = some_rows(w, rounding.grid)
    lowest, best = rounding.error(some, stats, some), 0.0
    for strength in config.strengths:
        error = rounding.error(some, stats, reduced(some, hessian, rounding.grid.group, strength, config.iterations))
        if error < lowest:
            lowest, best = error, strength
    return reduced(w, hessian, rounding.grid.group, best, config.iterations) if best else w


def reduced(
    w: Float[Tensor, "rows cols"], hessian: Float[Tensor, "cols cols"], group: int, strength: float, iterations: int
) -> Float[Tensor, "rows cols"]:
    """Return the weights v after proximal gradient steps down (v - w) H (v - w)ᵀ / 2 + penalty * max|v| of each group.

    hessian: with a largest eigenvalue of at most 1.
    """
    penalty = strength * w.view(len(w), -1, group).abs().sum(2, keepdim=True)
    v = w
    for _ in range(iterations):
        v = _cut((v - (v - w) @ hessian).view(len(w), -1, group), penalty).view(w.shape)
    return v


def _cut(v: Float[Tensor, "rows groups group"], penalty: Float[Tensor, "rows groups 1"]) -> Float[Tensor, "_r _g _c"]:
    """Return the weights clamped where, in each group, what is cut off adds up to the penalty.

    With the k largest cut, the limit is (their sum - penalty) / k; the largest of these is where it comes out even.
    """
    sums = v.abs().sort(dim=2, descending=True).values.cumsum(2)
    counts = torch.arange(1, v.shape[2] + 1, device=v.device)
    limit = ((sums - penalty) / counts).amax(2, keepdim=True).clamp(min=0)
    return v.clamp(-limit, limit)
