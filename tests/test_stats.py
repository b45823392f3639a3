import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmquant.stats import BLOCK, SAMPLE, Accumulator, Stats, _Values


def tokens(n, cols, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, cols, generator=generator) + torch.rand(cols, generator=generator)


def collected(batches, needs="hessian"):
    accumulator = Accumulator(batches[0].shape[1], needs)
    for batch in batches:
        accumulator.add(batch)
    return accumulator.result()


@pytest.mark.parametrize("cols", [1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3])
def test_the_statistics_are_means_over_tokens(cols):
    x = tokens(48, cols)
    stats = collected(x.split([1, 30, 17]))
    x = x.double()
    torch.testing.assert_close(stats.hessian.double(), x.T @ x / 48, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.square_mean.double(), x.square().mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.abs_mean.double(), x.abs().mean(0), rtol=1e-5, atol=1e-5)
    assert torch.equal(stats.abs_max.double(), x.abs().amax(0))
    assert stats.tokens == 48
    assert torch.equal(stats.hessian, stats.hessian.T)


@pytest.mark.parametrize("needs", ["nothing", "diagonal"])
def test_without_a_need_for_it_there_is_no_hessian(needs):
    x = tokens(20, 9)
    stats = collected([x], needs)
    assert stats.hessian is None
    torch.testing.assert_close(stats.square_mean, collected([x]).square_mean)
    assert torch.equal(stats.abs_mean, collected([x]).abs_mean)


def test_the_same_batches_give_the_same_bits_and_another_order_nearly_so():
    batches = tokens(60, 33).split(20)
    once, again, backwards = collected(batches), collected(batches), collected(batches[::-1])
    assert torch.equal(once.hessian, again.hessian)
    torch.testing.assert_close(once.hessian, backwards.hessian, rtol=1e-5, atol=1e-6)


def test_half_precision_activations_are_summed_in_float32():
    x = tokens(5000, 3).bfloat16()
    stats = collected(x.split(100))
    torch.testing.assert_close(stats.hessian.double(), x.double().T @ x.double() / 5000, rtol=1e-5, atol=1e-5)


def test_a_result_cannot_be_changed_by_later_batches():
    accumulator = Accumulator(5, "hessian")
    accumulator.add(tokens(20, 5))
    early = accumulator.result()
    with pytest.raises(AttributeError):
        accumulator.add(tokens(20, 5, seed=1))
    assert torch.equal(early.hessian, collected([tokens(20, 5)]).hessian)


def test_no_statistics_count_every_column_the_same():
    stats = Stats.none(4)
    assert (stats.hessian, stats.tokens) == (None, 0)
    assert torch.equal(stats.square_mean, torch.ones(4))


def test_a_site_that_saw_no_token_has_statistics_of_zero():
    stats = Accumulator(4, "hessian").result()
    assert stats.tokens == 0
    assert torch.equal(stats.hessian, torch.zeros(4, 4))


def sampled(batches):
    accumulator = Accumulator(batches[0].shape[1], "nothing", sample=True)
    for batch in batches:
        accumulator.add(batch)
    return accumulator.result().sample


def test_a_sample_of_few_values_holds_all_of_them_and_the_extremes_again():
    x = tokens(30, 7)
    sample = sampled(x.split(11))
    assert torch.equal(sample[:-2].sort().values, x.flatten().sort().values)
    assert torch.equal(sample[-2:], torch.stack([x.min(), x.max()]))


@pytest.mark.parametrize("parts", [1, 9])
def test_a_sample_of_many_values_is_bounded_and_fair_to_early_and_late_ones(parts):
    x = torch.arange(4.0 * SAMPLE).view(-1, 64)  # a value tells its place
    sample = sampled(x.tensor_split(parts))
    assert len(sample) == SAMPLE + 2
    assert torch.equal(sample[-2:], torch.tensor([0, 4.0 * SAMPLE - 1]))
    assert len(sample[:-2].unique()) == SAMPLE
    quarters = torch.bincount((sample[:-2] / SAMPLE).long())
    assert (quarters - SAMPLE / 4).abs().max() < 5 * (SAMPLE * 3 / 16) ** 0.5  # five standard deviations


def test_the_same_batches_give_the_same_sample():
    batches = torch.arange(2.0 * SAMPLE).view(-1, 64).split(1000)
    assert torch.equal(sampled(batches), sampled(batches))


def test_how_many_tokens_come_together_does_not_change_the_sample():
    x = torch.arange(2.0 * SAMPLE).view(-1, 64)
    assert torch.equal(sampled([x]).sort().values, sampled(x.split(77)).sort().values)


class Made(TorchDispatchMode):
    """Notes the size of the largest tensor that an operation makes."""

    numel = 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        made = operation(*arguments, **(options or {}))
        if not operation.is_view:
            self.numel = max([self.numel, *(t.numel() for t in tree_leaves(made) if isinstance(t, torch.Tensor))])
        return made


def test_a_sample_is_drawn_without_copies_of_all_activations():
    x = tokens(16 * SAMPLE // 64, 64)
    values = _Values("cpu")
    with Made() as made:
        values.add(x)
    assert len(values.result()) == SAMPLE + 2
    assert made.numel <= 2 * SAMPLE


def test_no_sample_is_kept_unless_asked_for():
    assert collected([tokens(5, 3)]).sample is None
