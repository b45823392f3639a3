"""The figures against slow float64 formulas."""

import math

import pytest
import torch

from llmquant.errors import NumericsError
from llmquant.metrics import Scores, output_power


def random(tokens=300, vocab=40):
    g = torch.Generator().manual_seed(0)
    return (
        3 * torch.randn(tokens, vocab, generator=g),
        torch.randint(0, vocab, (tokens,), generator=g),
        3 * torch.randn(tokens, vocab, generator=g),
    )


def test_figures_equal_float64_formulas():
    logits, targets, reference = random()
    scores = Scores()
    for part in (slice(0, 7), slice(7, 300)):
        scores.add(logits[part], targets[part], reference[part])
    result = scores.result()
    p, q = logits.double().softmax(-1), reference.double().softmax(-1)
    each = torch.distributions.kl_divergence(torch.distributions.Categorical(q), torch.distributions.Categorical(p))
    nll = -p[torch.arange(300), targets].log()
    nll_reference = -q[torch.arange(300), targets].log()
    assert result.perplexity == pytest.approx(float(nll.mean().exp()), rel=1e-5)
    assert result.perplexity_ratio == pytest.approx(float((nll.mean() - nll_reference.mean()).exp()), rel=1e-5)
    assert torch.allclose(scores.nll, nll, rtol=1e-4)
    assert torch.allclose(scores.kld, each, rtol=1e-3, atol=1e-6)
    assert result.kld_mean == pytest.approx(float(each.mean()), rel=1e-5)
    assert result.kld_error == pytest.approx(float(each.std() / math.sqrt(300)), rel=1e-4)
    assert result.kld_p99 == pytest.approx(float(each.sort().values[296]), rel=1e-4)
    assert result.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))


def test_identical_logits_diverge_by_exactly_nothing():
    logits, targets, _ = random()
    scores = Scores()
    scores.add(logits, targets, logits.clone())
    result = scores.result()
    assert (result.kld_mean, result.top1, result.perplexity_ratio) == (0.0, 1.0, 1.0)


def test_without_a_reference_there_is_no_divergence():
    logits, targets, _ = random()
    scores = Scores()
    scores.add(logits, targets)
    assert scores.result().kld_mean is None


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_refused(bad):
    logits, targets, _ = random()
    logits[5, 3] = bad
    with pytest.raises(NumericsError, match="NaN or infinite"):
        Scores().add(logits, targets)


def test_output_power_is_that_on_the_tokens():
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*s, generator=g) for s in ((50, 8), (4, 8)))
    wanted = (x @ w.T).square().sum() / 50
    assert float(output_power(w, x.T @ x / 50)) == pytest.approx(float(wanted), rel=1e-5)
