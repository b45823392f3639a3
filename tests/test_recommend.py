"""What is recommended fits: files to the byte, caches as the runtimes make them, rates by hand."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf

from llmquant import api, recipe, shipped
from llmquant.demo import MODEL
from llmquant.errors import DataError, PlanError, RecipeError
from llmquant.recommend import cache_bytes
from llmquant.targets import TARGETS
from tests.conftest import VOCABULARY
from tests.test_cli import command as command
from tests.test_models import TINY

WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def wide(save_model, tmp_path_factory):
    """A small Llama whose matrices divide into every grid's spans."""
    config = hf.LlamaConfig(**WIDE, vocab_size=VOCABULARY, num_hidden_layers=2, max_position_embeddings=512)
    return save_model(tmp_path_factory.mktemp("wide"), config, torch.bfloat16)


@pytest.fixture(scope="module")
def found(wide):
    return api.recommend(wide, "16GB")


@pytest.fixture
def few(monkeypatch):
    """Few recipes, as all take seconds to size."""
    names = ("gguf-q8_0", "gguf-q4_k_s", "gguf-q2_k", "gguf-q2_k_s", "gptq-q4_k_m", "fp8", "gptq-w4g128")
    some = {name: path for name, path in shipped.recipes().items() if name in names}
    monkeypatch.setattr(shipped, "recipes", lambda: some)


def test_the_sizes_are_those_of_the_written_files_to_the_byte(found, wide, tmp_path):
    rows = {(row.recipe, row.format): row for rows in found.rows.values() for row in rows}
    for name in ("gguf-q8_0", "gguf-q4_k_s", "rtn-w4g128", "fp8", "hqq-w4g64"):
        out = tmp_path / name
        (format_,) = recipe.load(name).formats
        api.quantize(wide, name, out, evaluate=False)
        written = sum(path.stat().st_size for path in [*out.glob("*.gguf"), *out.glob("*.safetensors")])
        assert rows[name, format_].file_bytes == written, name


# transformers spreads the keys of Falcon's key-value heads over all heads first
@pytest.mark.parametrize("name", [name for name in TINY if name not in ("falcon-40b", "falcon-11b")])
def test_the_cache_has_the_size_of_the_one_of_transformers(name):
    config, tokens = TINY[name][0], 12
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    cache = model(torch.zeros(1, tokens, dtype=torch.int64), use_cache=True).past_key_values
    held = 2 * sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    # transformers keeps one token less of a window: the newest has its keys at hand
    held += sum(4 * layer.keys[0, :, 0].numel() for layer in cache.layers if layer.keys.shape[2] < tokens)
    assert cache_bytes(config, tokens) == held


