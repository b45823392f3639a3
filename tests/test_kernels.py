"""Each fast function gives what its plain twin gives."""

import pytest
import torch

from llmquant import grid, kernels, offset_search, plugins, scale_search
from llmquant.algorithms import gptq
from llmquant.blocks import LEAST_WEIGHT, favour_large
from llmquant.grids import iq4_nl, q6_k
from llmquant.kernels import gptq as gptq_kernel
from llmquant.kernels import grid as grid_kernel
from llmquant.kernels import offset_search as offset_kernel
from llmquant.kernels import scale_search as scale_kernel

TABLES = {
    "16 even levels": torch.arange(16.0),
    "256 even levels": torch.arange(256.0) - 128,
    "2 levels": torch.arange(2.0),
    "uneven levels": torch.tensor(
        [-1.0, -0.7, -0.5, -0.39, -0.28, -0.18, -0.09, 0, 0.08, 0.16, 0.25, 0.34, 0.44, 0.72]
    ),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_columns_are_rounded_as_by_the_plain_twin(table, first, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    generator = torch.Generator().manual_seed(0)
    block, columns, rows = 12, 7, 700
    w = torch.randn(block, rows, generator=generator)
    scale = torch.rand(columns, rows, generator=generator) * 4 / len(table)
    scale[:, ::50] = 0
    scale[:, 1::50] *= -1
    offset = -scale * table.mean()
    factor = torch.randn(block, block, generator=generator).triu(1) / 4 + torch.eye(block)
    results = []
    for function in (gptq.round_columns, gptq_kernel.round_columns):
        left, codes, error = w.clone(), torch.empty(columns, rows, dtype=torch.uint8), torch.empty(columns, rows)
        function(left, scale, offset, table, factor, codes, error, first)
        results.append((left, codes, error))
    (left, codes, error), (fast_left, fast_codes, fast_error) = results
    # a rounding difference in the last bit may move a weight across the middle of two levels
    same = (codes == fast_codes).all(0)
    assert same.float().mean() > 0.99
    torch.testing.assert_close(fast_error[:, same], error[:, same])
    torch.testing.assert_close(fast_left[:, same], left[:, same])


def groups(n, size, seed=0):
    """Return weights with importances, among them groups of zeros and of one value."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, size, generator=generator)
    x[3], x[7] = 0, 0.25
    return x, torch.randn(n, size, generator=generator).exp()


def close(fast, plain, most_apart=0.001):
    """Compare element by element; a few may differ by a whole step where two choices were equally good."""
    apart = [~torch.isclose(f, p, rtol=1e-4, atol=1e-3) for f, p in zip(fast, plain, strict=True)]
    return torch.stack(apart).any(0).float().mean() <= most_apart


@pytest.mark.parametrize("n", [1, 255, 3000])
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_codes_are_those_of_the_plain_twin(table, n):
    generator = torch.Generator().manual_seed(0)
    w, scale, offset = torch.randn(3, n, 5, generator=generator)
    scale = scale * 4 / len(table)
    scale[::7] = 0
    codes = grid_kernel.nearest(table, w, scale, offset)
    assert (codes == grid.nearest(table, w, scale, offset)).float().mean() > 0.999
    assert torch.equal(grid_kernel.decode(table, codes, scale, offset), scale * table[codes.long()] + offset)


@pytest.mark.parametrize("size", [16, 32, 300])
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_groups_with_one_scale_are_encoded_and_decoded_as_by_the_plain_twin(table, size):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(70, 9, size, generator=generator)
    scale, offset = torch.randn(2, 70, 9, 1, generator=generator)
    scale[::7] = 0
    codes = grid_kernel.nearest(table, w, scale, offset)
    assert (codes == grid.nearest(table, w, scale, offset)).float().mean() > 0.999
    assert torch.equal(grid_kernel.decode(table, codes, scale, offset), scale * table[codes.long()] + offset)


def test_columns_of_a_larger_matrix_are_encoded_like_a_copy_of_them():
    w, scale, offset = torch.randn(3, 40, 90, generator=torch.Generator().manual_seed(0))[:, :, 11:70]
    table = TABLES["16 even levels"]
    codes = grid_kernel.nearest(table, w, scale, offset)
    assert torch.equal(codes, grid_kernel.nearest(table, w.clone(), scale.clone(), offset.clone()))


@pytest.mark.parametrize("name", ["q6_k", "iq4_nl", "q4_k"])
def test_errors_are_summed_as_by_the_plain_twin(name):
    grid_ = plugins.load("grids", name, "").Config()
    generator = torch.Generator().manual_seed(2)
    w, importance = torch.randn(40, 768, generator=generator), torch.rand(768, generator=generator)
    params = grid.fit_all(grid_, w, importance)
    q = grid.QuantizedTensor(grid_, grid.encode_all(grid_, w, params), params)
    fast = grid.error_sums(q, w, importance)
    assert torch.allclose(fast, grid.error_sums(q, w.double(), importance.double()), rtol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("table", "starts"), [(q6_k.Q6_K().table, q6_k.STARTS), (iq4_nl.IQ4_NL().table, iq4_nl.STARTS)]
)
def test_scales_are_found_as_by_the_plain_twin(table, starts, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x, weight = groups(700, 16)
    plain = scale_search.search(x, weight, table, starts)
    assert close(scale_kernel.search(x, weight, table, starts)[..., 0], [part[:, 0] for part in plain], 0.01)
    again = scale_kernel.round_at(x, weight, plain.scale, table)
    assert close(again[..., 0], [part[:, 0] for part in scale_search.round_at(x, weight, plain.scale, table)])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("most", [0.0, torch.inf])
@pytest.mark.parametrize(("size", "top"), [(16, 3), (32, 15), (32, 31)])
def test_scales_and_offsets_are_found_as_by_the_plain_twin(size, top, most, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x, weight = groups(700, size)
    starts = torch.tensor(offset_search.STARTS) / 8
    plain = offset_search.search(x, weight, top, most, starts)
    fast = offset_kernel.search(x, weight, top, most, starts, offset_search.SINGULAR)
    assert close(fast[..., 0], [part[:, 0] for part in plain], 0.01)
    again = offset_kernel.round_at(x, weight, plain.scale, plain.offset, top)
    assert close(again[..., 0], [part[:, 0] for part in offset_search.round_at(x, weight, *plain[:2], top)])


@pytest.mark.parametrize("favour", [0.0, 2.0])
@pytest.mark.parametrize(
    ("table", "starts", "size", "lowest"),
    [(q6_k.Q6_K().table, q6_k.STARTS, 16, -128), (iq4_nl.IQ4_NL().table, iq4_nl.STARTS, 32, -32)],
)
def test_super_blocks_are_fitted_as_by_the_plain_twin(table, starts, size, lowest, favour):
    w, importance = (part.view(300, 256) for part in groups(300 * 256 // size, size))
    w[:3] = torch.stack([torch.zeros(256), torch.full((256,), 3e-9), torch.linspace(-1e9, 1e12, 256)])
    importance[:, :size] = 0
    importance[5] *= 1e-39  # whose inverse overflows
    numbers = (table, starts, 256 // size, lowest)
    d, scale = scale_kernel.fit_super_block(w, importance, *numbers, scale_search.SPARE, favour, LEAST_WEIGHT, 1e9)
    weight = favour_large(w, importance, favour) if favour else importance
    largest = weight.amax(1, keepdim=True)
    weight = (weight / torch.where(largest > 0, largest, 1)).clamp(min=LEAST_WEIGHT)
    plain_d, plain_scale = scale_search.best_super_block(w.clamp(-1e9, 1e9), weight, *numbers)
    same = (scale == plain_scale).all(1)
    assert same.float().mean() > 0.97
    assert scale[5].any()
    assert torch.allclose(d[same], plain_d[same], rtol=1e-5, atol=0)
    error = [
        scale_search.round_at(w.view(300, -1, size)[3:], weight.view(300, -1, size)[3:], (a * b)[3:, :, None], table)
        for a, b in ((d, scale), (plain_d, plain_scale))
    ]
    assert error[0].wee.sum() == pytest.approx(float(error[1].wee.sum()), rel=1e-4)


def test_factors_of_super_blocks_are_chosen_as_by_the_plain_twins():
    x, weight = (part.view(150, 16, 16) for part in groups(2400, 16))
    found = offset_search.search(x, weight, 3, 0.0, torch.tensor(offset_search.STARTS_2_BITS) / 8)
    scale, offset = found.best(most=0.0)
    tops = torch.arange(15, 11, -1)
    trials = (scale.amax(1) / tops, -offset.amin(1) / tops)
    pairs = (
        offset_search.choose(found, offset, *trials, 15),
        offset_kernel.choose(torch.stack(found), offset, *trials, 15),
    )
    same = torch.stack([a == b for a, b in zip(*pairs, strict=True)]).all(0)
    assert same.float().mean() > 0.98


def test_other_devices_and_precisions_take_the_plain_way():
    assert kernels.suit(torch.zeros(1))
    assert not kernels.suit(torch.zeros(1, dtype=torch.float64))
    assert not kernels.suit(torch.zeros(1, device="meta"))
