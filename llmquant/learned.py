"""Learned rounding: tune the codes of a whole decoder layer on the error of its own output.

Source: SignRound, Cheng et al. 2023, https://arxiv.org/abs/2309.05516: every weight
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
from typing import Any

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


def tune(
    layer: nn.Module,
    done: Mapping[str, QuantizedTensor],
    targets: Mapping[str, Float[Tensor, "_rows _cols"]],
    read: Float[Tensor, "sequences time hidden"],
    wanted: Float[Tensor, "sequences time hidden"],
    call: Callable[[Tensor], Call],
    metric: Float[Tensor, "hidden hidden"],
    config: LearnedRounding,
) -> tuple[dict[str, QuantizedTensor], dict[str, Any]]:
    """Return the linears of a layer with tuned codes, and what a report should tell.

    done, targets: by name within the layer: as they were quantized, and the weights that were rounded.
    read: by the layer. wanted: what it should give for it. call: its other arguments for some sequences.
    metric: how much the model minds an error of the output, as a share of the output's size.

    Raises CalibrationError where there are no sequences to hold out.
    """
    held = torch.arange(len(read)) % HELD_OUT == HELD_OUT - 1
    if not held.any():
        raise CalibrationError(
            f"learned_rounding: needs {HELD_OUT} sequences that the float model computes, one of them to judge by, and "
            f"there are {len(read)}. Set calibration.sequences, or a smaller calibration.length"
        )
    linears = {name: _Linear.of(q, targets[name]) for name, q in done.items()}
    values, directions = torch.linalg.eigh(metric.double())
    root = (directions * values.clamp(min=0).sqrt()).to(read.device, torch.float32)
    at_once = max(config.tokens // read.shape[1], 1)

    def error(x: Tensor, y: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        args, kwargs = call(x)
        given = {f"{n}.weight": w.T if isinstance(layer.get_submodule(n), Conv1D) else w for n, w in weights.items()}
        out = torch.func.functional_call(layer, given, (x, *args), kwargs)
        out = out[0] if isinstance(out, tuple) else out
        size = y.float().square().mean(-1, keepdim=True).sqrt().clamp(min=1e-30)
        wrong: Tensor = (((out.float() - y.float()) / size) @ root).square().sum(-1).mean()
        return wrong

    def judged() -> float:
        weights = {name: x.weight().to(read.dtype) for name, x in linears.items()}
        pairs = zip(torch.split(read[held], at_once), torch.split(wanted[held], at_once), strict=True)
        return float(sum(error(x, y, weights) * len(x) for x, y in pairs) / held.sum())

    first = lowest = judged()
    best = {name: q.codes for name, q in done.items()}
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(len(read))[~held]
    left = rows[:0]
    for step in range(config.steps):
        if len(left) < min(at_once, len(rows)):
            left = torch.cat([left, rows[torch.randperm(len(rows), generator=generator)]])
        these, left = left[:at_once], left[at_once:]
        weights = {name: x.weight().to(read.dtype).requires_grad_() for name, x in linears.items()}
        with torch.enable_grad():
            of_weights = torch.autograd.grad(
                error(read[these], wanted[these], weights), list(weights.values()), materialize_grads=True
            )
        for linear, gradient in zip(linears.values(), of_weights, strict=True):
            linear.move(gradient, config.rate * (1 - step / config.steps))
        if (step + 1) % max(config.steps // LOOKS, 1) == 0 and (now := judged()) < lowest:
            lowest, best = now, {name: x.codes() for name, x in linears.items()}
    changed = sum(int((best[name] != q.codes).sum()) for name, q in done.items())
    told = {
        "output_error": round(lowest / max(first, 1e-30), 4),
        "changed": round(changed / sum(q.codes.numel() for q in done.values()), 4),
    }
    return {name: replace(q, codes=best[name]) for name, q in done.items()}, told
