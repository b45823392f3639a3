from dataclasses import replace

import pytest
import torch

from llmquant.algorithms import gptq, rtn
from llmquant.errors import CalibrationError
from llmquant.grid import dequantize, fit_all, per_column
from llmquant.grids import affine
from llmquant.stats import Stats

OPTIONS = {
    "plain": gptq.Config(),
    "static_groups": gptq.Config(static_groups=True),
    "actorder": gptq.Config(actorder=True),
}
options = pytest.mark.parametrize("config", OPTIONS.values(), ids=OPTIONS)
strategies = pytest.mark.parametrize("strategy", ["group", "channel", "tensor"])


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def activations(tokens, cols, dtype=torch.float64):
    """Columns of very different size that depend on each other, as in a real layer."""
    mix = normal(cols, cols, seed=1) / cols**0.5 + torch.eye(cols)
    return (normal(tokens, cols, seed=2) @ mix * (normal(cols, seed=3)).exp()).to(dtype)


def stats_of(hessian):
    diagonal = hessian.diagonal()
    return Stats(hessian, diagonal, diagonal.sqrt(), 1)


def hessian_of(x):
    return x.T @ x / len(x)


def grid_for(w, bits=4, strategy="group", group_size=8, **settings):
    return affine.Config(bits, group_size, strategy, **settings).bind(*w.shape, torch.float32)


def brain_surgeon(w, hessian, grid, config):
    """Return codes by optimal brain quantization, straight from its formulas and without any factorisation.

    Source: Frantar and Alistarh 2022, https://arxiv.org/abs/2208.11580: round column c, add
    -(error of c) / inverse[c, c] * inverse[c] to all columns that are left, and take c out of the inverse by one step
    of Gaussian elimination.
    """
    cols = w.shape[1]
    mean = hessian.diagonal().mean()
    inverse = torch.linalg.inv(hessian + config.dampening_frac * mean * torch.eye(cols, dtype=w.dtype))
    fitted = fit_all(grid, w, hessian.diagonal())
    scale, offset = (t.double() for t in per_column(grid, fitted))
    order = sorted(range(cols), key=lambda c: -hessian[c, c]) if config.actorder else range(cols)
    w, codes = w.clone(), torch.empty_like(w, dtype=torch.uint8)
    for c in order:
        if c % grid.span == 0 and not (config.actorder or config.static_groups):
            span = slice(c, c + grid.span)
            own = fit_all(grid, w[:, span], hessian.diagonal()[span])
            scale[:, span], offset[:, span] = per_column(grid, own)
        levels = scale[:, c, None] * grid.table + offset[:, c, None]
        codes[:, c] = (levels - w[:, c, None]).abs().argmin(1)
        error = w[:, c] - levels.gather(1, codes[:, c, None].long())[:, 0]
        w -= torch.outer(error, inverse[c] / inverse[c, c])
        inverse = inverse - torch.outer(inverse[:, c], inverse[c]) / inverse[c, c]
    return codes


@options
@strategies
@pytest.mark.parametrize(("bits", "observer"), [(2, "mse"), (3, "minmax"), (8, "minmax")])
def test_the_codes_are_those_of_optimal_brain_quantization(config, strategy, bits, observer):
    w = normal(12, 24)
    hessian = hessian_of(activations(64, 24))
    grid = grid_for(w, bits, strategy, symmetric=False, observer=observer)
    codes = gptq.quantize(w, stats_of(hessian), grid, config).codes
    assert torch.equal(codes, brain_surgeon(w, hessian, grid, config))


@options
@strategies
def test_the_block_size_does_not_change_the_result(config, strategy):
    w, stats = normal(16, 24), stats_of(hessian_of(activations(64, 24)))
    results = [
        gptq.quantize(w, stats, grid_for(w, 3, strategy), replace(config, block_size=size)) for size in (1, 3, 7, 128)
    ]
    for other in results[1:]:
        assert torch.equal(other.codes, results[0].codes)
        assert torch.equal(other.params["scale"], results[0].params["scale"])


@options
@strategies
def test_without_correlation_it_is_rounding_to_nearest(config, strategy):
    w = normal(8, 32, dtype=torch.float32)
    grid = grid_for(w, 4, strategy)
    ours = gptq.quantize(w, stats_of(torch.eye(32)), grid, config)
    nearest = rtn.quantize(w, Stats.none(32), grid, rtn.Config())
    assert torch.equal(ours.codes, nearest.codes)
    assert torch.equal(dequantize(ours), dequantize(nearest))


@options
@strategies
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_its_output_error_is_below_that_of_rounding_to_nearest(config, strategy, bits):
    w, x = normal(24, 32, dtype=torch.float32), activations(256, 32, dtype=torch.float32)
    grid, stats = grid_for(w, bits, strategy, group_size=16), stats_of(hessian_of(x))

    def error(q):
        return float((x.double() @ (dequantize(q) - w).double().T).square().sum())

    ours = error(gptq.quantize(w, stats, grid, config))
    assert ours < 0.9 * error(rtn.quantize(w, stats, grid, rtn.Config(calibrated=True)))


