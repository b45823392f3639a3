"""Quantization-aware training, judged by what written files predict, by transformers and by llama.cpp."""

from itertools import pairwise

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from llmquant import api, cli, data, demo, distillation, evaluation, recipe, run, training
from llmquant.errors import CheckpointError, DataError, NumericsError, RecipeError
from llmquant.grid import dequantize
from llmquant.packed import open_model
from tests.conftest import VOCABULARY
from tests.test_fake import GRIDS, rounded
from tests.test_moe import saved  # noqa: F401
from tests.test_ranks import begin, command, end

TINY = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "pad_token_id": None}
W2 = ["grid.bits=2", "formats=[compressed_tensors]"]


def weights(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".safetensors", ".gguf")}


def settings(steps=20, **more):
    given = {"steps": steps, "tokens": 512, "rate": 0.02, "scale_rate": 0.002, "patience": 10} | more
    return [f"training.{key}={value}" for key, value in given.items()]


def held_out(model, text, **options):
    """Return the mean divergence of written models from the float one, on text that was not trained on."""
    windows = evaluation.read_windows(model, text, max_tokens=2048)
    reference = evaluation.Reference(model)
    return lambda path: evaluation.evaluate(path, windows, reference, **options).kld_mean


@pytest.mark.parametrize("name", ["rtn-w4g128", "gptq-plain-w4g128"])
def test_training_brings_the_written_model_nearer_to_the_float_one(name, llama, texts, calibrated, tmp_path):
    kld = held_out(llama, texts / "evaluation.txt")
    for out, more in (("before", []), ("after", settings(60))):
        report = api.quantize(llama, name, tmp_path / out, changes=[*calibrated, *W2, *more], evaluate=False)
    assert kld(tmp_path / "after") < 0.95 * kld(tmp_path / "before")
    told = report.training
    assert told["step"] == 60
    assert told["best"] == min(value for _, value in told["held_out"]) < told["held_out"][0][1]


@pytest.mark.parametrize("tied", [False, True])
def test_what_the_student_computes_is_what_transformers_reads_from_the_file(
    tied, llama, save_model, calibrated, tmp_path
):
    if tied:
        config = hf.LlamaConfig(**TINY, hidden_size=64, intermediate_size=96, num_attention_heads=4)
        config.tie_word_embeddings = True
        llama = save_model(tmp_path / "tied", config, torch.bfloat16)
    report = api.quantize(llama, "rtn-w4g128", tmp_path / "out", changes=[*calibrated, *W2, *settings(10)])
    checkpoint = open_model(tmp_path / "out")
    model = hf.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        parameter.data.copy_(checkpoint.read(name))
    teacher = hf.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    source = data.Calibration(path=calibrated[0].partition("=")[2], length=128)
    text = data.training_tokens(source, data.load_tokenizer(llama), 256, 5120)
    tokens = text.held_out[::2]
    with torch.no_grad():
        found = distillation.divergence(model(tokens).logits, teacher(tokens).logits)
    assert float(found) == pytest.approx(report.training["best"], rel=1e-5)
    for file in ("README.md", "report.html"):
        assert f"Trained for 10 steps: KLD on held-out text {report.training['held_out'][0][1]:.5f} before" in (
            (tmp_path / "out" / file).read_text("utf-8")
        )
    floats = [name for name in checkpoint.infos if "norm" in name or "embed" in name or "head" in name]
    before = open_model(llama)
    changed = {name for name in floats if not torch.equal(checkpoint.read(name), before.read(name))}
    assert "model.embed_tokens.weight" in changed
    assert tied != ("lm_head.weight" in changed)
    assert any("norm" in name for name in changed)


