"""SmoothQuant: move outliers from the activations into the weights, where they are easier to round.

Source: Xiao et al. 2023, https://arxiv.org/abs/2211.10438, section 4: the columns'
factors are max|x|^alpha / max|w|^(1 - alpha), and the activations are divided by them.
Departure: alpha may be searched, by the error of the site's outputs when its
activations are rounded to 8 bits, one range for each token, and its weights to the
recipe's grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from llmquant.stats import Needs
from llmquant.transform import Scales, SiteView, round_to_nearest

ALPHAS = tuple(step / 20 for step in range(6, 19))  # 0.3 to 0.9
SMALLEST = 1e-5  # a largest |x| or |w| below it counts as it


@dataclass(frozen=True)
class Config:
    """SmoothQuant scales.

    alpha: migration strength in [0, 1]: 0 leaves all difficulty in the activations, 1 moves it into the weights.
        Without one it is searched for every site, no smoothing among the candidates.
    sites: smooth what comes out of norms, as the paper does, or "all" that can be folded.
    """

    alpha: float | None = 0.5
    sites: Literal["norms", "all"] = "norms"

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}, not in [0, 1]")


def needs(config: Config) -> Needs:
    return "diagonal"


def search(site: SiteView, config: Config) -> Scales:
    """Return the factors for the given alpha, or for the one that costs the site's outputs least."""
    none = torch.ones_like(site.stats.abs_mean)
    if config.sites == "norms" and not site.behind_norm:
        return Scales(none, {"skipped": "not behind a norm"})
    if config.alpha is not None:
        return Scales(_factors(site, config.alpha), {"alpha": config.alpha})
    best, lowest = Scales(none, {"alpha": None}), _loss(site)
    for alpha in ALPHAS:
        factors = _factors(site, alpha)
        loss = _loss(site.scaled(factors))
        if loss < lowest:
            best, lowest = Scales(factors, {"alpha": alpha}), loss
    return best


def _factors(site: SiteView, alpha: float) -> Float[Tensor, " cols"]:
    assert site.stats.abs_max is not None
    largest = torch.stack([w.abs().amax(0) for w in site.weights]).amax(0)
    x, w = (site.shared(values).clamp(min=SMALLEST) for values in (site.stats.abs_max, largest))
    return (x.pow(alpha) / w.pow(1 - alpha)).clamp(min=SMALLEST)


def _loss(site: SiteView) -> float:
    """Return the squared error of the outputs on the sample, activations and weights rounded."""
    x = site.sample
    step = x.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    rounded = (x / step).round() * step
    return sum(
        float((rounded @ round_to_nearest(w, site.stats, rounding.grid).T - x @ w.T).square().sum())
        for w, rounding in zip(site.weights, site.roundings, strict=True)
        if rounding is not None
    )
