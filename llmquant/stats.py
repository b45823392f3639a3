"""What calibration learns about the activations that one site reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Needs = Literal["nothing", "diagonal", "hessian"]
"""How much an algorithm wants to know; each includes the ones before it."""

BLOCK = 256  # columns; the Hessian is symmetric, so blocks below its diagonal are not computed


@dataclass(frozen=True)
class Stats:
    """Statistics of the activations x that one or more linears read, as means over tokens.

    hessian: x xᵀ, float32, or None where only the diagonal was asked for.
    square_mean: x², the diagonal of the Hessian (llama.cpp's imatrix).
    abs_mean: |x|.
    tokens: how many tokens were seen.
    """

    hessian: Float[Tensor, "cols cols"] | None
    square_mean: Float[Tensor, " cols"]
    abs_mean: Float[Tensor, " cols"]
    tokens: int

    @staticmethod
    def none(cols: int, device: torch.device | str = "cpu") -> Stats:
        """Return what stands in for statistics when there are none: every column counts the same."""
        ones = torch.ones(cols, device=device)
        return Stats(None, ones, ones, 0)


class Accumulator:
    """Sums activations batch by batch, always in the order given, in float32."""

    def __init__(self, cols: int, needs: Needs, device: torch.device | str = "cpu") -> None:
        self._hessian = torch.zeros(cols, cols, device=device) if needs == "hessian" else None
        self._squares = torch.zeros(cols, device=device)
        self._magnitudes = torch.zeros(cols, device=device)
        self._tokens = 0

    def add(self, x: Float[Tensor, "tokens cols"]) -> None:
        x = x.float()
        self._tokens += x.shape[0]
        self._magnitudes += x.abs().sum(0)
        if self._hessian is None:
            self._squares += x.square().sum(0)
        else:
            for start in range(0, x.shape[1], BLOCK):
                block = slice(start, start + BLOCK)
                self._hessian[block, start:].addmm_(x[:, block].T, x[:, start:])

    def result(self) -> Stats:
        tokens = max(self._tokens, 1)
        if self._hessian is None:
            return Stats(None, self._squares / tokens, self._magnitudes / tokens, self._tokens)
        upper = self._hessian.triu() / tokens
        hessian = upper + upper.triu(1).T
        return Stats(hessian, hessian.diagonal(), self._magnitudes / tokens, self._tokens)
