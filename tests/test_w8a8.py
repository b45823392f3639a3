"""Folders whose activations are 8-bit, too, end to end. The judges are compressed_tensors, and transformers with it.

Their logits and ours differ by more than the order of float sums: where an activation lies halfway between two codes,
a difference in the last bit tips it, and every later layer sees a whole step. The measure is what quantization itself
changed: the difference must be a small part of that. Linears by themselves, given the same input, agree to 1e-5, or
to a step of some activations where there is a zero point, which the library adds before it rounds and we after.

A token's int8 scale is 1/127 of its largest value here and in vLLM, 1/127.5 in the library (its largest value has no
level). The tests give the library vLLM's: otherwise they would compare two roundings that have nothing in common.
"""

from dataclasses import replace

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from llmquant import api, calibrate, demo, evaluation, layers, recipe, run
from llmquant.activations import ActivationScheme
from llmquant.errors import CheckpointError, FormatError, RecipeError
from llmquant.exporters import compressed_tensors as ct
from llmquant.packed import open_model
from llmquant.runtime.linear import QuantizedLinear
from llmquant.stream import Stream
from tests.conftest import VOCABULARY

CPU = torch.device("cpu")
FORMATS = {
    "w8a8-dynamic": "int-quantized",
    "w8a8-static": "int-quantized",
    "fp8": "float-quantized",
    "fp8-dynamic": "float-quantized",
    "fp8-static": "float-quantized",
    "int8": "pack-quantized",
}
STATIC = ("w8a8-static", "fp8-static")
ASYMMETRIC = ["activations.symmetric=false"]


@pytest.fixture(scope="module")
def text(texts):
    """Changes that let a recipe that needs text run on the small models."""
    path = texts / "calibration.txt"
    return [f"calibration.path={path}", "calibration.sequences=16", "calibration.length=128"]


@pytest.fixture(scope="module")
def written(llama, text, tmp_path_factory):
    """Return a function that quantizes the small Llama by a shipped recipe, once for all tests."""
    folder = tmp_path_factory.mktemp("w8a8")

    def write(name, *changes):
        out = folder / "-".join([name, *changes]).replace("/", "_")
        if not out.exists():
            run.quantize(llama, recipe.load(name, [*(text if name in STATIC else []), *changes]), out)
        return out

    return write


def tokens(seed=1):
    return torch.randint(2, VOCABULARY, (2, 32), generator=torch.Generator().manual_seed(seed))


def ours(folder, batch):
    stream = Stream(open_model(folder), CPU)
    return torch.cat([stream.finish(batch[i : i + 1], x) for i, x in enumerate(stream.hidden(batch))])


def transformers(folder):
    return hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def scale_of_vllm(monkeypatch):
    from compressed_tensors.quantization.lifecycle import forward

    compute = forward.compute_dynamic_scales_and_zp

    def scaled(value, args, **rest):
        scale, zero = compute(value, args, **rest)
        return (scale * 127.5 / 127 if args.type == "int" and args.symmetric else scale), zero

    monkeypatch.setattr(forward, "compute_dynamic_scales_and_zp", scaled)


CASES = [*((name, ()) for name in FORMATS), ("w8a8-dynamic", ASYMMETRIC), ("w8a8-static", ASYMMETRIC)]


@pytest.mark.filterwarnings("ignore")  # compressed-tensors' own
@pytest.mark.parametrize(("name", "changes"), CASES, ids=str)
@torch.no_grad()
def test_transformers_loads_the_folder_and_computes_nearly_our_logits(name, changes, written, llama, scale_of_vllm):
    folder, batch = written(name, *changes), tokens()
    mine, theirs, exact = ours(folder, batch), transformers(folder)(batch).logits, transformers(llama)(batch).logits
    rounding = (exact - mine).norm()
    assert rounding > 1e-4 * exact.norm()
    assert (theirs - mine).norm() < 0.2 * rounding


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "changes"), CASES, ids=str)
@torch.no_grad()
def test_one_linear_of_the_library_computes_what_ours_does(name, changes, written, scale_of_vllm):
    folder = written(name, *changes)
    path = "model.layers.1.mlp.down_proj"
    model, checkpoint = transformers(folder), open_model(folder)
    model(tokens())  # decompresses
    x = torch.randn(40, 128, generator=torch.Generator().manual_seed(0))
    operator = checkpoint.operator(path, CPU)
    assert (operator is None) == (name in ("fp8", "int8"))
    mine = operator(x) if operator else x @ checkpoint.read(f"{path}.weight").T
    theirs = model.get_submodule(path)(x[None])[0]  # without a first dimension it would give all tokens one scale
    torch.testing.assert_close(mine, theirs, rtol=0, atol=float(theirs.abs().max()) * (0.02 if changes else 1e-5))


