import dataclasses
import inspect
import math
import re
from typing import get_args

import pytest
import torch

from llmquant import grid, plugins
from llmquant.errors import RecipeError
from llmquant.grids import affine
from llmquant.stats import Needs, Stats

ROWS, COLS = 4, 512
algorithms = pytest.mark.parametrize("name", plugins.names("algorithms"))
grids = pytest.mark.parametrize("name", plugins.names("grids"))


def weight():
    return torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["grids", "algorithms"])
def test_every_config_is_frozen_has_defaults_and_explains_each_key(kind):
    for name in plugins.names(kind):
        config = plugins.load(kind, name, "here").Config
        assert dataclasses.is_dataclass(config)
        assert config.__dataclass_params__.frozen
        assert config() == config()
        for field in dataclasses.fields(config):
            assert re.search(rf"^ *(\w+, )*{field.name}(, \w+)*:", config.__doc__, re.MULTILINE), (name, field.name)


@pytest.mark.parametrize("kind", get_args(plugins.Kind))
def test_every_plugin_has_a_one_line_summary(kind):
    for name in plugins.names(kind):
        assert plugins.load(kind, name, "here").__doc__.splitlines()[0].strip(), name


@algorithms
def test_every_algorithm_has_the_agreed_functions(name):
    module = plugins.load("algorithms", name, "here")
    assert list(inspect.signature(module.quantize).parameters) == ["w", "stats", "grid", "config"]
    assert module.needs(module.Config()) in get_args(Needs)


@algorithms
def test_every_algorithm_returns_codes_of_the_grid_and_changes_no_argument(name):
    module = plugins.load("algorithms", name, "here")
    w, x = weight(), torch.randn(600, COLS, generator=torch.Generator().manual_seed(1))
    hessian = x.T @ x / 600
    stats = Stats(hessian, hessian.diagonal(), x.abs().mean(0), 600)
    before = w.clone(), hessian.clone()
    bound = affine.Config(3, 128).bind(ROWS, COLS, torch.float32)
    q = module.quantize(w, stats, bound, module.Config())
    assert q.grid is bound
    assert q.codes.dtype == torch.uint8
    assert q.codes.shape == w.shape
    assert q.codes.max() < 8
    assert {key: value.shape for key, value in q.params.items()} == {"scale": (ROWS, 4, 1), "zero": (ROWS, 4, 1)}
    assert (grid.dequantize(q) - w).norm() < 0.5 * w.norm()
    assert torch.equal(w, before[0])
    assert torch.equal(hessian, before[1])
    again = module.quantize(w, stats, bound, module.Config())
    assert torch.equal(again.codes, q.codes)


@grids
def test_every_grid_keeps_the_agreement(name):
    config = plugins.load("grids", name, "here").Config()
    assert list(inspect.signature(config.bind).parameters) == ["rows", "cols", "dtype"]
    bound = config.bind(ROWS, COLS, torch.bfloat16)
    assert isinstance(bound, grid.Grid)
    assert COLS % bound.span == 0
    assert bound.span % bound.group == 0
    assert ((bound.table.diff() > 0) | ((bound.table[1:] == 0) & (bound.table[:-1] == 0))).all()
    assert len(bound.table) <= 256
    assert math.log2(len(bound.table)) <= bound.bits_per_weight < 10


@grids
def test_every_grid_gives_finite_scales_for_every_group_and_comes_near_the_weights(name):
    bound = plugins.load("grids", name, "here").Config().bind(ROWS, COLS, torch.bfloat16)
    w = weight()
    params = grid.fit_all(bound, w, torch.ones(COLS))
    for value in params.values():
        assert value.shape[:2] == (ROWS, COLS // bound.span)
    scale, offset = bound.levels(params)
    assert scale.shape == offset.shape == (ROWS, COLS // bound.span, bound.span // bound.group)
    codes = grid.encode(bound, w, *grid.per_column(bound, params))
    assert (grid.dequantize(grid.QuantizedTensor(bound, codes, params)) - w).norm() < 0.5 * w.norm()


@grids
def test_every_grid_stores_scales_of_its_own_as_they_are(name):
    bound = plugins.load("grids", name, "here").Config().bind(ROWS, COLS, torch.bfloat16)
    scale, offset = bound.levels(grid.fit_all(bound, weight(), torch.ones(COLS)))
    stored = bound.levels(bound.store(scale.flatten(0, 1), offset.flatten(0, 1)))
    torch.testing.assert_close(stored[0], scale.flatten(0, 1), rtol=0.02, atol=0)
    torch.testing.assert_close(stored[1], offset.flatten(0, 1), rtol=0.02, atol=1e-6)


@pytest.mark.parametrize("name", ["os.path", "os", "gptq.Config", "..recipe", "llmquant.algorithms.gptq", ""])
def test_only_the_name_of_a_plugin_is_loaded(name):
    with pytest.raises(RecipeError, match=r"^algorithm\.name: no algorithm is called"):
        plugins.load("algorithms", name, "algorithm.name")


def test_a_mistyped_plugin_gets_the_nearest_name():
    with pytest.raises(RecipeError, match=r"grid\.name: no grid is called 'afine'\. Did you mean 'affine'\?"):
        plugins.configure("grids", {"name": "afine"}, "grid")


def test_a_plugin_without_a_name_gets_the_known_ones():
    with pytest.raises(RecipeError, match=r"algorithm: needs a `name`, one of .*gptq.*rtn"):
        plugins.configure("algorithms", {"actorder": True}, "algorithm")


def test_configure_returns_the_name_and_the_settings():
    name, config = plugins.configure("grids", {"name": "affine", "bits": 3, "group_size": 64}, "grid")
    assert (name, config) == ("affine", affine.Config(bits=3, group_size=64))


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("group_siez", " Did you mean 'group_size'?"),
        ("sym", " Did you mean 'symmetric'?"),
        ("zzz", " Known: bits, group_size, symmetric."),
    ],
)
def test_a_hint_is_the_nearest_word_or_all_of_them(word, said):
    assert plugins.hint(word, ["symmetric", "bits", "group_size"]) == said
