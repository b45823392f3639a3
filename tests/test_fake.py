"""Fake quantization, judged by what is stored and by torch's own differentiation of the formula."""

from itertools import pairwise

import pytest
import torch

from llmquant.fake import FakeQuantized, pulled, straight
from llmquant.grid import QuantizedTensor, dequantize, encode_all, fit_all
from llmquant.grids import affine, fp8, iq4_nl, iq4_xs, mxfp4, nf4, q2_k, q3_k, q4_0, q4_1, q4_k, q5_k, q6_k, q8_0
from llmquant.kernels import fake as kernel

GRIDS = {
    "w2": affine.Config(2, 32),
    "w3 with zeros": affine.Config(3, 32, symmetric=False),
    "a row": affine.Config(8, strategy="channel"),
    "a tensor": affine.Config(8, strategy="tensor"),
    "fp8": fp8.Config(),
    "nf4": nf4.Config(),
} | {module.__name__.rpartition(".")[2]: module.Config() for module in (
    iq4_nl, iq4_xs, mxfp4, q2_k, q3_k, q4_0, q4_1, q4_k, q5_k, q6_k, q8_0,
)}  # fmt: skip
every_grid = pytest.mark.parametrize("config", GRIDS.values(), ids=GRIDS)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded(config, w=None):
    w = normal(6, 512) if w is None else w
    grid = config.bind(*w.shape, torch.float32)
    params = fit_all(grid, w, torch.ones(w.shape[1]))
    return QuantizedTensor(grid, encode_all(grid, w, params), params)


@every_grid
def test_it_begins_with_what_was_quantized(config):
    q = rounded(config)
    fake = FakeQuantized(q)
    assert (fake.quantized().codes != q.codes).float().mean() < 1e-3  # nf4 stores scales of scales anew
    torch.testing.assert_close(fake().detach(), dequantize(q), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("module", [iq4_xs, q2_k, q3_k, q4_k, q5_k, q6_k])
def test_super_blocks_begin_with_their_own_bytes_and_change_as_little_as_their_scales(module):
    q = rounded(module.Config())
    fake = FakeQuantized(q)
    assert all(torch.equal(value, q.params[name]) for name, value in fake.quantized().params.items())
    for seed, levels in enumerate(fake.levels):
        levels.data += 1e-3 * normal(*levels.shape, seed=seed)
    for name, value in fake.quantized().params.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, q.params[name], rtol=5e-3, atol=1e-4)
        else:
            assert (value != q.params[name]).float().mean() < 0.06, name
            assert (value.int() - q.params[name].int()).abs().max() <= 1, name


@every_grid
def test_what_it_computes_with_is_what_is_stored_to_the_bit(config):
    fake = FakeQuantized(rounded(config))
    for i, parameter in enumerate(fake.parameters()):
        parameter.data += (1.0 if i == 0 else 0.1) * normal(*parameter.shape, seed=i)
    stored = fake.quantized()
    assert torch.equal(fake().detach(), dequantize(stored))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fake().detach(), dequantize(stored))
    assert stored.codes.shape == (6, 512)
    assert {name: value.shape for name, value in stored.params.items()} == {
        name: value.shape for name, value in rounded(config).params.items()
    }


@every_grid
def test_its_steps_lead_towards_the_weights_that_are_wanted(config):
    wanted = normal(6, 512, seed=7)
    fake = FakeQuantized(rounded(config, 0.7 * wanted + 0.3 * normal(6, 512)))
    rate = 0.01 * len(fake.grid.table)
    optimizer = torch.optim.Adam([{"params": [fake.places], "lr": rate}, {"params": fake.levels, "lr": 0.01}])
    before = float((fake().detach() - wanted).square().mean())
    for _ in range(60):
        optimizer.zero_grad()
        (fake() - wanted).square().mean().backward()
        optimizer.step()
    at_best = float((dequantize(rounded(config, wanted)) - wanted).square().mean())
    assert float((fake().detach() - wanted).square().mean()) < (before + at_best) / 2


@every_grid
def test_a_weight_is_drawn_to_the_middle_of_its_level_and_what_is_stored_stays(config):
    fake = FakeQuantized(rounded(config))
    fake.places.data += 2.0 * normal(*fake.places.shape)
    stored, table = fake.quantized(), fake.grid.table
    levels = table[stored.codes.long()].view(fake.places.shape)
    away = (fake.places - levels).detach()
    fake.draw(0.5)
    torch.testing.assert_close(fake.places - levels, away / 2, rtol=1e-3, atol=1e-3)
    assert torch.equal(fake.quantized().codes, stored.codes)
    fake.draw(1.0)
    torch.testing.assert_close(fake.places.detach(), levels)


