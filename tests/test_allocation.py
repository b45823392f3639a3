"""A type for every tensor: within the size, better than the uniform mixture on text it was not chosen by, or that."""

import dataclasses
import sys

import pytest
import transformers as hf
from safetensors.torch import load_file, save_file

from llmquant import allocation, api, budget, cli, data, evaluation, recipe, run, sensitivity
from llmquant.errors import LlmquantError, RecipeError


@pytest.fixture(scope="module", autouse=True)
def _short():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocation, "TOKENS", 2048)
        yield


@pytest.fixture(scope="module")
def small(save_model, tmp_path_factory):
    """One layer, whose second part reads some channels that are louder than the others."""
    config = hf.LlamaConfig(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=None,
    )
    folder = save_model(tmp_path_factory.mktemp("small"), config)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.post_attention_layernorm.weight"][::16] *= 30
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def rounding(texts):
    """Changes for what takes no time: types chosen by text, weights rounded without."""
    text = f"calibration={{path: {texts / 'calibration.txt'}, sequences: 16, length: 64}}"
    return [text, "algorithm={name: rtn}", "transforms=[]", "mismatch_correction=false"]


@pytest.fixture(scope="module")
def changes(rounding):
    """Changes that leave the recipe its ways, each made short."""
    gptq = "algorithm={name: gptq, actorder: true, sweeps: 0, scale_search: false}"
    return [rounding[0], gptq, "transforms=[{name: awq, steps: 2, duo: false}]"]


@pytest.fixture(scope="module")
def allocated(small, changes, tmp_path_factory):
    """The report and the folder of `gguf-auto`, at the size of Q4_K_M."""
    out = tmp_path_factory.mktemp("allocated") / "out"
    return api.quantize(small, "gguf-auto", out, changes=changes, evaluate=False), out


def test_the_file_is_within_the_size_and_better_than_the_uniform_one(allocated, small, changes, tmp_path):
    report, out = allocated
    uniform = api.quantize(small, "gptq-q4_k_m", tmp_path / "uniform", changes=changes, evaluate=False)
    assert report.bytes["gguf"] <= uniform.bytes["gguf"] == report.allocation["budget"]
    assert report.bytes["gguf"] == sum(file.stat().st_size for file in out.glob("*.gguf"))
    texts = allocation.splits(small, recipe.load("gguf-auto", changes))
    reference = evaluation.Reference(small)
    trials = {trial["name"]: trial for trial in report.allocation["trials"]}
    for split in ("selection", "check"):
        for name, folder in (("uniform", tmp_path / "uniform"), ("allocated", out)):
            row = evaluation.evaluate(folder, getattr(texts, split), reference)
            assert trials[name][split] == pytest.approx(row.kld_mean, rel=1e-6)
    assert report.allocation["chosen"] == "allocated"
    assert trials["allocated"]["check"] < 0.95 * trials["uniform"]["check"]
    assert sum(trials["allocated"]["types"].values()) == 7 + 2


def test_the_recipe_it_writes_is_an_ordinary_one_and_makes_the_same_file(allocated, small, tmp_path):
    report, out = allocated
    assert recipe.load(out / "recipe.yaml").budget is None
    again = api.quantize(small, out / "recipe.yaml", tmp_path / "again", evaluate=False)
    for hashes in (again.hashes["gguf"], report.hashes["gguf"]):
        del hashes["README.md"], hashes["report.html"]  # which tell what was measured
    assert again.hashes == report.hashes


def test_a_worse_allocation_is_not_written(small, rounding, tmp_path, monkeypatch):
    fill = budget.fill

    def worse(model, chosen, found, size, *rest):
        errors = {unit: {grid: 1 / error for grid, error in of.items()} for unit, of in found.errors.items()}
        return fill(model, chosen, dataclasses.replace(found, errors=errors), size, *rest)

    monkeypatch.setattr(budget, "fill", worse)
    out = tmp_path / "out"
    report = api.quantize(small, "gguf-auto", out, changes=[*rounding, "budget=q3_k_m"], evaluate=False)
    uniform = api.quantize(small, "gptq-q3_k_m", tmp_path / "uniform", changes=rounding, evaluate=False)
    trials = {trial["name"]: trial for trial in report.allocation["trials"]}
    assert trials["allocated"]["check"] > trials["uniform"]["check"]
    assert report.allocation["chosen"] == "uniform"
    assert "written: uniform" in (out / "README.md").read_text("utf-8")
    assert not recipe.load(out / "recipe.yaml").rules
    assert report.bytes == uniform.bytes


