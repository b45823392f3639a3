"""Searches on single sites, and whole runs with transforms; judges are float64 products with the real activations."""

import dataclasses
import inspect
import runpy
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from llmquant import api, plugins, recipe, run, stats, stream
from llmquant.algorithms import gptq, rtn
from llmquant.errors import CalibrationError, RecipeError
from llmquant.grid import dequantize
from llmquant.grids import affine, q4_k
from llmquant.packed import open_model
from llmquant.stats import Accumulator, Sample
from llmquant.transform import Rounding, SiteView, row_errors
from llmquant.transforms import awq, smoothquant
from tests.conftest import VOCABULARY

TOKENS, COLS = 700, 64
OUTLIERS = [3, 17]


def activations(cols=COLS):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, cols, generator=generator) @ (
        torch.eye(cols) + 0.2 * torch.randn(cols, cols, generator=generator)
    )
    x[:, OUTLIERS] *= 50
    return x


def weight(rows, seed=1, cols=COLS):
    w = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    w[:, OUTLIERS] /= 50
    return w


def stats_of(x):
    sums = Accumulator(x.shape[1], "hessian")
    sums.add(x)
    return sums.result()


def rounding(w, algorithm=rtn, **config):
    grid = affine.Config(**{"bits": 4, "group_size": 32, "symmetric": False, **config}).bind(*w.shape, torch.float32)
    return Rounding(grid, algorithm, algorithm.Config())


def site(*weights, algorithm=rtn, sharing=None, behind_norm=True, x=None):
    x = activations() if x is None else x
    sharing = torch.arange(x.shape[1]) if sharing is None else sharing
    roundings = tuple(rounding(w, algorithm) for w in weights)
    return SiteView(weights, roundings, stats_of(x), x[:200], sharing, behind_norm)


def true_error(view, x):
    """Return the error of the outputs, a token at a time in float64."""
    total = 0.0
    for w, of in zip(view.weights, view.roundings, strict=True):
        q = of.values(w, view.stats).double()
        total += float((x.double() @ (q - w.double()).T).square().sum() / len(x))
    return total


SCALING = [name for name in plugins.names("transforms") if hasattr(plugins.load("transforms", name, "here"), "search")]
transforms = pytest.mark.parametrize("name", SCALING)


@pytest.mark.parametrize("name", plugins.names("transforms"))
def test_every_transform_has_the_agreed_functions_and_explains_its_keys(name):
    module = plugins.load("transforms", name, "here")
    parameters = {"search": ["site", "config"], "clip": ["w", "stats", "rounding", "config"]}
    found = {key for key in parameters if hasattr(module, key)}
    assert found
    assert all(list(inspect.signature(getattr(module, key)).parameters) == parameters[key] for key in found)
    assert module.needs(module.Config()) in ("diagonal", "hessian")
    assert module.Config.__dataclass_params__.frozen
    assert all(f"{field.name}: " in module.Config.__doc__ for field in dataclasses.fields(module.Config))


@transforms
def test_a_search_changes_nothing_it_is_given(name):
    module = plugins.load("transforms", name, "here")
    view = site(weight(16), weight(8, 2))
    before = [w.clone() for w in view.weights], view.stats.hessian.clone()
    module.search(view, module.Config())
    assert all(torch.equal(a, b) for a, b in zip(before[0], view.weights, strict=True))
    assert torch.equal(before[1], view.stats.hessian)


@pytest.mark.parametrize("algorithm", [rtn, gptq])
def test_the_error_is_that_of_the_outputs_on_all_tokens(algorithm):
    view = site(weight(16), weight(8, 2), algorithm=algorithm)
    assert view.error() == pytest.approx(true_error(view, activations()), rel=1e-3)
    if algorithm is rtn:
        assert view.rounding_loss(view.column_costs()) == pytest.approx(view.error(), rel=1e-6)


def rounded_to_8_bits(x, span):
    """Return activations as llama.cpp rounds them: a scale for each span of columns, the largest magnitude at 127."""
    blocks = x.double().view(len(x), -1, span)
    step = blocks.abs().amax(2, keepdim=True) / 127
    return ((blocks / step).round() * step).view(x.shape)


