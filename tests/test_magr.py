"""Smaller largest weights; judges are a scan over all limits in float64, and products with the real activations."""

import pytest
import torch

from llmquant import api, recipe, run
from llmquant.algorithms import gptq, rtn
from llmquant.errors import RecipeError
from llmquant.transforms import magr
from tests.test_transforms import rounding, stats_of

ROWS, COLS, TOKENS = 24, 64, 400


def activations():
    """Tokens with most of their power in a few directions, as in a language model."""
    generator = torch.Generator().manual_seed(0)
    powers = torch.logspace(0, -2, COLS)
    mix = torch.linalg.qr(torch.randn(COLS, COLS, generator=generator)).Q
    return torch.randn(TOKENS, COLS, generator=generator) * powers @ mix


def weight():
    w = torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(1))
    w[:, 3] *= 4
    return w


def unit(hessian):
    return hessian / torch.linalg.matrix_norm(hessian, 2)


def test_the_cut_minimises_the_distance_and_the_penalty():
    v, penalty = weight().view(ROWS, 2, 32), torch.linspace(0.01, 40, ROWS * 2).view(ROWS, 2, 1)
    cut = magr._cut(v, penalty)

    def loss(u):
        u = u.double()
        return (u - v).square().sum(2) / 2 + penalty[..., 0] * u.abs().amax(2)

    lowest = torch.full((ROWS, 2), torch.inf, dtype=torch.float64)
    for share in torch.linspace(0, 1, 1001):
        limit = share * v.abs().amax(2, keepdim=True)
        lowest = torch.minimum(lowest, loss(v.clamp(-limit, limit)))
    assert (loss(cut) <= lowest + 1e-5).all()
    assert (loss(cut) >= lowest - 1e-2).all()
    assert (cut == 0).all(2).any()  # where the penalty is as large as all weights together


@pytest.mark.parametrize("group", [COLS, 16])
def test_largest_weights_shrink_and_outputs_stay(group):
    w, hessian = weight(), stats_of(activations()).hessian
    v = magr.reduced(w, unit(hessian), group, 1e-3, 50)
    before, after = (x.view(ROWS, -1, group).abs().amax(2) for x in (w, v))
    assert (after < before).all()
    assert after.mean() < 0.9 * before.mean()
    x = activations()
    moved = (x.double() @ (v - w).T.double()).square().sum() / (x @ w.T).square().sum()
    clamped = w.view(ROWS, -1, group).clamp(-after[..., None], after[..., None]).view(w.shape)
    cost_of_clamping = (x.double() @ (clamped - w).T.double()).square().sum() / (x @ w.T).square().sum()
    assert moved < 0.5 * cost_of_clamping


def test_every_step_comes_nearer_to_the_minimum():
    w, hessian = weight(), unit(stats_of(activations()).hessian)

    def loss(v):
        penalty = 1e-3 * w.abs().sum(1)
        return (((v - w) @ hessian * (v - w)).sum(1) / 2 + penalty * v.abs().amax(1)).sum().item()

    losses = [loss(magr.reduced(w, hessian, COLS, 1e-3, steps)) for steps in (1, 2, 5, 20, 100)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] < loss(w)


@pytest.mark.parametrize("algorithm", [rtn, gptq])
def test_weights_change_only_where_their_own_algorithm_gains(algorithm):
    w, stats = weight(), stats_of(activations())
    of = rounding(w, algorithm, bits=3, group_size=COLS)
    found = magr.clip(w, stats, of, magr.Config())
    assert of.error(w, stats, found) < of.error(w, stats, w)
    exact = rounding(w, algorithm, bits=3, group_size=COLS)
    assert torch.equal(magr.clip(w, stats, exact, magr.Config(strengths=(100.0,))), w)  # all weights would be 0


def test_a_run_takes_it_alone_and_after_scales(llama, calibrated, tmp_path):
    changes = [*calibrated, "grid.group_size=-1", "algorithm.sweeps=0"]
    errors = []
    for i, transforms in enumerate(("[]", "[{name: magr}]", "[{name: awq, steps: 3, clip: false}, {name: magr}]")):
        report = api.quantize(
            llama,
            "gptq-plain-w4g128",
            tmp_path / str(i),
            changes=[*changes, f"transforms={transforms}"],
            evaluate=False,
        )
        errors.append([told["error"] for told in report.linears.values()])
        assert not report.notes
    assert errors[1] != errors[0]
    assert errors[2] != errors[1]


def test_it_needs_text_and_explains_its_settings(llama):
    assert run.make_plan(llama, recipe.load("awq-w4g128", ["transforms=[{name: magr}]", "grid.group_size=32"])).needs
    for change, message in (
        ("strengths: []", "strengths"),
        ("iterations: 0", "iterations"),
        ("dampening_frac: 2", "dampening_frac"),
    ):
        with pytest.raises(RecipeError, match=message):
            recipe.load("awq-w4g128", [f"transforms=[{{name: magr, {change}}}]"])
