"""Weights to round instead of a linear's own, so that it makes up for the rounding of what comes before it.

The linears before have been rounded, so a linear reads x where it would read x' in
the float model. The weights T whose outputs on x are nearest to the float model's
W x' are, with means over tokens,

    T = W + W D H⁻¹,   D = E[(x' - x) xᵀ],  H = E[x xᵀ],

and to round T with the Hessian H minimises E|W x' - Q x|², for any algorithm.
Source: QEP, Arai and Ichikawa 2025, https://arxiv.org/abs/2504.09629; the same aim is
that of GPTAQ, Li et al. 2025, https://arxiv.org/abs/2504.02692.
Departure: a sample's D is noisy, and QEP goes half of the way for all linears. Here
the tokens are cut in halves; the correction found on one half is judged on the
other, and the linear goes that share of the way which is best there: none at all
where the correction does not carry over.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from llmquant.errors import CalibrationError
from llmquant.ranks import ALONE, Ranks
from llmquant.stats import Stats

DAMPING = 0.01  # added to the Hessian's diagonal, as a share of its mean


def corrected(
    weights: Sequence[Float[Tensor, "_rows cols"]], stats: Stats, ranks: Ranks = ALONE
) -> list[tuple[Float[Tensor, "_rows cols"], float]]:
    """Return for each of the linears that read the same activations the weights to round, and the share of the way.

    stats: of what they read, with its drift. ranks: each has some of the rows.
    """
    drift = stats.drift
    assert drift is not None
    w = torch.cat([weight.float() for weight in weights]) if len(weights) > 1 else weights[0].float()
    moved = [w @ cross for cross in drift.crosses]
    halves = [_solved(hessian, m) for hessian, m in zip(drift.hessians, moved, strict=True)]
    first, second = drift.shares
    hessian = first * drift.hessians[0] + second * drift.hessians[1]
    step = _solved(hessian, first * moved[0] + second * moved[1])
    # E|(W + a S) x - W x'|² on the other half is, but for a constant, curvature a² - 2 slope a, of every row
    slope, curvature = torch.zeros(len(w), device=w.device), torch.zeros(len(w), device=w.device)
    for k in (0, 1):
        slope += (halves[k] * moved[1 - k]).sum(1)
        curvature += ((halves[k] @ drift.hessians[1 - k]) * halves[k]).sum(1)
    lengths = [len(weight) for weight in weights]
    of_linears = torch.stack([part.sum() for of in (slope, curvature) for part in torch.split(of, lengths)])
    ranks.add(of_linears)
    slopes, curvatures = of_linears.chunk(2)
    shares = (slopes / curvatures.clamp(min=1e-30)).clamp(0, 1).tolist()
    parts = zip(torch.split(w, lengths), torch.split(step, lengths), shares, strict=True)
    return [(part + share * way, share) for part, way, share in parts]


def multiply_adds(rows: int, cols: int) -> float:
    """Return about how many of a matrix product take as long as ``corrected`` (see ``llmquant.duration``)."""
    return 4.5 * (cols + rows) * cols**2 + 5000.0 * rows * cols


def _solved(hessian: Float[Tensor, "cols cols"], right: Float[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
    """Return ``right`` times the inverse of the damped Hessian."""
    damped = hessian.to(torch.float64, copy=True)
    diagonal = damped.diagonal()
    diagonal += DAMPING * diagonal.mean().clamp(min=1e-30)
    factor, info = torch.linalg.cholesky_ex(damped)
    if info:
        raise CalibrationError("its activations are not finite on the calibration text")
    solved: Tensor = torch.cholesky_solve(right.T.double(), factor).T
    return solved.float()
