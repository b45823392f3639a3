"""The main job end to end, on small models."""

import json
import shutil
from dataclasses import replace
from typing import get_args

import pytest
import torch
import transformers as hf
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llmquant import api, demo, evaluation, footprint, gradients, hub, plugins, recipe, run, stats, stream, work
from llmquant import plan as planning
from llmquant.errors import CheckpointError, LlmquantError, OutputError, PlanError, RecipeError
from llmquant.packed import open_model
from tests.conftest import VOCABULARY

TINY = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def logits(folder, tokens, **options):
    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    with torch.no_grad():
        return model(tokens).logits


def decoded(folder, float_folder):
    """Return transformers' float model with our decoded weights in it."""
    checkpoint = open_model(folder)
    model = hf.AutoModelForCausalLM.from_pretrained(float_folder, dtype=torch.float32).eval()
    for name in checkpoint.packed:
        with torch.no_grad():
            model.get_parameter(f"{name}.weight").copy_(checkpoint.read(f"{name}.weight"))
    return model


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix == ".safetensors"}


@pytest.mark.filterwarnings("ignore")  # compressed-tensors' own
@pytest.mark.parametrize("changes", [["grid.bits=4"], ["grid.bits=8"]], ids=str)
def test_transformers_computes_the_same_logits_from_a_written_folder(llama, calibrated, tmp_path, changes):
    settings = [*calibrated, *changes, "formats=[compressed_tensors]"]
    api.quantize(llama, "gptq-plain-w4g128", tmp_path / "out", changes=settings, evaluate=False)
    tokens = torch.randint(2, VOCABULARY, (2, 32), generator=torch.Generator().manual_seed(1))
    ours = decoded(tmp_path / "out", llama)(tokens).logits
    theirs = logits(tmp_path / "out", tokens)
    assert (ours - theirs).abs().max() <= 1e-4 * ours.abs().max()
    assert (logits(llama, tokens) - theirs).abs().max() > 1e-2 * ours.abs().max() or "bits=8" in changes[0]


ALONG = [
    [],
    ["mismatch_correction=true"],
    ["mismatch_correction=true", "transforms=[{name: awq}]"],
    ["algorithm.two_sided=true", "transforms=[{name: awq}]"],
    ["learned_rounding={steps: 8, rate: 0.1}"],
    ["mismatch_correction=true", "algorithm.two_sided=true", "learned_rounding={steps: 8, rate: 0.1}"],
]


