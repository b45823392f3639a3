"""Tune the quantized linears of a whole decoder layer on the error of its own output.

Learned rounding changes codes. Source: SignRound, Cheng et al. 2023, https://arxiv.org/abs/2309.05516: every weight
has a place on the axis of the codes, the layer is computed with the codes that are
nearest, and the places take steps by the sign of the gradient, as if the rounding
were not there.
Departures: the start is what the recipe's algorithm found, so that only places near
an edge of their code can cross it; scales stay as they are; what the layer reads is
what the quantized layers before it give, and what it should give is the float
model's output, so it makes up for their errors too. The error of a token counts as a
share of its size (a norm reads it, and a few tokens are a hundred times larger than
the rest), in the directions that the model's predictions mind
(``llmquant.gradients``). And the codes that are kept are those with the smallest
error on sequences that no step was taken on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmquant.calibrate import Call
from llmquant.errors import CalibrationError
from llmquant.grid import QuantizedTensor, decode, dequantize, per_column

HELD_OUT = 8  # every so many sequences, one that no step is taken on
LOOKS = 8  # at the error on these, during the steps
TOWARDS = 0.5  # of the way from its code to the weight that was rounded, where a place begins


class LearnedRounding(BaseModel):
    """Tune each layer's codes on its output error, by SignRound's steps.

    steps: how many.
    rate: of the first step, in codes; it falls to 0.
    tokens: that a step is computed on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(default=200, ge=1)
    rate: float = Field(default=0.005, gt=0, le=1)
    tokens: int = Field(default=2048, ge=1)


@dataclass
class _Linear:
    """A linear whose codes are tuned: where its weights are on the axis of the codes."""

    q: QuantizedTensor
    place: Float[Tensor, "rows cols"]
    scale: Float[Tensor, "rows cols"]
    offset: Float[Tensor, "rows cols"]

    @staticmethod
    def of(q: QuantizedTensor, target: Float[Tensor, "rows cols"]) -> _Linear:
        """target: the weights that were rounded."""
        scale, offset = per_column(q.grid, q.params)
        table = q.grid.table.to(scale)
        (gaps,) = torch.gradient(table)
        step = scale * gaps[q.codes.long()]
        away = torch.where(step == 0, 0.0, (target - dequantize(q)) / step)
        return _Linear(q, q.codes + (TOWARDS * away).clamp(-0.49, 0.49), scale, offset)

    def codes(self) -> UInt8[Tensor, "rows cols"]:
        return self.place.round().clamp(0, self.q.grid.table.numel() - 1).to(torch.uint8)

    def weight(self) -> Float[Tensor, "rows cols"]:
        return decode(self.q.grid, self.codes(), self.scale, self.offset)

    def move(self, gradient: Float[Tensor, "rows cols"], rate: float) -> None:
        """Step against the gradient of the weights."""
        self.place -= rate * gradient.sign() * self.scale.sign()


class SignSteps:
    """SignRound's steps for the linears of a layer."""

    def __init__(
        self,
        done: Mapping[str, QuantizedTensor],
        targets: Mapping[str, Float[Tensor, "_rows _cols"]],
        settings: LearnedRounding,
    ) -> None:
        """done, targets: by name within the layer: as they were quantized, and the weights that were rounded."""
        self._linears = {name: _Linear.of(q, targets[name]) for name, q in done.items()}
        self._rate = settings.rate
        self._weights: dict[str, Tensor] = {}

    def weights(self) -> dict[str, Tensor]:
        self._weights = {name: x.weight().requires_grad_() for name, x in self._linears.items()}
        return self._weights

    def step(self, share: float) -> None:
        for name, linear in self._linears.items():
            gradient = self._weights[name].grad
            if gradient is not None:
                linear.move(gradient, share * self._rate)

    def quantized(self) -> dict[str, QuantizedTensor]:
        return {name: replace(x.q, codes=x.codes()) for name, x in self._linears.items()}


@runtime_checkable
class Steps(Protocol):
    """How the linears of a layer are changed, by their names within it."""

    def weights(self) -> dict[str, Tensor]:
        """Return what each computes with now; a loss may be pulled back from there."""

    def step(self, share: float) -> None:
        """Take a step by the gradients that a loss has left, at a share of the highest rate."""

    def quantized(self) -> dict[str, QuantizedTensor]:
        """Return what is to be stored of them now."""


def tune(
    layer: nn.Module,
    done: Mapping[str, QuantizedTensor],
    changing: Steps,
    read: Float[Tensor, "sequences time hidden"],
    wanted: Float[Tensor, "sequences time hidden"],
    call: Callable[[Tensor], Call],
    metric: Float[Tensor, "hidden hidden"],
    steps: int,
    tokens: int,
) -> tuple[dict[str, QuantizedTensor], dict[str, Any]]:
    """Return the linears of a layer as they were best on sequences held out, and what a report should tell.

    done: by name within the layer: as they were quantized. read: by the layer. wanted: what it should give for it.
    call: its other arguments for some sequences. tokens: of a step.
    metric: how much the model minds an error of the output, as a share of the output's size.

    Raises CalibrationError where there are no sequences to hold out.
    """
    held = torch.arange(len(read)) % HELD_OUT == HELD_OUT - 1
    if not held.any():
        raise CalibrationError(
            f"tuning a layer needs {HELD_OUT} sequences that the float model computes, one of them to judge by, and "
            f"there are {len(read)}. Set calibration.sequences, or a smaller calibration.length"
        )
    values, directions = torch.linalg.eigh(metric.double())
    root = (directions * values.clamp(min=0).sqrt()).to(read.device, torch.float32)
    at_once = max(tokens // read.shape[1], 1)

    def error(x: Tensor, y: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        args, kwargs = call(x)
        turned = {n: w.T if isinstance(layer.get_submodule(n), Conv1D) else w for n, w in weights.items()}
        given = {f"{n}.weight": w.to(read.dtype) for n, w in turned.items()}
        out = torch.func.functional_call(layer, given, (x, *args), kwargs)
        out = out[0] if isinstance(out, tuple) else out
        size = y.float().square().mean(-1, keepdim=True).sqrt().clamp(min=1e-30)
        wrong: Tensor = (((out.float() - y.float()) / size) @ root).square().sum(-1).mean()
        return wrong

    def judged(now: Mapping[str, QuantizedTensor]) -> float:
        weights = {name: dequantize(q) for name, q in now.items()}
        pairs = zip(torch.split(read[held], at_once), torch.split(wanted[held], at_once), strict=True)
        return float(sum(error(x, y, weights) * len(x) for x, y in pairs) / held.sum())

    first = lowest = judged(done)
    best = dict(done)
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(len(read))[~held]
    left = rows[:0]
    for step in range(steps):
        if len(left) < min(at_once, len(rows)):
            left = torch.cat([left, rows[torch.randperm(len(rows), generator=generator)]])
        these, left = left[:at_once], left[at_once:]
        with torch.enable_grad():
            error(read[these], wanted[these], changing.weights()).backward()  # type: ignore[no-untyped-call]
        changing.step(1 - step / steps)
        if (step + 1) % max(steps // LOOKS, 1) == 0:
            now = changing.quantized()
            if (found := judged(now)) < lowest:
                lowest, best = found, now
    changed = sum(int((best[name].codes != q.codes).sum()) for name, q in done.items())
    told = {
        "output_error": round(lowest / max(first, 1e-30), 4),
        "changed": round(changed / sum(q.codes.numel() for q in done.values()), 4),
    }
    return best, told
