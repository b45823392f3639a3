import numpy as np
import pytest
import torch

from llmquant import blocks
from llmquant.grids import iq4_nl, iq4_xs, q3_k, q4_0, q5_0, q6_k, q8_0
from llmquant.scale_search import fit_group, fit_super_block, round_at, store_super_block, super_block_levels

GROUP = {
    "q4_0": (q4_0.Q4_0, q4_0),
    "q5_0": (q5_0.Q5_0, q5_0),
    "q8_0": (q8_0.Q8_0, q8_0),
    "iq4_nl": (iq4_nl.IQ4_NL, iq4_nl),
}
SUPER = {
    "q3_k": (q3_k.Q3_K, q3_k, 16, -32),
    "q6_k": (q6_k.Q6_K, q6_k, 16, -128),
    "iq4_xs": (iq4_xs.IQ4_XS, iq4_nl, 8, -32),
}
every_super_block = pytest.mark.parametrize("name", SUPER)
every = pytest.mark.parametrize("name", [*GROUP, *SUPER])


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def table_of(name):
    return (GROUP | SUPER)[name][0]().table


def fit(name, w, importance=None):
    importance = torch.ones_like(w) if importance is None else importance
    if name in GROUP:
        return fit_group(w.reshape(-1, 32), importance.reshape(-1, 32), table_of(name), GROUP[name][1].STARTS)
    _, module, groups, lowest = SUPER[name]
    return fit_super_block(w, importance, table_of(name), module.STARTS, groups, lowest)


def scales(params):
    return params["d"].double() * params["scale"].double() if "scale" in params else params["d"].double()


def squares(w, scale, table):
    """Return the squared errors of w [n, cols] on the nearest of all levels, in float64 and by brute force."""
    x = w.double().reshape(scale.numel(), -1)
    levels = scale.reshape(-1, 1, 1) * table.double()
    return (x[:, :, None] - levels).abs().amin(2).square().reshape(w.shape)


def error(name, w, importance=None):
    found = squares(w, scales(fit(name, w, importance)), table_of(name))
    return float(found.sum() if importance is None else (found * importance).sum())


def exhaustive(w, importance, table, steps):
    """Return the least weighted squared error of each row over ``steps`` scales of either sign, each refitted twice."""
    x, weight, table = w.double().numpy(), importance.double().numpy(), table.double().numpy()
    middles = (table[1:] + table[:-1]) / 2
    largest = np.abs(x).max(1, keepdims=True)
    least = np.full(len(x), np.inf)
    for share in np.linspace(0.7, 1.9, steps):
        for sign in (-1, 1):
            scale = sign * share * largest / np.abs(table).max()
            for _ in range(3):
                level = table[np.searchsorted(middles, x / scale)]
                least = np.minimum(least, (weight * (x - scale * level) ** 2).sum(1))
                scale = (weight * x * level).sum(1, keepdims=True) / (weight * level**2).sum(1, keepdims=True)
    return torch.from_numpy(least)


@pytest.mark.parametrize("name", ["q4_0", "iq4_nl"])
def test_the_error_of_held_codes_is_the_quadratic_of_their_sums(name):
    x, weight = normal(5, 32).double(), normal(5, 32, seed=1).double().square()
    table = table_of(name).double()
    start = torch.full((5, 1), 2.5 / float(table[-1]), dtype=torch.float64)
    rounding = round_at(x, weight, start, table)
    level = table[(x[:, :, None] - start[:, :, None] * table).abs().argmin(2)]
    for share in (1.0, 1.3, -0.4):
        expected = (weight * (x - share * start * level).square()).sum(1, keepdim=True)
        torch.testing.assert_close(rounding.error_at(share * start), expected)
    for row in range(5):
        root = weight[row].sqrt()
        expected = np.linalg.lstsq((root * level[row])[:, None].numpy(), (root * x[row]).numpy(), rcond=None)[0]
        np.testing.assert_allclose(rounding.best_scale()[row], expected, rtol=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("name", "limit"), [("q4_0", 1.06), ("iq4_nl", 1.03), ("q5_0", 1.08), ("q8_0", 1.2)])
def test_a_group_errs_little_more_than_an_exhaustive_search(name, limit, weighted):
    w = normal(100, 32)
    importance = normal(100, 32, seed=1).exp() if weighted else torch.ones(100, 32)
    ours = error(name, w, importance)
    assert 0.98 < ours / exhaustive(w, importance, table_of(name), 300).sum() < limit


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("name", "limit"), [("q3_k", 1.03), ("iq4_xs", 1.05), ("q6_k", 1.13)])
def test_a_super_block_errs_little_more_than_groups_with_free_scales(name, limit, weighted):
    w = normal(12, 256)
    importance = normal(12, 256, seed=1).exp() if weighted else torch.ones(12, 256)
    size = 256 // SUPER[name][2]
    free = exhaustive(w.view(-1, size), importance.view(-1, size), table_of(name), 200).sum()
    assert 1 < error(name, w, importance) / free < limit


@every
def test_importance_moves_the_error_to_where_it_matters_less(name):
    w, importance = normal(40, 256), normal(1, 256, seed=1).exp().expand(40, -1)
    plain = squares(w, scales(fit(name, w)), table_of(name))
    assert error(name, w, importance) < 0.92 * float((plain * importance).sum())


