"""Biases that make up for the mean error of rounding; judges are the linears' outputs in transformers' own model."""

from pathlib import Path

import pytest
import torch
import transformers as hf

from llmquant import api, data, recipe, run
from llmquant.errors import RecipeError
from llmquant.packed import open_model
from tests.conftest import VOCABULARY

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}


@pytest.fixture(scope="module")
def biased(save_model, tmp_path_factory):
    config = hf.LlamaConfig(
        **SMALL, intermediate_size=128, pad_token_id=None, attention_bias=True, mlp_bias=True, tie_word_embeddings=False
    )
    return save_model(tmp_path_factory.mktemp("biased"), config)


@pytest.fixture
def changes(calibrated):
    return [*calibrated, "grid.bits=3", "tied_embeddings=keep"]


def loaded(folder, written=None):
    """Return a model in float32, with the weights that a quantized folder stands for."""
    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if written is not None:
        checkpoint = open_model(written)
        model.load_state_dict({name: checkpoint.read(name).float() for name in model.state_dict()})
    return model


@torch.no_grad()
def mean_outputs(model, tokens, name):
    outputs = []
    with model.get_submodule(name).register_forward_hook(lambda module, x, y: outputs.append(y.flatten(0, -2))):
        model(tokens)
    return torch.cat(outputs).double().mean(0)


@pytest.mark.parametrize("set_", ["algorithm={name: rtn}", "mismatch_correction=true", "true_sequential=false"])
def test_the_mean_output_of_a_linear_is_that_of_the_float_model(set_, biased, changes, tmp_path):
    chosen = recipe.load("gptq-plain-w4g128", [*changes, set_])
    tokens = data.calibration_tokens(chosen.calibration, hf.AutoTokenizer.from_pretrained(biased), 256).tokens
    # the first sees no error before it; with a float chain, later ones make up for theirs too
    for name in ("model.layers.0.self_attn.v_proj", *(["model.layers.0.mlp.down_proj"] if "mism" in set_ else [])):
        wrong = []
        for corrected in (False, True):
            out = tmp_path / f"{name}-{corrected}"
            api.quantize(
                biased,
                "gptq-plain-w4g128",
                out,
                changes=[*changes, set_, f"bias_correction={corrected}"],
                evaluate=False,
            )
            means = [mean_outputs(model, tokens, name) for model in (loaded(biased, out), loaded(biased))]
            wrong.append(float((means[0] - means[1]).norm() / means[1].norm()))
        assert wrong[1] < 1e-4 < 1e-3 < wrong[0]


def test_without_biases_nothing_changes(llama, changes, tmp_path):
    for corrected in (False, True):
        made = [*changes, "algorithm={name: rtn}", f"bias_correction={corrected}"]
        api.quantize(llama, "rtn-w4g128", tmp_path / str(corrected), changes=made, evaluate=False)
    files = [sorted((tmp_path / str(c)).glob("*.safetensors")) for c in (False, True)]
    assert [Path(f).read_bytes() for f in files[0]] == [Path(f).read_bytes() for f in files[1]]


def test_a_resumed_run_writes_the_same_biases(biased, changes, tmp_path):
    made = [*changes, "bias_correction=true"]
    whole = api.quantize(
        biased, "gptq-plain-w4g128", tmp_path / "whole", changes=made, work=tmp_path / "work", evaluate=False
    )
    (tmp_path / "work" / "layer-00001.safetensors").unlink()
    again = api.quantize(
        biased, "gptq-plain-w4g128", tmp_path / "again", changes=made, work=tmp_path / "work", evaluate=False
    )
    assert again.resumed_layers == 1
    assert whole.hashes["gptq"]["model.safetensors"] == again.hashes["gptq"]["model.safetensors"]


def test_it_needs_text(llama, tmp_path):
    with pytest.raises(RecipeError, match="calibration"):
        run.make_plan(llama, recipe.load("rtn-w4g128", ["bias_correction=true", "grid.group_size=32"]))
