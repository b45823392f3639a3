from dataclasses import dataclass, field

import pytest
import torch

from llmquant.grid import QuantizedTensor, decode, dequantize, encode, fit_all, per_column, rows_of
from llmquant.grids import affine


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True)
class Uneven:
    """A grid unlike any format: five uneven levels, a scale for 4 and an offset for 8 columns."""

    span: int = 8
    group: int = 4
    per_tensor: bool = False
    shared: dict[str, int] = field(default_factory=dict)
    bits_per_weight: float = 3.0

    @property
    def table(self):
        return torch.tensor([-1.0, -0.4, 0.0, 0.1, 1.0])

    def fit(self, w, importance):
        scale = w.unflatten(1, (-1, self.group)).abs().amax(2)
        return {"scale": scale, "offset": (importance * w).sum(1, keepdim=True) / importance.sum(1, keepdim=True)}

    def store(self, scale, offset):
        return {"scale": scale, "offset": offset[:, :1]}

    def levels(self, params):
        return params["scale"], params["offset"].expand_as(params["scale"])


def test_encode_picks_the_nearest_level():
    grid = Uneven()
    w, offset = 2 * normal(50, 40), normal(50, 40, seed=1)
    scale = normal(50, 40, seed=2)  # of either sign
    distance = (w[..., None] - (scale[..., None] * grid.table + offset[..., None])).abs()
    chosen = (w - decode(grid, encode(grid, w, scale, offset), scale, offset)).abs()
    torch.testing.assert_close(chosen, distance.amin(-1), rtol=0, atol=1e-12)
    assert encode(grid, w, scale, offset).dtype == torch.uint8


def test_a_zero_scale_takes_the_level_nearest_to_zero():
    w = normal(3, 8)
    codes = encode(Uneven(), w, torch.zeros_like(w), torch.zeros_like(w))
    assert (codes == 2).all()
    assert (decode(Uneven(), codes, torch.zeros_like(w), torch.zeros_like(w)) == 0).all()


def test_fit_all_fits_every_span_by_itself():
    grid, w, importance = Uneven(), normal(3, 24), normal(24, seed=1).square()
    params = fit_all(grid, w, importance)
    assert params["scale"].shape == (3, 3, 2)
    assert params["offset"].shape == (3, 3, 1)
    for row in range(3):
        for span in range(3):
            columns = slice(8 * span, 8 * span + 8)
            alone = grid.fit(w[row : row + 1, columns], importance[None, columns])
            for name, value in alone.items():
                torch.testing.assert_close(params[name][row, span], value[0])


def test_a_grid_for_a_whole_tensor_fits_all_rows_as_one_span():
    grid, w, importance = Uneven(span=8, group=8, per_tensor=True), normal(3, 8), normal(8, seed=1).square()
    params = fit_all(grid, w, importance)
    assert params["offset"].shape == (3, 1, 1)
    expected = (w * importance).sum() / (3 * importance.sum())
    torch.testing.assert_close(params["offset"].flatten(), expected.expand(3))


def test_dequantize_reads_every_weight_with_the_scale_of_its_group():
    grid = Uneven()
    params = {"scale": normal(2, 3, 2), "offset": normal(2, 3, 1, seed=1)}
    codes = torch.randint(5, (2, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    values = dequantize(QuantizedTensor(grid, codes, params))
    for row in range(2):
        for column in range(24):
            span, group = column // 8, column % 8 // 4
            level = [-1.0, -0.4, 0.0, 0.1, 1.0][codes[row, column]]
            expected = params["scale"][row, span, group] * level + params["offset"][row, span, 0]
            assert values[row, column].item() == pytest.approx(expected.item(), abs=1e-7)


def test_rows_of_a_quantized_tensor_read_back_as_those_rows():
    grid, w = Uneven(), normal(6, 16)
    params = fit_all(grid, w, torch.ones(16, dtype=w.dtype))
    q = QuantizedTensor(grid, encode(grid, w, *per_column(grid, params)), params, {"damping": 0.5})
    part = rows_of(q, 2, 5)
    assert torch.equal(dequantize(part), dequantize(q)[2:5])
    assert part.record == {"damping": 0.5}


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse", "kl"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("row", ["zero", "constant", "negative constant", "negative", "positive", "one weight"])
def test_odd_rows_are_kept_to_half_a_step(row, symmetric, observer):
    spread = torch.rand(64, generator=torch.Generator().manual_seed(0)) + 0.1
    w = {
        "zero": torch.zeros(64),
        "constant": torch.full((64,), 0.3),
        "negative constant": torch.full((64,), -0.3),
        "negative": -spread,
        "positive": spread,
        "one weight": torch.eye(64)[5],
    }[row][None]
    config = affine.Config(bits=4, group_size=-1, symmetric=symmetric, observer=observer, percentile=100.0)
    grid = config.bind(1, 64, torch.float16)
    params = fit_all(grid, w, torch.ones(64))
    q = QuantizedTensor(grid, encode(grid, w, *per_column(grid, params)), params)
    error = (dequantize(q) - w).abs()
    range_ = max(w.max().item(), 0) - min(w.min().item(), 0)
    step = range_ * (2 if symmetric else 1) / (14 if row in ("constant", "positive", "one weight") else 15)
    assert torch.isfinite(error).all()
    assert error[w == 0].eq(0).all()
    limit = 0.51 * step  # float16 scales
    if observer in ("minmax", "percentile"):
        assert error.max() <= limit
    else:
        assert error.square().mean().sqrt() <= limit