@pytest.mark.parametrize(("name", "changes"), CASES, ids=str)
def test_the_library_accepts_the_configuration_and_infers_the_same_format(name, changes, written, read_json):
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationConfig

    settings = read_json(written(name, *changes) / "config.json")["quantization_config"]
    scheme = QuantizationConfig.model_validate(settings).config_groups["group_0"]
    assert settings["format"] == FORMATS[name]
    if name != "fp8":  # which the library calls naive-quantized, with the same tensors
        assert infer_module_format(torch.nn.Linear, scheme).value == FORMATS[name]
    inputs = scheme.input_activations
    if name in ("int8", "fp8"):
        assert inputs is None
    else:
        assert (inputs.num_bits, inputs.dynamic, inputs.symmetric) == (8, name not in STATIC, not changes)
        assert inputs.strategy == ("tensor" if name in STATIC else "token")


@pytest.mark.parametrize("name", [n for n in FORMATS if n != "int8"])
def test_the_library_compresses_to_our_bytes_and_back(name, written, read_json):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    folder = written(name)
    settings = read_json(folder / "config.json")["quantization_config"]
    scheme = QuantizationConfig.model_validate(settings).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(settings["format"])
    stored, path = load_file(folder / "model.safetensors"), "model.layers.0.self_attn.k_proj"
    weight = ct.unpack({s: stored[f"{path}.{s}"] for s in ("weight", "weight_scale")}, settings, path)
    scale = stored[f"{path}.weight_scale"].float()
    state = {"weight": stored[f"{path}.weight"], "weight_scale": scale}
    assert torch.equal(compressor.decompress(state, scheme)["weight"], weight)
    again = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)["weight"]
    assert again.dtype == stored[f"{path}.weight"].dtype
    assert torch.equal(again.float(), stored[f"{path}.weight"].float())


@pytest.mark.parametrize("name", ["w8a8-dynamic", "w8a8-static", "fp8-static"])
def test_evaluation_runs_the_linears_as_a_runtime_does(name, written, llama, texts, monkeypatch):
    calls = []
    forward = QuantizedLinear.forward
    monkeypatch.setattr(QuantizedLinear, "forward", lambda self, x: calls.append(1) or forward(self, x))
    windows = evaluation.read_windows(llama, texts / "evaluation.txt", "gptq", 1024)
    row = evaluation.evaluate(written(name), windows, evaluation.Reference(llama))
    assert len(calls) == 3 * 7
    assert 0 < row.kld_mean < 0.02


def test_the_run_itself_sees_what_the_runtime_computes(llama, text, tmp_path, monkeypatch):
    """The quantized layers' last output, as calibration leaves it, against the written folder's."""
    kept = []
    monkeypatch.setattr(layers, "head_stats", lambda stream, tokens, x, plan, aimed: kept.append((tokens, x)) or 1 / 0)
    chosen = recipe.load("w8a8-static", [*text, "tied_embeddings=untie", "ignore=[]"])
    with pytest.raises(ZeroDivisionError):
        run.quantize(llama, chosen, tmp_path / "out", tmp_path / "work")
    monkeypatch.undo()
    run.quantize(llama, chosen, tmp_path / "out", tmp_path / "work")
    batch, activations = kept[0]
    stream = Stream(open_model(tmp_path / "out"), CPU)
    assert isinstance(stream.model.get_submodule("lm_head"), QuantizedLinear)
    seen = torch.cat(list(activations))
    found = torch.cat(stream.hidden(batch))
    assert (found - seen).norm() < 0.02 * seen.norm()  # activations halfway between codes tip
    assert (found - seen).abs().median() < 1e-5 * seen.abs().max()


