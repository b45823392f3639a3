"""What is loaded computes what evaluation computes of the same file, decoded."""

import pytest
import torch
import transformers as hf

import llmquant
from llmquant import bench, gguf_file, inference, run
from llmquant.errors import CheckpointError, DataError, LlmquantError
from llmquant.exporters import awq
from llmquant.packed import open_model
from llmquant.recipe import Recipe
from llmquant.runtime.coded import CodedEmbedding, CodedLinear, Int4Linear
from llmquant.runtime.linear import QuantizedLinear
from llmquant.stream import Stream
from tests.conftest import VOCABULARY
from tests.test_cli import llmquant as command_line
from tests.test_gguf_export import TYPES, resized
from tests.test_gguf_families import CONFIGS

INTS = {"name": "affine", "bits": 4, "group_size": 64}
MIXED = dict(zip((f"blk.{i}.{part}" for i in (0, 1) for part in (
    "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"
)), TYPES, strict=False))  # fmt: skip
RECIPES = {
    "gptq": {
        "grid": INTS,
        "rules": [
            {"match": "*.q_proj", "grid": {"bits": 8, "strategy": "channel"}},
            {"match": "*.down_proj", "grid": {"bits": 3}},
            {"match": "*.up_proj", "grid": {"bits": 2, "group_size": 32}},
        ],
        "formats": ["gptq"],
    },
    "gptq_v2": {"grid": INTS | {"symmetric": False}, "formats": ["gptq_v2"]},
    "awq": {"grid": INTS | {"symmetric": False, "scale_dtype": "float16"}, "formats": ["awq"]},
    "compressed_tensors": {
        "grid": INTS | {"symmetric": False},
        "rules": [
            {"match": "*.q_proj", "grid": {"bits": 8, "strategy": "channel", "symmetric": True}},
            {"match": "*.k_proj", "grid": {"bits": 8, "strategy": "tensor"}},
            {"match": "*.v_proj", "grid": {"bits": 3, "symmetric": True}},
            {"match": "*.o_proj", "grid": {"name": "fp8"}},
        ],
        "formats": ["compressed_tensors"],
    },
    "int8 activations": {
        "grid": {"name": "affine", "bits": 8, "strategy": "channel"},
        "activations": {"type": "int8"},
        "formats": ["compressed_tensors"],
    },
    "fp8 activations": {"grid": {"name": "fp8"}, "activations": {"type": "fp8"}, "formats": ["compressed_tensors"]},
    "nf4": {"grid": {"name": "nf4"}, "formats": ["bitsandbytes"]},
    "fp4": {"grid": {"name": "fp4", "double_quant": False}, "formats": ["bitsandbytes"]},
    "gguf": {"mixture": {"name": "q4_0", "overrides": MIXED}, "formats": ["gguf"]},
}
EXACT, ROUNDED = 1e-5, 0.03
"""Of the largest logit: in float32; in bfloat16, or with activations that are rounded to 8 bits."""


@pytest.fixture(scope="module")
def wide(save_model, tmp_path_factory):
    """A small Llama with columns enough for k-quants."""
    config = hf.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
    )
    return save_model(tmp_path_factory.mktemp("wide"), config)


