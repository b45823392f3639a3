"""Weights that make up for the rounding before them, against least squares on the tokens themselves."""

import pytest
import torch

from llmquant import mismatch, recipe, run
from llmquant.errors import CalibrationError
from llmquant.stats import Accumulator

COLS, ROWS = 12, 5


def draw(tokens, noise, seed=0):
    """Activations of the float model, what a rounded one reads in their place, and a weight."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(COLS, COLS, generator=torch.Generator().manual_seed(9)) / 4
    aimed = torch.randn(tokens, COLS, generator=generator) @ (torch.eye(COLS) + mixing)
    x = aimed @ (torch.eye(COLS) + 0.1 * mixing.T) + noise * torch.randn(tokens, COLS, generator=generator)
    return x, aimed, torch.randn(ROWS, COLS, generator=generator)


def stats(x, aimed, batches=3):
    sums = Accumulator(x.shape[1], "hessian", drift=True)
    for some, theirs in zip(x.tensor_split(batches), aimed.tensor_split(batches), strict=True):
        sums.add(some, theirs)
    return sums.result()


def test_the_sums_of_both_halves_are_those_of_all_tokens():
    x, aimed, _ = draw(301, 0.1)
    found = stats(x, aimed)
    drift = found.drift
    torch.testing.assert_close(found.hessian, x.T @ x / 301)
    cross = sum(share * part for share, part in zip(drift.shares, drift.crosses, strict=True))
    torch.testing.assert_close(cross, (aimed - x).T @ x / 301, rtol=1e-4, atol=1e-6)
    both = sum(share * part for share, part in zip(drift.shares, drift.hessians, strict=True))
    torch.testing.assert_close(both, found.hessian)
    assert sum(drift.shares) == pytest.approx(1)


def test_tokens_that_the_float_model_does_not_compute_count_in_the_hessian_alone():
    x, aimed, _ = draw(300, 0.1)
    compared = stats(x[:200], aimed[:200]).drift
    sums = Accumulator(COLS, "hessian", drift=True)
    sums.add(x[:90], aimed[:90])
    sums.add(x[90:200], aimed[90:200])
    sums.add(x[200:])
    found = sums.result()
    assert found.tokens == 300
    torch.testing.assert_close(found.hessian, x.T @ x / 300)
    torch.testing.assert_close(found.mean, x.mean(0))
    torch.testing.assert_close(found.drift.mean, (aimed - x)[:200].mean(0))
    assert sum(found.drift.shares) == pytest.approx(1)
    for ours, theirs in ((found.drift.crosses, compared.crosses), (found.drift.hessians, compared.hessians)):
        ours, theirs = (
            sum(share * part for share, part in zip(drift.shares, parts, strict=True))
            for drift, parts in ((found.drift, ours), (compared, theirs))
        )
        torch.testing.assert_close(ours, theirs)


def test_on_much_text_it_is_the_least_squares_solution(monkeypatch):
    monkeypatch.setattr(mismatch, "DAMPING", 0.0)
    x, aimed, w = draw(20_000, 0.1)
    ((target, share),) = mismatch.corrected([w], stats(x, aimed))
    best = torch.linalg.lstsq(x.double(), (aimed @ w.T).double()).solution.T
    assert 0.99 < share <= 1
    torch.testing.assert_close(target, w + share * (best.float() - w), rtol=1e-3, atol=1e-4)


def test_what_does_not_carry_over_is_not_corrected():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, COLS, generator=generator)
    aimed = x + torch.randn(40, COLS, generator=generator)  # noise that x tells nothing about
    ((_, noise),) = mismatch.corrected([torch.randn(ROWS, COLS, generator=generator)], stats(x, aimed))
    x, aimed, w = draw(40, 0.01)
    ((_, sound),) = mismatch.corrected([w], stats(x, aimed))
    assert noise < 0.2 < 0.7 < sound


@pytest.mark.parametrize("noise", [0.01, 0.1, 0.5])
def test_outputs_are_nearer_to_the_float_models_on_other_tokens(noise):
    x, aimed, w = draw(400, noise)
    ((target, share),) = mismatch.corrected([w], stats(x, aimed))
    x, aimed, _ = draw(5000, noise, seed=1)
    before, after = ((x @ q.T - aimed @ w.T).square().mean() for q in (w, target))
    assert share > 0
    assert after < before


def test_linears_that_agree_with_the_float_model_stay_as_they_are():
    x, _, w = draw(100, 0.1)
    first, second = w[:2], w[2:]
    found = mismatch.corrected([first, second], stats(x, x))
    assert [share for _, share in found] == [0, 0]
    assert torch.equal(found[0][0], first)
    assert torch.equal(found[1][0], second)


def test_activations_that_are_not_finite_are_an_error():
    x, aimed, w = draw(100, 0.1)
    x[3, 4] = torch.inf
    with pytest.raises(CalibrationError, match="not finite"):
        mismatch.corrected([w], stats(x, aimed))


def test_rounding_diverges_less_with_it(save_model, texts, tmp_path):
    from llmquant import demo, evaluation

    windows = evaluation.read_windows(demo.MODEL, texts / "evaluation.txt", "llama.cpp", 2048)
    reference = evaluation.Reference(demo.MODEL)
    text = f"calibration={{path: {texts / 'calibration.txt'}, sequences: 24, length: 256}}"
    rows = []
    for flag in (False, True):
        changes = [text, "algorithm={name: rtn, calibrated: true}", "grid={name: affine, bits: 3, group_size: 128}"]
        chosen = recipe.load("rtn-w4g128", [*changes, f"mismatch_correction={flag}"])
        report, _ = run.quantize(demo.MODEL, chosen, tmp_path / str(flag))
        rows.append(evaluation.evaluate(tmp_path / str(flag), windows, reference))
        shares = [told.get("corrected") for told in report.linears.values()]
        assert all(0 <= share <= 1 for share in shares) if flag else set(shares) == {None}
    assert rows[1].kld_mean < 0.8 * rows[0].kld_mean
