"""The GGUF types with an offset, judged by the decoders of PyPI's gguf package."""

import importlib

import gguf
import numpy as np
import pytest
import torch

from llmquant.algorithms import gptq, rtn
from llmquant.errors import ShapeError
from llmquant.grid import BlockGrid, QuantizedTensor, decode, dequantize, encode, fit_all, per_column
from llmquant.stats import Stats

NAMES = ["q4_1", "q5_1", "q2_k", "q4_k", "q5_k"]
COLS = 512

every_type = pytest.mark.parametrize("grid", NAMES, indirect=True)


@pytest.fixture
def grid(request):
    return importlib.import_module(f"llmquant.grids.{request.param}").Config().bind(4, COLS, torch.float16)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded(grid, w, importance=None):
    params = fit_all(grid, w, torch.ones(w.shape[1]) if importance is None else importance)
    return QuantizedTensor(grid, encode(grid, w, *per_column(grid, params)), params)


def blocks_of(q):
    """Return the bytes of a quantized matrix, [rows, row_bytes]."""
    params = {name: value.flatten(0, 1) for name, value in q.params.items()}
    return q.grid.to_bytes(q.codes.view(-1, q.grid.span), params).view(len(q.codes), -1)


def in_gguf(grid, blocks):
    return gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[grid.name.upper()])


def odd_rows():
    w = normal(1, COLS)
    spread = w.abs() + 0.1
    outlier, few = w.clone(), torch.zeros(1, COLS)
    outlier[0, 77] = 300
    few[0, ::37] = 1.5
    return {
        "random": w,
        "small": w * 1e-5,
        "zero": torch.zeros(1, COLS),
        "constant": torch.full((1, COLS), 0.3),
        "negative constant": torch.full((1, COLS), -0.3),
        "outlier": outlier,
        "few": few,
        "a group of zeros": w * (torch.arange(COLS) >= 64),
        "tiny": w * 1e-30,
        "huge": w * 1e30,
        "negative": -spread,
        "positive": spread,
        "far from zero": spread + 50,
    }


@every_type
@pytest.mark.parametrize("row", odd_rows())
def test_bytes_decode_to_the_same_floats_in_gguf(grid, row):
    q = rounded(grid, odd_rows()[row])
    assert torch.isfinite(dequantize(q)).all()
    assert blocks_of(q).shape == (1, COLS // grid.span * grid.block_bytes)
    np.testing.assert_array_equal(in_gguf(grid, blocks_of(q)).view(np.uint32), dequantize(q).numpy().view(np.uint32))


@every_type
def test_odd_rows_are_kept_to_the_precision_of_the_format(grid):
    step = 1 / (len(grid.table) - 1)
    for name, w in odd_rows().items():
        if name in ("tiny", "huge"):  # float16 factors hold neither
            continue
        error = (dequantize(rounded(grid, w)) - w).abs()
        width = w.max().clamp(min=0) - w.min().clamp(max=0)
        assert error.max() <= 0.75 * step * width, name
        assert (error[:, :64] == 0).all() or name not in ("zero", "a group of zeros")


@every_type
def test_weights_too_large_for_the_format_become_its_largest(grid):
    w = torch.where(normal(1, COLS) > 0, 1e30, -1e30)
    assert (dequantize(rounded(grid, w)) * w.sign() > 60000).all()


@every_type
def test_any_bytes_survive_reading_and_writing(grid):
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (200, grid.block_bytes), dtype=torch.uint8, generator=generator)
    codes, params = grid.from_bytes(blocks)
    assert codes.shape == (200, grid.span)
    assert codes.max() == len(grid.table) - 1
    assert torch.equal(grid.to_bytes(codes, params), blocks)


@every_type
def test_any_block_is_read_as_gguf_reads_it(grid):
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (200, grid.block_bytes), dtype=torch.uint8, generator=generator)
    codes, params = grid.from_bytes(blocks)
    finite = torch.stack([v.isfinite().all(1) for v in params.values() if v.dtype == torch.float16]).all(0)
    assert finite.sum() > 150
    scale, offset = (value.repeat_interleave(grid.group, 1) for value in grid.levels(params))
    ours = decode(grid, codes, scale, offset)[finite]
    np.testing.assert_array_equal(ours.numpy(), in_gguf(grid, blocks[finite]))


