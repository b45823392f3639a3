"""Mutated inputs end in success or in one message: the short form of eval/fuzz.py, in this process."""

import dataclasses
import gzip
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import transformers as hf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llmquant import api, cli, data, gguf_file, patterns, recipe
from llmquant.checkpoint import Checkpoint, check_followed
from llmquant.errors import CheckpointError, DataError, LlmquantError, OutputError, RecipeError, ShapeError
from llmquant.packed import open_model
from llmquant.stream import Stream, model_config
from tests.test_cli import llmquant as command_line

SLOW = r"(\w|\w\.|.)*[A-Z]$"
EVAL = Path(__file__).parent.parent / "eval"
KINDS = ["safetensors", "index", "config", "tokenizer", "recipe", "packed", "gguf", "imatrix"]
KINDS += ["text", "sensitivity", "work"]


@pytest.fixture(scope="module")
def fuzz():
    sys.path.insert(0, str(EVAL))
    yield importlib.import_module("fuzz")
    sys.path.remove(str(EVAL))


@pytest.fixture(scope="module")
def sound(fuzz, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    fuzz.sound_files(folder)
    return folder


def test_the_long_form_knows_the_same_kinds(fuzz):
    assert list(fuzz.KINDS) == KINDS


@pytest.mark.filterwarnings("ignore")  # of libraries, about what they read
@given(st.sampled_from(KINDS), st.integers(0, 10**6))
@settings(max_examples=44, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_a_mutated_input_is_no_traceback_and_writes_nothing_outside(fuzz, sound, capsys, kind, number):
    with tempfile.TemporaryDirectory() as scratch, pytest.MonkeyPatch.context() as patch:
        folder = Path(scratch) / "root"
        shutil.copytree(sound, folder)
        for path in (folder / "work" / "work.json", folder / "sensitivity" / "sensitivity.json"):
            path.write_text(path.read_text("utf-8").replace(str(sound), str(folder)), "utf-8")
        arguments = fuzz.mutate(kind, number, 0, folder)
        before = fuzz.tree(folder)
        patch.chdir(folder)
        patch.setattr(cli.out, "width", 200)
        code, out, err = command_line(capsys, patch, *arguments)
        assert not fuzz.judge(kind, code, out + err, before, fuzz.tree(folder))


def test_yaml_that_stands_for_gigabytes_or_for_objects_is_refused(tmp_path):
    path = tmp_path / "r.yaml"
    for text, message in (
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "aliases are not read"),
        ("grid: " + "[" * 1000, "levels"),
        ("x" * (recipe.MOST_BYTES + 1), "more than 1,048,576 characters"),
        ("name: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
        ("grid: {name: affine, bits: " + "9" * 5000 + "}\n", "digits"),
        ("name: 2020-99-99\n", "month must be in 1..12"),
    ):
        path.write_text(text, "utf-8")
        with pytest.raises(RecipeError, match=message):
            recipe.load(path)


@pytest.mark.parametrize("name", ["../x", "/x", "", "..", ".", "a/b", "a\nb", "a" * 101])
def test_a_recipes_name_is_that_of_a_folder_and_no_path(name):
    with pytest.raises(RecipeError, match=r"^name: .* is not a name that a folder can have"):
        recipe.Recipe(name=name, grid={"name": "affine"})


def test_a_regular_expression_comes_to_an_end(tmp_path):
    name = "model.layers.0.self_attn.q_proj_of_a_long_name"
    assert patterns.matches(r".*layers\.[01]\..*", name, "fullmatch")
    with pytest.raises(ValueError, match=r"tries for more than 0\.5 s"):
        patterns.matches(SLOW, name, "match")
    with pytest.raises(RecipeError, match=r"match: '.*' tries for more than 0\.5 s"):
        recipe.matches(f"re:{SLOW}", name)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("tokenizer_config.json", "vocab_file", "../secret.json"),
        ("tokenizer_config.json", "fast_tokenizer_files", ["../secret.json"]),
        ("config.json", "configuration_files", ["../secret.json"]),
    ],
)
def test_a_path_out_of_the_model_folder_is_refused(file, key, value, llama, tmp_path, read_json):
    model = tmp_path / "model"
    shutil.copytree(llama, model)
    config = read_json(model / file)
    (model / file).write_text(json.dumps({**config, key: value}), "utf-8")
    check_followed(model)  # the author's own path, which does not exist here
    (tmp_path / "secret.json").write_text("{}", "utf-8")
    with pytest.raises(CheckpointError, match=rf"{file}: {key} is '\.\./secret\.json', which is not a file of this"):
        model_config(model)
    with pytest.raises(CheckpointError, match="which is not a file of this folder"):
        data.load_tokenizer(model)


