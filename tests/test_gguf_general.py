"""What a GGUF file says of its model: judged by the gguf package, which reads model folders itself."""

import json
import shutil

import gguf
import pytest
import yaml

from llmquant import demo, gguf_file, recipe, run
from llmquant.exporters.gguf import general

CARD = {
    "license": "other",
    "license_name": "llama3.2",
    "license_link": "https://a.b/license",
    "base_model": ["meta-llama/Llama-3.2-1B", "https://huggingface.co/org/Other-2B-v0.3"],
    "datasets": ["org/some-data"],
    "language": ["en", "no"],
    "tags": ["facebook", "llama-3"],
    "pipeline_tag": "text-generation",
    "description": "A model",
    "author": "Someone",
    "version": "1.10",
}
WEIGHTS = 1_235_814_400


def folder_of(path, card, **files):
    path.mkdir(parents=True)
    if card:
        (path / "README.md").write_text(f"---\n{card}---\n# A model\n", "utf-8")
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def test_the_card_the_configuration_and_the_folder_tell_what_the_gguf_package_reads_in_them(tmp_path):
    settings = {"temperature": 1, "top_k": 20, "top_p": 0.8, "do_sample": True, "eos_token_id": [1, 2]}
    config = {"_name_or_path": "meta-llama/Llama-3.2-1B-Instruct"}
    folder = folder_of(
        tmp_path / "Llama-3.2-1B-Instruct", yaml.safe_dump(CARD), config=config, generation_config=settings
    )
    found = general.metadata(folder, config, "llama", WEIGHTS)
    judge = gguf.GGUFWriter(None, "llama")
    gguf.Metadata.load(None, folder, None, WEIGHTS).set_gguf_meta_model(judge)
    assert found == {key: entry.value for key, entry in judge.kv_data[0].items()}
    assert found["general.name"] == "Llama 3.2 1B Instruct"
    assert found["general.basename"] == "Llama-3.2"
    assert found["general.size_label"] == "1B"
    assert found["general.finetune"] == "Instruct"
    assert found["general.organization"] == "Meta Llama"
    assert found["general.license.link"] == "https://a.b/license"
    assert found["general.base_model.0.repo_url"] == "https://huggingface.co/meta-llama/Llama-3.2-1B"
    assert found["general.base_model.1.name"] == "Other 2B v0.3"
    assert found["general.languages"] == ["en", "no"]
    assert found["general.tags"] == ["facebook", "llama-3", "text-generation"]
    assert (found["general.sampling.temp"], found["general.sampling.top_k"]) == (1.0, 20)


@pytest.mark.parametrize(
    ("name", "weights", "file"),
    [
        ("Llama-3.2-1B-Instruct", WEIGHTS, "Llama-3.2-1B-Instruct-Q4_0"),
        ("Qwen2.5-0.5B", 494_032_768, "Qwen2.5-0.5B-Q4_0"),
        ("Mistral-7B-v0.1", 7_241_732_096, "Mistral-7B-v0.1-Q4_0"),
        ("gemma-2-27b-it", 27_227_128_320, "gemma-2-27B-it-Q4_0"),
        ("Phi-3-mini-4k-instruct", 3_821_079_552, "Phi-3-mini-4k-instruct-Q4_0"),
        ("gpt2", 124_439_808, "gpt2-124M-Q4_0"),
        ("my model", 5_000_000, "my-model-5.0M-Q4_0"),
    ],
)
def test_files_are_named_by_the_convention(name, weights, file, tmp_path):
    folder = folder_of(tmp_path / name, "")
    assert general.file_name(general.metadata(folder, {}, "llama", weights), folder, "Q4_0") == file


def test_a_snapshot_in_the_hubs_cache_has_the_name_of_its_repository(tmp_path):
    folder = folder_of(tmp_path / "models--org--Model-7B" / "snapshots" / "0123abcd", "")
    found = general.metadata(folder, {"_name_or_path": "somewhere/else"}, "llama", 7_000_000_000)
    assert (found["general.name"], found["general.organization"]) == ("Model 7B", "Org")
    assert found["general.source.repo_url"] == "https://huggingface.co/org/Model-7B"
    assert general.file_name(found, folder, "F16") == "Model-7B-F16"


@pytest.mark.parametrize(
    "card",
    [
        "version: ../../../outside\nfinetune: a/b\n",
        "name: [a, b]\nlicense: {a: b}\ntags: [{a: b}]\nlanguage: 7\nbase_model: [[a]]\n",
        "name:\nlicense:\ntags:\nbasename: [x]\n",
        "{[broken\n",
        "just text\n",
    ],
)
def test_a_strange_card_does_no_harm(card, tmp_path):
    folder = folder_of(tmp_path / "model", card, generation_config={"temperature": None, "top_k": -1, "top_p": "x"})
    found = general.metadata(folder, {"_name_or_path": 3}, "llama", 5_500_000)
    assert "/" not in general.file_name(found, folder, "F16")
    assert not any(key.startswith("general.sampling") for key in found)
    assert all(isinstance(v, str) or all(isinstance(x, str) for x in v) for v in found.values())


def test_a_file_carries_what_its_folder_tells(tmp_path):
    model = tmp_path / "Tiny-5.5M-Chat-v1.0"
    shutil.copytree(demo.MODEL, model)
    (model / "README.md").write_text(f"---\n{yaml.safe_dump(CARD)}---\n", "utf-8")
    run.quantize(model, recipe.load("gguf-q4_0"), tmp_path / "out")
    (path,) = (tmp_path / "out").glob("*.gguf")
    assert path.name == "Tiny-5.5M-Chat-1.10-Q4_0.gguf"
    judge = gguf.GGUFReader(path)
    assert judge.get_field("general.license.name").contents() == "llama3.2"
    assert judge.get_field("general.tags").contents() == ["facebook", "llama-3", "text-generation"]
    assert gguf_file.read(path).metadata["general.base_model.count"] == 2