def test_weights_that_are_needed_between_two_levels_come_to_rest_before_the_end():
    """Of a grid of 2 bits, whose gradients are mostly noise."""
    noise, steps = torch.Generator().manual_seed(1), 400

    def late(dampening):
        """Return how many codes change in the third quarter of the steps."""
        q = rounded(GRIDS["w2"])
        wanted = dequantize(q) + 0.3 * q.params["scale"].repeat_interleave(q.grid.group, 1).view(q.codes.shape)
        changing = training.AdamSteps({"w": q}, distillation.Training(rate=0.03, scale_rate=0, dampening=dampening))
        codes = []
        for step in range(steps):
            w = changing.weights()["w"]
            (w - wanted + 5 * torch.randn(w.shape, generator=noise)).detach().mul(w).sum().backward()
            changing.step(1 - step / steps)
            codes.append(changing.quantized()["w"].codes)
        return sum(int((a != b).sum()) for a, b in pairwise(codes[steps // 2 : 3 * steps // 4]))

    assert 0 < 5 * late(1.0) < late(0.0)


def test_weights_that_count_little_are_the_first_on_another_level():
    """Their gradients, however small, all point to it all the time."""
    q = rounded(GRIDS["nf4"])
    size = torch.tensor([0, 32.0, 64, 128, 256, 512])
    changing = training.AdamSteps({"w": q}, distillation.Training(rate=0.01, scale_rate=0, dampening=0))
    away = torch.where(q.codes == q.codes.max(), 1.0, -1.0) * size[:, None]
    changed = torch.zeros(len(size), dtype=torch.int64)
    for _ in range(100):
        (changing.weights()["w"] * away).sum().backward()
        changing.step(1.0)
        changed += (changing.quantized()["w"].codes != q.codes).any(1)
    assert not changed[0]
    assert changed[1:].tolist() == sorted(set(changed[1:].tolist()), reverse=True)
    assert changed[-1]


def test_what_a_training_is_judged_by_was_not_calibrated_on(llama, calibrated):
    source = data.Calibration(path=calibrated[0].partition("=")[2], length=64, sequences=100)
    tokenizer = data.load_tokenizer(llama)
    text = data.training_tokens(source, tokenizer, 256, 5120)
    assert text.available >= source.sequences + len(text.held_out)
    known = {tuple(x) for x in data.calibration_tokens(source, tokenizer, 256, 0).tokens.tolist()}
    held_out = {tuple(x) for x in text.held_out.tolist()}
    assert len(held_out) == 2 * data.HELD_OUT
    assert not held_out & {*known, *(tuple(x) for x in text.tokens.tolist())}


@pytest.mark.parametrize("step", [0, 3, 8])
def test_a_training_that_died_goes_on_and_ends_with_the_same_bytes(step, llama, calibrated, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "KEEP", 0.0)
    chosen = recipe.load("gptq-plain-w4g128", [*calibrated, *W2, *settings(8, patience=2)])
    run.quantize(llama, chosen, tmp_path / "whole")

    def die(what, done, total):
        if (what.startswith("training") and done == step) or (step == 8 and what.startswith("writing")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.quantize(llama, chosen, tmp_path / "out", progress=die)
    seen = []
    run.quantize(llama, chosen, tmp_path / "out", progress=lambda what, done, total: seen.append((what, done)))
    assert [done for what, done in seen if what.startswith("training")] == list(range(step, 8))
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_a_death_while_the_trained_layers_are_put_in_place_changes_nothing(llama, calibrated, tmp_path, monkeypatch):
    chosen = recipe.load("rtn-w4g128", [*calibrated, *W2, *settings(3)])
    run.quantize(llama, chosen, tmp_path / "whole")
    replace, count = training.work.Work.replace, iter(range(100))

    def die(self, part, tensors):
        if next(count) == 2:
            raise KeyboardInterrupt
        replace(self, part, tensors)

    monkeypatch.setattr(training.work.Work, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        run.quantize(llama, chosen, tmp_path / "out")
    run.quantize(llama, chosen, tmp_path / "out")
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_a_gguf_file_has_in_llama_cpp_the_divergence_that_training_reached(texts, tmp_path):
    changes = [f"calibration.path={texts / 'calibration.txt'}", "calibration.length=128", "calibration.sequences=16"]
    changes += ["algorithm={name: rtn, calibrated: true}", "transforms=[]", "mismatch_correction=false"]
    changes += settings(12, tokens=1024, rate=0.01)
    api.quantize(demo.MODEL, "gptq-q2_k", tmp_path / "out", changes=changes, evaluate=False)
    api.quantize(demo.MODEL, "gptq-q2_k", tmp_path / "before", changes=changes[:-5], evaluate=False)
    ours, theirs = (held_out(demo.MODEL, texts / "evaluation.txt", runtime=r) for r in ("torch", "llama.cpp"))
    assert theirs(tmp_path / "out") == pytest.approx(ours(tmp_path / "out"), rel=0.05)
    assert theirs(tmp_path / "out") < theirs(tmp_path / "before")


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (hf.GPT2Config(**TINY | {"num_hidden_layers": 2}, n_embd=64, n_head=4), ["formats=[gptq]"]),
        (hf.LlamaConfig(**TINY, hidden_size=64, intermediate_size=96, num_attention_heads=4, tie_word_embeddings=True),
         ["mixture={name: q4_0}", "formats=[gguf]"]),
        (hf.LlamaConfig(**TINY, hidden_size=64, intermediate_size=96, num_attention_heads=4, tie_word_embeddings=True),
         ["mixture={name: q4_0}", "formats=[gguf]", "tied_embeddings=untie"]),
        (hf.LlamaConfig(**TINY, hidden_size=64, intermediate_size=96, num_attention_heads=4),
         ["activations={type: int8}", "grid.bits=8", "grid.strategy=channel"]),
    ],
    ids=["conv1d and biases", "tied", "untied", "rounded activations"],
)  # fmt: skip
def test_every_kind_of_model_is_trained(config, changes, save_model, calibrated, tmp_path):
    model = save_model(tmp_path / "model", config)
    mixture = changes and changes[0].startswith("mixture")
    base = [*calibrated[: 3 if mixture else 4], *([] if mixture else W2), *changes, *settings(6)]
    name = "gptq-q4_k_m" if mixture else "rtn-w4g128"
    base += ["algorithm={name: rtn}", "transforms=[]", "mismatch_correction=false"] if mixture else []
    report = api.quantize(model, name, tmp_path / "out", changes=base)
    assert report.training["best"] < report.training["held_out"][0][1] or "grid.bits=8" in changes
    written = report.evaluation[-1]["kld_mean"]
    assert written == pytest.approx(report.training["best"], rel=0.3)  # of other sequences of the text


def test_experts_are_trained(saved, calibrated, tmp_path):  # noqa: F811
    report = api.quantize(saved("qwen3-moe"), "rtn-w4g128", tmp_path / "out", changes=[*calibrated, *W2, *settings(6)])
    assert report.training["best"] < report.training["held_out"][0][1]


def test_layers_are_trained_one_by_one_where_the_recipe_says_so(llama, texts, calibrated, tmp_path):
    kld = held_out(llama, texts / "evaluation.txt")
    for out, more in (("before", []), ("after", settings(60, scope="layers", rate=0.04, scale_rate=0.01, tokens=2048))):
        api.quantize(llama, "rtn-w4g128", tmp_path / out, changes=[*calibrated, *W2, *more], evaluate=False)
    assert kld(tmp_path / "after") < 0.95 * kld(tmp_path / "before")


def test_other_text_is_trained_on_where_the_recipe_names_it(llama, texts, calibrated, tmp_path):
    own = [f"training.text={{path: {texts / 'evaluation.txt'}}}", "calibration=null"]
    report = api.quantize(
        llama, "rtn-w4g128", tmp_path / "out", changes=[calibrated[-1], *W2, *settings(2), *own], evaluate=False
    )
    assert report.training["step"] == 2


def test_it_stops_where_nothing_gets_better(llama, calibrated, tmp_path):
    changes = [*calibrated, "grid.bits=8", *settings(40, rate=1.0, patience=2)]
    report = api.quantize(llama, "rtn-w4g128", tmp_path / "out", changes=changes, evaluate=False)
    assert report.training["step"] == 8  # two looks, of ten
    assert report.training["best"] == report.training["held_out"][0][1]


def test_without_rates_nothing_changes(llama, calibrated, tmp_path):
    changes = [*calibrated, *W2, "formats=[compressed_tensors]"]
    still = settings(2, rate=1e-12, scale_rate=0, float_rate=0)
    for out, more in (("before", []), ("after", still)):
        api.quantize(llama, "rtn-w4g128", tmp_path / out, changes=[*changes, *more], evaluate=False)
    before, after = (load_file(tmp_path / out / "model.safetensors") for out in ("before", "after"))
    assert all(torch.equal(before[name], after[name]) for name in before.keys() | after.keys())


def test_a_work_folder_whose_training_is_not_finished_is_not_exported(llama, calibrated, tmp_path):
    chosen = recipe.load("rtn-w4g128", [*calibrated, *W2, *settings(4)])

    def die(what, done, total):
        if what.startswith("training") and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.quantize(llama, chosen, tmp_path / "out", tmp_path / "work", progress=die)
    with pytest.raises(CheckpointError, match="its training is not finished"):
        api.export(tmp_path / "work", ["gptq"], tmp_path / "other")
    run.quantize(llama, chosen, tmp_path / "out", tmp_path / "work")
    api.export(tmp_path / "work", ["compressed_tensors"], tmp_path / "other")
    assert weights(tmp_path / "other") == weights(tmp_path / "out")


def test_too_little_text_is_refused(llama, calibrated, tmp_path):
    (tmp_path / "short.txt").write_text("word " * 300, "utf-8")
    changes = [*calibrated, f"training.text={{path: {tmp_path / 'short.txt'}}}"]
    with pytest.raises(DataError, match="and training needs 8"):
        api.train(llama, "rtn-w4g128", tmp_path / "out", changes=changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["learned_rounding={}", "training={scope: layers}"], "Leave out one of them"),
        (["activations={type: int8}", "training={scope: layers}"], "only where activations stay float"),
        (["training={step: 3}"], "Did you mean"),
        (["training={rate: 0}"], "training.rate"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, told):
    with pytest.raises(RecipeError, match=told):
        recipe.load("gptq-plain-w4g128", changes)


def test_a_training_that_leaves_the_numbers_is_stopped(llama, calibrated, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "divergence", lambda *_: torch.tensor(float("nan")))
    with pytest.raises(NumericsError, match=r"after step 0 .* smaller training.rate"):
        api.train(llama, "rtn-w4g128", tmp_path / "out", changes=[*calibrated, *settings(2)])


def test_every_sequence_is_trained_on_once_before_any_is_again():
    seen = [i for step in range(10) for i in training.chosen(step, 3, 10, seed=0)]
    rounds = [seen[:10], seen[10:20], seen[20:]]
    assert [sorted(one) for one in rounds] == [list(range(10))] * 3
    assert rounds[0] != rounds[1] != rounds[2]


def test_the_command_trains_and_tells_what_it_gained(llama, calibrated, tmp_path, read_json):
    changes = [x for change in [*calibrated, *W2, *settings(4)] for x in ("--set", change)]
    arguments = [
        "train",
        llama,
        "rtn-w4g128",
        "--out",
        tmp_path / "out",
        "--steps",
        6,
        "--json",
        tmp_path / "facts.json",
    ]
    result = CliRunner().invoke(cli.app, [*map(str, arguments), *changes])
    assert result.exit_code == 0, result.output
    assert "Trained for 6 steps: KLD on held-out text" in result.output
    assert read_json(tmp_path / "facts.json")["training"]["step"] == 6


@pytest.mark.parametrize("told", ["{}", '{"step": "x", "losses": [], "held_out": [], "finished": false}'])
def test_a_damaged_state_is_refused(told, llama, calibrated, tmp_path):
    chosen = recipe.load("rtn-w4g128", [*calibrated, *W2, *settings(4)])

    def die(what, done, total):
        if what.startswith("training") and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.quantize(llama, chosen, tmp_path / "out", progress=die)
    path = tmp_path / "out.work" / "training.safetensors"
    save_file(load_file(path), path, metadata={"told": told})
    with pytest.raises(CheckpointError, match=r"training\.safetensors: is damaged"):
        run.quantize(llama, chosen, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["float:../../beside.weight", "model.layers.7.mlp.up_proj:codes", "float:a.b"])
def test_a_finished_state_of_something_else_is_refused_and_nothing_is_written(name, llama, calibrated, tmp_path):
    chosen = recipe.load("rtn-w4g128", [*calibrated, *W2, *settings(2)])
    run.quantize(llama, chosen, tmp_path / "out", tmp_path / "work")
    path = tmp_path / "work" / "training.safetensors"
    save_file({name: torch.zeros(2)}, path, metadata={"told": '{"finished": true}'})
    with pytest.raises(CheckpointError, match="belongs to no part of this model"):
        run.quantize(llama, chosen, tmp_path / "again", tmp_path / "work")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "work"]


def test_two_trainings_in_one_process_may_differ_in_their_precision(llama, calibrated, tmp_path):
    best = []
    for precision in ("float32", "bfloat16"):
        more = settings(4, precision=precision)
        report = api.quantize(llama, "rtn-w4g128", tmp_path / precision, changes=[*calibrated, *W2, *more])
        best.append(report.training["best"])
    assert best[0] == pytest.approx(best[1], rel=0.05)
    assert best[0] != best[1]


def test_two_processes_train_what_one_does(llama, calibrated, tmp_path):
    changes = [*calibrated, *W2, *settings(6, precision="float32")]
    typed = [
        "train",
        *(x for x in command(llama, "rtn-w4g128", changes, tmp_path / "together")[1:] if x != "--no-eval"),
    ]
    told = end(begin(2, *typed))
    assert [code for code, _, _ in told] == [0, 0], told
    report = api.quantize(llama, "rtn-w4g128", tmp_path / "alone", changes=changes, evaluate=False)
    ours, theirs = (open_model(tmp_path / name) for name in ("alone", "together"))
    apart = [float((ours.read(n) != theirs.read(n)).float().mean()) for n in (f"{name}.weight" for name in ours.packed)]
    assert max(apart) < 0.01
    assert report.training["best"] < report.training["held_out"][0][1]