def test_what_stopped_goes_on_and_ends_with_the_same_bytes(small, rounding, tmp_path):
    def die(what, done, total):
        if what.startswith("allocated"):
            raise KeyboardInterrupt

    told = []
    whole = api.quantize(small, "gguf-auto", tmp_path / "whole", changes=rounding, evaluate=False)
    with pytest.raises(KeyboardInterrupt):
        api.quantize(small, "gguf-auto", tmp_path / "parts", changes=rounding, evaluate=False, progress=die)
    assert not (tmp_path / "parts").exists()
    again = api.quantize(
        small,
        "gguf-auto",
        tmp_path / "parts",
        changes=rounding,
        evaluate=False,
        progress=lambda what, *_: told.append(what),
    )
    assert not [what for what in told if what == "measuring" or what.startswith("uniform")]
    for report in (again, whole):
        del report.hashes["gguf"]["report.html"]  # which tells how long it took
    assert (again.hashes, again.allocation) == (whole.hashes, whole.allocation)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]


def shared(one, other):
    """Return whether two lists of sequences have ``PASSAGE`` tokens in a row in common."""
    joined = ["".join(map(chr, row)) for row in other.tolist()]
    rows = ["".join(map(chr, row)) for row in one.tolist()]
    starts = range(one.shape[1] - allocation.PASSAGE + 1)
    return any(row[i : i + allocation.PASSAGE] in text for row in rows for i in starts for text in joined)


def test_no_split_has_a_passage_of_another(small, texts, tokenizer, tmp_path):
    text = (texts / "calibration.txt").read_text("utf-8")
    paragraphs = text.split("\n\n")
    twice = "\n\n".join(p for i, p in enumerate(paragraphs) for _ in range(1 + (i % 4 == 0)))
    (tmp_path / "twice.txt").write_text(twice, "utf-8")
    (tmp_path / "other.txt").write_text((texts / "evaluation.txt").read_text("utf-8") + text[:20_000], "utf-8")
    base = f"calibration={{path: {tmp_path / 'twice.txt'}, sequences: 16, length: 128}}"
    for changes in ([base], [base, f"selection.path={tmp_path / 'other.txt'}"]):
        chosen = recipe.load("gguf-auto", changes)
        found = allocation.splits(small, chosen)
        calibrated = data.calibration_tokens(chosen.calibration, tokenizer, 256)
        selection, check = found.selection.tokens, found.check.tokens
        assert min(len(selection), len(check)) >= 4
        assert shared(calibrated.tokens, calibrated.tokens)
        assert not shared(selection, calibrated.tokens)
        assert not shared(check, calibrated.tokens)
        assert not shared(check, selection)
        assert not shared(found.held_out.tokens, selection)


def test_a_quick_sensitivity_predicts_what_a_whole_one_measures(small, texts, tmp_path):
    windows = evaluation.read_windows(small, texts / "evaluation.txt", "gptq", 512)
    chosen, grids = recipe.load("gguf-q4_k_s"), "q4_0,q5_0,q8_0"
    whole = sensitivity.measure(small, chosen, windows, tmp_path / "whole", grids=grids)
    quick = sensitivity.measure(small, chosen, windows, tmp_path / "quick", grids=grids, quick=True)
    assert len(quick.results) == len(quick.units) == len(whole.results) / 3
    assert set(quick.results) <= set(whole.results)
    assert sensitivity.read(tmp_path / "quick" / "sensitivity.json").costs() == quick.costs()
    measured = whole.costs()
    for unit, costs in quick.costs().items():
        for grid, cost in costs.items():
            assert cost == pytest.approx(measured[unit][grid], rel=0.5), (unit, grid)