@pytest.mark.parametrize("name", ["actorder", "static_groups"])
@strategies
def test_static_scales_are_those_of_the_original_weights(name, strategy):
    w, hessian = normal(8, 32), hessian_of(activations(64, 32))
    grid = grid_for(w, 3, strategy, symmetric=False, observer="mse")
    q = gptq.quantize(w, stats_of(hessian), grid, OPTIONS[name])
    for key, value in fit_all(grid, w, hessian.diagonal()).items():
        assert torch.equal(q.params[key], value)


@options
def test_stacked_matrices_become_what_each_becomes_alone(config):
    first, second = normal(5, 32), normal(9, 32, seed=9)
    stats, grid = stats_of(hessian_of(activations(64, 32))), grid_for(first)
    both = gptq.quantize(torch.cat([first, second]), stats, grid, config)
    for alone, rows in ((first, slice(0, 5)), (second, slice(5, 14))):
        q = gptq.quantize(alone, stats, grid, config)
        assert torch.equal(both.codes[rows], q.codes)
        assert torch.equal(both.params["scale"][rows], q.params["scale"])


@options
def test_columns_without_activations_are_rounded_to_nearest_and_disturb_no_other(config):
    dead = [3, 17]
    x = activations(64, 32)
    x[:, dead] = 0
    w = normal(8, 32)
    w[:, ::8] *= 3  # these hold the largest weights, so that the dead ones do not move any scale
    w[:, dead] = w[:, dead].clamp(-0.5, 0.5)
    stats = stats_of(hessian_of(x))
    grid = grid_for(w, 4, "channel")
    q = gptq.quantize(w, stats, grid, config)
    scale, offset = per_column(grid, q.params)
    nearest = ((w - offset) / scale).round()
    assert torch.equal(q.codes[:, dead].double(), nearest[:, dead])

    assert gptq.quantize(w, stats, grid, replace(config, dampening_frac=0.0)).record["damping"] == 0

    w[:, dead] = -w[:, dead]
    alive = [c for c in range(32) if c not in dead]
    assert torch.equal(gptq.quantize(w, stats, grid, config).codes[:, alive], q.codes[:, alive])


def test_a_hessian_of_zeros_gives_rounding_to_nearest():
    w = normal(4, 16, dtype=torch.float32)
    grid = grid_for(w)
    q = gptq.quantize(w, stats_of(torch.zeros(16, 16)), grid, gptq.Config())
    assert torch.equal(q.codes, rtn.quantize(w, Stats.none(16), grid, rtn.Config()).codes)


def test_a_hessian_that_cannot_be_factorised_climbs_the_damping_and_says_so():
    w = normal(4, 16)
    alike = stats_of(torch.ones(16, 16, dtype=torch.float64))  # every token the same, every column the same
    q = gptq.quantize(w, alike, grid_for(w), gptq.Config(dampening_frac=0.0))
    assert 0 < q.record["damping"] <= 1
    assert torch.isfinite(dequantize(q)).all()
    # one input with weight sum(w) a row: feedback must keep the sums, to half a step of the last column
    error = (dequantize(q) - w).sum(1).abs()
    assert (error <= q.params["scale"][:, -1, 0].double() * 0.51).all()


@pytest.mark.parametrize("damping", [0.0, 0.01, 0.5])
def test_a_sound_hessian_is_damped_as_asked(damping):
    w = normal(4, 16)
    q = gptq.quantize(w, stats_of(hessian_of(activations(64, 16))), grid_for(w), gptq.Config(damping))
    assert q.record["damping"] == damping


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [(2, 2), (2, 5)], ids=["diagonal", "beside"])
def test_a_hessian_that_is_not_finite_is_refused(value, place):
    w, hessian = normal(4, 16), hessian_of(activations(64, 16))
    hessian[place] = hessian[place[::-1]] = value
    with pytest.raises(CalibrationError):
        gptq.quantize(w, stats_of(hessian), grid_for(w), gptq.Config())


def test_a_hessian_with_a_negative_eigenvalue_is_refused_with_the_remedy():
    w, hessian = normal(4, 16), torch.eye(16, dtype=torch.float64)
    hessian[0, 1] = hessian[1, 0] = 9
    with pytest.raises(CalibrationError, match=r"16 columns.*more calibration tokens"):
        gptq.quantize(w, stats_of(hessian), grid_for(w), gptq.Config())


@options
def test_the_arguments_are_not_changed(config):
    w, hessian = normal(4, 16), hessian_of(activations(64, 16))
    hessian[3] = hessian[:, 3] = 0
    before = w.clone(), hessian.clone()
    gptq.quantize(w, stats_of(hessian), grid_for(w), config)
    assert torch.equal(w, before[0])
    assert torch.equal(hessian, before[1])