@pytest.mark.parametrize("changes", ALONG, ids=str)
def test_a_run_that_died_goes_on_and_ends_with_the_same_bytes(llama, calibrated, tmp_path, changes):
    chosen = recipe.load("gptq-plain-w4g128", [*calibrated, *changes])
    run.quantize(llama, chosen, tmp_path / "whole")

    def die(what, done, total):
        if (what, done) == ("quantizing layers", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.quantize(llama, chosen, tmp_path / "out", progress=die)
    assert not (tmp_path / "out").exists()
    report, _ = run.quantize(llama, chosen, tmp_path / "out")
    assert report.resumed_layers == 2
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert not (tmp_path / "out.work").exists()


def test_a_run_that_died_still_reports_what_finished_layers_took(llama, calibrated, tmp_path):
    chosen = recipe.load("gptq-plain-w4g128", calibrated)
    whole, _ = run.quantize(llama, chosen, tmp_path / "whole")
    kept = []

    def die(what, done, total):
        if (what, done) == ("quantizing layers", 2):
            paths = sorted((tmp_path / "out.work").glob("layer-*"))
            for path in paths:
                with safe_open(path, "pt") as file:
                    kept.append(json.loads(file.metadata()["cost"]))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.quantize(llama, chosen, tmp_path / "out", progress=die)
    report, _ = run.quantize(llama, chosen, tmp_path / "out")
    assert report.costs[:2] == kept
    assert [cost["part"] for cost in report.costs] == [0, 1, 2]
    assert all(cost["seconds"] > 0 < cost["peak_bytes"] <= 2 * report.peak_rss_bytes for cost in report.costs)
    assert report.histograms == whole.histograms
    assert [x["error"] for x in report.linears.values()] == [x["error"] for x in whole.linears.values()]


@pytest.mark.parametrize("step", [0, 2])
def test_a_run_that_died_does_not_round_the_embedding_again(llama, calibrated, tmp_path, monkeypatch, step):
    chosen = recipe.load("gptq-q4_k_m", [*calibrated[:3], "mixture={name: q4_0}"])
    run.quantize(llama, chosen, tmp_path / "whole")

    def die(what, done, total):
        if (what, done) == ("quantizing layers", step):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.quantize(llama, chosen, tmp_path / "out", progress=die)
    monkeypatch.delattr(gradients, "measure")
    run.quantize(llama, chosen, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_layers_are_calibrated_on_what_the_rounded_embedding_gives(llama, calibrated, tmp_path):
    changes = [*calibrated[:3], "mixture={name: q4_0}", "transforms=[]", "mismatch_correction=false"]
    keep = "rules=[{match: model.embed_tokens, keep: true}]"
    for name, more in (("rounded", []), ("float", [keep])):
        run.quantize(llama, recipe.load("gptq-q4_k_m", [*changes, *more]), tmp_path / name, tmp_path / f"{name}.work")
    rounded, kept = (load_file(tmp_path / f"{x}.work" / "layer-00000.safetensors") for x in ("rounded", "float"))
    assert rounded.keys() == kept.keys()
    assert not torch.equal(*(x["model.layers.0.self_attn.q_proj:codes"] for x in (rounded, kept)))


def test_a_work_folder_of_another_recipe_is_refused_and_the_difference_named(llama, calibrated, tmp_path):
    work = tmp_path / "work"
    run.quantize(llama, recipe.load("gptq-plain-w4g128", calibrated), tmp_path / "a", work)
    other = recipe.load("gptq-plain-w4g128", [*calibrated, "grid.bits=3"])
    with pytest.raises(OutputError, match=r"begun with recipe\.grid\.bits = 4, and now it is 3"):
        run.quantize(llama, other, tmp_path / "b", work)
    run.quantize(llama, other, tmp_path / "b", work, restart=True)


def test_exporting_again_equals_quantizing_to_that_format(llama, calibrated, tmp_path):
    work = tmp_path / "work"
    run.quantize(llama, recipe.load("gptq-plain-w4g128", calibrated), tmp_path / "gptq", work)
    api.export(work, ["compressed_tensors"], tmp_path / "again")
    direct = recipe.load("gptq-plain-w4g128", [*calibrated, "formats=[compressed_tensors]"])
    run.quantize(llama, direct, tmp_path / "direct")
    assert files(tmp_path / "again") == files(tmp_path / "direct")


def test_what_is_exported_again_has_its_reports_and_may_be_uploaded(llama, calibrated, tmp_path):
    first = api.quantize(
        llama, "gptq-plain-w4g128", tmp_path / "gptq", changes=calibrated, work=tmp_path / "work", evaluate=False
    )
    again = api.export(tmp_path / "work", ["compressed_tensors"], tmp_path / "again", command="llmquant export")
    told = json.loads((tmp_path / "again" / run.REPORT).read_text("utf-8"))
    assert told == json.loads(json.dumps(again.as_dict()))
    assert told["linears"] == json.loads(json.dumps(first.linears))
    assert told["command"] == "llmquant export"
    assert {"README.md", "report.html", "model.safetensors"} <= {*hub.check(tmp_path / "again")}


@pytest.mark.parametrize("name", ["rtn-w4g128", "gptq-plain-w4g128"])
def test_exporting_again_needs_a_file_of_every_layer_but_those_that_stay_float(name, llama, calibrated, tmp_path):
    work, changes = tmp_path / "work", [*calibrated, "ignore=['*.layers.1.*']"]
    run.quantize(llama, recipe.load(name, [*changes, "formats=[gptq]"]), tmp_path / "gptq", work)
    api.export(work, ["compressed_tensors"], tmp_path / "again")
    run.quantize(llama, recipe.load(name, [*changes, "formats=[compressed_tensors]"]), tmp_path / "direct")
    assert files(tmp_path / "again") == files(tmp_path / "direct")
    for file, what in (("outside-lm_head", "lm_head"), ("layer-00002", "layer 2 of 3")):
        (work / f"{file}.safetensors").unlink()
        with pytest.raises(CheckpointError, match=f"{what} is not finished"):
            api.export(work, ["compressed_tensors"], tmp_path / "none")


def test_all_containers_of_one_run_decode_to_the_same_floats(llama, calibrated, tmp_path):
    settings = [*calibrated, "formats=[gptq, gptq_v2, compressed_tensors]", "grid.symmetric=false"]
    api.quantize(llama, "gptq-plain-w4g128", tmp_path / "out", changes=settings, evaluate=False)
    first, *others = [open_model(tmp_path / "out" / name) for name in ("gptq", "gptq_v2", "compressed_tensors")]
    assert len(first.packed) == 3 * 7
    for name in first.packed:
        for other in others:
            assert torch.equal(first.read(f"{name}.weight"), other.read(f"{name}.weight"))


def test_sharded_and_single_checkpoints_give_the_same_result(llama, calibrated, tmp_path):
    sharded = tmp_path / "sharded"
    hf.AutoModelForCausalLM.from_pretrained(llama).save_pretrained(sharded, max_shard_size="100KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(llama / name, sharded)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    for model, out in ((llama, "a"), (sharded, "b")):
        api.quantize(model, "gptq-plain-w4g128", tmp_path / out, changes=calibrated, evaluate=False)
    a, b = (load_file(tmp_path / x / "model.safetensors") for x in "ab")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_tied_embedding_stays_tied_or_is_untied_by_the_recipe(save_model, calibrated, tmp_path):
    config = hf.LlamaConfig(
        **TINY, intermediate_size=128, tie_word_embeddings=True, max_position_embeddings=256, pad_token_id=None
    )
    model = save_model(tmp_path / "model", config)
    plain = [*calibrated, "formats=[compressed_tensors]"]
    api.quantize(model, "gptq-plain-w4g128", tmp_path / "tied", changes=plain, evaluate=False)
    api.quantize(
        model, "gptq-plain-w4g128", tmp_path / "untied", changes=[*plain, "tied_embeddings=untie"], evaluate=False
    )
    api.quantize(
        model,
        "gptq-plain-w4g128",
        tmp_path / "head",
        changes=[*plain, "tied_embeddings=untie", "ignore=[]"],
        evaluate=False,
    )
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    assert "lm_head.weight_packed" in load_file(tmp_path / "head" / "model.safetensors")
    tokens = torch.randint(2, VOCABULARY, (1, 32), generator=torch.Generator().manual_seed(1))
    tied, untied = (logits(tmp_path / x, tokens) for x in ("tied", "untied"))
    assert torch.equal(tied, untied)
    with pytest.raises(RecipeError, match="lm_head: the recipe quantizes it, but this model ties it"):
        api.plan(model, "gptq-plain-w4g128", changes=[*plain, "ignore=[]"])


FAMILIES = {
    "gpt2": hf.GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=256, n_inner=128),
    "neox": hf.GPTNeoXConfig(**TINY, intermediate_size=128, max_position_embeddings=256),
    "opt": hf.OPTConfig(**TINY, ffn_dim=128, max_position_embeddings=256, word_embed_proj_dim=64),
    "falcon": hf.FalconConfig(**TINY),
    "bloom": hf.BloomConfig(**TINY),
    "phi3": hf.Phi3Config(**TINY, intermediate_size=128, max_position_embeddings=256, pad_token_id=None),
    "gemma3": hf.Gemma3TextConfig(
        **TINY,
        intermediate_size=128,
        max_position_embeddings=256,
        head_dim=16,
        num_key_value_heads=2,
        sliding_window=16,
    ),
    "qwen3": hf.Qwen3Config(**TINY, intermediate_size=128, max_position_embeddings=256, num_key_value_heads=2),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_written_and_evaluates_as_transformers_does(family, save_model, calibrated, texts, tmp_path):
    model = save_model(tmp_path / "model", FAMILIES[family])
    settings = [*calibrated, "calibration.length=64", "grid.bits=8"]
    api.quantize(model, "gptq-plain-w4g128", tmp_path / "out", changes=settings, evaluate=False)
    windows = evaluation.read_windows(model, texts / "evaluation.txt", "gptq", 4096)
    row = evaluation.evaluate(tmp_path / "out", windows, evaluation.Reference(model))
    tokens = windows.tokens
    judge = hf.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    weights = dict(judge.named_parameters())
    checkpoint = open_model(tmp_path / "out")
    assert checkpoint.packed
    with torch.no_grad():
        for name in checkpoint.packed:
            assert not torch.equal(weights[f"{name}.weight"], checkpoint.read(f"{name}.weight"))
            weights[f"{name}.weight"].copy_(checkpoint.read(f"{name}.weight"))
        theirs = torch.nn.functional.cross_entropy(judge(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert row.perplexity == pytest.approx(float(theirs.exp()), rel=1e-4)
    assert 0 < row.kld_mean < 0.01


def test_tensor_names_without_the_first_part_are_understood(save_model, calibrated, tmp_path):
    model = save_model(tmp_path / "model", FAMILIES["gpt2"])
    tensors = load_file(model / "model.safetensors")
    save_file({k.removeprefix("transformer."): v for k, v in tensors.items()}, model / "model.safetensors")
    api.quantize(model, "gptq-plain-w4g128", tmp_path / "out", changes=calibrated, evaluate=False)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert "h.0.attn.c_attn.qweight" in file.keys()  # noqa: SIM118
    assert open_model(tmp_path / "out").read("transformer.h.0.attn.c_attn.weight").shape == (64, 192)


def test_a_shape_that_does_not_divide_is_refused_substituted_or_kept(llama, tmp_path):
    wide = ["grid.group_size=96"]
    with pytest.raises(LlmquantError, match=r"layers\.0\.self_attn\.q_proj\.weight: 64 columns are not a multiple"):
        api.plan(llama, "rtn-w4g128", changes=wide)
    substituted = api.plan(llama, "rtn-w4g128", changes=[*wide, "fallback=substitute"])
    assert len(substituted.notes) == len(substituted.quantized) == 3 * 7
    kept = api.plan(llama, "rtn-w4g128", changes=[*wide, "fallback=keep"])
    assert not kept.quantized
    assert len(kept.notes) == 3 * 7


def test_the_plan_knows_the_size_of_the_tensors_that_are_written(llama, calibrated, tmp_path):
    settings = [*calibrated, "formats=[gptq, compressed_tensors]", "grid.symmetric=false"]
    plan = api.plan(llama, "gptq-plain-w4g128", changes=settings)
    api.quantize(llama, "gptq-plain-w4g128", tmp_path / "out", changes=settings, evaluate=False)
    for name, size in plan.sizes.items():
        tensors = load_file(tmp_path / "out" / name / "model.safetensors")
        assert sum(t.nbytes for t in tensors.values()) == size


def test_the_peak_memory_of_a_plan_counts_what_is_held_at_once(llama, calibrated):
    def peak(name, *changes):
        return api.plan(llama, name, changes=changes).peak_bytes

    rtn = ("rtn-w4g128", "grid.group_size=32")
    assert peak(*rtn) == footprint.RUNTIME + footprint.DIRECT * 64 * 128  # the largest linear
    wide = 4 * VOCABULARY * 64
    assert peak("gptq-plain-w4g128", *calibrated) > footprint.RUNTIME + 2 * wide  # embedding, output matrix


def test_activations_are_where_there_is_room_for_them(llama, calibrated):
    chosen = recipe.load("gptq-plain-w4g128", calibrated)
    limit, places = 10**12, {}
    for _ in get_args(planning.Placement):
        plan = run.make_plan(llama, chosen, memory_limit=limit)
        places[plan.placement] = plan.peak_bytes
        limit = int(plan.peak_bytes / footprint.MARGIN) - 1
    assert list(places) == list(get_args(planning.Placement))
    assert sorted(places.values(), reverse=True) == list(places.values())
    told = r"needs about 0\.\d\d GB of memory \(phase: layers\), and there are 0\.\d\d GB"
    with pytest.raises(PlanError, match=told):
        run.make_plan(llama, chosen, memory_limit=plan.peak_bytes - 1)


def test_a_run_that_would_not_fit_is_refused_before_it_writes(llama, calibrated, tmp_path):
    with pytest.raises(PlanError, match="GB of memory"):
        run.quantize(llama, recipe.load("gptq-plain-w4g128", calibrated), tmp_path / "out", memory_limit=10**6)
    assert not list(tmp_path.iterdir())


def test_a_run_for_which_the_disk_has_no_room_is_refused_before_it_writes(llama, calibrated, tmp_path, monkeypatch):
    chosen = recipe.load("gptq-plain-w4g128", calibrated)
    plan = run.make_plan(llama, chosen)
    needed = plan.work_bytes + plan.scratch_bytes + sum(plan.sizes.values())
    usage = shutil.disk_usage(tmp_path)._replace(free=needed - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(PlanError, match=r"needs 0\.\d+ GB for the files and 0\.\d+ GB for the work folder, and 0\.\d+"):
        run.quantize(llama, chosen, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    usage = usage._replace(free=needed)
    run.quantize(llama, chosen, tmp_path / "out")


@pytest.mark.parametrize("placement", get_args(planning.Placement))
def test_a_plan_knows_how_large_the_work_folder_gets(placement, llama, calibrated, tmp_path, monkeypatch):
    chosen = recipe.load("gptq-plain-w4g128", [*calibrated, "algorithm.two_sided=true", "mismatch_correction=true"])
    plan_for, sizes, plans = run.plan_for, [], []

    def planned(stream, recipe_):
        computing = footprint.Computing(stream.hidden_size, stream.vocabulary)
        plan = plan_for(stream, recipe_)
        text = run.text_of(stream, plan)
        plans.append(
            replace(plan, placement=placement, scratch_bytes=footprint._scratch(plan, computing, text, placement))
        )
        return plans[-1]

    def drop(log, index):
        sizes.append(sum(path.stat().st_size for path in log.folder.rglob("*.safetensors")))
        dropped(log, index)

    dropped = work.Work.drop_information
    monkeypatch.setattr(work.Work, "drop_information", drop)
    monkeypatch.setattr(run, "plan_for", planned)
    run.quantize(llama, chosen, tmp_path / "out", work_folder=tmp_path / "work")
    first = plans[-1].work_bytes / plans[-1].layers
    assert max(sizes) == pytest.approx(plans[-1].scratch_bytes + first, rel=0.05)
    tensors = [t for path in (tmp_path / "work").glob("*.safetensors") for t in load_file(path).values()]
    assert sum(t.nbytes for t in tensors) == pytest.approx(plans[-1].work_bytes, rel=0.05)


def test_a_gpu_is_planned_without_what_the_host_takes(llama, calibrated):
    plan = run.make_plan(llama, recipe.load("gptq-plain-w4g128", calibrated), device="cpu")
    exporters = {name: plugins.load("exporters", name, "formats") for name in plan.recipe.formats}
    text = footprint.Text(tokens=4096, length=128, batch=1024, aimed=4096, gradients=4096)
    peaks = {}
    for element in (2, 4):
        computing = footprint.Computing(64, VOCABULARY, element, gpu=True)
        placed = footprint.placed(plan, computing, text, exporters, 10**12)
        assert set(placed.peaks) == {"start", "layers"}
        assert placed.host_bytes > footprint.RUNTIME
        peaks[element] = placed.peaks
    assert peaks[4]["start"] == 2 * peaks[2]["start"]
    assert peaks[2]["layers"] < peaks[4]["layers"] < 2 * peaks[2]["layers"]  # Hessians are as large


def test_gptq_diverges_less_than_rounding_on_the_demo_model(texts, tmp_path):
    windows = evaluation.read_windows(demo.MODEL, texts / "evaluation.txt", "llama.cpp", 2048)
    reference = evaluation.Reference(demo.MODEL)
    settings = [f"calibration.path={texts / 'calibration.txt'}", "calibration.length=256", "calibration.sequences=16"]
    for bits in (2, 4):
        divergence = {}
        for name in ("rtn-w4g128", "gptq-plain-w4g128", "gptq-w4g128"):
            out = tmp_path / f"{name}-{bits}"
            run.quantize(demo.MODEL, recipe.load(name, [*settings, f"grid.bits={bits}"]), out)
            divergence[name] = evaluation.evaluate(out, windows, reference).kld_mean
        assert divergence["gptq-plain-w4g128"] < 0.6 * divergence["rtn-w4g128"]
        assert divergence["gptq-w4g128"] < 0.9 * divergence["gptq-plain-w4g128"]


def test_true_sequential_lets_later_sites_see_earlier_rounding(llama, calibrated, tmp_path):
    for name, flag in (("a", "false"), ("b", "true")):
        changes = [*calibrated, f"true_sequential={flag}"]
        api.quantize(llama, "gptq-plain-w4g128", tmp_path / name, changes=changes, evaluate=False)
    a, b = (load_file(tmp_path / x / "model.safetensors") for x in "ab")
    first = "model.layers.0.{}.qweight"
    assert torch.equal(a[first.format("self_attn.q_proj")], b[first.format("self_attn.q_proj")])
    assert not torch.equal(a[first.format("mlp.down_proj")], b[first.format("mlp.down_proj")])


@pytest.mark.parametrize("changes", ALONG, ids=str)
def test_where_activations_are_does_not_change_a_byte(llama, calibrated, tmp_path, monkeypatch, changes):
    monkeypatch.setattr(stream, "BATCH_TOKENS", 512)
    monkeypatch.setattr(stats, "ENOUGH", 1024)  # the float model computes two of four batches
    monkeypatch.setattr(stats, "ENOUGH_BY_COLUMN", 1)
    chosen = recipe.load("gptq-plain-w4g128", [*calibrated, *changes])
    placed, planned = run.plan_for, []

    def plan_for(*args):
        planned.append(replace(placed(*args), placement=placement))
        return planned[-1]

    monkeypatch.setattr(run, "plan_for", plan_for)
    written = {}
    for placement in get_args(planning.Placement):
        run.quantize(llama, chosen, tmp_path / placement)
        written[placement] = (tmp_path / placement / "model.safetensors").read_bytes()
    assert len(set(written.values())) == 1
    assert [plan.placement for plan in planned] == list(get_args(planning.Placement))


def test_without_statistics_no_work_folder_is_needed_for_the_same_bytes(llama, tmp_path, monkeypatch):
    chosen = recipe.load("rtn-w4g128", ["grid.group_size=32"])
    through, _ = run.quantize(llama, chosen, tmp_path / "through", tmp_path / "work")
    monkeypatch.setattr(run.work, "Work", None)  # must not be asked for
    directly, _ = run.quantize(llama, chosen, tmp_path / "directly")
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("through", "directly"))
    assert a == b
    assert through.linears.keys() == directly.linears.keys()
    for name, record in through.linears.items():
        assert directly.linears[name]["error"] == pytest.approx(record["error"], rel=1e-4)


def test_quantize_measures_on_text_it_did_not_calibrate_on_and_writes_a_card(llama, calibrated, tmp_path, read_json):
    report = api.quantize(llama, "gptq-plain-w4g128", tmp_path / "out", changes=calibrated)
    float_row, row = report.evaluation
    assert float_row["kld_mean"] == 0.0
    assert 0 < row["kld_mean"] < 1
    assert "not calibrated on" in row["protocol"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model_relation: quantized" in card
    assert f"{row['perplexity']:.3f}" in card
    told = read_json(tmp_path / "out" / "llmquant-report.json")
    assert told["calibration"]["tokens"] == 16 * 128
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()
    assert recipe.load(tmp_path / "out" / "recipe.yaml") == recipe.load("gptq-plain-w4g128", calibrated)


def test_two_runs_on_one_work_folder_are_refused(llama, calibrated, tmp_path):
    chosen = recipe.load("gptq-plain-w4g128", calibrated)
    work = tmp_path / "work"

    def second_run(what, done, total):
        if (what, done) == ("quantizing layers", 1):
            with pytest.raises(OutputError, match="another run is using this work folder"):
                run.quantize(llama, chosen, tmp_path / "b", work)

    run.quantize(llama, chosen, tmp_path / "a", work, progress=second_run)
    assert not (tmp_path / "b").exists()
