"""Figures about answers, beside scipy, a slow count, and what is printed in papers."""

import random
from fractions import Fraction
from itertools import product

import pytest

from llmquant import answers
from llmquant.answers import Answers


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (7, 2), (3, 9), (40, 25)])
def test_mcnemars_p_is_the_share_of_coin_tosses_at_least_as_uneven(lost, gained):
    flips = lost + gained
    if flips <= 12:
        tosses = [sum(toss) for toss in product((0, 1), repeat=flips)]
        uneven = Fraction(sum(abs(2 * heads - flips) >= abs(lost - gained) for heads in tosses), len(tosses))
        assert answers.mcnemar(lost, gained) == pytest.approx(float(uneven), abs=1e-12)
    stats = pytest.importorskip("scipy.stats")
    assert answers.mcnemar(lost, gained) == pytest.approx(
        stats.binomtest(lost, flips).pvalue if flips else 1.0, abs=1e-12
    )


@pytest.mark.parametrize(("right", "total"), [(0, 5), (5, 5), (1, 3), (81, 263), (999, 1000)])
def test_the_interval_of_a_share_is_wilsons(right, total):
    stats = pytest.importorskip("scipy.stats")
    found = stats.binomtest(right, total).proportion_ci(method="wilson")
    assert answers.wilson(right, total) == pytest.approx((found.low, found.high), abs=1e-9)


def test_the_bootstrap_covers_a_mean_as_the_normal_interval_does_and_never_changes():
    generator = random.Random(0)
    values = [generator.random() for _ in range(400)]
    mean = sum(values) / 400
    error = (sum((x - mean) ** 2 for x in values) / 400) ** 0.5 / 20
    low, high = answers.bootstrap(values)
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.15 * error)
    assert answers.bootstrap(values) == (low, high)


@pytest.mark.parametrize(
    ("answer", "wanted", "same", "overlap"),
    [
        ("the Eiffel Tower!", ["Eiffel tower"], 1.0, 1.0),
        ("Paris, France", ["Paris"], 0.0, 2 / 3),
        ("red red red", ["red"], 0.0, 0.5),
        ("blue", ["red", "dark blue"], 0.0, 2 / 3),
        ("", ["something"], 0.0, 0.0),
        ("the", ["a"], 1.0, 1.0),
    ],
)
def test_words_are_compared_as_squad_compares_them(answer, wanted, same, overlap):
    assert answers.exact_match(answer, wanted) == same
    assert answers.f1(answer, wanted) == pytest.approx(overlap)


def test_two_models_are_compared_item_by_item():
    theirs = Answers("t", {"accuracy": [1.0, 1.0, 0.0, 0.0, 1.0]}, ["a", "b", "c", "d", "e"], {})
    mine = Answers("t", {"accuracy": [1.0, 0.0, 1.0, 0.0, 0.0]}, ["a", "x", "y", "z", "w"], {})
    (row,) = answers.rows("quantized", mine, theirs)
    assert (row.value, row.reference, row.difference) == (0.4, 0.6, pytest.approx(-0.2))
    assert (row.lost, row.gained, row.changed) == (2, 1, 4)
    assert row.p == 1.0
    assert row.difference_low < row.difference < row.difference_high
    (alone,) = answers.rows("quantized", mine)
    assert alone.difference is None
    assert (alone.low, alone.high) == (row.low, row.high)
