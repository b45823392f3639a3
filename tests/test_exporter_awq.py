"""The judge of the layout is a slow reader of the format's definition: Python integers, one value at a time."""

import math

import pytest
import torch

from llmquant.errors import CheckpointError, FormatError
from llmquant.exporters import awq
from llmquant.grid import QuantizedTensor, dequantize, encode_all, fit_all
from llmquant.grids import affine, q4_k

NIBBLE_OF_OUTPUT = {0: 0, 1: 4, 2: 1, 3: 5, 4: 2, 5: 6, 6: 3, 7: 7}  # which four bits of its word an output takes


def quantized(rows=24, cols=96, **config):
    settings = {"group_size": 32, "symmetric": False, "scale_dtype": "float16", **config}
    grid = affine.Config(**settings).bind(rows, cols, torch.float16)
    w = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows + cols))
    w[0] = 0
    params = fit_all(grid, w, torch.ones(cols))
    return QuantizedTensor(grid, encode_all(grid, w, params), params)


def config_of(q):
    return awq.quantization_config({"m.layers.0.q": q.grid}, [], {})


def slow_field(word, output):
    return ((int(word) & 0xFFFFFFFF) >> (4 * NIBBLE_OF_OUTPUT[output % 8])) & 15


def slow_weights(tensors, group_size):
    qweight, qzeros, scales = (tensors[name] for name in ("qweight", "qzeros", "scales"))
    cols, rows = qweight.shape[0], scales.shape[1]
    weights = torch.empty(rows, cols)
    for row in range(rows):
        for col in range(cols):
            group = col // group_size
            code, zero = slow_field(qweight[col, row // 8], row), slow_field(qzeros[group, row // 8], row)
            weights[row, col] = float(scales[group, row]) * (code - zero)
    return weights


@pytest.mark.parametrize("settings", [{}, {"symmetric": True}, {"strategy": "channel"}], ids=str)
def test_a_reader_of_the_definition_finds_our_weights(settings):
    q = quantized(**settings)
    assert torch.equal(slow_weights(awq.pack(q), q.grid.group), dequantize(q))


def test_a_word_holds_even_outputs_below_odd_ones():
    q = quantized(rows=8, cols=32)
    q.codes[:, 5] = torch.arange(8, dtype=torch.uint8)
    assert int(awq.pack(q)["qweight"][5, 0]) == 0x75316420


@pytest.mark.parametrize("settings", [{}, {"symmetric": True}, {"strategy": "channel"}], ids=str)
def test_unpacking_gives_the_weights_that_were_packed(settings):
    q = quantized(**settings)
    assert torch.equal(awq.unpack(awq.pack(q), config_of(q), "m.layers.0.q"), dequantize(q))


def test_zero_points_of_other_programs_reach_from_0_to_15():
    q = quantized(rows=16)
    q.params["zero"][:, 0, 0] = torch.arange(16, dtype=torch.uint8)
    assert torch.equal(awq.unpack(awq.pack(q), config_of(q), "m"), dequantize(q))


def test_settings_under_the_names_of_autoawq_are_read():
    q = quantized()
    named = awq.extra_files(config_of(q))["quant_config.json"]
    assert named == {
        "zero_point": True,
        "q_group_size": 32,
        "w_bit": 4,
        "version": "GEMM",
        "modules_to_not_convert": [],
    }
    assert torch.equal(awq.unpack(awq.pack(q), named, "m"), dequantize(q))


def test_sizes_are_known_without_any_number():
    q = quantized()
    meta = QuantizedTensor(q.grid, q.codes.to("meta"), {name: value.to("meta") for name, value in q.params.items()})
    real = {suffix: (tensor.shape, tensor.dtype) for suffix, tensor in awq.pack(q).items()}
    assert {suffix: (tensor.shape, tensor.dtype) for suffix, tensor in awq.pack(meta).items()} == real


def test_bits_are_those_that_the_grid_counts():
    q = quantized()
    assert math.isclose(8 * sum(t.nbytes for t in awq.pack(q).values()) / q.codes.numel(), q.grid.bits_per_weight)


def test_transformers_accepts_the_config():
    from transformers import AwqConfig

    q = quantized()
    theirs = AwqConfig.from_dict(awq.quantization_config({"a": q.grid}, ["lm_head"], {}))
    assert (theirs.bits, theirs.group_size, theirs.zero_point, theirs.format) == (4, 32, True, "gemm")
    assert theirs.modules_to_not_convert == ["lm_head"]


@pytest.mark.parametrize(
    ("settings", "shape", "said"),
    [
        ({"bits": 3}, (24, 96), "3 bits"),
        ({"strategy": "tensor"}, (24, 96), "whole tensor"),
        ({"scale_dtype": "bfloat16"}, (24, 96), "bfloat16 scales"),
        ({}, (20, 96), "20 rows"),
    ],
)
def test_what_a_file_cannot_hold_is_refused_with_a_remedy(settings, shape, said):
    with pytest.raises(FormatError, match=rf"{said}.*(Use|use) "):
        awq.check(quantized(*shape, **settings).grid, *shape)


def test_a_grid_of_another_format_is_refused():
    with pytest.raises(FormatError, match="grid Q4_K"):
        awq.check(q4_k.Config().bind(24, 256, torch.float16), 24, 256)


def test_linears_of_one_file_share_their_setting_and_leave_out_the_head():
    usual, wide = quantized().grid, quantized(group_size=96).grid
    awq.check_together({"a": usual, "b": usual})
    with pytest.raises(FormatError, match="group sizes 32, 96"):
        awq.check_together({"a": usual, "b": wide})
    with pytest.raises(FormatError, match=r"^lm_head: "):
        awq.check_together({"a": usual, "lm_head": usual})


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_scale_that_is_no_number_is_never_written(bad):
    q = quantized()
    q.params["scale"][2, 1] = bad
    with pytest.raises(FormatError, match="1 of 72 scales"):
        awq.pack(q)


@pytest.mark.parametrize(
    ("change", "config", "said"),
    [
        ({"qzeros": None}, {}, "qzeros is missing"),
        ({"qweight": torch.ones(96, 3)}, {}, "qweight is torch.float32"),
        (
            {"qzeros": torch.ones(2, 3, dtype=torch.int32)},
            {},
            r"qzeros is torch.int32 \[2, 3\], expected int32 \[3, 3\]",
        ),
        ({"scales": torch.ones(2, 24)}, {}, r"scales is torch.float32 \[2, 24\], expected a float \[3, 24\]"),
        ({}, {"bits": 8}, "bits is 8, expected 4"),
        ({}, {"version": "gemv"}, "version is gemv, expected gemm"),
        ({}, {"zero_point": False}, "zero_point is False"),
        ({}, {"group_size": 0}, "group_size is 0"),
        ({}, {"group_size": 64}, "multiple of the group_size 64"),
    ],
)
def test_a_broken_folder_says_what_was_expected_and_found(change, config, said):
    q = quantized()
    tensors = {s: t for s, t in {**awq.pack(q), **change}.items() if t is not None}
    with pytest.raises(CheckpointError, match=said):
        awq.unpack(tensors, {**config_of(q), **config}, "m")


def test_linears_are_found_among_all_tensors_of_a_folder():
    names = [f"model.layers.0.q.{part}" for part in ("qweight", "qzeros", "scales", "bias")]
    names += ["model.norm.weight", "model.rope.scales"]
    found = {part: f"model.layers.0.q.{part}" for part in ("qweight", "qzeros", "scales")}
    assert awq.linears(names, {}) == {"model.layers.0.q": found}
