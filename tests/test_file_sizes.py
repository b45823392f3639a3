"""A plan knows the size of the weights' files to the byte."""

import pytest
import transformers as hf

from llmquant import api
from tests.conftest import VOCABULARY

CASES = {
    "gptq and compressed-tensors": (
        "rtn-w4g128",
        ["grid.group_size=32", "formats=[gptq, gptq_v2, compressed_tensors]"],
    ),
    "zero points": ("rtn-w4g128", ["grid.group_size=16", "grid.symmetric=false", "grid.bits=3"]),
    "one scale": ("rtn-w4g128", ["grid.strategy=tensor"]),
    "shards": ("rtn-w4g128", ["grid.group_size=32", "max_shard_size=40kB"]),
    "gguf": ("gguf-q4_k_m", []),
    "gguf shards": ("gguf-q8_0", ["max_shard_size=50kB"]),
    "gguf of a grid": ("rtn-w4g128", ["grid={name: q4_0}", "formats=[gguf]"]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_plan_knows_the_size_of_the_files_to_the_byte(case, llama, tmp_path):
    name, changes = CASES[case]
    planned = api.plan(llama, name, changes=changes)
    report = api.quantize(llama, name, tmp_path / "out", changes=changes, evaluate=False)
    assert planned.files == report.bytes


@pytest.mark.parametrize("untie", [False, True])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gguf-q4_k_s", []),
        ("rtn-w4g128", ["grid.group_size=32", "ignore=[]"]),
        ("rtn-w4g128", ["grid.group_size=32", "formats=[gptq]"]),
    ],
)
def test_tied_embeddings_count_as_they_are_stored(untie, name, changes, save_model, tmp_path):
    if "ignore=[]" in changes and not untie:
        changes = changes[:1]
    config = hf.Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = save_model(tmp_path / "model", config)
    changes = [*changes, f"tied_embeddings={'untie' if untie else 'keep'}"]
    planned = api.plan(model, name, changes=changes)
    report = api.quantize(model, name, tmp_path / "out", changes=changes, evaluate=False)
    assert planned.files == report.bytes
