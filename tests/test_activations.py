"""The judges are the definitions, and compressed_tensors, whose fake quantization a runtime must agree with."""

import pytest
import torch

from llmquant import ranges
from llmquant.activations import ActivationScheme, Inputs, decode, encode, fit, rounded
from llmquant.errors import CalibrationError, RecipeError
from llmquant.plugins import validate

SCHEMES = {
    "int8": {},
    "int8 with a zero point": {"symmetric": False},
    "fp8": {"type": "fp8"},
}
kinds = pytest.mark.parametrize("kind", SCHEMES.values(), ids=SCHEMES)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def token_by_token(kind):
    return Inputs(ActivationScheme(**kind))


def for_all(kind, sample, **more):
    return fit(ActivationScheme(dynamic=False, **kind, **more), sample)


def largest_error(kind, x, scale):
    """Half the distance of two neighbouring levels: of floats it grows with the value."""
    if kind.get("type") == "fp8":
        return torch.maximum(x.abs() / 16, scale * 2**-10)
    return scale / 2


@kinds
@pytest.mark.parametrize("shift", [-3.0, 0.0, 0.3, 20.0])
def test_each_value_becomes_the_nearest_level(kind, shift):
    x = normal(5, 7, 64) + shift
    for inputs in (token_by_token(kind), for_all(kind, x.flatten())):
        codes, params = encode(inputs, x)
        assert codes.dtype == (torch.float8_e4m3fn if kind.get("type") == "fp8" else torch.int8)
        error = (decode(codes, params) - x).abs()
        # a rounded zero point moves all levels by up to half a step, and the ends fall short by it
        slack = params["scale"] / 2 if "zero" in params else 0
        assert (error <= 1.0001 * (largest_error(kind, x, params["scale"]) + slack)).all()


@kinds
def test_every_token_has_a_scale_of_its_own(kind):
    x = normal(6, 32)
    larger = x * torch.tensor([1, 2, 0.25, 64, 1, 1024])[:, None]  # powers of two: the codes stay the same
    inputs = token_by_token(kind)
    assert torch.equal(rounded(inputs, larger)[0], rounded(inputs, x)[0])
    assert torch.equal(encode(inputs, larger)[0].float(), encode(inputs, x)[0].float())
    assert encode(inputs, x)[1]["scale"].shape == (6, 1)


@kinds
def test_the_largest_value_of_a_token_is_kept(kind):
    x = normal(50, 32)
    largest = x.abs().argmax(1, keepdim=True)
    torch.testing.assert_close(
        rounded(token_by_token(kind), x).gather(1, largest),
        x.gather(1, largest),
        rtol=0.01 if kind.get("symmetric") is False else 1e-6,
        atol=0,
    )


@kinds
def test_a_token_of_zeros_stays_zero(kind):
    x = torch.stack([torch.zeros(8), torch.full((8,), 1e-45)])
    assert (rounded(token_by_token(kind), x) == 0).all()


@kinds
@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_the_library_rounds_to_the_same_values(kind, shift):
    """It adds the zero point before it rounds (vLLM's kernels after), which tips a value that lies halfway."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    x = normal(40, 64) + shift
    inputs = for_all(kind, x[:20].flatten())  # the others are clipped where they reach further
    args = QuantizationArgs(
        num_bits=8,
        type="float" if kind.get("type") == "fp8" else "int",
        symmetric=kind.get("symmetric", True),
        strategy="tensor",
    )
    theirs = fake_quantize(2 * x, inputs.params["scale"], inputs.params.get("zero"), args)
    steps = ((rounded(inputs, 2 * x) - theirs) / inputs.params["scale"]).abs()
    if "zero" not in inputs.params:
        assert steps.max() == 0
    assert steps.max() < 1.001
    assert (steps > 0.01).float().mean() < 0.002


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse", "kl"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_static_ranges_come_from_the_observers_that_weights_have(observer, symmetric):
    x = torch.cat([normal(5000), torch.tensor([40.0])]) + 0.2
    inputs = for_all({"symmetric": symmetric}, x, observer=observer)
    low, high = {
        "minmax": lambda: ranges.minmax(x[None], symmetric),
        "percentile": lambda: ranges.percentile(x[None], symmetric, 99.99),
        "mse": lambda: ranges.mse(x[None], symmetric, torch.ones_like(x[None]), 256),
        "kl": lambda: ranges.kl(x[None], symmetric, 256),
    }[observer]()
    scale = inputs.params["scale"]
    torch.testing.assert_close(scale, (high / 127 if symmetric else (high - low) / 255)[0])
    if not symmetric:
        torch.testing.assert_close(-scale * (inputs.params["zero"] + 128), low[0], rtol=0, atol=float(scale) / 2)


@pytest.mark.parametrize("kind", [SCHEMES["int8"], SCHEMES["fp8"]], ids=["int8", "fp8"])
def test_least_squares_leave_no_larger_error_than_the_whole_range(kind):
    x = torch.cat([normal(5000), torch.tensor([200.0])])
    error = {o: (rounded(for_all(kind, x, observer=o), x) - x).square().sum() for o in ("minmax", "mse")}
    assert error["mse"] <= error["minmax"]


def test_a_range_needs_finite_activations():
    with pytest.raises(CalibrationError, match="no activations were seen"):
        for_all({}, torch.empty(0))
    with pytest.raises(CalibrationError, match="not finite"):
        for_all({}, torch.tensor([1.0, float("nan")]))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"type": "fp8", "symmetric": False}, "activations: fp8 has no zero point"),
        ({"type": "fp8", "dynamic": False, "observer": "kl"}, "activations: observer kl counts even levels"),
        ({"observer": "mse"}, "activations: observer mse chooses a static range. Set `dynamic: false`"),
        ({"percentile": 0}, "activations: percentile is 0.0, not in"),
        ({"dynamik": True}, "activations.dynamik: unknown key. Did you mean 'dynamic'?"),
    ],
)
def test_a_scheme_that_makes_no_sense_is_refused(values, message):
    with pytest.raises(RecipeError, match=message.replace("?", r"\?")):
        validate(ActivationScheme, values, "activations")
