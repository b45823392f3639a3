"""The GGUF tensor types: bytes that other programs decode to the same floats, and scales worth their search."""

import gguf
import numpy as np
import pytest
import torch

from llmquant import plugins
from llmquant.algorithms import gptq, rtn
from llmquant.exporters import gguf as exporter
from llmquant.exporters.gguf import mixtures
from llmquant.grid import BlockGrid, dequantize
from llmquant.stats import Stats

NAMES = [n for n in plugins.names("grids") if n.upper() in gguf.GGMLQuantizationType.__members__]
COLS = 512
ROWS = {
    "random": lambda g: torch.randn(4, COLS, generator=g),
    "zero": lambda g: torch.zeros(1, COLS),
    "constant": lambda g: torch.full((1, COLS), 0.37),
    "negative constant": lambda g: torch.full((1, COLS), -0.37),
    "one outlier": lambda g: torch.randn(2, COLS, generator=g).index_fill(1, torch.tensor([77]), 300.0),
    "one weight": lambda g: torch.zeros(1, COLS).index_fill(1, torch.tensor([300]), -2.0),
    "tiny": lambda g: torch.randn(2, COLS, generator=g) * 1e-30,
    "huge": lambda g: torch.randn(2, COLS, generator=g) * 1e30,
    "negative only": lambda g: -torch.rand(2, COLS, generator=g) - 0.1,
    "positive only": lambda g: torch.rand(2, COLS, generator=g) + 0.1,
}
every = pytest.mark.parametrize("name", NAMES)


def bound(name, rows=4, cols=COLS):
    return plugins.load("grids", name, "").Config().bind(rows, cols, torch.float32)


def judged(name, raw):
    """Return what the gguf package decodes bytes to."""
    with np.errstate(invalid="ignore"):  # random bytes may be no number
        values = gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType[name.upper()])
    return torch.from_numpy(np.array(values, np.float32))


def rounded(name, w, importance=None):
    square_mean = torch.ones(w.shape[1]) if importance is None else importance
    return rtn.quantize(w, Stats(None, square_mean, square_mean, 0), bound(name, *w.shape), rtn.Config(True))


def test_all_types_of_the_plan_are_there():
    assert set(NAMES) == {
        *("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs", "mxfp4")
    }


@every
def test_sizes_are_those_of_the_gguf_package(name):
    grid = bound(name)
    assert isinstance(grid, BlockGrid)
    assert (grid.span, grid.block_bytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]]
    assert grid.bits_per_weight == 8 * grid.block_bytes / grid.span
    assert grid == bound(name, 8, 256)