def test_the_loss_of_rounded_inputs_is_about_what_it_costs_at_the_outputs():
    view = site(weight(16), weight(8, 2))
    x = view.sample
    wrong = rounded_to_8_bits(x, 32) - x.double()
    expected = sum(float((wrong @ w.double().T).square().sum()) / len(x) for w in view.weights)
    assert view.input_loss() == pytest.approx(expected, rel=0.15)
    factors = x.abs().mean(0).sqrt()
    assert view.scaled(factors).input_loss() < 0.5 * view.input_loss()
    float_one = dataclasses.replace(view, roundings=(view.roundings[0], None))
    assert float_one.input_loss() == pytest.approx(site(view.weights[0]).input_loss())


def test_awq_evens_out_inputs_as_far_as_it_is_told_to():
    view = site(weight(32), algorithm=gptq)
    found = []
    for inputs in (0.0, 4.0, 1e6):
        scaled = view.scaled(awq.search(view, awq.Config(inputs=inputs)).factors)
        found.append((scaled.rounding_loss(scaled.column_costs()), scaled.input_loss()))
    (of_weights, _), *_, (more_of_weights, _) = found
    assert of_weights < more_of_weights
    assert found[0][1] >= found[1][1] >= found[2][1] < 0.99 * found[0][1]


def test_the_costs_of_columns_foretell_how_scales_change_what_gptq_leaves():
    view = site(weight(64), algorithm=gptq)
    costs = view.column_costs()
    tried = [view.stats.abs_mean.pow(exponent) for exponent in (0.0, 0.2, 0.5, 0.8, 1.2)]
    foretold = torch.tensor([view.rounding_loss(costs, factors) for factors in tried])
    left = torch.tensor([view.scaled(factors).error() for factors in tried])
    assert torch.equal(foretold.argsort(), left.argsort())
    assert torch.corrcoef(torch.stack([foretold, left]).log())[0, 1] > 0.95


def test_a_few_rows_stand_for_many():
    many = torch.randn(3000, COLS, generator=torch.Generator().manual_seed(7))
    view = site(many)
    assert view.error() == pytest.approx(true_error(view, activations()), rel=0.1)
    assert view.rounding_loss([None]) == pytest.approx(view.error(), rel=1e-4)


def test_a_scaled_site_has_the_statistics_of_its_scaled_activations():
    x, view = activations(), site(weight(16))
    factors = torch.rand(COLS, generator=torch.Generator().manual_seed(5)) + 0.5
    scaled, wanted = view.scaled(factors), stats_of(x / factors)
    for name in ("hessian", "square_mean", "abs_mean", "abs_max"):
        torch.testing.assert_close(getattr(scaled.stats, name), getattr(wanted, name), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scaled.sample @ scaled.weights[0].T, view.sample @ view.weights[0].T)


def test_awq_undoes_outliers():
    x, view = activations(), site(weight(16), weight(8, 2))
    found = awq.search(view, awq.Config())
    after = true_error(view.scaled(found.factors), x / found.factors)
    assert after < 0.25 * true_error(view, x)
    assert found.factors[OUTLIERS].min() > 3 * found.factors.median()


@pytest.mark.parametrize("algorithm", [rtn, gptq])
def test_awq_never_makes_a_site_worse(algorithm):
    for seed in range(2):
        x = torch.randn(TOKENS, COLS, generator=torch.Generator().manual_seed(seed))
        view = site(torch.randn(24, COLS, generator=torch.Generator().manual_seed(9 + seed)), algorithm=algorithm, x=x)
        factors = awq.search(view, awq.Config(steps=5)).factors
        assert true_error(view.scaled(factors), x / factors) <= true_error(view, x) * (1 + 1e-5)


def test_awq_rounds_nothing_to_compare_no_scaling_with_itself(monkeypatch):
    x = torch.randn(TOKENS, COLS, generator=torch.Generator().manual_seed(0))
    view = site(torch.randn(24, COLS, generator=torch.Generator().manual_seed(9)), algorithm=gptq, x=x)
    monkeypatch.setattr(SiteView, "rounding_loss", lambda self, costs, factors=None: 1.0)  # no candidate wins
    monkeypatch.setattr(SiteView, "error", lambda self: pytest.fail("rounded"))
    found = awq.search(view, awq.Config())
    assert torch.equal(found.factors, torch.ones(COLS))
    assert found.record == {"exponent": 0.0, "duo": False, "loss": 1.0}