SIZES = {
    "num_hidden_layers": (10**9, "num_hidden_layers 1000000000, but there are 3 decoder layers"),
    "vocab_size": (10**12, "vocab_size 1000000000000, but there are 384 embeddings"),
    "head_dim": (2**40, "head_dim 1.0995e[+]12"),
    "max_position_embeddings": (-1, "max_position_embeddings -1"),
    "rope_parameters": ({"rope_theta": [1]}, r"rope_parameters.rope_theta: \[1\] is not a number"),
    "hidden_act": ("evil", "cannot build the model"),
}


@pytest.mark.parametrize("key", SIZES)
def test_numbers_out_of_all_proportion_are_refused_before_they_cost_anything(key, llama, tmp_path, read_json):
    value, message = SIZES[key]
    model = tmp_path / "model"
    shutil.copytree(llama, model)
    config = read_json(model / "config.json")
    (model / "config.json").write_text(json.dumps({**config, key: value}), "utf-8")
    with pytest.raises(CheckpointError, match=message):
        Stream(Checkpoint(model), torch.device("cpu"))


def test_remote_code_runs_only_where_that_is_asked_for(llama, tmp_path, read_json):
    model = tmp_path / "model"
    shutil.copytree(llama, model)
    config = read_json(model / "config.json")
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
    (model / "config.json").write_text(json.dumps(config), "utf-8")
    (model / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n", "utf-8")
    with pytest.raises(CheckpointError, match=r"brings along\. If you trust that: --trust-remote-code"):
        model_config(model)
    assert not (tmp_path / "ran").exists()


def test_what_a_gguf_file_says_of_its_size_is_held_against_its_tensors(sound, fuzz, tmp_path):
    raw = (sound / "m.gguf").read_bytes()
    at = raw.index(b"llama.block_count") + len("llama.block_count") + 4
    path = tmp_path / "m.gguf"
    path.write_bytes(raw[:at] + (2**31 - 1).to_bytes(4, "little") + raw[at + 4 :])
    assert gguf_file.read(path).metadata["llama.block_count"] == 2**31 - 1
    with pytest.raises(LlmquantError, match="block_count is 2147483647, but there are tensors of 2 blocks"):
        open_model(path)


def test_a_gguf_matrix_with_rows_missing_is_named(sound):
    checkpoint = open_model(sound / "m.gguf")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors = checkpoint.file.tensors
    whole = tensors["blk.0.attn_q.weight"]
    shorter = dataclasses.replace(whole, shape=(whole.shape[0] // 2, whole.shape[1]), bytes=whole.bytes // 2)
    checkpoint.file = dataclasses.replace(checkpoint.file, tensors={**tensors, "blk.0.attn_q.weight": shorter})
    assert checkpoint.infos[name].shape == whole.shape
    with pytest.raises(CheckpointError, match=r"blk\.0\.attn_q\.weight is \[\d+, 64\], but its metadata asks for"):
        checkpoint.read(name)


def test_a_kept_tensor_that_is_not_finite_stops_a_run_that_only_copies_it(llama, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(llama, model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    for name, changes in (("rtn-w4g128", ["grid.group_size=32"]), ("gguf-q4_0", [])):
        with pytest.raises(CheckpointError, match=r"model\.norm\.weight.* has 1 values that are NaN"):
            api.quantize(model, name, tmp_path / "out", changes=changes, evaluate=False)
        assert not list(tmp_path.glob("out*"))


def test_a_name_in_a_file_cannot_command_the_terminal(llama, tmp_path, capsys, monkeypatch):
    model = tmp_path / "model"
    shutil.copytree(llama, model)
    tensors = load_file(model / "model.safetensors")
    tensors["\x1b]0;evil\x07[red]"] = torch.zeros(1)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    code, out, _ = command_line(capsys, monkeypatch, "inspect", model)
    assert code == 0
    assert "]0;evil" in out
    assert "[red]" in out
    assert not {"\x1b", "\x07"} & set(out)


def test_a_pickle_is_refused_with_the_command_that_converts_it(llama, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(llama, model)
    whole = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(whole, model / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="A pickle can run code") as refused:
        Checkpoint(model)
    command = str(refused.value).partition("convert it: python -c ")[2]
    subprocess.run(f"{sys.executable} -W ignore -c {command}", shell=True, check=True, capture_output=True)
    converted = load_file(tmp_path / "model-safetensors" / "model.safetensors")
    assert all(torch.equal(converted[name], tensor) for name, tensor in whole.items())


@pytest.fixture
def model(llama, tmp_path):
    """A copy of the small Llama, to be broken."""
    shutil.copytree(llama, tmp_path / "model")
    return tmp_path / "model"


def test_a_file_that_links_out_of_the_model_is_not_copied_into_the_output(model, tmp_path):
    (tmp_path / "id_rsa").write_text("secret")
    (model / "notes.txt").symlink_to("../id_rsa")
    with pytest.raises(CheckpointError, match=r"notes\.txt: is a link out of the model's folder, to .*id_rsa"):
        api.quantize(model, "rtn-w4g128", tmp_path / "out", changes=["grid.group_size=32"], evaluate=False)
    assert not (tmp_path / "out").exists()


def test_the_links_of_the_hubs_cache_are_followed(llama, tmp_path):
    blobs, snapshot = tmp_path / "models--org--m" / "blobs", tmp_path / "models--org--m" / "snapshots" / "abc"
    shutil.copytree(llama, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    api.quantize(snapshot, "rtn-w4g128", tmp_path / "out", changes=["grid.group_size=32"], evaluate=False)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("shape", [(64, 0), (0, 64)])
@pytest.mark.parametrize("name", ["hqq-w4g64", "int8", "nf4", "gguf-q4_0"])
def test_a_matrix_of_nothing_is_named(name, shape, model, tmp_path):
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"] = torch.zeros(shape)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ShapeError, match=r"layers\.1\.self_attn\.q_proj\.weight: is \[\d+, \d+\], so there is nothing"):
        api.quantize(model, name, tmp_path / "out", evaluate=False)


def test_experts_of_no_bytes_are_not_counted_one_by_one(tmp_path):
    config = hf.Qwen2MoeConfig(vocab_size=384, num_hidden_layers=1, architectures=["Qwen2MoeForCausalLM"])
    config.save_pretrained(tmp_path)
    tensors = {"model.layers.0.mlp.experts.gate_up_proj": torch.zeros(10**12, 2, 0)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"has the shape \[1000000000000, 2, 0\], so there is nothing in it"):
        open_model(tmp_path)


def test_a_configuration_that_is_no_file_is_not_waited_for(model):
    (model / "config.json").unlink()
    os.mkfifo(model / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json: is not a file"):
        Checkpoint(model)


def test_a_card_that_is_nested_too_deep_says_nothing(model, tmp_path):
    (model / "README.md").write_text("---\na: " + "[" * 5000 + "\n---\n")
    api.quantize(model, "rtn-w4g128", tmp_path / "out", changes=["grid.group_size=32"], evaluate=False)
    assert (tmp_path / "out" / "llmquant-report.json").exists()


def test_a_text_that_unpacks_to_more_than_is_read_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MOST_TEXT", 1_000_000)
    path = tmp_path / "text.txt.gz"
    path.write_bytes(gzip.compress(bytes(2_000_000)))
    with pytest.raises(DataError, match="has more than 0 GB of text"):
        list(data.documents(data.TextSource(path=path), None))


@pytest.mark.parametrize("out", [".", "..", "/"])
def test_an_output_needs_a_name(out, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="give a new folder a name of its own"):
        api.quantize(model, "rtn-w4g128", out, changes=["grid.group_size=32"], evaluate=False)
