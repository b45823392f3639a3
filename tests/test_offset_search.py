import numpy as np
import pytest
import torch

from llmquant import blocks, offset_search
from llmquant.offset_search import fit_group, fit_super_block, super_block_levels

SUPER = {"q2_k": (16, 3, 15), "q4_k": (8, 15, 63), "q5_k": (8, 31, 63)}
every_super_block = pytest.mark.parametrize("sizes", SUPER.values(), ids=SUPER)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def squares(x, scale, offset, top):
    """Return the squared errors of x [n, groups, size] on the nearest levels, in float64."""
    x, scale, offset = x.double(), scale.double()[..., None], offset.double()[..., None]
    code = ((x - offset) / scale.where(scale != 0, 1)).round().clamp(0, top)
    return (x - scale * code - offset).square()


def group_error(w, importance, top):
    params = fit_group(w, importance, top)
    return (squares(w[:, None], params["d"], params["m"], top) * importance[:, None]).sum((1, 2))


def super_error(w, importance, sizes):
    groups, top, _ = sizes
    scale, offset = super_block_levels(fit_super_block(w, importance, *sizes))
    x, weight = w.view(len(w), groups, -1), importance.view(len(w), groups, -1)
    return (squares(x, scale, offset, top) * weight).sum((1, 2))


def exhaustive(w, importance, top, steps):
    """Return the least weighted squared error of each row over ``steps``² ranges, each refitted three times."""
    x, weight = w.double().numpy(), importance.double().numpy()
    low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
    step = (high - low) / top
    least = np.full(len(x), np.inf)
    for below in np.linspace(-1, 1.5, steps):
        for above in np.linspace(-1, 1.5, steps):
            if below + above > top - 1:
                continue
            offset, scale = low + below * step, step * (1 - (below + above) / top)
            for _ in range(4):
                code = ((x - offset) / scale).round().clip(0, top)
                least = np.minimum(least, (weight * (x - scale * code - offset) ** 2).sum(1))
                w_, wq, wqq = weight.sum(1), (weight * code).sum(1), (weight * code**2).sum(1)
                wx, wqx = (weight * x).sum(1), (weight * code * x).sum(1)
                determinant = w_ * wqq - wq**2
                scale = ((w_ * wqx - wq * wx) / determinant)[:, None]
                offset = ((wqq * wx - wq * wqx) / determinant)[:, None]
    return torch.from_numpy(least)


def rounding_at(x, weight, scale, offset, top):
    size = (*x.shape[:-1], 1)
    return offset_search.round_at(x, weight, torch.full(size, scale), torch.full(size, offset), top)


def test_the_error_of_held_codes_is_the_quadratic_of_their_sums():
    x, weight = normal(5, 32).double(), normal(5, 32, seed=1).double().square()
    rounding = rounding_at(x, weight, 0.25, -2.0, 15)
    code = ((x + 2) / 0.25).round().clamp(0, 15)
    for scale, offset in ((0.25, -2.0), (0.3, -1.7), (0.1, 0.4)):
        expected = (weight * (x - scale * code - offset).square()).sum(1, keepdim=True)
        got = rounding.error_at(torch.full((5, 1), scale), torch.full((5, 1), offset))
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


def test_a_refit_is_the_weighted_least_squares_solution():
    x, weight = normal(5, 32).double(), normal(5, 32, seed=1).double().square()
    rounding = rounding_at(x, weight, 0.25, -2.0, 15)
    best = rounding.best()
    code = ((x + 2) / 0.25).round().clamp(0, 15)
    for row in range(5):
        root = weight[row].sqrt()
        columns = torch.stack([root * code[row], root], dim=1)
        expected = np.linalg.lstsq(columns.numpy(), (root * x[row]).numpy(), rcond=None)[0]
        np.testing.assert_allclose([best[0][row].item(), best[1][row].item()], expected, rtol=1e-5)
    for offset in (-2.2, -1.5):
        scale = rounding.best_scale(torch.full((5, 1), offset))
        expected = (weight * code * (x - offset)).sum(1) / (weight * code * code).sum(1)
        torch.testing.assert_close(scale[:, 0], expected, rtol=1e-5, atol=0)
    for scale in (0.2, 0.3):
        offset = rounding.best_offset(torch.full((5, 1), scale))
        expected = (weight * (x - scale * code)).sum(1) / weight.sum(1)
        torch.testing.assert_close(offset[:, 0], expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("top", "limit"), [(15, 1.04), (31, 1.04)])
