"""The judges are sums in int64, formulas in float64, and the float function beside each integer one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmquant.activations import ActivationScheme, Inputs, encode, fit
from llmquant.runtime import integer
from llmquant.runtime.linear import QuantizedLinear, int8_product, int32_product

KINDS = {
    "dynamic": {},
    "dynamic with zero points": {"symmetric": False},
    "static": {"dynamic": False},
    "static with a zero point": {"dynamic": False, "symmetric": False},
}
FLOATS = {"dynamic fp8": {"type": "fp8"}, "static fp8": {"type": "fp8", "dynamic": False}}


def codes(*shape, seed=0):
    return torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)


@pytest.fixture(params=["this CPU's kernel", "torch._int_mm"])
def either_kernel(request, monkeypatch):
    if request.param == "torch._int_mm":
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)


@pytest.mark.parametrize("tokens", [1, 2, 17, 33])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 5), (48, 64), (65, 257)])
def test_integer_products_are_exact(tokens, rows, cols, either_kernel):
    x, weight = codes(tokens, cols), codes(rows, cols, seed=1)
    exact = x.long() @ weight.long().T
    assert torch.equal(int32_product(x, weight).long(), exact)
    assert torch.equal(int8_product(weight)(x).long(), exact)  # below 2^24 a float32 holds it


@pytest.mark.parametrize("x", [-128, 127])
@pytest.mark.parametrize("weight", [-128, 127])
def test_no_sum_saturates(x, weight, either_kernel):
    """Instructions without VNNI add pairs of products in 16 bits."""
    product = int8_product(torch.full((4, 4096), weight, dtype=torch.int8))
    assert (product(torch.full((3, 4096), x, dtype=torch.int8)) == 4096 * x * weight).all()


def inputs_of(kind, x):
    return fit(ActivationScheme(**kind), x.flatten())


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("per_row", [True, False])
def test_a_linear_is_its_formula(kind, per_row, either_kernel):
    x = torch.randn(2, 9, 96, generator=torch.Generator().manual_seed(0)) + 0.5
    weight, inputs = codes(40, 96), inputs_of(kind, x)
    scale = torch.rand(40, 1, generator=torch.Generator().manual_seed(1)) - 0.5 if per_row else torch.tensor([0.01])
    linear = QuantizedLinear(weight, scale, inputs)
    linear.bias = torch.nn.Parameter(torch.arange(40.0), requires_grad=False)
    q, params = encode(inputs, x)
    read = params["scale"].double() * (q.double() - params.get("zero", torch.zeros(1)).double())
    expected = read @ (scale.double() * weight.double()).T + torch.arange(40.0)
    torch.testing.assert_close(linear(x).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", FLOATS.values(), ids=FLOATS)
def test_a_linear_of_8_bit_floats_is_its_formula(kind):
    x = torch.randn(2, 9, 96, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(1)).to(torch.float8_e4m3fn)
    scale, inputs = torch.rand(40, 1, generator=torch.Generator().manual_seed(1)), inputs_of(kind, x)
    q, params = encode(inputs, x)
    expected = (params["scale"].double() * q.double()) @ (scale.double() * weight.double()).T
    torch.testing.assert_close(QuantizedLinear(weight, scale, inputs)(x).double(), expected, rtol=1e-5, atol=1e-4)


def test_a_linear_answers_in_the_dtype_it_was_asked_in():
    linear = QuantizedLinear(codes(8, 16), torch.tensor([0.1]), Inputs(ActivationScheme()))
    assert linear(torch.ones(3, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16


scales = st.floats(1e-4, 1.0)
zeros = st.integers(-128, 127)
EVERY = torch.arange(-128, 128).to(torch.int8)


@given(st.floats(2**-30, 2**29))
def test_a_fixed_point_multiplier_is_as_exact_as_31_bits_can_be(multiplier):
    mantissa, shift = integer.fixed_point(multiplier)
    assert 2**30 <= mantissa < 2**31
    assert mantissa / 2**shift == pytest.approx(multiplier, rel=2**-31)


@pytest.mark.parametrize("multiplier", [0.0, -1.0, 2.0**40, 1e-20])
def test_a_multiplier_out_of_reach_is_refused(multiplier):
    with pytest.raises(ValueError, match="not between"):
        integer.fixed_point(multiplier)


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1), st.floats(2**-30, 1.0), zeros)
def test_requantized_sums_are_the_nearest_codes(sums, multiplier, zero):
    found = integer.requantize(torch.tensor(sums, dtype=torch.int32), *integer.fixed_point(multiplier), zero)
    exact = (torch.tensor(sums, dtype=torch.float64) * multiplier + zero).clamp(-128, 127)
    assert (found - exact).abs().max() <= 0.500001


def test_a_requantized_product_of_codes_is_within_one_level_of_the_float_product():
    x, weight = codes(20, 64), codes(30, 64, seed=1)
    zero_x, scales, scale_y, zero_y = 5, 0.02 * 0.003, 0.7, -11
    sums = int32_product(x, weight) - zero_x * weight.int().sum(1, dtype=torch.int32)
    found = integer.requantize(sums, *integer.fixed_point(scales / scale_y), zero_y)
    y = scales * ((x.double() - zero_x) @ weight.double().T)
    assert (found - (y / scale_y + zero_y).clamp(-128, 127)).abs().max() <= 1


@given(scales, zeros)
def test_relu_of_codes_is_relu_of_their_values(scale, zero):
    found = integer.dequantize(integer.relu(EVERY, zero), scale, zero)
    assert torch.equal(found, integer.dequantize(EVERY, scale, zero).relu())


@given(scales, zeros)
def test_the_sigmoid_table_is_within_one_level(scale, zero):
    found = integer.look_up(integer.sigmoid_table(scale, zero), EVERY)
    assert (
        integer.dequantize(found, 1 / 256, -128) - integer.dequantize(EVERY, scale, zero).sigmoid()
    ).abs().max() <= (1.0001 / 256)


@given(scales, zeros)
def test_the_silu_table_is_within_one_level(scale, zero):
    x = integer.dequantize(EVERY, scale, zero)
    y = torch.nn.functional.silu(x)
    low, high = min(float(y.min()), 0), max(float(y.max()), 0)
    scale_out = max((high - low) / 255, 1e-6)
    zero_out = round(-128 - low / scale_out)
    found = integer.look_up(integer.silu_table(scale, zero, scale_out, zero_out), EVERY)
    assert (integer.dequantize(found, scale_out, zero_out) - y).abs().max() <= 1.0001 * scale_out


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), scales, zeros)
def test_codes_are_the_nearest_and_saturate(values, scale, zero):
    x = torch.tensor(values, dtype=torch.float64)
    found = integer.quantize(x, scale, zero)
    assert (found - (x / scale + zero).clamp(-128, 127)).abs().max() <= 0.5
