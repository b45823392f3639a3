"""How often answers are right, how sure that is, and whether two models differ on the same questions."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

Z = 1.959963984540054  # of a normal distribution, 95 % lie within so many standard deviations
RESAMPLES = 2000
PIECE = 1 << 22  # indices that are drawn together; bounds memory


@dataclass(frozen=True)
class Answers:
    """What a model answered to the items of a task.

    scores: metric -> a figure for each item, 1 for right and 0 for wrong where there is nothing between. given: its
    answers, to see which change. known: metrics that are no mean over the items -> value and standard error, if known.
    """

    task: str
    scores: Mapping[str, Sequence[float]]
    given: Sequence[str]
    known: Mapping[str, tuple[float, float | None]]


@dataclass(frozen=True)
class TaskRow:
    """One metric of a model on a task.

    low, high: the 95 % interval, made as ``interval`` says. Beside a reference on the same items: difference, of this
    model's value and the reference's, with its interval by a paired bootstrap; lost, gained: items that only the
    reference, only this model has right; changed: other answers, right or wrong; p: of McNemar's exact test.
    """

    model: str
    task: str
    metric: str
    items: int
    value: float
    low: float | None = None
    high: float | None = None
    interval: str = ""
    reference: float | None = None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    lost: int | None = None
    gained: int | None = None
    changed: int | None = None
    p: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def rows(model: str, answers: Answers, reference: Answers | None = None) -> list[TaskRow]:
    """Return a row for every metric of a task. reference: what another model answered to the same items."""
    found = []
    for metric, scores in answers.scores.items():
        binary = set(scores) <= {0.0, 1.0}
        mean = sum(scores) / len(scores)
        low, high = wilson(round(sum(scores)), len(scores)) if binary else bootstrap(scores)
        row: dict[str, Any] = {"low": low, "high": high, "interval": "Wilson" if binary else "bootstrap"}
        if reference is not None:
            theirs = reference.scores[metric]
            pairs = list(zip(scores, theirs, strict=True))
            row |= {"reference": sum(theirs) / len(theirs), "difference": sum(a - b for a, b in pairs) / len(pairs)}
            row["difference_low"], row["difference_high"] = bootstrap([a - b for a, b in pairs])
            row["changed"] = sum(a != b for a, b in zip(answers.given, reference.given, strict=True))
            if binary and set(theirs) <= {0.0, 1.0}:
                lost, gained = (sum(pair == wanted for pair in pairs) for wanted in ((0.0, 1.0), (1.0, 0.0)))
                row |= {"lost": lost, "gained": gained, "p": mcnemar(lost, gained)}
        found.append(TaskRow(model, answers.task, metric, len(scores), mean, **row))
    for metric, (value, error) in answers.known.items():
        told: dict[str, Any] = {}
        if error is not None:
            told = {"low": value - Z * error, "high": value + Z * error, "interval": "standard error"}
        if reference is not None and metric in reference.known:
            told["reference"] = reference.known[metric][0]
            told["difference"] = value - told["reference"]
        found.append(TaskRow(model, answers.task, metric, len(answers.given), value, **told))
    return found


def wilson(right: int, total: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson 1927).

    >>> tuple(round(x, 4) for x in wilson(8, 10))
    (0.4902, 0.9433)
    """
    share, square = right / total, Z * Z
    middle = (share + square / (2 * total)) / (1 + square / total)
    half = Z * math.sqrt(share * (1 - share) / total + square / (4 * total * total)) / (1 + square / total)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of a mean: the 2.5th and 97.5th percentiles over 2000 resamples, the same every time."""
    of = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    step = max(PIECE // len(of), 1)
    means = torch.cat(
        [
            of[torch.randint(len(of), (min(step, RESAMPLES - start), len(of)), generator=generator)].mean(1)
            for start in range(0, RESAMPLES, step)
        ]
    )
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def mcnemar(lost: int, gained: int) -> float:
    """Return the two-sided p-value of McNemar's test in its exact form: lost or gained, heads or tails.

    >>> mcnemar(0, 5), mcnemar(3, 3)
    (0.0625, 1.0)
    """
    flips = lost + gained
    tail = sum(math.comb(flips, k) for k in range(min(lost, gained) + 1))
    return min(2 * tail / (1 << flips), 1.0)


def normalized(answer: str) -> str:
    """Return an answer without case, punctuation, articles and surplus spaces, as SQuAD compares them.

    Source: Rajpurkar et al. 2016 (SQuAD), its evaluation script.

    >>> normalized("  The Cat, sat.")
    'cat sat'
    """
    bare = "".join(c for c in answer.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def exact_match(answer: str, wanted: Sequence[str]) -> float:
    """Return 1.0 where an answer is one of those wanted, normalized, else 0.0."""
    return float(normalized(answer) in map(normalized, wanted))


def f1(answer: str, wanted: Sequence[str]) -> float:
    """Return the harmonic mean of precision and recall of an answer's words, beside the nearest of those wanted.

    >>> f1("a big black cat", ["black cat", "dog"])
    0.8
    """
    return max(_f1(normalized(answer).split(), normalized(one).split()) for one in wanted)


def _f1(words: Sequence[str], wanted: Sequence[str]) -> float:
    if not words or not wanted:
        return float(words == wanted)
    return 2 * (Counter(words) & Counter(wanted)).total() / (len(words) + len(wanted))