def test_a_group_errs_little_more_than_an_exhaustive_search(top, limit, weighted):
    w = normal(60, 32)
    importance = normal(60, 32, seed=1).exp() if weighted else torch.ones(60, 32)
    ratio = group_error(w, importance, top) / exhaustive(w, importance, top, 16)
    assert ratio.mean() < limit
    assert ratio.min() > 0.99  # the exhaustive search is one


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("name", "limit"), [("q2_k", 1.06), ("q4_k", 1.07), ("q5_k", 1.12)])
def test_a_super_block_errs_little_more_than_groups_with_free_scales(name, limit, weighted):
    groups, top, _ = SUPER[name]
    w = normal(20, 256)
    importance = normal(20, 256, seed=1).exp() if weighted else torch.ones(20, 256)
    free = exhaustive(w.view(20 * groups, -1), importance.view(20 * groups, -1), top, 12).view(20, groups).sum(1)
    ratio = super_error(w, importance, SUPER[name]).sum() / free.sum()
    assert 1 < ratio < limit


@every_super_block
def test_importance_moves_the_error_to_where_it_matters_less(sizes):
    w, ones = normal(50, 256), torch.ones(50, 256)
    importance = normal(1, 256, seed=1).exp().expand(50, -1)
    groups, top, _ = sizes

    def weighted(chosen_by):
        scale, offset = super_block_levels(fit_super_block(w, chosen_by, *sizes))
        return (squares(w.view(50, groups, -1), scale, offset, top).flatten(1) * importance).sum()

    assert weighted(importance) < 0.9 * weighted(ones)


@every_super_block
def test_mirrored_weights_get_mirrored_levels(sizes):
    w = normal(40, 256) + 0.5
    params, mirrored = (fit_super_block(x, torch.ones_like(w), *sizes) for x in (w, -w))
    for name in ("d", "dmin"):
        assert torch.equal(params[name], -mirrored[name])
    for name in ("scale", "minimum"):
        assert torch.equal(params[name], mirrored[name])
    assert (params["d"] > 0).any()
    assert (mirrored["d"] > 0).any()


@every_super_block
def test_positive_weights_far_from_zero_lose_no_levels(sizes):
    _, top, _ = sizes
    w = torch.rand(20, 256, generator=torch.Generator().manual_seed(0)) + 3
    ideal = 1 / 12 / top**2  # mean squared error of even levels over a range of 1
    assert super_error(w, torch.ones_like(w), sizes).mean() / 256 < 1.1 * ideal


@every_super_block
def test_weights_near_the_smallest_float16_are_kept(sizes):
    w = normal(20, 256)
    error = [super_error(w * size, torch.ones_like(w), sizes).sum() / size**2 for size in (1.0, 1e-5)]
    assert error[1] < 1.15 * error[0]


@every_super_block
@pytest.mark.parametrize("factor", [2.0**-40, 2.0**40])
def test_only_ratios_of_importances_count(sizes, factor):
    w, importance = normal(10, 256), normal(10, 256, seed=1).exp()
    for a, b in zip(
        fit_super_block(w, importance, *sizes).values(),
        fit_super_block(w, factor * importance, *sizes).values(),
        strict=True,
    ):
        assert torch.equal(a, b)


@every_super_block
def test_columns_without_activations_do_not_matter_and_break_nothing(sizes):
    w, importance = normal(10, 256), torch.ones(10, 256)
    importance[:, 64:128] = 0
    other = w.clone()
    other[:, 64:128] *= 0.5
    error = super_error(w, importance, sizes)
    torch.testing.assert_close(super_error(other, importance, sizes), error, rtol=0.06, atol=0)
    assert super_error(w, torch.ones_like(w), sizes).sum() < 1.1 * 256 / 192 * error.sum()
    none = fit_super_block(w, torch.zeros_like(w), *sizes)
    for name, value in fit_super_block(w, torch.ones_like(w), *sizes).items():
        assert torch.equal(none[name], value)


@every_super_block
def test_chunks_do_not_change_the_result(sizes, monkeypatch):
    w, importance = normal(9, 256), normal(9, 256, seed=1).exp()
    whole = fit_super_block(w, importance, *sizes)
    monkeypatch.setattr(blocks, "CHUNK", 2 * 256)
    for name, value in fit_super_block(w, importance, *sizes).items():
        assert torch.equal(whole[name], value)


@every_super_block
def test_float64_weights_are_searched_too(sizes):
    w, importance = normal(20, 256), torch.ones(20, 256)
    single, double = fit_super_block(w, importance, *sizes), fit_super_block(w.double(), importance, *sizes)
    assert [value.dtype for value in single.values()] == [value.dtype for value in double.values()]
    torch.testing.assert_close(super_error(w.double(), importance, sizes), super_error(w, importance, sizes).double())


@every_super_block
def test_an_outlier_does_not_spoil_the_other_groups(sizes):
    groups, top, _ = sizes
    w = normal(20, 256)

    def error_elsewhere(w):
        scale, offset = super_block_levels(fit_super_block(w, torch.ones_like(w), *sizes))
        return squares(w.view(20, groups, -1), scale, offset, top)[:, 1:].sum()

    with_outlier = w.clone()
    with_outlier[:, 5] = 30
    assert error_elsewhere(with_outlier) < 1.4 * error_elsewhere(w)
