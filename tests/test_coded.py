"""The judge is the format's formula in float64."""

import pytest
import torch

from llmquant import kernels
from llmquant.errors import CheckpointError
from llmquant.runtime import coded
from llmquant.runtime.coded import Coded, CodedEmbedding, CodedLinear, Int4Linear, affine, by_group, without_offset

UNEVEN = torch.tensor([-1.0, -0.7, -0.5, -0.3, -0.2, 0.0, 0.1, 0.4, 0.9])
SHAPES = {  # bits, rows, columns, group
    "2 bits": (2, 40, 96, 16),
    "3 bits": (3, 70, 192, 96),
    "4 bits": (4, 130, 256, 64),
    "4 bits, one group a row": (4, 33, 320, 320),
    "4 bits, odd groups": (4, 9, 45, 15),
    "6 bits": (6, 20, 64, 16),
    "8 bits": (8, 20, 50, 25),
}


def matrix(bits, rows, cols, group):
    """Return a coded matrix and the weights that it stands for, in float64."""
    generator = torch.Generator().manual_seed(bits * cols)
    codes = torch.randint(2**bits, (rows, cols), dtype=torch.uint8, generator=generator)
    scale = torch.rand(rows, cols // group, generator=generator).half()
    zero = torch.randint(2**bits, (rows, cols // group), dtype=torch.uint8, generator=generator)
    weight = (codes.double().view(rows, -1, group) - zero.double()[..., None]) * scale.double()[..., None]
    table = torch.arange(2.0**bits)
    return Coded(codes, table, {"scale": scale, "zero": zero}, affine), weight.view(rows, cols)


@pytest.fixture(params=["compiled", "plain"])
def either_twin(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(kernels, "suit", lambda x: False)


def inputs(tokens, cols, dtype=torch.float32):
    return torch.randn(tokens, cols, generator=torch.Generator().manual_seed(tokens)).to(dtype)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_decoded_weights_are_those_of_the_formula(shape, either_twin):
    coded_, weight = matrix(*shape)
    assert torch.equal(coded_.decode(slice(0, len(weight))), weight.float())
    some = torch.tensor([3, 0, 3])
    assert torch.equal(coded_.decode(some), weight.float()[some])


@pytest.mark.parametrize("tokens", [0, 1, 2, 9])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_products_are_those_of_the_formula(shape, tokens, monkeypatch):
    monkeypatch.setattr(coded, "PIECE", 1000)  # several pieces
    coded_, weight = matrix(*shape)
    x = inputs(tokens, weight.shape[1])
    exact = x.double() @ weight.T
    torch.testing.assert_close(coded_(x).double(), exact, rtol=1e-5, atol=1e-5 * float(weight.abs().max()) * 10)


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("levels", [UNEVEN, torch.linspace(-3, 5, 200).square()])
def test_levels_may_be_uneven(levels, tokens, either_twin):
    codes = torch.randint(len(levels), (30, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scale = torch.rand(30, 2, generator=torch.Generator().manual_seed(1))
    coded_ = Coded(codes, levels, {"scale": scale}, without_offset)
    weight = (levels.double()[codes.long()].view(30, 2, 32) * scale.double()[..., None]).view(30, 64)
    x = inputs(tokens, 64)
    torch.testing.assert_close(coded_(x).double(), x.double() @ weight.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [0, 1, 2, 40])
@pytest.mark.parametrize("name", ["3 bits", "4 bits", "4 bits, one group a row"])
def test_torch_s_kernel_for_4_bits_is_within_the_rounding_of_bfloat16(name, tokens):
    coded_, weight = matrix(*SHAPES[name])
    module = coded.linear(coded_, torch.bfloat16)
    assert isinstance(module, Int4Linear)
    module.bias = torch.nn.Parameter(torch.ones(len(weight), dtype=torch.bfloat16), requires_grad=False)
    x = inputs(tokens, weight.shape[1], torch.bfloat16)
    exact = x.double() @ weight.T + 1
    assert module(x).dtype == torch.bfloat16
    assert (module(x).double() - exact).norm() <= 2**-7 * exact.norm()


@pytest.mark.parametrize(("name", "dtype"), [("4 bits", torch.float32), ("2 bits", torch.bfloat16), ("6 bits", None)])
def test_what_torch_s_kernel_does_not_take_is_computed_from_the_codes(name, dtype):
    coded_, _ = matrix(*SHAPES[name])
    assert isinstance(coded.linear(coded_, dtype or torch.bfloat16), CodedLinear)


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_may_be_in_another_order(dtype, tokens):
    group = torch.tensor([1, 0] * 32)
    order = by_group(group, 2)
    codes = torch.randint(16, (64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    params = {"scale": torch.tensor([[1.0, 0.5]] * 64).half(), "zero": torch.full((64, 2), 8, dtype=torch.uint8)}
    weight = (codes.double() - 8) * params["scale"].double()[:, group]
    coded_ = Coded(codes[:, order], torch.arange(16.0), params, affine, order)
    assert torch.equal(coded_.decode(slice(0, 64)), weight.float())
    x = inputs(tokens, 64, dtype)
    exact = x.double() @ weight.T
    assert (coded.linear(coded_, dtype)(x).double() - exact).norm() <= (1e-6 if dtype == torch.float32 else 2**-7) * (
        exact.norm()
    )


def test_groups_of_several_sizes_are_refused():
    with pytest.raises(CheckpointError, match="groups have 1 to 3 columns"):
        by_group(torch.tensor([0, 0, 0, 1]), 2)
    assert by_group(torch.tensor([0, 0, 1, 1]), 2) is None


def test_an_embedding_gives_the_rows_it_is_asked_for():
    coded_, weight = matrix(*SHAPES["4 bits"])
    tokens = torch.tensor([[5, 0], [5, 129]])
    found = CodedEmbedding(coded_, torch.float32, scale=2.0)(tokens)
    assert torch.equal(found, 2 * weight.float()[tokens])


def test_codes_of_4_bits_or_fewer_take_half_a_byte():
    assert matrix(*SHAPES["3 bits"])[0].packed.nbytes == 70 * 192 // 2
    assert matrix(*SHAPES["6 bits"])[0].packed.nbytes == 20 * 64


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("tokens", [1, 9])
def test_a_gpu_gives_the_same(tokens):
    coded_, weight = matrix(*SHAPES["4 bits"])
    x = inputs(tokens, weight.shape[1])
    found = coded.linear(coded_.to("cuda"), torch.float32)(x.to("cuda")).cpu()
    torch.testing.assert_close(found.double(), x.double() @ weight.T, rtol=1e-2, atol=1e-1)  # TF32
