"""How far one model's predictions are from the text, and from another model's predictions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llmquant.errors import NumericsError

TOKENS = 1024  # whose logits are compared at a time; bounds memory


@dataclass(frozen=True)
class Result:
    """Figures over all scored tokens; those that need a reference are None without one.

    perplexity: exp of the mean negative log-likelihood (over words, where ``units`` says so).
    *_error: standard error of the mean (of the perplexity: by the delta method).
    kld_*: KL divergence of this model from the reference, in nats a token.
    top1: share of tokens where both models find the same token likeliest.
    perplexity_ratio: this model's over the reference's.
    """

    perplexity: float
    perplexity_error: float
    kld_mean: float | None = None
    kld_error: float | None = None
    kld_median: float | None = None
    kld_p99: float | None = None
    top1: float | None = None
    perplexity_ratio: float | None = None


class Scores:
    """Collects one number a token and measure; logits are dropped at once."""

    def __init__(self) -> None:
        self._nll: list[Tensor] = []
        self._nll_reference: list[Tensor] = []
        self._kld: list[Tensor] = []
        self._same: list[Tensor] = []

    def add(
        self,
        logits: Float[Tensor, "tokens vocab"],
        targets: Int[Tensor, " tokens"],
        reference: Float[Tensor, "tokens vocab"] | None = None,
    ) -> None:
        """Score the predictions of ``targets``; raise NumericsError when logits are not finite."""
        for start in range(0, len(targets), TOKENS):
            part = slice(start, start + TOKENS)
            target = targets[part, None]
            log_p = logits[part].float().log_softmax(-1)
            self._check(log_p, "the model")
            self._nll.append(-log_p.gather(1, target)[:, 0].cpu())
            if reference is None:
                continue
            log_q = reference[part].float().log_softmax(-1)
            self._check(log_q, "the reference")
            self._nll_reference.append(-log_q.gather(1, target)[:, 0].cpu())
            self._kld.append((log_q.exp() * (log_q - log_p)).sum(-1, dtype=torch.float64).cpu())
            self._same.append((log_p.argmax(-1) == log_q.argmax(-1)).cpu())

    def _check(self, log_p: Tensor, whose: str) -> None:
        if not torch.isfinite(log_p).all():
            raise NumericsError(
                f"the logits of {whose} at scored token {sum(map(len, self._nll))} or soon after are NaN or infinite. "
                "The model is damaged, or its dtype is too narrow for its activations."
            )

    @property
    def nll(self) -> Float[Tensor, " tokens"]:
        """The negative log-likelihood of every token so far, in nats."""
        return torch.cat(self._nll).double()

    @property
    def kld(self) -> Float[Tensor, " tokens"]:
        """The KL divergence from the reference at every token so far, in nats; empty without a reference."""
        return torch.cat(self._kld).double() if self._kld else torch.empty(0, dtype=torch.float64)

    def result(self, units: float | None = None) -> Result:
        """Return the figures. units: what the log-likelihood is shared among (words), if not the tokens."""
        nll = self.nll
        share = len(nll) / units if units else 1.0
        perplexity = _exp(float(nll.mean()) * share)
        result = Result(perplexity, perplexity * share * _standard_error(nll))
        if not self._kld:
            return result
        kld = self.kld
        reference = torch.cat(self._nll_reference).double()
        return Result(
            result.perplexity,
            result.perplexity_error,
            kld_mean=float(kld.mean()),
            kld_error=_standard_error(kld),
            kld_median=float(kld.median()),
            kld_p99=float(kld.kthvalue(max(math.ceil(0.99 * len(kld)), 1)).values),
            top1=float(torch.cat(self._same).double().mean()),
            perplexity_ratio=_exp(float((nll - reference).mean()) * share),
        )


def output_power(w: Float[Tensor, "rows cols"], hessian: Float[Tensor, "cols cols"]) -> Float[Tensor, ""]:
    """Return the mean over the calibration tokens of ||x·wᵀ||²."""
    return ((w @ hessian) * w).sum()


def _standard_error(x: Tensor) -> float:
    return float(x.std() / math.sqrt(len(x))) if len(x) > 1 else 0.0


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