def test_a_run_that_died_goes_on_with_the_same_ranges(llama, text, tmp_path):
    chosen = recipe.load("w8a8-static", text)
    run.quantize(llama, chosen, tmp_path / "whole")

    def die(what, done, total):
        if (what, done) == ("quantizing layers", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.quantize(llama, chosen, tmp_path / "out", progress=die)
    run.quantize(llama, chosen, tmp_path / "out")
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out"))
    assert a == b


def test_a_layer_computed_once_gives_the_same_ranges_as_one_pass_for_each_site(llama, text, tmp_path, monkeypatch):
    chosen = recipe.load("w8a8-static", [*text, "algorithm.name=gptq"])
    run.quantize(llama, chosen, tmp_path / "once")
    placed = run.plan_for
    monkeypatch.setattr(run, "plan_for", lambda *args: replace(placed(*args), placement="memory"))
    run.quantize(llama, chosen, tmp_path / "passes")
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("once", "passes"))
    assert a == b


def test_static_ranges_cover_what_the_linears_read(llama, text, tmp_path):
    run.quantize(llama, recipe.load("w8a8-static", [*text, "activations.observer=minmax"]), tmp_path / "out")
    stream, largest = Stream(open_model(llama), CPU), {}
    batch = tokens()
    checkpoint = open_model(tmp_path / "out")
    x = stream.start(batch)
    with (
        stream.layer(0) as layer,
        calibrate.watch(
            layer, stream.spec.sites, lambda site, seen: largest.update({site.linears[0]: float(seen.abs().max())})
        ),
    ):
        stream.run(layer, 0, x)
    for name, value in largest.items():
        scale = checkpoint.operator(f"model.layers.0.{name}", CPU).inputs.params["scale"]
        assert 0.3 * value < 127 * float(scale) < 3 * value


def test_a_rule_may_leave_the_inputs_of_some_linears_float(written, read_json):
    rule = '{match: "*.down_proj", activations: float}'
    folder = written("w8a8-dynamic", f"rules=[{rule}]")
    settings = read_json(folder / "config.json")["quantization_config"]
    assert settings["format"] == "mixed-precision"
    assert {g["format"] for g in settings["config_groups"].values()} == {"int-quantized", "pack-quantized"}
    checkpoint = open_model(folder)
    assert checkpoint.operator("model.layers.0.mlp.down_proj", CPU) is None
    assert checkpoint.operator("model.layers.0.mlp.up_proj", CPU) is not None
    assert "model.layers.0.mlp.down_proj.weight_packed" in checkpoint.infos
    assert len(checkpoint.packed) == 3 * 7


def test_the_plan_knows_the_size_and_asks_for_text_only_where_it_is_needed(llama, text, written):
    for name in FORMATS:
        plan = api.plan(llama, name, changes=text if name in STATIC else [])
        assert plan.needs == ("diagonal" if name in STATIC else "nothing")
        tensors = load_file(written(name) / "model.safetensors")
        assert plan.sizes["compressed_tensors"] == sum(t.nbytes for t in tensors.values())


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [
        ("w8a8-static", ["calibration=null"], RecipeError, "static ranges of activations need text"),
        ("w8a8-static", ["imatrix=x.gguf"], RecipeError, "does not tell the ranges of activations"),
        ("w8a8-dynamic", ["grid.bits=4"], FormatError, r"q_proj\.weight: weights have 4 bits.* integer products need"),
        ("w8a8-dynamic", ["grid.symmetric=false"], FormatError, "symmetric False"),
        ("w8a8-dynamic", ["activations.type=fp8"], FormatError, "weights are integers but activations fp8"),
        ("fp8-dynamic", ["activations.type=int8"], FormatError, "weights are fp8 but activations int8"),
        ("w8a8-dynamic", ["formats=[gptq]"], FormatError, "a gptq file cannot say that activations are rounded"),
        ("fp8", ["formats=[gptq]"], FormatError, "cannot hold"),
    ],
)
def test_what_no_runtime_computes_is_refused_by_the_plan(name, changes, error, message, llama):
    with pytest.raises(error, match=message):
        api.plan(llama, name, changes=changes)


