"""What calibration learns about the activations that one site reads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from llmquant.ranks import ALONE, Ranks

Needs = Literal["nothing", "diagonal", "hessian", "fisher"]
"""How much an algorithm wants to know; each includes the ones before it. The last: of the outputs, too."""

TOKENS = 512  # of a sample
SAMPLE = 2**17  # values kept of those that a site reads
ENOUGH = 8192  # tokens for what needs fewer than rounding does, at least, and for each column:
ENOUGH_BY_COLUMN = 4
BLOCK = 256  # columns; the Hessian is symmetric, so blocks below its diagonal are not computed


def enough(cols: int) -> int:
    """Return on how many tokens transforms, mismatches and priors of experts are found."""
    return max(ENOUGH, ENOUGH_BY_COLUMN * cols)


def most_of(needs: Iterable[Needs]) -> Needs:
    """Return what includes all of them."""
    return max(needs, key=get_args(Needs).index)


@dataclass(frozen=True)
class Drift:
    """How far activations x are from those x' of the float model, as means over each of two halves of the tokens.

    These are tokens that the float model computed too, perhaps not all.
    crosses: (x' - x) xᵀ. hessians: x xᵀ. shares: of the tokens. mean: x' - x, over both halves.
    """

    crosses: tuple[Float[Tensor, "cols cols"], Float[Tensor, "cols cols"]]
    hessians: tuple[Float[Tensor, "cols cols"], Float[Tensor, "cols cols"]]
    shares: tuple[float, float]
    mean: Float[Tensor, " cols"]

    def mixed(self, prior: Drift, share: float) -> Drift:
        """Return means of which a share is another's."""
        shares = [(1 - share) * a + share * b for a, b in zip(self.shares, prior.shares, strict=True)]
        weights = [share * b / max(total, 1e-30) for b, total in zip(prior.shares, shares, strict=True)]
        of_halves = (0, 1)
        crosses = [torch.lerp(self.crosses[i], prior.crosses[i], weights[i]) for i in of_halves]
        hessians = [torch.lerp(self.hessians[i], prior.hessians[i], weights[i]) for i in of_halves]
        return Drift(
            (crosses[0], crosses[1]),
            (hessians[0], hessians[1]),
            (shares[0], shares[1]),
            torch.lerp(self.mean, prior.mean, share),
        )


@dataclass(frozen=True)
class Stats:
    """Statistics of the activations x that one or more linears read, as means over tokens.

    hessian: x xᵀ, float32, or None where only the diagonal was asked for.
    square_mean: x², the diagonal of the Hessian (llama.cpp's imatrix).
    abs_mean: |x|.
    mean: x; None where no activations were seen.
    tokens: how many tokens were seen; of mixed statistics, how many would tell as much.
    abs_max: the largest |x|; None where no activations were seen.
    sample: values drawn at random from all of x, then the smallest and the largest of all; None where not asked for.
    drift: None where not asked for.
    outputs: the Fisher information of a linear's outputs (``llmquant.gradients``), for some rows after the other, or
        None where not asked for.
    """

    hessian: Float[Tensor, "cols cols"] | None
    square_mean: Float[Tensor, " cols"]
    abs_mean: Float[Tensor, " cols"]
    tokens: int
    abs_max: Float[Tensor, " cols"] | None = None
    sample: Float[Tensor, " values"] | None = None
    drift: Drift | None = None
    outputs: tuple[Float[Tensor, "_n _n"], ...] | None = None
    mean: Float[Tensor, " cols"] | None = None

    def divided(self, scales: Float[Tensor, " cols"]) -> Stats:
        """Return the statistics of x / scales; without a sample, drift and outputs."""
        return Stats(
            None if self.hessian is None else self.hessian / scales / scales[:, None],
            self.square_mean / scales.square(),
            self.abs_mean / scales,
            self.tokens,
            None if self.abs_max is None else self.abs_max / scales,
            mean=None if self.mean is None else self.mean / scales,
        )

    def mixed(self, prior: Stats, share: float) -> Stats:
        """Return means of which a share is another's; extremes and the sample are both's where that is half or more.

        The variance of such a mean tells how many tokens it is worth.
        """
        if share >= 1:
            return prior
        own, other = (1 - share) ** 2 / max(self.tokens, 1), share**2 / max(prior.tokens, 1)

        def mean(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            return None if a is None or b is None else torch.lerp(a, b, share)

        hessian, square_mean = mean(self.hessian, prior.hessian), mean(self.square_mean, prior.square_mean)
        abs_mean = mean(self.abs_mean, prior.abs_mean)
        assert square_mean is not None
        assert abs_mean is not None
        both = share >= 0.5
        abs_max, sample = self.abs_max, self.sample
        if both and abs_max is not None and prior.abs_max is not None:
            abs_max = torch.maximum(abs_max, prior.abs_max)
        if both and sample is not None and prior.sample is not None:
            sample = torch.cat([sample, prior.sample])
        return replace(
            self,
            hessian=hessian,
            square_mean=square_mean,
            abs_mean=abs_mean,
            mean=mean(self.mean, prior.mean),
            tokens=round(1 / (own + other)),
            abs_max=abs_max,
            sample=sample,
            drift=None if self.drift is None or prior.drift is None else self.drift.mixed(prior.drift, share),
        )

    @staticmethod
    def none(cols: int, device: torch.device | str = "cpu") -> Stats:
        """Return what stands in for statistics when there are none: every column counts the same."""
        ones = torch.ones(cols, device=device)
        return Stats(None, ones, ones, 0)


class Accumulator:
    """Sums activations batch by batch, and at last those of all ranks.

    A batch's own sums are float32. In float64, sums of such numbers are exact as long as they are of about one size, so
    that neither the order of the batches nor the number of ranks changes a bit.

    sample: keep a sample of the values, for the range of quantized activations. It is a uniform one whatever the
        batches (each value draws a number, and those with the smallest stay), of at most ``SAMPLE`` values, and the
        observers take it as they take a row of weights. A histogram would need observers of its own, and bins that
        suit an outlier leave few to the bulk.
    drift: compare with the float model's activations, which then come with each batch; needs "hessian" or more.
    """

    def __init__(
        self,
        cols: int,
        needs: Needs,
        device: torch.device | str = "cpu",
        sample: bool = False,
        drift: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        parts = 0 if needs in ("nothing", "diagonal") else 3 if drift else 1  # two halves, and what is not compared

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self._hessians = [zeros(cols, cols) for _ in range(parts)]
        self._crosses = [zeros(cols, cols) for _ in range(2 if drift else 0)]
        self._counts = [0] * parts
        self._squares, self._magnitudes, self._sums, self._drifts = (zeros(cols) for _ in range(4))
        self._largest = torch.zeros(cols, device=device)
        self._tokens = 0
        self._sample = _Values(device, ranks) if sample else None
        self._ranks = ranks

    def add(self, x: Float[Tensor, "tokens cols"], aimed: Float[Tensor, "tokens cols"] | None = None) -> None:
        """aimed: what the float model reads in the place of x; None where it does not compute these tokens."""
        if not len(x):
            return
        x = x.float()
        self._tokens += x.shape[0]
        if self._sample is not None:
            self._sample.add(x)
        magnitude = x.abs()
        self._magnitudes += magnitude.sum(0)
        self._sums += x.sum(0)
        if aimed is not None:
            self._drifts += (aimed.float() - x).sum(0)
        self._largest = torch.maximum(self._largest, magnitude.amax(0))
        if not self._hessians:
            self._squares += x.square().sum(0)
        half = len(x) // 2
        parts = {len(self._hessians) - 1: slice(None)} if aimed is None else {0: slice(half), 1: slice(half, None)}
        for part, here in parts.items() if self._hessians else ():
            some, hessian = x[here], self._hessians[part]
            self._counts[part] += len(some)
            for start in range(0, x.shape[1], BLOCK):
                block = slice(start, start + BLOCK)
                hessian[block, start:] += some[:, block].T @ some[:, start:]
                if aimed is not None:
                    moved = aimed[here, block].float() - some[:, block]
                    self._crosses[part][block] += moved.T @ some

    def result(self) -> Stats:
        """Return the statistics. The sums become what is returned, as they are large: to be called once, at the end."""
        self._join()
        tokens = max(self._tokens, 1)
        sample = None if self._sample is None else self._sample.result()
        hessian, drift = None, None
        if self._crosses:
            every = self._hessians.pop()
            for of_half in self._hessians:
                every += of_half
            hessian = _symmetric(every.div_(tokens))
            del every
            means = [max(count, 1) for count in self._counts]
            compared = max(sum(self._counts[:2]), 1)
            crosses = [self._crosses.pop(0).div_(count).float() for count in means[:2]]
            halves = [_symmetric(self._hessians.pop(0).div_(count)) for count in means[:2]]
            drift = Drift(
                (crosses[0], crosses[1]),
                (halves[0], halves[1]),
                (self._counts[0] / compared, self._counts[1] / compared),
                (self._drifts / compared).float(),
            )
        elif self._hessians:
            hessian = _symmetric(self._hessians.pop().div_(tokens))
        del self._hessians, self._crosses
        square_mean = (self._squares / tokens).float() if hessian is None else hessian.diagonal()
        abs_mean, mean = ((sums / tokens).float() for sums in (self._magnitudes, self._sums))
        return Stats(hessian, square_mean, abs_mean, self._tokens, self._largest, sample, drift, mean=mean)

    def _join(self) -> None:
        """Make the sums those of all ranks."""
        if self._ranks.size > 1:
            sums = (self._squares, self._magnitudes, self._sums, self._drifts)
            self._ranks.add(*self._hessians, *self._crosses, *sums)
            self._ranks.largest(self._largest)
            counts = self._ranks.each(lambda: [self._tokens, *self._counts])
            self._tokens, *self._counts = (sum(of_ranks) for of_ranks in zip(*counts, strict=True))


def _symmetric(upper: Float64[Tensor, "cols cols"]) -> Float[Tensor, "cols cols"]:
    """Return a matrix in float32 of which only the upper half, diagonal included, is known."""
    whole = upper.float()
    for start in range(0, len(whole), BLOCK):
        block = slice(start, start + BLOCK)
        whole[block, block] = whole[block, block].triu() + whole[block, block].triu(1).T
        whole[start + BLOCK :, block] = whole[block, start + BLOCK :].T
    return whole


class Sample:
    """Keeps about ``TOKENS`` tokens of those that all ranks add, evenly spread."""

    def __init__(self, tokens: int, ranks: Ranks = ALONE) -> None:
        """tokens: how many will be added."""
        self._ranks = ranks
        self._stride = max(tokens // TOKENS, 1)
        self._seen = 0
        self._kept: list[Tensor] = []

    def add(self, x: Float[Tensor, "tokens cols"]) -> None:
        self._kept.append(x[-self._seen % self._stride :: self._stride].to(torch.float32, copy=True))  # no view of all
        self._seen += len(x)

    def result(self) -> Float[Tensor, "tokens cols"]:
        return self._ranks.joined(torch.cat(self._kept))


class _Values:
    """At most ``SAMPLE`` of the values that all ranks added, each as likely to stay, and the extremes of all."""

    def __init__(self, device: torch.device | str, ranks: Ranks = ALONE) -> None:
        self._ranks = ranks
        self._generator = torch.Generator(device).manual_seed(ranks.rank)
        self._values = self._draws = self._extremes = torch.empty(0, device=device)
        self._bound = 1.0

    def add(self, x: Float[Tensor, "tokens cols"]) -> None:
        for some in torch.split(x, max(SAMPLE // x.shape[1], 1)):  # all at once would take several copies of x
            if some.numel():
                self._add(some.flatten())

    def _add(self, x: Float[Tensor, " values"]) -> None:
        draws = torch.rand(len(x), generator=self._generator, device=x.device)
        stay = draws < self._bound
        self._keep(x[stay], draws[stay], torch.cat(torch.aminmax(x[None], dim=1)))

    def _keep(self, values: Float[Tensor, " some"], draws: Float[Tensor, " some"], extremes: Tensor) -> None:
        self._values = torch.cat([self._values, values])
        self._draws = torch.cat([self._draws, draws])
        self._extremes = torch.stack(torch.aminmax(torch.cat([self._extremes, extremes])))
        if len(self._draws) > SAMPLE:
            self._draws, smallest = self._draws.topk(SAMPLE, largest=False)
            self._values = self._values[smallest]
            self._bound = float(self._draws.max())

    def result(self) -> Float[Tensor, " values"]:
        if self._ranks.size > 1:
            found = [self._ranks.joined(x) for x in (self._values, self._draws, self._extremes)]
            self._values = self._draws = self._extremes[:0]
            self._keep(*found)
        return torch.cat([self._values, self._extremes])