@pytest.fixture(scope="module")
def packed(wide, tmp_path_factory):
    """Return a function that gives the folder of a recipe, made once."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("packed") / "out"
            run.quantize(wide, Recipe(name="x", **RECIPES[name]), made[name])
        return made[name]

    return folder


def tokens(count=24):
    return torch.randint(2, VOCABULARY, (1, count), generator=torch.Generator().manual_seed(0))


def decoded_logits(path, ids):
    stream = Stream(open_model(path), torch.device("cpu"))
    (hidden,) = stream.hidden(ids)
    return stream.finish(ids, hidden)


@torch.no_grad()
def assert_same(path, dtype, most, counts=(24, 1)):
    model = llmquant.load(path, dtype)
    for count in counts:
        ids = tokens(count)
        wanted = decoded_logits(path, ids)
        assert (model(ids).logits - wanted).abs().max() <= most * wanted.abs().max()
    return {type(module) for module in model.modules()}


@pytest.mark.parametrize("name", RECIPES)
def test_a_loaded_model_gives_the_logits_of_its_decoded_weights(name, packed):
    rounds = "activations" in name
    kinds = assert_same(packed(name), "float32", ROUNDED if rounds else EXACT)
    assert (QuantizedLinear if rounds else CodedLinear) in kinds
    if not rounds:  # else inputs in bfloat16 are rounded to other levels, which are few
        assert_same(packed(name), "bfloat16", 2 * ROUNDED)


def test_bfloat16_goes_through_torch_s_kernel(packed):
    kinds = {type(module) for module in llmquant.load(packed("awq"), "bfloat16").modules()}
    assert Int4Linear in kinds
    assert CodedLinear not in kinds


@pytest.mark.filterwarnings("ignore")  # transformers' own about tiny configurations
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "qwen3-moe, tied"])
def test_families_with_modules_of_their_own_stay_packed(name, save_model, tmp_path):
    model = save_model(tmp_path / "model", resized(CONFIGS[name]()))
    run.quantize(model, Recipe(name="x", mixture={"name": "q8_0", "pure": True}, formats=["gguf"]), tmp_path / "out")
    assert {CodedLinear, CodedEmbedding} <= assert_same(tmp_path / "out", "float32", EXACT)


@pytest.mark.filterwarnings("ignore")  # transformers' own about tiny configurations
def test_other_programs_may_tie_a_packed_output_matrix_again(save_model, tmp_path):
    model = save_model(tmp_path / "model", resized(CONFIGS["qwen3-moe, tied"]()))
    run.quantize(model, Recipe(name="x", mixture={"name": "q8_0", "pure": True}, formats=["gguf"]), tmp_path / "out")
    loaded, ids = llmquant.load(tmp_path / "out"), torch.arange(8)[None]
    logits, size = loaded(ids).logits, inference.weight_bytes(loaded)
    loaded.tie_weights()  # as lm-evaluation-harness does
    assert torch.equal(loaded(ids).logits, logits)
    assert inference.weight_bytes(loaded) == size


def test_no_quantized_weight_is_decoded_while_a_model_is_loaded(packed, monkeypatch):
    def refuse(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr(awq, "unpack", refuse)
    assert llmquant.load(packed("awq"))
    to_float = gguf_file.to_float
    monkeypatch.setattr(gguf_file, "to_float", lambda t, rows=None: to_float(t, rows) if t.type == "f32" else refuse())
    assert llmquant.load(packed("gguf"))


@pytest.mark.parametrize(("name", "most"), [("awq", 0.28), ("gguf", 0.22), ("int8 activations", 0.4)])
def test_weights_take_little_more_memory_than_in_their_file(name, most, wide, packed):
    floats = inference.weight_bytes(llmquant.load(wide, "float32"))
    assert floats == 4 * sum(p.numel() for p in hf.AutoModelForCausalLM.from_pretrained(wide).parameters())
    assert inference.weight_bytes(llmquant.load(packed(name))) <= most * floats


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["compressed_tensors", "gguf"])
def test_greedy_generation_is_that_of_a_float_model_with_the_decoded_weights(name, packed):
    checkpoint = open_model(packed(name))
    config = Stream(checkpoint, torch.device("cpu"), weights=False).config
    floats = hf.AutoModelForCausalLM.from_config(config).eval()
    floats.load_state_dict({name: checkpoint.read(name) for name in floats.state_dict()})
    tokenizer = inference.load_tokenizer(packed(name))
    ids = tokenizer("The module", return_tensors="pt")["input_ids"]
    mask = torch.ones_like(ids)  # else the first token is taken for padding
    found = floats.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False, pad_token_id=0)
    wanted = found[0, ids.shape[1] :]
    pieces = []
    found = llmquant.generate(
        llmquant.load(packed(name)), tokenizer, "The module", max_new_tokens=24, say=pieces.append
    )
    assert found == tokenizer.decode(wanted, skip_special_tokens=True)
    assert "".join(pieces) == found


def test_the_same_seed_draws_the_same_text_and_leaves_the_global_one_alone(packed):
    model, tokenizer = llmquant.load(packed("awq")), inference.load_tokenizer(packed("awq"))
    before = torch.get_rng_state()
    texts = [
        llmquant.generate(model, tokenizer, "The", max_new_tokens=8, temperature=2.0, seed=seed) for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(DataError, match=r"prompt: has \d+ tokens, and the model takes 64 at most"):
        llmquant.generate(model, tokenizer, "many words " * 40)


def test_what_cannot_be_loaded_is_said(packed, tmp_path):
    with pytest.raises(LlmquantError, match="dtype: 'float8' is none of auto, float32, bfloat16"):
        llmquant.load(packed("awq"), "float8")
    tensor = gguf_file.GgufTensor("blk.0.ffn_up.weight", (1, 256), "iq2_s", tmp_path / "x.gguf", 0, 82)
    with pytest.raises(CheckpointError, match="has type iq2_s, which llmquant computes decoded only"):
        gguf_file.coded(tensor, (0, 1))


def test_the_command_generates(packed, monkeypatch, capsys, tmp_path, read_json):
    arguments = ["generate", str(packed("gguf")), "The module", "--max-new-tokens", "5", "--json", str(tmp_path / "j")]
    code, said, _ = command_line(capsys, monkeypatch, *arguments)
    assert code == 0
    text = read_json(tmp_path / "j")["text"]
    assert said.split() == "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text).split() != []


def test_the_benchmark_runs_files_side_by_side(wide, packed, texts, monkeypatch, capsys, tmp_path, read_json):
    arguments = ["bench", str(packed("gguf")), "--reference", str(wide), "--text", str(texts / "evaluation.txt")]
    arguments += ["--max-tokens", "200", "--prompt", "16", "--generated", "4", "--rounds", "2"]
    assert command_line(capsys, monkeypatch, *arguments, "--json", tmp_path / "j")[0] == 0
    floats, ours, theirs = read_json(tmp_path / "j")["rows"]
    assert [row["runtime"] for row in (floats, ours, theirs)] == ["torch", "torch", "llama.cpp"]
    assert floats["prompt_ratio"] == floats["generation_ratio"] == 1.0
    assert floats["kld_mean"] == 0.0
    assert ours["weight_bytes"] < 0.3 * floats["weight_bytes"]
    assert ours["perplexity"] == pytest.approx(theirs["perplexity"], rel=0.05)
    for row in (floats, ours, theirs):
        assert row["peak_bytes"] > row["weight_bytes"]
        assert row["first_token_seconds"] > 0


def test_an_error_in_a_process_of_the_benchmark_is_that_of_the_command(packed):
    with pytest.raises(LlmquantError, match="dtype: 'float8' is none of"):
        bench.bench([packed("awq")], settings=bench.Settings(dtype="float8"))