@every
@pytest.mark.parametrize("rows", ROWS)
def test_bytes_decode_to_the_same_floats_in_gguf(name, rows):
    w = ROWS[rows](torch.Generator().manual_seed(0))
    q = rounded(name, w)
    raw = exporter.pack(q)[""]
    assert raw.shape == (len(w), COLS // q.grid.span * q.grid.block_bytes)
    mine = dequantize(q)
    assert torch.isfinite(mine).all()
    assert torch.equal(judged(name, raw), mine)


@every
def test_any_bytes_are_read_as_the_gguf_package_reads_them(name):
    grid = bound(name)
    raw = torch.randint(0, 256, (200, grid.block_bytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    wanted = judged(name, raw)
    sound = torch.isfinite(wanted).all(1)
    codes, params = grid.from_bytes(raw[sound])
    scale, offset = grid.levels(params)
    spread = (scale.repeat_interleave(grid.group, 1), offset.repeat_interleave(grid.group, 1))
    assert sound.sum() > 100
    assert torch.equal(spread[0] * grid.table[codes.long()] + spread[1], wanted[sound])
    again = grid.to_bytes(codes, params)
    assert torch.equal(judged(name, again), wanted[sound])
    if name != "mxfp4":  # it has two zeros
        assert torch.equal(again, raw[sound])


@every
def test_sizes_are_known_without_numbers(name):
    grid = bound(name)
    wished = torch.empty(3, grid.span // grid.group, device="meta")
    codes = torch.empty(3, grid.span, dtype=torch.uint8, device="meta")
    assert grid.to_bytes(codes, grid.store(wished, wished)).shape == (3, grid.block_bytes)


@every
def test_what_is_stored_is_near_to_what_was_wished_for(name):
    grid = bound(name)
    generator = torch.Generator().manual_seed(2)
    scale = torch.rand(50, grid.span // grid.group, generator=generator) + 0.5
    offset = -torch.rand(scale.shape, generator=generator) - 0.5
    stored_scale, stored_offset = grid.levels(grid.store(scale, offset))
    coarse = {"q2_k": 0.06, "q3_k": 0.04, "iq4_xs": 0.04, "q4_k": 0.02, "q5_k": 0.02, "q6_k": 0.01, "mxfp4": 0.42}
    assert float(((stored_scale - scale).abs() / scale.amax()).max()) < coarse.get(name, 1e-3)
    if stored_offset.any():
        assert float((stored_offset - offset).abs().max()) < 1.5 * coarse.get(name, 1e-3)


units = pytest.mark.parametrize("name", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs"])


@units
def test_in_near_units_levels_that_all_grow_keep_their_integers(name):
    grid = bound(name)
    scale, offset = torch.rand(2, 50, grid.span // grid.group, generator=torch.Generator().manual_seed(2)) + 0.5
    near = grid.store(scale, -offset)
    wished = [share * levels for share, levels in zip((1.3, 0.6), grid.levels(near), strict=True)]
    params = grid.store_near(near, *wished)
    for key, value in params.items():
        assert value.dtype == near[key].dtype
        assert value.is_floating_point() or torch.equal(value, near[key]), key
    for found, wish in zip(grid.levels(params), wished, strict=True):
        torch.testing.assert_close(found, wish, rtol=1e-3, atol=0)


@units
def test_in_near_units_integers_that_were_0_follow(name):
    grid = bound(name)
    scale, offset = torch.rand(2, 50, grid.span // grid.group, generator=torch.Generator().manual_seed(2)) + 0.5
    params = grid.store_near(grid.store(0 * scale, 0 * offset), scale, -offset)
    assert float((grid.levels(params)[0] - scale).abs().max()) < 0.1
    if "minimum" in params:
        assert float((grid.levels(params)[1] + offset).abs().max()) < 0.1


@every
def test_importance_moves_the_error_to_where_it_does_not_count(name):
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(64, COLS, generator=generator)
    importance = torch.rand(COLS, generator=generator) ** 6 + 1e-3

    def error(q):
        return float(((dequantize(q) - w).square() * importance).sum())

    assert error(rounded(name, w, importance)) < error(rounded(name, w)) * (1.0 if name == "mxfp4" else 0.97)


@every
@pytest.mark.parametrize("actorder", [False, True])
def test_gptq_works_on_every_type(name, actorder):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(1024, COLS, generator=generator)
    x = x @ (torch.randn(COLS, COLS, generator=generator) / COLS**0.5 + torch.eye(COLS))
    hessian = x.T @ x / len(x)
    stats = Stats(hessian, hessian.diagonal(), x.abs().mean(0), len(x))
    w = torch.randn(32, COLS, generator=generator)

    def error(q):
        delta = dequantize(q) - w
        return float(((delta @ hessian) * delta).sum())

    grid = bound(name, 32)
    better = error(gptq.quantize(w, stats, grid, gptq.Config(actorder=actorder)))
    assert better < 0.9 * error(rtn.quantize(w, stats, grid, rtn.Config(True)))


@every
def test_what_stands_in_for_a_shape_is_what_the_mixtures_say(name):
    substitute = plugins.load("grids", name, "").Config().substitute()
    assert (substitute[0] if substitute else None) == mixtures.SUBSTITUTES.get(name)
