"""Each linear quantized alone: the figures are those of the written file, and a budget is spent to the byte."""

import dataclasses
import itertools
import json
import sys

import pytest
import torch

from llmquant import api, budget, evaluation, knapsack, recipe, sensitivity
from llmquant.errors import DataError, LlmquantError, OutputError, RecipeError

TOKENS = 512


@pytest.fixture(scope="module")
def windows(llama, texts):
    return evaluation.read_windows(llama, texts / "evaluation.txt", "gptq", TOKENS)


def measure(llama, windows, out, name, changes=(), **options):
    return sensitivity.measure(llama, recipe.load(name, list(changes)), windows, out, **options)


def alone(model, name, changes, linears, windows, out):
    """Return the divergence of the written file in which only these linears are quantized."""
    chosen = recipe.load(name, changes)
    values = chosen.model_dump(exclude_defaults=True)
    values["rules"] = [{"match": f"re:(?!({'|'.join(linears)})$).*", "keep": True}]
    api.quantize(model, recipe.Recipe(**values), out, evaluate=False)
    return evaluation.evaluate(out, windows, evaluation.Reference(model)).kld_mean


@pytest.mark.parametrize("by", ["linear", "site", "layer"])
def test_the_divergence_is_that_of_a_file_with_only_this_unit_quantized(by, llama, windows, calibrated, tmp_path):
    found = measure(llama, windows, tmp_path, "gptq-plain-w4g128", [*calibrated, "formats=[compressed_tensors]"], by=by)
    assert len(found.units) == 3 * {"linear": 7, "site": 4, "layer": 1}[by]
    unit = found.units[-2 if by == "layer" else len(found.units) // 3 + 1]
    assert unit.layer == 1
    changes = [*calibrated, "formats=[compressed_tensors]", "true_sequential=false"]
    written = alone(llama, "gptq-plain-w4g128", changes, unit.linears, windows, tmp_path / "out")
    result = found.table()[unit.name]["recipe"]
    assert result.kld == pytest.approx(written, rel=1e-4)
    assert result.bits_per_weight == 4.5


@pytest.fixture(scope="module")
def mixture(llama, windows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    return folder, measure(llama, windows, folder, "gguf-q4_k_s", grids="q4_0,q8_0")


@pytest.mark.parametrize("name", ["model.embed_tokens", "lm_head", "model.layers.0.mlp.down_proj"])
def test_a_mixtures_output_and_embedding_are_units_too(name, llama, windows, mixture, tmp_path):
    _, found = mixture
    assert len(found.units) == 3 * 7 + 2
    changes = ["mixture.pure=true", "mixture.name=q4_0"]
    written = alone(llama, "gguf-q4_k_s", changes, [name], windows, tmp_path / "out")
    # what a rule keeps is stored in 16 bits
    assert found.table()[name]["q4_0"].kld == pytest.approx(written, rel=0.02)


def test_more_bits_diverge_less_and_results_are_in_the_file(llama, windows, tmp_path):
    found = measure(llama, windows, tmp_path, "rtn-w4g128", ["grid.group_size=32"], by="layer", grids="2,w4g16,8")
    for results in found.table().values():
        assert results["2"].kld > results["w4g16"].kld > results["8"].kld >= 0
        assert [r.bits_per_weight for r in results.values()] == [2.5, 5.0, 8.5]
    assert sensitivity.read(tmp_path / "sensitivity.json") == found


def test_what_stopped_goes_on_and_measures_nothing_twice(llama, windows, tmp_path):
    settings = {"changes": ["grid.group_size=32"], "by": "layer", "grids": "4,8"}
    whole = measure(llama, windows, tmp_path / "whole", "rtn-w4g128", **settings)

    def die(what, done, total):
        if (what, done) == ("measuring", 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(llama, windows, tmp_path / "parts", "rtn-w4g128", **settings, progress=die)
    costs = []
    again = measure(llama, windows, tmp_path / "parts", "rtn-w4g128", **settings, announce=costs.append)
    assert again.results == whole.results
    # of layers 0, 1 and 2 with 3, 2 and 1 layers to compute, one and a half were done
    assert [(cost.measurements, cost.layer_passes) for cost in costs] == [(3, 2 + 1 + 1)]
    measure(llama, windows, tmp_path / "parts", "rtn-w4g128", **settings, announce=costs.append)
    assert len(costs) == 1
    with pytest.raises(OutputError, match="measured for another recipe"):
        measure(llama, windows, tmp_path / "parts", "rtn-w4g128", ["grid.group_size=16"], by="layer")
    with pytest.raises(OutputError, match="measured by layer"):
        measure(llama, windows, tmp_path / "parts", "rtn-w4g128", ["grid.group_size=32"], by="site")


def test_grids_that_mean_nothing_are_refused(llama, windows, tmp_path):
    for grids, message in (("q4_q", "Did you mean 'q4_k'"), ("9", "bits is 9"), ("q8_0", "cannot hold the grid")):
        with pytest.raises(LlmquantError, match=message):
            measure(llama, windows, tmp_path, "rtn-w4g128", ["grid.group_size=32"], grids=grids)
    with pytest.raises(RecipeError, match="has a mixture"):
        measure(llama, windows, tmp_path, "gguf-q4_k_s", grids="3")


def test_text_that_is_calibrated_on_is_refused(llama, calibrated, texts, tmp_path):
    with pytest.raises(DataError, match="calibrates on this text"):
        api.sensitivity(
            llama, "gptq-plain-w4g128", tmp_path, text=texts / "calibration.txt", changes=calibrated, protocol="sliding"
        )


def test_a_grid_that_leaves_a_linear_float_is_refused(llama, windows, tmp_path):
    changes = ["grid.group_size=32", "fallback=keep"]
    with pytest.raises(RecipeError, match=r"w4g96: .*q_proj would stay float: kept float: 64 columns"):
        measure(llama, windows, tmp_path, "rtn-w4g128", changes, grids="w4g96")


# Budgets


@pytest.mark.parametrize("seed", range(8))
def test_the_knapsack_is_as_good_as_trying_everything(seed):
    generator = torch.Generator().manual_seed(seed)
    groups = [
        [
            (int(s), float(c))
            for s, c in zip(
                torch.randint(1, 40, (3,), generator=generator), torch.rand(3, generator=generator), strict=True
            )
        ]
        for _ in range(6)
    ]
    for limit in (20, 60, 90, 240):
        fitting = [
            sum(c for _, c in combination)
            for combination in itertools.product(*groups)
            if sum(s for s, _ in combination) <= limit
        ]
        chosen = knapsack.choose(groups, limit)
        if not fitting:
            assert chosen is None
            continue
        picked = [group[i] for group, i in zip(groups, chosen, strict=True)]
        assert sum(s for s, _ in picked) <= limit
        assert sum(c for _, c in picked) == pytest.approx(min(fitting), abs=1e-12)


def test_a_knapsack_of_too_many_sizes_is_thinned_and_still_fits(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 10**9, (40, 4), generator=generator).sort(dim=1).values.tolist()
    costs = torch.rand(40, 4, generator=generator).sort(dim=1, descending=True).values.tolist()
    groups = [list(zip(*pair, strict=True)) for pair in zip(sizes, costs, strict=True)]
    limit = sum(size[1] for size in sizes)
    totals = []
    for states in (1 << 10, 1 << 14):
        monkeypatch.setattr(knapsack, "STATES", states)
        picked = [group[i] for group, i in zip(groups, knapsack.choose(groups, limit), strict=True)]
        assert sum(size for size, _ in picked) <= limit
        totals.append(sum(cost for _, cost in picked))
    assert totals[1] <= totals[0] * 1.0001
    assert totals[0] < sum(cost[1] for cost in costs)


GROUPS = ["grid.group_size=32", "grid.symmetric=false"]


@pytest.fixture(scope="module")
def groups(llama, windows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("groups")
    return folder, measure(llama, windows, folder, "rtn-w4g128", GROUPS, by="site", grids="2,3,w4g16,8")


@pytest.mark.parametrize(
    ("name", "changes", "measured"), [("gguf-q4_k_s", [], "mixture"), ("rtn-w4g128", GROUPS, "groups")]
)
def test_a_budget_is_kept_to_the_byte_by_the_written_files(name, changes, measured, llama, tmp_path, request):
    folder, found = request.getfixturevalue(measured)
    base = recipe.load(name, changes)
    ends = [api.plan(llama, sensitivity.uniform(base, found.units, found.grids[end])) for end in (0, -1)]
    least, most = (next(iter(plan.files.values())) for plan in ends)
    before = None
    for share in (0.0, 0.4, 1.0):
        limit = int(least + share * (most - least))
        path = tmp_path / f"mixed-{share}.yaml"
        filled = api.budget(llama, name, f"{limit}B", folder / "sensitivity.json", path, changes=changes)
        assert recipe.load(path) == filled.recipe
        report = api.quantize(llama, path, tmp_path / f"out-{share}", evaluate=False)
        (written,) = report.bytes.values()
        assert next(iter(filled.plan.files.values())) == written <= limit
        assert written > limit - 0.03 * most
        units = {unit.name: unit.linears for unit in found.units}
        for linear, grid in [(n, grid) for unit, grid in filled.choices.items() for n in units[unit]]:
            rule = {"match": linear, "grid": sensitivity.grid_rule(grid, base)}
            expected = sensitivity.with_rules(base, [rule]).choose(linear)
            assert recipe.load(tmp_path / f"out-{share}" / "recipe.yaml").choose(linear) == expected
        assert before is None or filled.kld <= before
        before = filled.kld
    for outside in (least - 1, most + 1):
        with pytest.raises(RecipeError, match=rf"{least:,} to {most:,} bytes"):
            api.budget(llama, name, f"{outside}B", folder / "sensitivity.json", path, changes=changes)


def test_a_bad_grid_of_the_same_size_does_not_spoil_a_good_one(llama, mixture):
    _, found = mixture
    like = {"q5_0": ("q4_0", 1.0), "mxfp4": ("q4_0", 4.0), "iq4_nl": ("q4_0", 1.5), "q8_0": ("q8_0", 1.0)}
    table = found.table()
    made_up = [
        dataclasses.replace(table[unit.name][old], grid=new, kld=times * (i + 1) * (1e-3 if old == "q4_0" else 1e-5))
        for i, unit in enumerate(found.units)
        for new, (old, times) in {"q4_0": ("q4_0", 1.6), **like}.items()
    ]
    wide, narrow = (
        dataclasses.replace(found, results=tuple(r for r in made_up if r.grid in grids), errors={})
        for grids in ({*like, "q4_0"}, {"iq4_nl", "q5_0", "q8_0"})
    )
    base = recipe.load("gguf-q4_k_s")
    best, same = (budget.fill(llama, base, some, "6bpw", "x") for some in (wide, narrow))
    assert best.choices == same.choices
    assert set(best.choices.values()) == {"iq4_nl", "q5_0", "q8_0"}
    measured = wide.table()
    assert best.kld == pytest.approx(sum(measured[unit][grid].kld for unit, grid in best.choices.items()), rel=1e-12)


def test_a_budget_in_bits_per_weight_is_what_the_plan_prints(llama, windows, tmp_path):
    found = measure(llama, windows, tmp_path, "rtn-w4g128", ["grid.group_size=32"], by="layer", grids="3,4,8")
    model, chosen = llama, recipe.load("rtn-w4g128", ["grid.group_size=32"])
    uniform = api.plan(model, chosen).file_bits_per_weight("compressed_tensors")
    filled = budget.fill(model, chosen, found, f"{uniform + 0.00001}bpw", "mixed")
    assert filled.plan.file_bits_per_weight("compressed_tensors") <= uniform + 0.00001
    assert filled.kld <= sum(results["4"].kld for results in found.table().values())
    with pytest.raises(RecipeError, match="neither bits per weight"):
        budget.to_bytes("4 bits", 10)
    with pytest.raises(RecipeError, match=r"measured with grid = .*'group_size': 32.* this recipe has .*16"):
        budget.fill(model, recipe.load("rtn-w4g128", ["grid.group_size=16"]), found, "5bpw", "mixed")
    by_linear = dataclasses.replace(found, by="linear")
    with pytest.raises(RecipeError, match="have 21"):
        budget.fill(model, chosen, by_linear, "5bpw", "mixed")


def test_a_budget_is_not_spent_by_what_was_measured_on_another_text(llama, windows, calibrated, texts, tmp_path):
    changes = [*calibrated, "formats=[compressed_tensors]"]
    found = measure(llama, windows, tmp_path, "gptq-plain-w4g128", changes, by="layer", grids="3,8")
    assert budget.fill(llama, recipe.load("gptq-plain-w4g128", changes), found, "15bpw", "mixed").choices
    for change, message in (
        ("calibration.sequences=12", r"measured with calibration = .*'sequences': 16.* this recipe has .*12"),
        (f"calibration.path={texts / 'evaluation.txt'}", r"measured with calibration = "),
        ("transforms=[{name: awq}]", r"measured with transforms = None, and this recipe has \[\{'name': 'awq'\}\]"),
        (
            "rules=[{match: '*.q_proj', grid: {bits: 8, strategy: channel}, activations: {type: int8}}]",
            "^activations: only the rounding of weights",
        ),
    ):
        with pytest.raises(RecipeError, match=message):
            budget.fill(llama, recipe.load("gptq-plain-w4g128", [*changes, change]), found, "15bpw", "mixed")
    # what does not read text is the same on any
    plain = measure(llama, windows, tmp_path / "rtn", "rtn-w4g128", ["grid.group_size=32"], by="layer", grids="3,8")
    text = [f"calibration.path={texts / 'calibration.txt'}", "grid.group_size=32"]
    assert budget.fill(llama, recipe.load("rtn-w4g128", text), plain, "15bpw", "mixed").choices


def test_a_budget_is_not_spent_by_what_was_measured_with_another_imatrix(llama, windows, texts, tmp_path):
    path = tmp_path / "imatrix.gguf"
    changes = [f"imatrix={path}", "mixture.name=q4_0"]

    def write(sequences):
        path.unlink(missing_ok=True)
        api.imatrix(llama, texts / "calibration.txt", path, sequences=sequences, length=64)

    write(4)
    found = measure(llama, windows, tmp_path, "gguf-q4_k_s", changes, by="layer", grids="q4_0,q8_0")
    chosen = recipe.load("gguf-q4_k_s", changes)
    assert budget.fill(llama, chosen, found, "6bpw", "mixed").choices
    write(5)
    with pytest.raises(RecipeError, match=rf"measured with imatrix = {path}.* in which other numbers are"):
        budget.fill(llama, chosen, found, "6bpw", "mixed")
    with pytest.raises(RecipeError, match=rf"measured with imatrix = {path}, and this recipe has None\. Measure"):
        budget.fill(llama, recipe.load("gguf-q4_k_s", changes[1:]), found, "6bpw", "mixed")


def test_the_command_line_measures_and_spends(llama, texts, tmp_path, monkeypatch, capsys):
    from llmquant import cli

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["llmquant", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, capsys.readouterr()

    common = (llama, "rtn-w4g128", "--set", "grid.group_size=32")
    code, told = command(
        *("sensitivity", *common, "--text", texts / "evaluation.txt", "--out", tmp_path, "--by", "layer"),
        *("--grids", "budget", "--max-tokens", 512, "--json", tmp_path / "facts.json"),
    )
    assert not code
    assert "12 measurements, 24 passes of a layer" in told.out
    assert "model.layers.2" in told.out
    assert json.loads((tmp_path / "facts.json").read_text())["by"] == "layer"
    assert "--max-tokens 512" in (tmp_path / "report.html").read_text("utf-8")
    assert "| model.layers.2 | " in (tmp_path / "report.md").read_text("utf-8")
    known = ("--sensitivity", tmp_path / "sensitivity.json", "--out", tmp_path / "mixed.yaml")
    (size,) = api.plan(llama, "rtn-w4g128", changes=["grid.group_size=32"]).files.values()
    code, told = command("plan", *common, "--budget", f"{size / 1e6}MB", *known)
    assert not code
    assert f"within {size:,} bytes" in told.out
    assert recipe.load(tmp_path / "mixed.yaml").rules
    code, told = command("plan", *common, "--budget", "1kB", *known)
    assert code == 2
    assert "bytes" in told.err
    code, told = command("plan", *common, "--budget", "1kB")
    assert code == 2
    assert "needs --sensitivity" in told.err