def test_what_transforms_fold_is_in_the_sensitivities(small, rounding, texts, tmp_path):
    """Against the written file of a run in which only one site is quantized: its search sees the same."""
    windows = evaluation.read_windows(small, texts / "evaluation.txt", "gptq", 512)
    chosen = recipe.load("gptq-q4_k_m", [*rounding, "transforms=[{name: awq, steps: 4, duo: false, clip: false}]"])
    found = sensitivity.measure(small, chosen, windows, tmp_path, by="site")
    unit = found.units[2]
    assert unit.name == "model.layers.0.mlp_in"
    values = chosen.model_dump(exclude_defaults=True)
    values["rules"] = [{"match": f"re:(?!({'|'.join(unit.linears)})$).*", "keep": True}]
    report = api.quantize(small, recipe.Recipe(**values), tmp_path / "out", evaluate=False)
    (record,) = {str(told["transforms"]) for told in report.linears.values()}
    assert "'exponent': 0.0" not in record
    row = evaluation.evaluate(tmp_path / "out", windows, evaluation.Reference(small))
    # what a rule keeps is stored in 16 bits
    assert found.table()[unit.name]["recipe"].kld == pytest.approx(row.kld_mean, rel=0.03)


def test_a_budget_in_bits_is_compared_with_the_largest_mixture_that_fits(small, rounding):
    sizes = {}
    for mixture in ("q4_k_m", "q6_k"):
        chosen, sizes[mixture] = allocation.within(small, recipe.load("gguf-auto", [*rounding, f"budget={mixture}"]))
        assert chosen.mixture.name == mixture
        assert api.plan(small, "gguf-auto", changes=[*rounding, f"budget={mixture}"]).files["gguf"] == sizes[mixture]
    chosen, limit = allocation.within(small, recipe.load("gguf-auto", [*rounding, f"budget={sizes['q6_k'] - 1}B"]))
    assert limit == sizes["q6_k"] - 1
    assert sizes["q4_k_m"] <= api.plan(small, chosen).files["gguf"] <= limit
    with pytest.raises(RecipeError, match=r"budget: 1kB is 1,000 bytes, and the smallest files have [\d,]+: "):
        allocation.within(small, recipe.load("gguf-auto", [*rounding, "budget=1kB"]))


def test_bits_of_an_affine_grid_are_a_budgets_too(small, texts, tmp_path):
    plain = ["grid.group_size=32"]
    (size,) = api.plan(small, "rtn-w4g128", changes=plain).files.values()
    changes = [*plain, f"budget={size + 6000}B", f"selection.path={texts / 'evaluation.txt'}"]
    report = api.quantize(small, "rtn-w4g128", tmp_path / "out", changes=changes, evaluate=False)
    uniform, allocated = report.allocation["trials"]
    assert report.allocation["budget"] == uniform["bytes"] + 6000 == size + 6000 >= allocated["bytes"]
    assert len(allocated["types"]) > 1


def test_what_a_budget_cannot_be_spent_on_is_refused(small, rounding, texts, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text((texts / "evaluation.txt").read_text("utf-8")[:200], "utf-8")
    for changes, message in (
        ([f"selection.path={short}"], "too few to choose types by. Add --select FILE"),
        (["budget=q4"], "neither bits per weight"),
        (["budget=100bpw"], "the gguf files have"),
    ):
        with pytest.raises(LlmquantError, match=message):
            api.quantize(small, "gguf-auto", tmp_path / "out", changes=[*rounding, *changes], evaluate=False)
    with pytest.raises(RecipeError, match="keeps no work folder"):
        api.quantize(small, "gguf-auto", tmp_path / "out", changes=rounding, work=tmp_path / "work")
    with pytest.raises(RecipeError, match="budget: is for `llmquant quantize`"):
        run.quantize(small, recipe.load("gguf-auto", rounding), tmp_path / "out")
    with pytest.raises(RecipeError, match="budget: is for one container, and the recipe has 2"):
        api.plan(small, "rtn-w4g128", changes=["budget=5bpw", "formats=[gptq, compressed_tensors]"])


def test_the_command_line_asks_for_one_budget_and_passes_it_on(monkeypatch, capsys):
    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["llmquant", "quantize", "model", "gguf-auto", "--out", "out", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, capsys.readouterr().err

    def quantize(model, name, out, *, changes, **_):
        chosen = recipe.load(name, changes)
        raise LlmquantError(f"{chosen.budget} {chosen.selection.path if chosen.selection else 'none'}")

    monkeypatch.setattr(api, "quantize", quantize)
    for arguments, said in (
        ((), "q4_k_m none"),
        (("--budget", "4.5bpw"), "4.5bpw none"),
        (("--budget-like", "q2_k", "--select", "text.txt"), "q2_k text.txt"),
        (("--budget", "4.5bpw", "--budget-like", "q2_k"), "give one of them"),
    ):
        code, told = command(*arguments)
        assert code == 2
        assert said in told