@every_type
def test_the_size_of_a_tensor_is_known_without_its_data(grid):
    w = torch.zeros(2, COLS)
    q = rounded(grid, w)
    params = {name: value.flatten(0, 1).to("meta") for name, value in q.params.items()}
    blocks = grid.to_bytes(q.codes.view(-1, grid.span).to("meta"), params)
    assert blocks.is_meta
    assert blocks.numel() == w.numel() * grid.bits_per_weight / 8
    codes, read = grid.from_bytes(blocks)
    assert codes.shape == (2 * COLS // grid.span, grid.span)
    assert {name: value.shape for name, value in read.items()} == {name: value.shape for name, value in params.items()}


@every_type
def test_a_type_has_the_sizes_that_gguf_gives_it(grid):
    assert isinstance(grid, BlockGrid)
    sizes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[grid.name.upper()]]
    assert (grid.span, grid.block_bytes) == sizes


@every_type
def test_columns_that_are_no_whole_blocks_are_refused(grid):
    config = importlib.import_module(f"llmquant.grids.{grid.name}").Config()
    with pytest.raises(ShapeError, match=rf"{grid.span + 16} columns .* {grid.span}, which {grid.name} needs"):
        config.bind(8, grid.span + 16, torch.float16)


@pytest.mark.parametrize(("name", "stand_in"), [("q2_k", "q4_0"), ("q4_k", "q5_0"), ("q5_k", "q5_1")])
def test_what_stands_in_for_a_refused_shape_is_what_llama_cpp_takes(name, stand_in):
    name_, config = importlib.import_module(f"llmquant.grids.{name}").Config().substitute()
    assert name_ == stand_in
    assert config.bind(8, 96, torch.float16).name == stand_in


@pytest.mark.parametrize("name", ["q4_1", "q5_1"])
def test_nothing_stands_in_for_blocks_of_32(name):
    assert importlib.import_module(f"llmquant.grids.{name}").Config().substitute() is None


@every_type
def test_levels_that_a_block_holds_are_stored_without_change(grid):
    generator = torch.Generator().manual_seed(0)
    groups = grid.span // grid.group
    params = fit_all(grid, normal(20, COLS), torch.ones(COLS))
    params = {name: value.flatten(0, 1) for name, value in params.items()}
    for name in params.keys() & {"scale", "minimum"}:
        top = params[name].max()
        params[name] = torch.randint(int(top), (len(params["d"]), groups), dtype=torch.uint8, generator=generator)
        params[name][:, 0] = 15 if grid.name == "q2_k" else 63  # a block that wastes no integer
    for name, value in grid.store(*grid.levels(params)).items():
        assert value.dtype == params[name].dtype
        assert torch.equal(value, params[name]), name


@every_type
def test_wished_for_levels_are_stored_nearer_than_half_a_step(grid):
    groups = grid.span // grid.group
    scale, offset = normal(30, groups).abs() + 0.1, -normal(30, groups, seed=1).abs()
    steps = 2**-10 if groups == 1 else 0.51 / (15 if grid.name == "q2_k" else 63)
    for wished, stored in zip((scale, offset), grid.levels(grid.store(scale, offset)), strict=True):
        # the mean of their squares: what the plainest unit, the largest over the largest integer, would leave at most
        far = (wished - stored).square().mean(1).sqrt()
        assert (far <= steps * wished.abs().amax(1)).all()


@every_type
def test_gptq_errs_less_than_plain_rounding(grid):
    mixing = normal(COLS, COLS) + 4 * normal(1, COLS, seed=1)
    activations = normal(2048, COLS, seed=2) @ mixing
    hessian = activations.T @ activations / 2048
    stats = Stats(hessian, hessian.diagonal(), activations.abs().mean(0), 2048)
    w = normal(16, COLS, seed=3)

    def output_error(q):
        difference = (dequantize(q) - w).double()
        return float((difference @ hessian.double() * difference).sum())

    plain = output_error(rtn.quantize(w, stats, grid, rtn.Config(calibrated=True)))
    assert output_error(gptq.quantize(w, stats, grid, gptq.Config())) < 0.7 * plain
    assert output_error(gptq.quantize(w, stats, grid, gptq.Config(actorder=True))) < 0.7 * plain


def test_two_weights_of_one_type_share_a_grid_and_others_do_not():
    grids = [importlib.import_module(f"llmquant.grids.{name}").Config().bind(4, COLS, torch.float16) for name in NAMES]
    assert len(set(grids)) == len(NAMES)
    assert grids[0] == importlib.import_module("llmquant.grids.q4_1").Config().bind(9, 64, torch.bfloat16)
