"""A type for every tensor: within the size, better than the uniform mixture on text it was not chosen by, or that."""

import dataclasses

import pytest
import torch

from llmquant import allocation, api, budget, evaluation, recipe, run, sensitivity
from llmquant.errors import DataError, LlmquantError, RecipeError


@pytest.fixture(scope="module")
def text(texts):
    return [f"calibration.path={texts / 'calibration.txt'}", "calibration.sequences=16", "calibration.length=128"]


@pytest.fixture(scope="module")
def allocated(llama, text, tmp_path_factory):
    """The report and the folder of `gguf-auto`, at the size of Q4_K_M."""
    out = tmp_path_factory.mktemp("allocated") / "out"
    return api.quantize(llama, "gguf-auto", out, changes=text, evaluate=False), out


def test_the_file_is_within_the_size_and_better_than_the_uniform_one(allocated, llama, text, tmp_path):
    report, out = allocated
    uniform = api.quantize(llama, "gptq-q4_k_m", tmp_path / "uniform", changes=text, evaluate=False)
    assert report.bytes["gguf"] <= uniform.bytes["gguf"] == report.allocation["budget"]
    assert report.bytes["gguf"] == sum(file.stat().st_size for file in out.glob("*.gguf"))
    texts = allocation.splits(llama, recipe.load("gguf-auto", text))
    reference = evaluation.Reference(llama)
    trials = {trial["name"]: trial for trial in report.allocation["trials"]}
    for name, folder in (("uniform", tmp_path / "uniform"), ("allocated", out)):
        for split in ("selection", "check"):
            row = evaluation.evaluate(folder, getattr(texts, split), reference)
            assert trials[name][split] == pytest.approx(row.kld_mean, rel=1e-6)
    assert report.allocation["chosen"] == "allocated"
    assert trials["allocated"]["check"] < 0.9 * trials["uniform"]["check"]
    assert sum(trials["allocated"]["types"].values()) == 3 * 7 + 2


def test_the_recipe_it_writes_is_an_ordinary_one_and_makes_the_same_file(allocated, llama, tmp_path):
    report, out = allocated
    again = api.quantize(llama, out / "recipe.yaml", tmp_path / "again", evaluate=False)
    assert recipe.load(out / "recipe.yaml").budget is None
    assert again.hashes["gguf"][
        "model.gguf" if "model.gguf" in again.hashes["gguf"] else next(iter(again.hashes["gguf"]))
    ] == next(iter(report.hashes["gguf"].values()))


def test_a_worse_allocation_is_not_written(llama, text, tmp_path, monkeypatch):
    fill = budget.fill

    def worse(model, chosen, found, size, *rest):
        costs = [dataclasses.replace(result, kld=1 / result.kld) for result in found.results]
        return fill(model, chosen, dataclasses.replace(found, results=tuple(costs)), size, *rest)

    monkeypatch.setattr(budget, "fill", worse)
    quick = [*text, "transforms=[]", "mismatch_correction=false", "algorithm={name: rtn}", "budget=q3_k_m"]
    report = api.quantize(llama, "gguf-auto", tmp_path / "out", changes=quick, evaluate=False)
    plain = [change for change in quick if "budget" not in change]
    uniform = api.quantize(llama, "gptq-q3_k_m", tmp_path / "uniform", changes=plain, evaluate=False)
    assert report.allocation["chosen"] == "uniform"
    allocated, of_uniform = (
        next(t["check"] for t in report.allocation["trials"] if t["name"] == name) for name in ("allocated", "uniform")
    )
    assert allocated > of_uniform
    assert "written: uniform" in (tmp_path / "out" / "README.md").read_text("utf-8")
    assert not recipe.load(tmp_path / "out" / "recipe.yaml").rules
    assert report.bytes == uniform.bytes