def folder_of(kind, **inputs):
    """Return a config and the tensors of a linear, to be broken."""
    group = {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "channel"},
        "input_activations": {"num_bits": 8, "type": kind, "symmetric": True, **inputs},
    }
    dtype = {"int": torch.int8, "float": torch.float8_e4m3fn}[kind]
    tensors = {"weight": torch.ones(4, 8).to(dtype), "weight_scale": torch.ones(4, 1), "input_scale": torch.ones(1)}
    return {"format": f"{kind}-quantized", "config_groups": {"group_0": group}}, tensors


@pytest.mark.parametrize(
    ("inputs", "change", "message"),
    [
        ({"strategy": "token", "dynamic": True}, {"weight": torch.ones(4, 8)}, r"weight is torch.float32 \[4, 8\]"),
        ({"strategy": "token", "dynamic": True}, {"weight_scale": torch.ones(4)}, r"weight_scale .* a float \[4, 1\]"),
        ({"strategy": "tensor"}, {"input_scale": None}, "input_scale is missing"),
        ({"strategy": "tensor"}, {"input_scale": torch.ones(8)}, r"input_scale is \[8\], expected one number"),
        ({"strategy": "tensor", "symmetric": False}, {}, "input_zero_point is missing"),
        ({"strategy": "group", "group_size": 4, "dynamic": True}, {}, "input_activations .* strategy token if dynamic"),
        ({"num_bits": 4, "strategy": "token", "dynamic": True}, {}, "input_activations .* expected 8 bits"),
        ({"type": "float", "strategy": "token", "dynamic": True}, {}, "weights is int, .* expected fp8, as the inputs"),
    ],
)
def test_a_broken_folder_says_what_was_expected_and_found(inputs, change, message):
    config, tensors = folder_of("int", **inputs)
    tensors = {k: v for k, v in (tensors | change).items() if v is not None}
    with pytest.raises(CheckpointError, match=message):
        ct.operator(tensors, config, "a.b")


def test_integer_weights_of_other_writers_are_decoded_in_groups_and_with_zero_points():
    config, tensors = folder_of("int")
    weights = config["config_groups"]["group_0"]["weights"]
    weights |= {"strategy": "group", "group_size": 4, "symmetric": False}
    tensors |= {"weight_scale": torch.rand(4, 2), "weight_zero_point": torch.arange(8).view(4, 2).to(torch.int8)}
    tensors["weight"] = torch.arange(32).view(4, 8).to(torch.int8)
    expected = [
        [float(tensors["weight_scale"][r, c // 4]) * (8 * r + c - (2 * r + c // 4)) for c in range(8)] for r in range(4)
    ]
    torch.testing.assert_close(ct.unpack(tensors, config, "a.b"), torch.tensor(expected))


def test_8_bits_cost_almost_nothing_on_the_demo_model(texts, tmp_path):
    """The margins are those that torchao publishes for Llama 3.1 8B: 0.2 % and 1.7 % of perplexity."""
    windows = evaluation.read_windows(demo.MODEL, texts / "evaluation.txt", "llama.cpp", 1024)
    reference = evaluation.Reference(demo.MODEL)
    for name, margin in (("int8", 0.002), ("w8a8-dynamic", 0.017)):
        run.quantize(demo.MODEL, recipe.load(name), tmp_path / name)
        row = evaluation.evaluate(tmp_path / name, windows, reference)
        assert row.perplexity_ratio == pytest.approx(1, abs=margin)
        assert row.kld_mean > 0


def test_a_recipe_with_activations_reads_back_the_same(tmp_path):
    rule = [{"match": "*.down_proj", "activations": "float"}, {"match": "*.up_proj", "activations": {"dynamic": True}}]
    made = recipe.Recipe(
        name="x",
        grid={"name": "affine", "bits": 8, "group_size": -1},
        activations=ActivationScheme(symmetric=False),
        rules=rule,
    )
    (tmp_path / "x.yaml").write_text(recipe.dump(made))
    again = recipe.load(tmp_path / "x.yaml")
    assert again == made
    assert again.choose("a.down_proj").activations is None
    assert again.choose("a.up_proj").activations == ActivationScheme()
    assert again.choose("a.q_proj").activations == ActivationScheme(symmetric=False)