@pytest.mark.parametrize(("context", "window"), [(4096, 512), (1000, 512), (600, 64)])
def test_llama_cpp_makes_a_cache_of_this_size_and_a_buffer_no_larger_than_estimated(
    context, window, few, save_model, tmp_path
):
    pytest.importorskip("cyllama")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = hf.Gemma3TextConfig(
        **sizes,
        vocab_size=VOCABULARY,
        num_hidden_layers=7,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=window,
        max_position_embeddings=4096,
    )
    model = save_model(tmp_path / "model", config)
    row = api.recommend(model, "16GB", target="laptop", context=context).best("laptop")
    api.quantize(model, "gguf-q8_0", tmp_path / "out", evaluate=False)
    (file,) = (tmp_path / "out").glob("*.gguf")
    code = (
        "from cyllama.llama import llama_cpp as program\n"
        f"settings = program.LlamaContextParams(); settings.n_ctx = {context}; settings.swa_full = False\n"
        f"model = program.LlamaModel({str(file)!r}, program.LlamaModelParams())\n"
        "program.LlamaContext(model, settings)\n"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr
    caches = [float(size) for size in re.findall(r"CPU KV buffer size = +([\d.]+) MiB", told)]
    assert abs(sum(caches) * 2**20 - row.cache_bytes) <= len(caches) * 0.005 * 2**20
    (buffer,) = re.findall(r"sched_reserve: +CPU compute buffer size = +([\d.]+) MiB", told)
    assert float(buffer) * 2**20 <= row.runtime_bytes


def test_the_rate_is_the_bandwidth_over_the_bytes_of_a_token(found, wide):
    row = next(row for row in found.rows["laptop"] if row.recipe == "gguf-q8_0")
    matrices = 2 * (256 * (256 + 128 + 128 + 256) + 3 * 256 * 256) + VOCABULARY * 256  # layers, output matrix
    norms = 5 * 256 * 4
    read = matrices * 34 // 32 + norms + row.cache_bytes  # 32 numbers of Q8_0 take 34 bytes
    assert row.cache_bytes == 2 * 2 * 2 * (2 * 64) * 512
    assert row.rate == pytest.approx(TARGETS["laptop"].bandwidth / read, rel=1e-4)


def test_a_token_reads_its_own_experts_alone(few, save_model, tmp_path):
    experts = {"num_local_experts": 8, "num_experts_per_tok": 2}
    config = hf.MixtralConfig(
        **WIDE, **experts, vocab_size=VOCABULARY, num_hidden_layers=1, max_position_embeddings=256
    )
    model = save_model(tmp_path / "model", config)
    rows = api.recommend(model, "16GB", target="laptop").rows["laptop"]
    row = next(row for row in rows if row.recipe == "gguf-q8_0")
    attention, expert = 256 * (256 + 128 + 128 + 256), 3 * 256 * 256
    quantized = (attention + 2 * expert + VOCABULARY * 256) * 34 // 32
    read = quantized + (8 * 256 + 3 * 256) * 4 + row.cache_bytes  # the router and the norms are float32
    assert row.rate == pytest.approx(TARGETS["laptop"].bandwidth / read, rel=1e-4)


def test_what_fits_comes_first_and_the_best_of_it_before_the_rest(few, wide):
    every = api.recommend(wide, "16GB", target="laptop").rows["laptop"]
    assert every[0].recipe == "gguf-q8_0"
    sizes = {row.recipe: row.total_bytes for row in every}
    rows = api.recommend(wide, sizes["gptq-q4_k_m"], target="laptop").rows["laptop"]
    assert [row.recipe for row in rows] == ["gptq-q4_k_m", "gguf-q4_k_s", "gguf-q2_k", "gguf-q2_k_s", "gguf-q8_0"]
    assert [row.fits for row in rows] == [True] * 4 + [False]
    with pytest.raises(PlanError, match=r"nothing fits in .* The least is gguf-q2_k_s on laptop"):
        api.recommend(wide, sizes["gguf-q2_k_s"] - 1, target="laptop")


def test_a_measured_divergence_decides_among_the_measured(few, wide, texts, tmp_path):
    names = ["gguf-q4_k_s", "gguf-q2_k"]
    api.compare(wide, names, tmp_path / "compared", text=texts / "evaluation.txt", max_tokens=1024)
    path = tmp_path / "compared" / "gguf-q4_k_s" / "llmquant-report.json"
    report = json.loads(path.read_text("utf-8"))
    report["evaluation"][1]["kld_mean"] = 9.0  # as if it had gone wrong
    path.write_text(json.dumps(report), "utf-8")
    rows = api.recommend(wide, "16GB", target="laptop", reports=[tmp_path / "compared"]).rows["laptop"]
    told = {row.recipe: row.kld for row in rows if row.kld is not None}
    assert list(told) == names[::-1]
    assert told["gguf-q4_k_s"] == 9.0
    assert rows[0].recipe == "gguf-q8_0"
    with pytest.raises(DataError, match=r"of the 2 reports .* none is on"):
        api.recommend(MODEL, "16GB", target="laptop", reports=[tmp_path / "compared"])


def test_the_command_prints_what_fits_and_the_commands_to_run_it(few, command, wide, tmp_path):
    facts = tmp_path / "facts.json"
    code, out, _ = command(
        "recommend", wide, "--memory", "1GB", "--target", "laptop", "--context", "256", "--json", facts
    )
    assert code == 0
    assert f"llmquant quantize {wide} gguf-q8_0 --out {wide.name}-gguf-q8_0" in out
    assert f"llama-cli -m {wide.name}-gguf-q8_0/*.gguf -c 256" in out
    told = json.loads(facts.read_text("utf-8"))
    assert told["rows"]["laptop"][0]["file_bytes"] > 0
    assert told["targets"]["laptop"]["sources"]["bandwidth"]
    code, out, _ = command("recommend", wide, "--memory", "16GB")
    assert code == 0
    assert all(name in out for name in TARGETS)


def test_what_cannot_be_recommended_is_said(wide):
    with pytest.raises(RecipeError, match=r"no such target\. Did you mean 'laptop'"):
        api.recommend(wide, "8GB", target="labtop")
    with pytest.raises(DataError, match="takes 1 to 512 tokens"):
        api.recommend(wide, "8GB", context=1000)


def test_every_figure_of_a_target_has_a_source():
    for target in TARGETS.values():
        assert {"bandwidth", "formats"} <= target.sources.keys()
        assert all(target.sources.values())


def test_every_shipped_recipe_is_sized_or_refused_with_a_reason(found):
    sized = {row.recipe for rows in found.rows.values() for row in rows}
    assert not found.refused
    assert sized <= shipped.recipes().keys()


def test_no_weights_are_read(few, wide, tmp_path):
    folder = tmp_path / "hollow"
    folder.mkdir()
    for path in wide.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = folder / "model.safetensors"
    length = int.from_bytes(weights.read_bytes()[:8], "little") + 8
    size = weights.stat().st_size
    with weights.open("r+b") as file:  # nothing but the header
        file.truncate(length)
        file.truncate(size)
    hollow = api.recommend(folder, "16GB", target="vllm-hopper").rows["vllm-hopper"]
    whole = api.recommend(wide, "16GB", target="vllm-hopper").rows["vllm-hopper"]
    assert [row.file_bytes for row in hollow] == [row.file_bytes for row in whole]
    assert Path(hollow[0].commands[0].split()[2]) == folder
