"""What a student is trained towards: the predictions of its teacher, the float model.

The loss of a token is

    (1 - language) T² KL(teacher || student), both at the temperature T, + language * (- log p of the next token)
    + hidden * |student - teacher|² / |teacher|²  of what the output matrix reads

Source: Hinton et al. 2015, https://arxiv.org/abs/1503.02531, section 2.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional

from llmquant.data import TextSource

TOKENS, LOGITS = 4096, 1 << 26  # at once, at most, where a sequence has not more
CACHED = 1 << 17  # logits that a processor's cache has room for, a few times


class Training(BaseModel):
    """Train the quantized model to predict what the float model does.

    scope: "model": all layers together, once all linears are quantized. "layers": one after the other, each as soon as
        it is quantized, to give what the float model's does on the calibration text, where the memory is for no more.
    steps: how many (with "layers": for each); the text is read again where it has fewer sequences.
    tokens: of a step.
    rate: of the weights, in mean steps between two levels, at its highest; it rises and falls to 0 with a cosine.
    dampening: how fast weights are drawn to the middle of their levels in the end, as a share of the rate; it rises
        from 0 with the square of the steps. Weights that are needed between two levels are carried to and fro over
        the edge, more and more of them, and what they add to the error hides what the others should make up for.
        Drawn, they come to rest while rates are still high enough for that.
        Source: Nagel et al. 2022, https://arxiv.org/abs/2203.11086; here apart from the gradient, as
        AdamW's decay of weights.
    scale_rate: of scales, as a share of what they were, and of offsets, in mean steps.
    float_rate: of what stays float (norms, biases, an embedding that is not quantized), as a share of its size; 0
        leaves all of it alone.
    temperature: of the distillation.
    language: the share of the language model's own loss, which leads away from the float model.
    hidden: how much the error of what the output matrix reads counts beside that: of every token it tells more of
        what is wrong than the predictions do.
    precision: what steps are computed in; "auto": bfloat16 on GPUs, and on processors with instructions for it.
        Held-out text is computed in float32.
    patience: how many looks at the held-out divergence, one every tenth of the steps, may pass without a better one.
        Most is gained late, as rates fall; while they are high, it may even get worse.
    text: to train on; by default all of the calibration text.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    scope: Literal["model", "layers"] = "model"
    steps: int = Field(default=500, ge=1)
    tokens: int = Field(default=4096, ge=1)
    rate: float = Field(default=0.01, gt=0, le=1)
    dampening: float = Field(default=0.5, ge=0, le=1)
    scale_rate: float = Field(default=0.003, ge=0, le=1)
    float_rate: float = Field(default=0.001, ge=0, le=1)
    temperature: float = Field(default=1.0, gt=0, le=100)
    language: float = Field(default=0.0, ge=0, le=1)
    hidden: float = Field(default=3.0, ge=0)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    patience: int = Field(default=6, ge=1)
    text: TextSource | None = None
    seed: int = 0


def together(vocabulary: int, length: int) -> int:
    """Return how many sequences of a length are computed at once: both models' logits of them are in memory."""
    return max(min(TOKENS, LOGITS // vocabulary) // length, 1)


class Predictions(NamedTuple):
    """Of one model for some tokens. hidden: what the output matrix reads."""

    logits: Float[Tensor, "sequences time vocab"]
    hidden: Float[Tensor, "sequences time hidden"]


def loss(
    student: Predictions, teacher: Predictions, tokens: Int[Tensor, "sequences time"], settings: Training
) -> Float[Tensor, ""]:
    """Return the mean loss of a token."""
    temperature = settings.temperature
    found = (1 - settings.language) * temperature**2 * divergence(student.logits, teacher.logits, temperature)
    if settings.language:
        of_text = functional.cross_entropy(student.logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
        found = found + settings.language * of_text
    if settings.hidden:
        aim = teacher.hidden.float()
        wrong = (student.hidden.float() - aim).square().sum(-1) / aim.square().sum(-1).clamp(min=1e-30)
        found = found + settings.hidden * wrong.mean()
    return found


def divergence(
    student: Float[Tensor, "*tokens vocab"], teacher: Float[Tensor, "*tokens vocab"], temperature: float = 1.0
) -> Float[Tensor, ""]:
    """Return the mean of KL(teacher || student) over all tokens, in nats, of logits divided by a temperature."""
    found: Tensor = _Divergence.apply(student.flatten(0, -2), teacher.flatten(0, -2), temperature)  # type: ignore[no-untyped-call]
    return found


class _Divergence(torch.autograd.Function):
    """Finds the gradient along with the value, of a few tokens at a time, so that nothing of it leaves the cache.

    With whole tensors of logits between its operations, this took a quarter of a training step.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        count, vocabulary = student.shape
        pull = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        at_once = max((CACHED if student.device.type == "cpu" else LOGITS) // vocabulary, 1)
        total = torch.zeros((), device=student.device)
        for start in range(0, count, at_once):
            part = slice(start, start + at_once)
            log_q, log_p = ((x[part].float() / temperature).log_softmax(-1) for x in (student, teacher))
            p = log_p.exp()
            total += log_p.sub_(log_q).mul_(p).sum()
            if pull is not None:
                pull[part] = log_q.exp_().sub_(p).div_(temperature * count)
        ctx.save_for_backward(pull)
        return total / count

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient * ctx.saved_tensors[0], None, None
