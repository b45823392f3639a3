"""The judge of the layout is a slow reader of the format's definition: Python integers, one value at a time."""

import math
import re

import numpy as np
import pytest
import torch

from llmquant.errors import CheckpointError, FormatError
from llmquant.exporters import gptq, gptq_v2
from llmquant.grid import QuantizedTensor, dequantize, encode, fit_all, per_column
from llmquant.grids import affine

VERSIONS = pytest.mark.parametrize(("exporter", "zero_shift"), [(gptq, 1), (gptq_v2, 0)], ids=["v1", "v2"])


def quantized(rows=64, cols=96, dtype=torch.float16, **config):
    grid = affine.Config(**{"group_size": 32, **config}).bind(rows, cols, dtype)
    w = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows + cols))
    w[0] = 0
    params = fit_all(grid, w, torch.ones(cols))
    return QuantizedTensor(grid, encode(grid, w, *per_column(grid, params)), params)


def slow_field(words, index, bits):
    """The value at one place of a column of words, read as one long little-endian integer."""
    stream = sum((int(word) & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    return stream >> (index * bits) & (2**bits - 1)


def slow_weights(tensors, bits, zero_shift):
    qweight, qzeros = tensors["qweight"].numpy(), tensors["qzeros"].numpy()
    scales, g_idx = tensors["scales"].float().numpy(), tensors["g_idx"].numpy()
    weights = np.empty((qweight.shape[1], len(g_idx)), dtype=np.float32)
    zeros = [[slow_field(line, row, bits) + zero_shift for row in range(len(weights))] for line in qzeros]
    for row in range(weights.shape[0]):
        for col in range(weights.shape[1]):
            code = slow_field(qweight[:, row], col, bits)
            weights[row, col] = scales[g_idx[col], row] * np.float32(code - zeros[g_idx[col]][row])
    return torch.from_numpy(weights)


def config_of(exporter, q, name="m.layers.0.q"):
    return exporter.quantization_config({name: q.grid}, [], {})


@VERSIONS
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_reader_of_the_definition_finds_our_weights(exporter, zero_shift, bits, symmetric):
    q = quantized(bits=bits, symmetric=symmetric)
    assert torch.equal(slow_weights(exporter.pack(q), bits, zero_shift), dequantize(q))


def test_three_bit_codes_straddle_words_as_in_the_format():
    q = quantized(rows=32, cols=32, bits=3)
    codes = [int(c) for c in q.codes[1]]
    words = [int(w) & 0xFFFFFFFF for w in gptq.pack(q)["qweight"][:, 1]]
    first = sum(code << (3 * i) for i, code in enumerate(codes[:10])) | (codes[10] & 3) << 30
    second = codes[10] >> 2 | sum(c << (3 * i + 1) for i, c in enumerate(codes[11:21])) | (codes[21] & 1) << 31
    third = codes[21] >> 1 | sum(code << (3 * i + 2) for i, code in enumerate(codes[22:]))
    assert words == [first, second, third]


def test_a_symmetric_zero_point_is_seven_in_every_field_of_version_one():
    assert {int(z) & 0xFFFFFFFF for z in gptq.pack(quantized(bits=4))["qzeros"].flatten()} == {0x77777777}


@VERSIONS
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("settings", [{}, {"symmetric": False}, {"strategy": "channel", "symmetric": False}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_unpacking_gives_the_weights_that_were_packed(exporter, zero_shift, bits, settings, dtype):
    q = quantized(bits=bits, dtype=dtype, **settings)
    assert torch.equal(exporter.unpack(exporter.pack(q), config_of(exporter, q), "m.layers.0.q"), dequantize(q))


@VERSIONS
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_columns_may_belong_to_groups_in_any_order(exporter, zero_shift, bits):
    q = quantized(bits=bits, symmetric=False)
    tensors = exporter.pack(q)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    tensors["g_idx"] = tensors["g_idx"][order]
    config = {**config_of(exporter, q), "desc_act": True}
    assert torch.equal(exporter.unpack(tensors, config, "m"), slow_weights(tensors, bits, zero_shift))


def test_the_version_is_read_from_either_key_and_is_one_without_any():
    q = quantized(symmetric=False)
    bare = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    for exporter, keys in [
        (gptq, {}),
        (gptq, {"format": "gptq"}),
        (gptq_v2, {"format": "gptq_v2"}),
        (gptq_v2, {"checkpoint_format": "gptq_v2"}),
    ]:
        assert torch.equal(gptq.unpack(exporter.pack(q), {**bare, **keys}, "m"), dequantize(q))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_points_that_borrowed_from_their_neighbours_are_restored(bits):
    q = quantized(bits=bits, symmetric=False)
    q.params["zero"][3::5] = 0
    tensors = gptq_v2.pack(q)
    ones = sum(1 << shift for shift in range(0, 32, bits))
    tensors["qzeros"] = (tensors["qzeros"].long() - ones).to(torch.int32)  # as GPTQModel writes version 1
    assert torch.equal(gptq.unpack(tensors, config_of(gptq, q), "m"), dequantize(q))


@VERSIONS
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("strategy", ["group", "channel"])
def test_sizes_are_known_without_any_number(exporter, zero_shift, bits, strategy):
    q = quantized(bits=bits, strategy=strategy, symmetric=False)
    meta = QuantizedTensor(q.grid, q.codes.to("meta"), {name: value.to("meta") for name, value in q.params.items()})
    real = {suffix: (tensor.shape, tensor.dtype) for suffix, tensor in exporter.pack(q).items()}
    assert {suffix: (tensor.shape, tensor.dtype) for suffix, tensor in exporter.pack(meta).items()} == real


@pytest.mark.parametrize(
    ("config", "shape", "message"),
    [
        ({"bits": 5}, (64, 96), "5 bits"),
        ({"strategy": "tensor"}, (64, 96), "whole tensor"),
        ({"scale_dtype": "float32"}, (64, 96), "float32 scales"),
        ({}, (48, 96), "48 rows by 96 columns"),
        ({"group_size": 16}, (64, 80), "64 rows by 80 columns"),
    ],
)
def test_what_a_file_cannot_hold_is_refused_with_a_remedy(config, shape, message):
    grid = affine.Config(**{"group_size": 32, **config}).bind(*shape, torch.float16)
    with pytest.raises(FormatError, match=rf"{message}.*(Use|use) "):
        gptq.check(grid, *shape)


def test_what_a_file_can_hold_is_accepted():
    for bits in (2, 3, 4, 8):
        for strategy in ("group", "channel"):
            gptq.check(quantized(bits=bits, strategy=strategy).grid, 64, 96)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_scale_that_is_no_number_is_never_written(bad):
    q = quantized()
    q.params["scale"][2, 1] = bad
    with pytest.raises(FormatError, match="1 of 192 scales"):
        gptq.pack(q)


def test_a_scale_beyond_float16_is_never_written():
    q = quantized(dtype=torch.bfloat16)
    q.params["scale"][2, 1] = 1e5
    with pytest.raises(FormatError, match="1 of 192 scales"):
        gptq.pack(q)


def test_a_zero_point_that_would_wrap_around_is_refused_by_version_one_only():
    q = quantized(symmetric=False)
    q.params["zero"][2, 1] = 0
    with pytest.raises(FormatError, match="gptq_v2"):
        gptq.pack(q)
    assert torch.equal(gptq_v2.unpack(gptq_v2.pack(q), config_of(gptq_v2, q), "m"), dequantize(q))


LAYER = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.gate_proj"]


def mixed():
    """12 layers: v and the last two layers' o in 8 bits, channel for gate and up of layer 1; o of layer 3 float."""
    usual, wide, channel = (
        affine.Config(**c).bind(64, 64, torch.float16)
        for c in ({"group_size": 32}, {"group_size": 32, "bits": 8, "symmetric": False}, {"group_size": -1})
    )
    grids = {f"model.layers.{i}.{name}": usual for i in range(12) for name in LAYER}
    grids |= {f"model.layers.{i}.self_attn.{x}_proj": wide for i in (0, 11) for x in "qkv"}
    grids |= {f"model.layers.{i}.self_attn.o_proj": wide for i in (10, 11)}
    grids |= {f"model.layers.1.mlp.{x}_proj": channel for x in ("gate", "up")}
    del grids["model.layers.3.self_attn.o_proj"]
    return grids, ["lm_head", "model.layers.3.self_attn.o_proj"]


def resolve(config, name):
    """What vLLM (get_dynamic_override) and GPTQModel make of `dynamic`: the first pattern that matches decides."""
    for pattern, override in config.get("dynamic", {}).items():
        if re.match(pattern.removeprefix("-:").removeprefix("+:"), name):
            return None if pattern.startswith("-:") else {**config, **override}
    return config


def test_every_linear_of_a_mixed_model_resolves_to_its_own_setting():
    grids, kept = mixed()
    config = gptq.quantization_config(grids, kept, {})
    for name, grid in grids.items():
        found = resolve(config, name)
        wanted = (grid.bits, -1 if grid.config.strategy == "channel" else grid.group, grid.symmetric)
        assert (found["bits"], found["group_size"], found["sym"]) == wanted, name
    assert resolve(config, "model.layers.3.self_attn.o_proj") is None
    assert not any("lm_head" in pattern for pattern in config["dynamic"])
    assert (config["bits"], config["lm_head"]) == (4, False)


def test_the_matrices_that_vllm_fuses_resolve_like_their_parts():
    grids, kept = mixed()
    config = gptq.quantization_config(grids, kept, {})
    for i in range(12):
        assert resolve(config, f"model.layers.{i}.self_attn.qkv_proj")["bits"] == (8 if i in (0, 11) else 4)
        assert resolve(config, f"model.layers.{i}.mlp.gate_up_proj")["group_size"] == (-1 if i == 1 else 32)
    experts = {
        f"model.layers.{i}.mlp.experts.{j}.up_proj": q for i in range(3) for j, q in enumerate([quantized().grid] * 4)
    }
    wide = quantized(bits=8).grid
    experts |= {name: wide for name in experts if ".layers.1." in name}
    config = gptq.quantization_config(experts, [], {})
    assert [resolve(config, f"model.layers.{i}.mlp.experts")["bits"] for i in range(3)] == [4, 8, 4]


def test_a_mixed_config_grows_with_the_settings_and_not_with_the_layers():
    grids, kept = mixed()
    assert len(gptq.quantization_config(grids, kept, {})["dynamic"]) < 12


def test_a_mixed_model_is_read_back_through_its_own_config():
    grids, kept = mixed()
    config = gptq.quantization_config(grids, kept, {})
    for name in ("model.layers.0.self_attn.v_proj", "model.layers.1.mlp.up_proj", "model.layers.5.mlp.up_proj"):
        w = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
        params = fit_all(grids[name], w, torch.ones(64))
        q = QuantizedTensor(grids[name], encode(grids[name], w, *per_column(grids[name], params)), params)
        assert torch.equal(gptq.unpack(gptq.pack(q), config, name), dequantize(q))
    with pytest.raises(CheckpointError, match=r"expected a float weight"):
        gptq.unpack({}, config, "model.layers.3.self_attn.o_proj")


@VERSIONS
def test_transformers_accepts_the_config(exporter, zero_shift):
    from transformers import GPTQConfig

    grids, kept = mixed()
    ours = exporter.quantization_config(grids, kept, {"dampening_frac": 0.0})
    theirs = GPTQConfig.from_dict(ours)
    assert (theirs.bits, theirs.group_size, theirs.sym) == (4, 32, True)
    assert theirs.format == ours["checkpoint_format"]
    assert (
        GPTQConfig.from_dict(exporter.quantization_config(grids, kept, {"dampening_frac": 0.05})).damp_percent == 0.05
    )


def test_a_quantized_output_matrix_is_announced():
    assert gptq.quantization_config({"lm_head": quantized().grid}, [], {})["lm_head"] is True


def test_the_extra_file_says_what_the_config_says():
    config = config_of(gptq, quantized())
    assert gptq.extra_files(config) == {"quantize_config.json": config}


def test_linears_are_found_among_all_tensors_of_a_folder():
    parts = ("qweight", "qzeros", "scales", "g_idx")
    names = [f"model.layers.0.q.{p}" for p in parts]
    names += ["model.layers.0.q.bias", "model.norm.weight", "lm_head.weight", "model.rope.scales"]
    assert gptq.linears(names, {}) == {"model.layers.0.q": {p: f"model.layers.0.q.{p}" for p in parts}}


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({"qzeros": None}, {}, "qzeros is missing"),
        ({"g_idx": None}, {"desc_act": True}, "g_idx is missing"),
        ({"scales": torch.ones(2, 64)}, {}, r"scales is torch.float32 \[2, 64\], expected a float \[3, 64\]"),
        ({"qweight": torch.ones(12, 64)}, {}, r"qweight is torch.float32 .* expected int32 \[12, 64\]"),
        ({"g_idx": torch.full((96,), 3)}, {}, "g_idx is 3 to 3, expected 0 to 2"),
        ({}, {"bits": 8}, r"expected int32 \[24, 64\] for 8 bits"),
        ({}, {"bits": 5}, "bits is 5"),
        ({}, {"checkpoint_format": "marlin"}, "checkpoint_format is marlin"),
        ({}, {"pack_dtype": "int64"}, "pack_dtype is int64"),
        ({}, {"group_size": 0}, "group_size is 0"),
        ({}, {"dynamic": {"+:(": {}}}, "regular expression"),
    ],
)
def test_a_broken_folder_says_what_was_expected_and_found(change, config, message):
    q = quantized()
    tensors = {s: t for s, t in {**gptq.pack(q), **change}.items() if t is not None}
    with pytest.raises(CheckpointError, match=message):
        gptq.unpack(tensors, {**config_of(gptq, q), **config}, "m.layers.0.q")


def test_packing_changes_none_of_its_inputs():
    q = quantized(symmetric=False)
    before = [q.codes.clone(), *(value.clone() for value in q.params.values())]
    gptq.pack(q)
    assert all(torch.equal(a, b) for a, b in zip(before, [q.codes, *q.params.values()], strict=True))


def test_bits_are_those_that_the_grid_counts():
    q = quantized(bits=3, symmetric=False)
    tensors = gptq.pack(q)
    bits = 8 * sum(tensors[s].nbytes for s in ("qweight", "qzeros", "scales")) / q.codes.numel()
    assert math.isclose(bits, q.grid.bits_per_weight)