@transforms
def test_columns_that_share_a_producer_get_the_same_scale(name):
    module = plugins.load("transforms", name, "here")
    sharing = torch.arange(COLS // 2).repeat(2)
    factors = module.search(site(weight(16), sharing=sharing), module.Config()).factors
    assert torch.equal(factors[: COLS // 2], factors[COLS // 2 :])
    assert factors.std() > 0


@transforms
def test_columns_without_activations_get_finite_scales(name):
    module = plugins.load("transforms", name, "here")
    x = activations()
    x[:, :5] = 0
    factors = module.search(site(weight(16), x=x), module.Config()).factors
    assert torch.isfinite(factors).all()
    assert (factors > 0).all()


def test_clipping_lowers_the_error_of_some_rows_and_raises_it_in_none():
    x = torch.randn(TOKENS, COLS, generator=torch.Generator().manual_seed(3))
    w = torch.randn(64, COLS, generator=torch.Generator().manual_seed(4))
    stats, of = stats_of(x), rounding(w, bits=3)
    clipped = awq.clip(w, stats, of, awq.Config())
    errors = [
        (x.double() @ (dequantize(rtn.quantize(target, stats, of.grid, rtn.Config())) - w).double().T).square().sum(0)
        for target in (clipped, w)
    ]
    assert (errors[0] <= errors[1] * (1 + 1e-5)).all()
    assert errors[0].sum() < 0.9 * errors[1].sum()
    assert torch.equal(awq.clip(w, stats, of, awq.Config(clip=False)), w)


def test_a_linear_is_clipped_only_where_its_own_algorithm_gains():
    x = torch.randn(TOKENS, COLS, generator=torch.Generator().manual_seed(3))
    w = torch.randn(64, COLS, generator=torch.Generator().manual_seed(4))
    stats = stats_of(x)

    grid = rounding(w, bits=3).grid
    deaf = ModuleType("deaf")
    deaf.quantize = lambda target, *_: rtn.quantize(w, stats, grid, rtn.Config())
    assert torch.equal(awq.clip(w, stats, Rounding(grid, deaf, None), awq.Config()), w)


def test_a_block_grid_is_searched_on_its_own_levels():
    x, w = activations(256), weight(16, cols=256)
    grid = q4_k.Config().bind(16, 256, torch.float32)
    of = Rounding(grid, rtn, rtn.Config(True))
    view = SiteView((w,), (of,), stats_of(x), x[:10], torch.arange(256), True)
    factors = awq.search(view, awq.Config(steps=5)).factors
    assert true_error(view.scaled(factors), x / factors) < 0.8 * true_error(view, x)
    clipped = awq.clip(w, view.stats, of, awq.Config())
    errors = [row_errors(of.values(t, view.stats) - w, view.stats).sum() for t in (clipped, w)]
    assert errors[0] <= errors[1]


def test_smoothquant_with_alpha_one_half_gives_weights_and_activations_the_same_range():
    view = site(weight(16), weight(8, 2))
    factors = smoothquant.search(view, smoothquant.Config(alpha=0.5)).factors
    scaled = view.scaled(factors)
    largest = torch.cat(scaled.weights).abs().amax(0)
    torch.testing.assert_close(scaled.stats.abs_max, largest)


def test_smoothquant_with_alpha_one_moves_all_outliers_out_of_the_activations():
    view = site(weight(16))
    scaled = view.scaled(smoothquant.search(view, smoothquant.Config(alpha=1.0)).factors)
    torch.testing.assert_close(scaled.stats.abs_max, torch.ones(COLS))


def test_a_searched_alpha_lowers_the_error_of_rounded_activations():
    x, view = activations(), site(weight(16))
    found = smoothquant.search(view, smoothquant.Config(alpha=None))

    def error(view, x):
        step = x.abs().amax(1, keepdim=True) / 127
        q = dequantize(rtn.quantize(view.weights[0], view.stats, view.roundings[0].grid, rtn.Config()))
        wanted = x.double() @ view.weights[0].double().T
        return float((((x / step).round() * step).double() @ q.double().T - wanted).square().mean())

    assert error(view.scaled(found.factors), x / found.factors) < 0.5 * error(view, x)
    assert 0.3 <= found.record["alpha"] <= 0.9


def test_smoothquant_leaves_sites_without_a_norm_unless_asked():
    view = site(weight(16), behind_norm=False)
    assert torch.equal(smoothquant.search(view, smoothquant.Config()).factors, torch.ones(COLS))
    assert smoothquant.search(view, smoothquant.Config(sites="all")).factors.std() > 0


def test_a_sample_is_spread_evenly_over_all_batches():
    x = torch.arange(5000.0)[:, None]
    sample = Sample(5000)
    for part in x.split([700, 1, 2299, 2000]):
        sample.add(part)
    steps = sample.result().diff(dim=0)
    assert (steps == steps[0]).all()
    assert 512 <= len(sample.result()) < 1024


# whole runs


SMALL = ["calibration.sequences=4", "calibration.length=64"]


def logits(folder, tokens, source):
    """Return what transformers computes with our decoded weights, norms and biases included."""
    checkpoint = open_model(folder)
    model = hf.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        parameter.data.copy_(checkpoint.read(name))
    with torch.no_grad():
        return model(tokens).logits


def some_tokens():
    return torch.randint(2, VOCABULARY, (2, 32), generator=torch.Generator().manual_seed(1))


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".safetensors", ".gguf")}


@pytest.fixture
def small(calibrated):
    return [*calibrated, *SMALL]


@pytest.fixture(scope="module")
def tiny(save_model, tmp_path_factory):
    """A Llama of two layers with grouped-query attention."""
    return save_model(tmp_path_factory.mktemp("tiny"), llama_of(64, 2))


def llama_of(width, layers):
    return hf.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=None,
    )


