"""The judge is torch's own conversion to float8_e4m3fn."""

import pytest
import torch

from llmquant.algorithms import gptq, rtn
from llmquant.grid import dequantize
from llmquant.grids import fp8
from llmquant.stats import Accumulator, Stats


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded(w, **config):
    grid = fp8.Config(**config).bind(*w.shape, torch.float32)
    return rtn.quantize(w, Stats.none(w.shape[1]), grid, rtn.Config())


def test_the_levels_are_all_finite_values_of_the_type():
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    finite = every[every.isfinite()].unique()
    assert torch.equal(fp8.Config().bind(1, 1, torch.float32).table, finite)


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_weights_become_what_the_type_makes_of_them(strategy):
    w = normal(20, 64) * normal(20, 1, seed=1).exp()
    q = rounded(w, strategy=strategy, scale_dtype="float32")
    scale = (w.abs().amax(1, keepdim=True) if strategy == "channel" else w.abs().max()) / 448
    expected = (w / scale).to(torch.float8_e4m3fn).float() * scale
    torch.testing.assert_close(dequantize(q), expected, rtol=1e-6, atol=0)
    assert q.grid.bits_per_weight == 8 + 32 / (64 if strategy == "channel" else 20 * 64)


def test_a_searched_scale_leaves_less_of_the_weighted_error():
    w, importance = normal(8, 64), normal(64, seed=1).exp()
    stats = Stats(None, importance, importance.sqrt(), 1)
    error = {}
    for observer in ("minmax", "mse"):
        grid = fp8.Config(observer=observer).bind(8, 64, torch.float32)
        q = rtn.quantize(w, stats, grid, rtn.Config(calibrated=True))
        error[observer] = ((dequantize(q) - w).square() * importance).sum(1)
    assert (error["mse"] <= error["minmax"]).all()
    assert error["mse"].sum() < error["minmax"].sum()


def test_gptq_leaves_less_error_at_the_output_than_rounding():
    w, x = normal(32, 64), normal(500, 64, seed=1) @ normal(64, 64, seed=2)
    accumulator = Accumulator(64, "hessian")
    accumulator.add(x)
    stats = accumulator.result()
    grid = fp8.Config().bind(32, 64, torch.float32)
    error = [
        ((dequantize(module.quantize(w, stats, grid, module.Config())) - w) @ x.T).norm() for module in (gptq, rtn)
    ]
    assert error[0] < 0.9 * error[1]