@pytest.mark.parametrize(("share", "change"), [(0.0, True), (0.02, False)])
def test_weights_that_are_needed_between_two_levels_rest_where_they_are_drawn(share, change):
    fake = FakeQuantized(rounded(GRIDS["w2"]))
    steps = fake.step.expand_as(fake.places).reshape(fake.shape)
    wanted = (fake() + 0.3 * steps).detach()
    optimizer = torch.optim.SGD([fake.places], lr=0.02)
    seen = []
    for _ in range(200):
        optimizer.zero_grad()
        ((fake() - wanted) / steps).square().sum().div(2).backward()
        fake.draw(share)
        optimizer.step()
        seen.append(fake.quantized().codes)
    inside = seen[0] < seen[0].max()  # the highest level has none above it
    assert any(bool((a != b)[inside].any()) for a, b in pairwise(seen[100:])) is change


def straight_through(x):
    return x + (x.round() - x).detach()


@pytest.mark.parametrize(
    ("config", "free"),
    [
        (affine.Config(3, 32, scale_dtype="float32"), False),
        (affine.Config(3, 32, symmetric=False, scale_dtype="float32"), False),
        (q4_1.Config(), True),
    ],
)
def test_gradients_are_those_of_the_formula(config, free):
    """In float64 by torch; offsets are free, or grow with their scales."""
    fake = FakeQuantized(rounded(config))
    fake.places.data += 0.7 * normal(*fake.places.shape, seed=3)  # some are far beyond the table
    assert (fake.shift is not None) == free
    parameters = [p.detach().double().requires_grad_() for p in fake.parameters()]
    places, growth, *shift = parameters
    top = len(fake.grid.table) - 1
    offset = fake.offset.double() + fake.step.double() * shift[0] if free else fake.offset.double() * (1 + growth)
    inside = (places >= -0.5) & (places <= top + 0.5)
    code = torch.where(inside, straight_through(places), places.detach()).clamp(0, top)
    expected = (fake.scale.double() * (1 + growth) * code + offset).view(6, 512)
    pull = normal(6, 512, seed=4)
    (fake() * pull).sum().backward()
    wanted = torch.autograd.grad((expected * pull.double()).sum(), parameters)
    for found, known in zip(fake.parameters(), wanted, strict=True):
        torch.testing.assert_close(found.grad.double(), known, rtol=1e-3, atol=1e-3)


@every_grid
def test_scales_follow_what_is_wanted_of_weights_in_the_middle_of_their_levels(config):
    fake = FakeQuantized(rounded(config))
    wanted = 2 * fake().detach()
    across = 0.03 * len(fake.grid.table)  # offsets may lie that many steps from 0
    rates = zip(fake.levels, (0.03, across), strict=False)
    optimizer = torch.optim.Adam([{"params": [levels], "lr": rate} for levels, rate in rates])
    before = float((fake().detach() - wanted).square().mean())
    for _ in range(100):
        optimizer.zero_grad()
        (fake() - wanted).square().mean().backward()
        optimizer.step()
    assert float((fake().detach() - wanted).square().mean()) < 0.1 * before


def test_offsets_are_learned_where_a_format_stores_them_apart():
    free = {name for name, config in GRIDS.items() if FakeQuantized(rounded(config)).shift is not None}
    assert free == {"q2_k", "q4_1", "q4_k", "q5_k"}


def test_an_offset_of_whole_steps_stays():
    config = affine.Config(3, 32, symmetric=False)
    fake = FakeQuantized(rounded(config))
    assert fake.shift is None
    fake.growth.data += 0.3 * normal(*fake.growth.shape)
    assert torch.equal(fake.quantized().params["zero"], rounded(config).params["zero"])


@every_grid
def test_compiled_gradients_are_those_of_the_plain_twin(config):
    fake = FakeQuantized(rounded(config))
    places = fake.places.detach() * 1.3
    codes = fake.quantized().codes.view(places.shape)
    given = fake.grid.table, fake.gap, places, codes, fake.scale, normal(*places.shape)
    for found, known in zip(kernel.pulled(*given), pulled(*given), strict=True):
        torch.testing.assert_close(found, known, rtol=1e-4, atol=1e-4)


def test_straight_gives_one_value_and_the_gradient_of_the_other():
    x = torch.tensor([0.4, 1.6], requires_grad=True)
    y = straight(x, x.detach().round())
    y.backward(torch.tensor([2.0, 3.0]))
    assert y.tolist() == [0.0, 2.0]
    assert x.grad.tolist() == [2.0, 3.0]