@every
def test_mirrored_weights_get_mirrored_levels(name):
    w = normal(40, 256)
    params, mirrored = fit(name, w), fit(name, -w)
    assert torch.equal(params.pop("d"), -mirrored.pop("d"))
    assert all(torch.equal(params[key], mirrored[key]) for key in params)


@every
def test_weights_twice_as_large_get_twice_the_scale(name):
    w = normal(40, 256)
    params, double = fit(name, w), fit(name, 2 * w)
    assert torch.equal(2 * params.pop("d"), double.pop("d"))
    assert all(torch.equal(params[key], double[key]) for key in params)


@every
def test_weights_that_the_format_holds_are_kept(name):
    """Ours again, and whatever another program made of the same type: requantizing costs nothing."""
    table, generator = table_of(name), torch.Generator().manual_seed(0)
    w = normal(20, 256)
    scale = scales(fit(name, w)).float().reshape(20, -1, 1)
    level = table[(w.reshape(20, scale.shape[1], -1, 1) - scale[..., None] * table).abs().argmin(3)]
    held = (scale * level).reshape(20, 256)
    assert error(name, held) < 1e-3 * error(name, w)
    anything = torch.randint(len(table), (20, 8, 32), generator=generator)
    anything[..., 0] = 0  # others put the largest weight of a group on the level of largest magnitude
    scale = (torch.rand(20, 8, 1, generator=generator) + 0.5).half().float()
    if name in GROUP:
        assert error(name, (scale * table[anything]).reshape(20, 256)) < 1e-3 * float(scale.square().sum() * 32 / 12)


@every_super_block
def test_negative_scales_are_used(name):
    """The one level more on the negative side serves the larger sign of each group."""
    assert (fit(name, normal(20, 256))["scale"].sign().unique() == torch.tensor([-1, 1])).all()


@every_super_block
def test_a_group_of_zeros_has_no_error_and_an_outlier_spoils_no_other_group(name):
    size = 256 // SUPER[name][2]
    w = normal(20, 256)
    w[:, :size] = 0
    found = squares(w, scales(fit(name, w)), table_of(name))
    assert (found[:, :size] == 0).all()
    w[:, 5] = 30 * w.abs().amax(1) / 10
    spoiled = squares(w, scales(fit(name, w)), table_of(name))
    assert spoiled[:, size:].sum() < 1.2 * found[:, size:].sum()


@every
def test_weights_near_the_smallest_float16_are_kept(name):
    w = normal(40, 256)
    small = error(name, w * 1e-3) / 1e-6
    assert small < 1.04 * error(name, w)
    if name in SUPER:  # integers do what a subnormal factor cannot
        assert error(name, w * 2e-5) / 4e-10 < 1.3 * error(name, w)


@every
@pytest.mark.parametrize("size", [1e-40, 1e-38, 1e-30, 1e-20, 1e-9])
def test_weights_too_small_for_the_format_become_zero(name, size):
    w = normal(4, 256) * size
    w[:, ::3] = 0
    assert (scales(fit(name, w)).abs() < 1e-7).all()


@every
@pytest.mark.parametrize("factor", [2.0**-40, 2.0**40])
def test_only_ratios_of_importances_count(name, factor):
    w, importance = normal(10, 256), normal(10, 256, seed=1).exp()
    one, other = fit(name, w, importance), fit(name, w, factor * importance)
    assert all(torch.equal(one[key], other[key]) for key in one)


@every
def test_no_importance_at_all_means_the_same_for_all(name):
    w = normal(10, 256)
    one, other = fit(name, w), fit(name, w, torch.zeros_like(w))
    assert all(torch.equal(one[key], other[key]) for key in one)


@every
def test_columns_without_activations_only_move_the_starts(name):
    w, importance = normal(200, 256), torch.ones(200, 256)
    importance[:, 1::2] = 0
    bent = w.clone()
    bent[:, 1::2] *= 0.9
    torch.testing.assert_close(error(name, bent, importance), error(name, w, importance), rtol=0.1, atol=0)
    assert error(name, w, importance) < 0.5 * error(name, w)


@every
def test_chunks_do_not_change_the_result(name, monkeypatch):
    w, importance = normal(9, 256), normal(9, 256, seed=1).exp()
    whole = fit(name, w, importance)
    monkeypatch.setattr(blocks, "CHUNK", 2 * 256)
    parts = fit(name, w, importance)
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


@every
def test_float64_weights_are_searched_too(name):
    w = normal(40, 256)
    single, double = fit(name, w), fit(name, w.double())
    assert [value.dtype for value in single.values()] == [value.dtype for value in double.values()]
    assert error(name, w.double()) == pytest.approx(error(name, w), rel=1e-3)


@every_super_block
def test_stored_scales_are_the_nearest(name):
    lowest = SUPER[name][3]
    wished = normal(30, SUPER[name][2]) + 0.3
    found, offset = super_block_levels(store_super_block(wished, lowest))
    assert not offset.any()
    assert ((found - wished).abs() <= wished.abs().amax(1, keepdim=True) / (-lowest - 1)).all()
    plain = (wished.abs().amax(1, keepdim=True) / (-lowest - 1)).half().float()
    rounded = (wished / plain).round().clamp(lowest, -lowest - 1) * plain
    assert (found - wished).square().sum() <= (rounded - wished).square().sum()
