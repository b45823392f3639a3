"""Rotated checkpoints; judges are transformers' own logits, and the orthogonality that defines a Hadamard matrix."""

import copy

import pytest
import torch
import transformers as hf

from llmquant import api, recipe, run
from llmquant.checkpoint import Checkpoint
from llmquant.errors import RecipeError
from llmquant.packed import open_model
from llmquant.rotation import Rotated, hadamard, orthogonal
from llmquant.run import load_float
from llmquant.stream import Stream
from tests.test_models import TINY, fused, tokens

RMS = [key for key in TINY if key.split("-")[0] in ("llama", "mistral", "mixtral", "qwen2", "qwen3", "phi3")]
CLIPPED = "olmoe-clipped"  # its values pass a function that no rotation does
NORMS_ELSEWHERE = [key for key in TINY if key not in (*RMS, CLIPPED)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a function that writes one of the tiny models, float32, once."""
    folder = tmp_path_factory.mktemp("tiny")

    def save(key):
        if not (folder / key).exists():
            model = copy.deepcopy(fused(key)).float()
            for parameter in model.parameters():
                parameter.data = parameter + 1.0 if parameter.ndim == 1 else parameter
            model.save_pretrained(folder / key)
        return folder / key

    return save


def stream_of(folder):
    return Stream(load_float(folder), torch.device("cpu"), weights=False)


def logits(checkpoint, x):
    stream = Stream(checkpoint, torch.device("cpu"))
    return torch.cat([stream.finish(x[i : i + 1], h) for i, h in enumerate(stream.hidden(x))])


def expected(folder, x):
    with torch.no_grad():
        return hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(x).logits


def check_same_function(folder, *rotations):
    x = tokens(1)
    right = expected(folder, x)
    rotated = Rotated(stream_of(folder), rotations, untie=True)
    error = (logits(rotated, x) - right).abs().max()
    assert error < 2e-4 * right.abs().max(), float(error)
    return rotated


@pytest.mark.parametrize("key", RMS)
def test_rotating_the_residual_stream_and_the_heads_leaves_the_function_unchanged(key, saved):
    folder = saved(key)
    rotated = check_same_function(folder, "residual", "heads")
    plain = Checkpoint(folder)
    for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.o_proj.weight"):
        assert (rotated.read(name) - plain.read(name)).abs().max() > 0.1


@pytest.mark.parametrize("key", [*NORMS_ELSEWHERE, "llama-gqa-tied"])
def test_rotating_the_heads_leaves_the_function_of_every_family_unchanged(key, saved):
    check_same_function(saved(key), "heads")


def test_values_that_are_clipped_cannot_be_rotated(saved):
    with pytest.raises(RecipeError, match="no values of attention"):
        Rotated(stream_of(saved(CLIPPED)), ["heads"], untie=True)


@pytest.mark.parametrize("key", [*NORMS_ELSEWHERE, CLIPPED])
def test_a_model_whose_residual_stream_cannot_be_rotated_is_refused(key, saved):
    with pytest.raises(RecipeError, match=r"rotations: .*because of .*(norm|ln_|embed|wpe|emb)"):
        Rotated(stream_of(saved(key)), ["residual"], untie=True)


def test_a_tied_output_matrix_is_rotated_only_where_it_may_be_untied(saved):
    with pytest.raises(RecipeError, match="tied_embeddings: untie"):
        Rotated(stream_of(saved("llama-gqa-tied")), ["residual"], untie=False)


def test_rows_are_those_of_the_whole_tensor(saved):
    rotated = Rotated(stream_of(saved("llama-mqa-bias")), ["residual", "heads"], untie=True)
    for name, info in rotated.infos.items():
        whole = rotated.read(name)
        assert whole.shape == info.shape
        assert torch.equal(whole[2:5], rotated.read(name, (2, 5)))


@pytest.mark.parametrize("size", [1, 2, 4, 12, 20, 28, 36, 64, 576, 768, 896])
def test_a_hadamard_matrix_has_orthogonal_rows_of_ones(size):
    h = hadamard(size)
    assert (h.abs() == 1).all()
    assert torch.equal(h @ h.T, size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [13, 52, 64])
def test_every_size_has_an_orthogonal_matrix_that_depends_on_the_seed(size):
    q = orthogonal(size, 0)
    torch.testing.assert_close(q @ q.T, torch.eye(size, dtype=torch.float64))
    assert torch.equal(q, orthogonal(size, 0))
    assert not torch.equal(q, orthogonal(size, 1))


def test_outliers_are_spread_over_all_channels():
    x = torch.zeros(64, dtype=torch.float64)
    x[5] = 100
    torch.testing.assert_close((x @ orthogonal(64, 0)).abs(), torch.full((64,), 12.5, dtype=torch.float64))


@pytest.mark.parametrize("algorithm", ["rtn", "gptq"])
def test_a_file_of_a_rotated_model_computes_what_the_model_did(algorithm, llama, texts, calibrated, tmp_path):
    changes = [*calibrated, "rotations=[residual, heads]", f"algorithm={{name: {algorithm}}}", "grid.bits=8"]
    api.quantize(llama, "gptq-plain-w4g128", tmp_path / "out", changes=changes, evaluate=False)
    x = torch.arange(40)[None]
    right = expected(llama, x)
    error = logits(open_model(tmp_path / "out"), x) - right
    assert error.square().mean() < 1e-3 * right.square().mean()
    config = hf.AutoConfig.from_pretrained(tmp_path / "out")
    assert not config.tie_word_embeddings


def test_a_recipe_says_what_is_wrong_with_its_rotations(llama):
    with pytest.raises(RecipeError, match="rotations"):
        recipe.load("gptq-plain-w4g128", ["rotations=[residuals]"])
    assert run.make_plan(llama, recipe.load("rtn-w4g128", ["rotations=[residual]", "grid.group_size=32"])).weights
