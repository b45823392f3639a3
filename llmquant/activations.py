"""Round what a linear reads to 8 bits: integers, or floats of 4 exponent and 3 mantissa bits (E4M3).

    value = scale * (code - zero)

with one scale for each token, found while the model runs (dynamic), or one for all,
chosen beforehand from a sample (static). A symmetric code reaches the same distance
to either side, 127 or 448, so the largest value keeps a level.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float, Shaped
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor

from llmquant import ranges
from llmquant.errors import CalibrationError

DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
TOP = {"int8": 127.0, "fp8": ranges.E4M3_TOP}
LEVELS = 256


class ActivationScheme(BaseModel):
    """What the inputs of linears are rounded to.

    type: "int8", or "fp8" (E4M3).
    dynamic: every token has a scale of its own, found at run time. Off: one range for all, from the calibration text.
    symmetric: the zero point is 0. Off (int8 only): the levels lie between the smallest and the largest value.
    observer: how a static range is chosen: "minmax", "percentile", "mse" or (int8 only) "kl".
    percentile: share of the values inside the range, in %, for that observer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["int8", "fp8"] = "int8"
    dynamic: bool = True
    symmetric: bool = True
    observer: Literal["minmax", "percentile", "mse", "kl"] = "minmax"
    percentile: float = 99.99

    @property
    def label(self) -> str:
        """Return the scheme for people.

        >>> ActivationScheme().label, ActivationScheme(type="fp8", dynamic=False, observer="mse").label
        ('int8, by token', 'fp8, static by mse')
        """
        zero = "" if self.symmetric else " with zero points"
        return f"{self.type}{zero}, " + ("by token" if self.dynamic else f"static by {self.observer}")

    @model_validator(mode="after")
    def _check(self) -> ActivationScheme:
        if self.dynamic and self.observer != "minmax":
            raise ValueError(f"observer {self.observer} chooses a static range. Set `dynamic: false`, or leave it out")
        if self.type == "fp8" and not self.symmetric:
            raise ValueError("fp8 has no zero point. Set `symmetric: true`")
        if self.type == "fp8" and self.observer == "kl":
            raise ValueError("observer kl counts even levels, which fp8 has not. Use minmax, percentile or mse")
        if not 0 < self.percentile <= 100:
            raise ValueError(f"percentile is {self.percentile}, not in (0, 100]")
        return self


@dataclass(frozen=True)
class Inputs:
    """How one linear rounds what it reads.

    params: of a static scheme: "scale" float32 [1] and, if asymmetric, "zero" int8 [1].
    """

    scheme: ActivationScheme
    params: Mapping[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def placeholder(scheme: ActivationScheme) -> Inputs:
        """Return inputs without numbers (meta tensors), for their sizes."""
        if scheme.dynamic:
            return Inputs(scheme)
        edge = torch.ones(1)
        return Inputs(scheme, {name: value.to("meta") for name, value in _params(-edge, edge, scheme).items()})


def fit(scheme: ActivationScheme, sample: Float[Tensor, " values"] | None) -> Inputs:
    """Return the inputs of a linear, with a range for the values of ``sample`` if the scheme is static.

    Raises CalibrationError when there are no values, or some that are not finite.
    """
    if scheme.dynamic:
        return Inputs(scheme)
    if sample is None or not len(sample):
        raise CalibrationError("no activations were seen, so there is no range for them. Set activations.dynamic: true")
    if not torch.isfinite(sample).all():
        raise CalibrationError("some activations are not finite. Look for broken weights before this linear")
    x = sample[None]
    symmetric = scheme.symmetric
    match scheme.observer:
        case "minmax":
            low, high = ranges.minmax(x, symmetric)
        case "percentile":
            low, high = ranges.percentile(x, symmetric, scheme.percentile)
        case "mse" if scheme.type == "fp8":
            low, high = ranges.mse_e4m3(x, torch.ones_like(x))
        case "mse":
            low, high = ranges.mse(x, symmetric, torch.ones_like(x), LEVELS)
        case "kl":
            low, high = ranges.kl(x, symmetric, LEVELS)
    return Inputs(scheme, {name: value[0] for name, value in _params(low, high, scheme).items()})


def encode(
    inputs: Inputs, x: Float[Tensor, "*tokens cols"]
) -> tuple[Shaped[Tensor, "*tokens cols"], dict[str, Tensor]]:
    """Return the codes of activations, int8 or float8_e4m3fn, and their parameters, each [1] or [*tokens, 1]."""
    scheme = inputs.scheme
    x = x.float()
    if scheme.dynamic:
        params = _params(x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0), scheme)
    else:
        params = {name: value.to(x.device) for name, value in inputs.params.items()}
    scaled = x / params["scale"]
    if scheme.type == "fp8":
        return scaled.clamp_(-ranges.E4M3_TOP, ranges.E4M3_TOP).to(torch.float8_e4m3fn), params
    scaled.round_()
    if "zero" in params:
        scaled.add_(params["zero"])
    return scaled.clamp_(-128, 127).to(torch.int8), params


def decode(codes: Shaped[Tensor, "*tokens cols"], params: Mapping[str, Tensor]) -> Float[Tensor, "*tokens cols"]:
    """Return the float32 activations that the codes stand for."""
    x = codes.float()
    return (x - params["zero"].float() if "zero" in params else x) * params["scale"]


def rounded(inputs: Inputs, x: Float[Tensor, "*tokens cols"]) -> Float[Tensor, "*tokens cols"]:
    """Return what is left of activations after a code has stood for them, in their own dtype."""
    return decode(*encode(inputs, x)).to(x.dtype)


def _params(low: Tensor, high: Tensor, scheme: ActivationScheme) -> dict[str, Tensor]:
    """Return the parameters for ranges [low, high] that hold zero."""
    if scheme.symmetric:
        return {"scale": _not_zero(torch.maximum(-low, high) / TOP[scheme.type])}
    scale = _not_zero((high - low) / (LEVELS - 1))
    return {"scale": scale, "zero": ((-low / scale).round() - 128).clamp(-128, 127).to(torch.int8)}


def _not_zero(scale: Tensor) -> Tensor:
    return torch.where(scale < torch.finfo(scale.dtype).tiny, 1.0, scale)