@pytest.fixture(scope="module")
def biased(save_model, tmp_path_factory):
    """A bfloat16 OPT: LayerNorms and linears with biases, ReLU."""
    config = hf.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        word_embed_proj_dim=64,
        pad_token_id=None,
    )
    return save_model(tmp_path_factory.mktemp("opt"), config, torch.bfloat16)


@pytest.mark.parametrize("model", ["tiny", "biased"])
@pytest.mark.parametrize("name", ["awq", "smoothquant"])
def test_what_a_run_folds_reaches_the_written_model(model, name, small, tmp_path, request):
    source = request.getfixturevalue(model)
    changes = [*small, "grid.bits=8", "grid.scale_dtype=float32", "formats=[compressed_tensors]", "ignore=[lm_head]"]
    changes += [f"transforms=[{{name: {name}}}]"]
    if name == "awq":
        changes[-1] = "transforms=[{name: awq, steps: 4, clip: false}]"
    run.quantize(source, recipe.load("awq-w3g128", changes), tmp_path / "out")
    norms = [n for n in load_file(tmp_path / "out" / "model.safetensors") if "norm" in n and ".layers." in n]
    before, after = open_model(source), open_model(tmp_path / "out")
    assert any(not torch.equal(before.read(n), after.read(n)) for n in norms)
    assert all(before.read(n).dtype == after.read(n).dtype for n in norms)
    wanted = logits(source, some_tokens(), source)
    assert (logits(tmp_path / "out", some_tokens(), source) - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_a_linear_that_stays_float_is_scaled_with_its_site(tiny, small, tmp_path):
    changes = [*small, "grid.bits=8", "rules=[{match: ['*.k_proj', '*.v_proj', '*.up_proj'], keep: true}]"]
    changes += ["transforms=[{name: smoothquant, sites: all}]"]
    run.quantize(tiny, recipe.load("awq-w3g128", changes), tmp_path / "out")
    name = "model.layers.1.self_attn.k_proj.weight"
    assert not torch.equal(open_model(tmp_path / "out").read(name), open_model(tiny).read(name))
    wanted = logits(tiny, some_tokens(), tiny)
    assert (logits(tmp_path / "out", some_tokens(), tiny) - wanted).abs().max() < 0.03 * wanted.abs().max()


def test_a_fold_that_the_dtype_cannot_hold_is_refused(save_model, small, tmp_path, monkeypatch):
    source = save_model(tmp_path / "model", llama_of(64, 1), torch.float16)
    changes = [*small, "transforms=[{name: smoothquant, sites: all}]", "rules=[{match: '*.up_proj', keep: true}]"]
    monkeypatch.setattr(smoothquant, "_factors", lambda site, alpha: torch.full_like(site.stats.abs_mean, 1e-7))
    with pytest.raises(CalibrationError, match=r"mlp\.up_proj\.weight: .* torch\.float16 cannot hold"):
        run.quantize(source, recipe.load("awq-w3g128", changes), tmp_path / "out")


def test_transforms_are_applied_one_after_the_other(tiny, small, tmp_path):
    changes = [*small, "grid.bits=8", "transforms=[{name: smoothquant}, {name: awq, steps: 3, clip: false}]"]
    report, _ = run.quantize(tiny, recipe.load("awq-w3g128", changes), tmp_path / "out")
    told = report.linears["model.layers.1.mlp.up_proj"]["transforms"]
    assert [one["name"] for one in told] == ["smoothquant", "awq"]
    assert told[0]["alpha"] == 0.5
    assert 0 < told[1]["loss"] <= 1
    wanted = logits(tiny, some_tokens(), tiny)
    assert (logits(tmp_path / "out", some_tokens(), tiny) - wanted).abs().max() < 0.03 * wanted.abs().max()


@pytest.mark.parametrize("changes", [["true_sequential=false"], ["algorithm={name: gptq, sweeps: 0}"]], ids=str)
def test_a_run_with_transforms_that_died_ends_with_the_same_bytes(tiny, small, tmp_path, changes):
    chosen = recipe.load("awq-w3g128", [*small, *changes, "transforms.0.steps=3"])
    run.quantize(tiny, chosen, tmp_path / "whole")

    def die(what, done, total):
        if (what, done) == ("quantizing layers", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.quantize(tiny, chosen, tmp_path / "out", progress=die)
    report, _ = run.quantize(tiny, chosen, tmp_path / "out")
    assert report.resumed_layers == 1
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_exporting_a_transformed_model_again_gives_the_same_bytes(tiny, small, tmp_path):
    changes = [*small, "transforms.0.steps=3"]
    run.quantize(tiny, recipe.load("awq-w4g128", changes), tmp_path / "awq", tmp_path / "work")
    api.export(tmp_path / "work", ["compressed_tensors"], tmp_path / "again")
    run.quantize(tiny, recipe.load("awq-w4g128", [*changes, "formats=[compressed_tensors]"]), tmp_path / "direct")
    assert files(tmp_path / "again") == files(tmp_path / "direct")
    ours, theirs = open_model(tmp_path / "awq"), open_model(tmp_path / "direct")
    assert len(ours.packed) == 2 * 7
    for name in [*(f"{n}.weight" for n in ours.packed), "model.layers.1.input_layernorm.weight"]:
        assert torch.equal(ours.read(name), theirs.read(name))


def test_a_gguf_file_holds_the_folded_norms(save_model, small, tmp_path):
    source = save_model(tmp_path / "model", llama_of(256, 1))
    changes = [c for c in small if "grid" not in c]
    changes += ["transforms=[{name: smoothquant}, {name: awq, steps: 2}]", "mixture={name: q8_0}"]
    run.quantize(source, recipe.load("awq-q4_k_m", changes), tmp_path / "out")
    norm = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(open_model(tmp_path / "out").read(norm), open_model(source).read(norm))
    wanted = logits(source, some_tokens(), source)
    assert (logits(tmp_path / "out", some_tokens(), source) - wanted).abs().max() < 0.05 * wanted.abs().max()


@pytest.mark.parametrize("name", ["awq-w4g128", "awq-w3g128", "awq-gptq-w4g128", "w8a8-smoothquant"])
def test_the_shipped_recipes_run(tiny, small, tmp_path, name):
    grid = small if "w8a8" not in name else [c for c in small if "group_size" not in c]
    steps = ["transforms.0.steps=3"] if "awq" in name else []
    report = api.quantize(tiny, name, tmp_path / "out", changes=[*grid, *steps])
    assert report.evaluation[1]["kld_mean"] < 0.5


def test_sites_that_cannot_be_folded_are_listed(save_model, small, tmp_path):
    config = hf.GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=256,
    )
    source = save_model(tmp_path / "model", config)
    report, _ = run.quantize(source, recipe.load("awq-w3g128", [*small, "transforms.0.steps=2"]), tmp_path / "out")
    assert [note for note in report.notes if note.startswith("mlp_out: not transformed")]
    assert "transforms" not in report.linears["gpt_neox.layers.0.mlp.dense_4h_to_h"]
    rules = "rules=[{match: ['*.query_key_value', '*.attention.dense', '*.dense_h_to_4h'], keep: true}]"
    with pytest.raises(RecipeError, match=r"^transforms: nothing in this model's layers.* of mlp_out\. Leave out"):
        api.plan(source, "awq-w3g128", changes=[*small, rules])


def test_transforms_need_text_and_not_an_imatrix(tiny, small, tmp_path):
    (tmp_path / "imatrix.gguf").touch()
    with pytest.raises(RecipeError, match=r"^imatrix: the transforms need text"):
        api.plan(tiny, "awq-w3g128", changes=[*small, f"imatrix={tmp_path / 'imatrix.gguf'}"])
    with pytest.raises(RecipeError, match=r"^calibration: missing"):
        api.plan(tiny, "rtn-w4g128", changes=["transforms=[{name: smoothquant}]", "grid.group_size=32"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("transforms=[{name: awk}]", r"^transforms\.0\.name: no transform is called 'awk'\. Did you mean 'awq'"),
        ("transforms=[{name: awq, step: 3}]", r"^transforms\.0\.step: unknown key\. Did you mean 'steps'"),
        ("transforms=[{name: awq, steps: 0}]", r"^transforms\.0: steps is 0"),
        ("transforms=[{name: awq}, {name: smoothquant, alpha: 2}]", r"^transforms\.1: alpha is 2"),
    ],
)
def test_a_wrong_transform_is_named_with_its_place(change, said):
    with pytest.raises(RecipeError, match=said):
        recipe.load("awq-w3g128", [change])


def test_one_awq_file_has_one_setting(tiny, small):
    rules = "rules=[{match: '*.q_proj', grid: {group_size: 64}}]"
    with pytest.raises(Exception, match="group sizes 32, 64"):
        api.plan(tiny, "awq-w4g128", changes=[*small, rules])


def test_a_copy_with_outliers_computes_the_same(tiny, tmp_path):
    write = runpy.run_path(str(Path(__file__).parent.parent / "eval" / "outliers.py"))["write_outliers"]
    write(tiny, tmp_path / "copy")
    norm = "model.layers.0.input_layernorm.weight"
    before, after = open_model(tiny).read(norm), open_model(tmp_path / "copy").read(norm)
    assert ((after / before) > 20).sum() == 2
    wanted = logits(tiny, some_tokens(), tiny)
    torch.testing.assert_close(logits(tmp_path / "copy", some_tokens(), tiny), wanted, rtol=1e-3, atol=1e-3)


def test_transforms_may_meet_a_first_layer_that_stays_float(llama):
    chosen = recipe.Recipe(
        name="x",
        grid={"name": "affine", "group_size": 32},
        transforms=[{"name": "smoothquant"}],
        rules=[{"match": "*.layers.0.*", "keep": True}],
        calibration={"path": "text.txt"},
    )
    plan = run.make_plan(llama, chosen)
    assert not plan.unfoldable
    assert {x.layer for x in plan.quantized.values()} == {1, 2}


def test_a_search_sees_no_more_text_than_it_needs(llama, calibrated, tmp_path, monkeypatch):
    tokens = []

    def seen(site, config, search=awq.search):
        tokens.append(site.stats.tokens)
        return search(site, config)

    monkeypatch.setattr(awq, "search", seen)
    monkeypatch.setattr(stream, "BATCH_TOKENS", 128)
    monkeypatch.setattr(stats, "ENOUGH", 200)
    chosen = recipe.load("awq-w4g128", [*calibrated, "transforms=[{name: awq, steps: 2, duo: false, clip: false}]"])
    report, _ = run.quantize(llama, chosen, tmp_path / "out")
    assert {told["tokens"] for told in report.linears.values()} == {16 * 128}
    assert set(tokens) == {4 * 128}  # the widest site has 128 columns
    tokens.clear()
    monkeypatch.setattr(stats, "ENOUGH_BY_COLUMN", 1)
    run.quantize(llama, chosen, tmp_path / "again")
    assert set(tokens) == {2 * 128}
