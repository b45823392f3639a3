"""The judges are bitsandbytes itself, and transformers and peft, which read folders with it."""

import json

import bitsandbytes.functional as bnb
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from llmquant import api, blockwise, plugins, recipe, run
from llmquant.algorithms import gptq, rtn
from llmquant.errors import CheckpointError, FormatError, ShapeError
from llmquant.exporters import bitsandbytes as exporter
from llmquant.grid import QuantizedTensor, dequantize, fit_all
from llmquant.grids import affine
from llmquant.packed import open_model
from llmquant.stats import Stats
from tests.conftest import VOCABULARY

TYPES = pytest.mark.parametrize("type_", ["nf4", "fp4"])
DOUBLE = pytest.mark.parametrize("double_quant", [True, False], ids=["double", "single"])
SHAPE = (131, 384)  # no whole number of nested blocks


def normal(*shape, seed=0):
    return 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def grid_for(w, type_, **config):
    return plugins.load("grids", type_, "here").Config(**config).bind(*w.shape, w.dtype)


def quantize(w, type_="nf4", **config):
    stats = Stats.none(w.shape[1], torch.device("cpu"))
    return rtn.quantize(w, stats, grid_for(w, type_, **config), rtn.Config())


def library(w, type_, block_size=64, double_quant=True):
    """What bitsandbytes makes of a weight, as the tensors that a state dict holds."""
    codes, state = bnb.quantize_4bit(w, blocksize=block_size, quant_type=type_, compress_statistics=double_quant)
    return {"weight": codes} | {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}


def library_decodes(tensors):
    state = {key.removeprefix("weight."): value for key, value in tensors.items() if key != "weight"}
    return bnb.dequantize_4bit(tensors["weight"], bnb.QuantState.from_dict(state, torch.device("cpu")))


def same(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def outliers(w):
    return torch.where(normal(*w.shape, seed=1) > 0.15, 80 * w, w)


def zero_rows_and_blocks(w):
    w = w.clone()
    w[5], w[:, 64:128] = 0, 0
    return w


WEIGHTS = {
    "normal": lambda w: w,
    "outliers": outliers,
    "zero rows and blocks": zero_rows_and_blocks,
    "zero": torch.zeros_like,
    "constant": lambda w: torch.full_like(w, -0.02),
    "negative": lambda w: -w.abs(),
    "positive": lambda w: w.abs(),
    "long tails": lambda w: w.pow(3),
    "tiny": lambda w: w * 1e-39,
}


@TYPES
@DOUBLE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_every_byte_is_what_bitsandbytes_writes(kind, dtype, double_quant, type_):
    w = WEIGHTS[kind](normal(*SHAPE)).to(dtype)
    assert same(
        exporter.pack(quantize(w, type_, double_quant=double_quant)), library(w, type_, double_quant=double_quant)
    )


@TYPES
@pytest.mark.parametrize("block_size", blockwise.SIZES)
def test_every_block_size_gives_the_bytes_of_bitsandbytes(block_size, type_):
    w = normal(24, 4096)
    assert same(exporter.pack(quantize(w, type_, block_size=block_size)), library(w, type_, block_size))


def test_the_dynamic_map_is_that_of_bitsandbytes():
    assert torch.equal(blockwise.dynamic_map(), bnb.create_dynamic_map())


@TYPES
@DOUBLE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_bitsandbytes_decodes_to_our_floats(dtype, double_quant, type_):
    w = normal(*SHAPE).to(dtype)
    q = quantize(w, type_, double_quant=double_quant, observer="mse")
    tensors = exporter.pack(q)
    theirs = library_decodes(tensors)
    assert theirs.dtype == dtype
    assert torch.equal(theirs, dequantize(q).to(dtype))
    assert torch.equal(exporter.unpack(tensors, {}, "x"), theirs.float())


@TYPES
@DOUBLE
@pytest.mark.parametrize("shape", [(8, 100), (33, 64)], ids=str)
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
def test_what_only_bitsandbytes_writes_is_read_too(storage, shape, double_quant, type_):
    w = normal(*shape)  # blocks that go on in the next row; codes kept as bytes of another dtype
    codes, state = bnb.quantize_4bit(
        w, blocksize=32, quant_type=type_, compress_statistics=double_quant, quant_storage=storage
    )
    tensors = {"weight": codes} | {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    assert torch.equal(exporter.unpack(tensors, {}, "x"), bnb.dequantize_4bit(codes, state))


@TYPES
@DOUBLE
def test_bits_per_weight_are_those_of_what_is_stored(double_quant, type_):
    w = normal(256, 1024)
    grid, tensors = grid_for(w, type_, double_quant=double_quant), library(w, type_, double_quant=double_quant)
    kept = ("weight", "weight.absmax", "weight.nested_absmax")
    stored = sum(tensors[name].nbytes for name in kept if name in tensors) + (4 if double_quant else 0)
    assert grid.bits_per_weight == 8 * stored / w.numel()
    assert grid.bits_per_weight == pytest.approx(4.127 if double_quant else 4.5, abs=2e-4)


@TYPES
@DOUBLE
def test_sizes_without_any_number_are_exact_but_for_the_most_digits_an_offset_can_have(double_quant, type_):
    q = quantize(normal(*SHAPE), type_, double_quant=double_quant)
    meta = QuantizedTensor(q.grid, q.codes.to("meta"), {name: value.to("meta") for name, value in q.params.items()})
    real, planned = exporter.pack(q), exporter.pack(meta)
    state = f"{exporter.STATE}{type_}"
    assert planned.keys() == real.keys()
    assert all(planned[k].nbytes == real[k].nbytes and planned[k].dtype == real[k].dtype for k in real if k != state)
    digits = len(str(float(q.params["nested_offset"].flatten()[0]))) if double_quant else 22
    assert planned[state].nbytes - real[state].nbytes == 22 - digits


def test_no_offset_has_more_characters_than_are_planned_for():
    bits = torch.randint(0, 0x7F800000, (200_000,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    assert max(len(str(x)) for x in bits.view(torch.float32).tolist()) == len(str(exporter.LONGEST_OFFSET)) == 22


@TYPES
def test_a_searched_absmax_leaves_less_error_where_it_matters(type_):
    w, importance = WEIGHTS["long tails"](normal(64, 256)), normal(256, seed=1).square()
    stats = Stats(None, importance, importance.sqrt(), 1)
    errors = []
    for observer in ("absmax", "mse"):
        q = rtn.quantize(w, stats, grid_for(w, type_, double_quant=False, observer=observer), rtn.Config())
        errors.append((importance * (dequantize(q) - w).square()).view(64, 4, 64).sum(2))
    assert (errors[1] <= 1.0001 * errors[0]).all()
    assert errors[1].sum() < 0.95 * errors[0].sum()


def test_a_shape_that_leaves_part_of_a_block_is_refused_with_a_remedy():
    with pytest.raises(ShapeError, match=r"96 columns are not a multiple of block_size 64\. Give it block_size 32"):
        grid_for(normal(4, 96), "nf4")
    with pytest.raises(ShapeError, match=r"Leave it float"):
        grid_for(normal(4, 44), "nf4")


def test_a_block_size_without_kernels_is_refused():
    with pytest.raises(ValueError, match=r"block_size is 48, not one of 32, 64"):
        plugins.load("grids", "nf4", "here").Config(block_size=48)


def test_other_grids_and_dtypes_are_refused():
    with pytest.raises(FormatError, match=r"cannot hold the grid Affine, only nf4 and fp4"):
        exporter.check(affine.Config(4, 64).bind(4, 64, torch.float16), 4, 64)
    with pytest.raises(FormatError, match=r"cannot hold torch\.float64"):
        exporter.check(grid_for(normal(4, 64).double(), "nf4"), 4, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": None}, "weight is missing"),
        ({"weight": torch.zeros(5, 1, dtype=torch.uint8)}, "weight has 5 values, expected 128"),
        ({"weight.absmax": torch.zeros(5, dtype=torch.uint8)}, r"weight\.absmax has 5 values, expected 4"),
        ({"weight.nested_absmax": None}, r"weight\.nested_absmax is missing"),
        ({"weight.quant_map": torch.zeros(15)}, r"weight\.quant_map has 15 values, expected 16"),
        ({f"{exporter.STATE}nf4": torch.tensor([1, 2], dtype=torch.uint8)}, "expected JSON with dtype"),
        ({f"{exporter.STATE}nf4": torch.tensor(list(b'{"dtype": 3}'), dtype=torch.uint8)}, "expected JSON with dtype"),
    ],
)
def test_a_broken_linear_says_what_was_expected_and_found(change, message):
    tensors = {k: v for k, v in {**library(normal(4, 64), "nf4"), **change}.items() if v is not None}
    with pytest.raises(CheckpointError, match=message):
        exporter.unpack(tensors, {}, "x")


def test_8_bit_folders_are_refused():
    with pytest.raises(CheckpointError, match="4-bit bitsandbytes files only"):
        exporter.linears(["a.weight", "a.SCB"], {"load_in_4bit": False, "load_in_8bit": True})


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Let bitsandbytes decode and multiply in float32, also on processors with bfloat16 instructions.

    There it rearranges the packed weights at the first forward and multiplies in bfloat16.
    """
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


def theirs(folder, **options):
    """Return transformers' model of a folder, float or 4-bit."""
    return hf.AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options}).eval()


def tokens():
    return torch.randint(2, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))


def decoded(folder, float_folder):
    """Return transformers' float model with our decoded weights in it."""
    checkpoint, model = open_model(folder), theirs(float_folder)
    assert len(checkpoint.packed) > 0
    for name in checkpoint.packed:
        weight = checkpoint.read(f"{name}.weight")
        parameter = model.get_parameter(f"{name}.weight")
        with torch.no_grad():
            parameter.copy_(weight)
    return model


def in_4_bits(folder, type_, double_quant):
    """Return transformers' own 4-bit quantization of a float folder."""
    settings = hf.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=type_, bnb_4bit_use_double_quant=double_quant
    )
    return theirs(folder, quantization_config=settings)


@torch.no_grad()
def logits(model):
    return model(tokens()).logits


@TYPES
@DOUBLE
def test_transformers_loads_a_folder_and_computes_what_its_own_4_bit_model_computes(
    llama, tmp_path, read_json, type_, double_quant
):
    changes = [f"grid.double_quant={double_quant}"]
    api.quantize(llama, type_, tmp_path / "out", changes=changes, evaluate=False)
    loaded, own = theirs(tmp_path / "out"), in_4_bits(llama, type_, double_quant)
    assert loaded.is_loaded_in_4bit
    assert torch.equal(logits(loaded), logits(own))
    torch.testing.assert_close(logits(loaded), logits(decoded(tmp_path / "out", llama)), rtol=1e-5, atol=1e-5)
    own.save_pretrained(tmp_path / "own")
    assert same(load_file(tmp_path / "out" / "model.safetensors"), load_file(tmp_path / "own" / "model.safetensors"))
    config, expected = (read_json(tmp_path / x / "config.json")["quantization_config"] for x in ("out", "own"))
    assert config == expected | {"llm_int8_skip_modules": ["lm_head"]}
    for name in open_model(tmp_path / "own").packed:
        a, b = (open_model(tmp_path / x).read(f"{name}.weight") for x in ("out", "own"))
        assert torch.equal(a, b), name


def test_a_mixed_folder_keeps_what_the_recipe_keeps(llama, tmp_path):
    rules = [
        "rules=[{match: '*.layers.1.mlp.up_proj', keep: true}, {match: '*.down_proj', grid: {name: fp4}},"
        " {match: '*.q_proj', grid: {block_size: 32, double_quant: false}}]",
        "ignore=[]",
    ]
    api.quantize(llama, "nf4", tmp_path / "out", changes=rules, evaluate=False)
    loaded = theirs(tmp_path / "out")
    layers = loaded.model.layers
    assert type(layers[1].mlp.up_proj) is torch.nn.Linear
    assert type(layers[0].mlp.up_proj) is not torch.nn.Linear
    assert (layers[0].mlp.down_proj.weight.quant_type, layers[0].mlp.up_proj.weight.quant_type) == ("fp4", "nf4")
    assert layers[2].self_attn.q_proj.weight.blocksize == 32
    torch.testing.assert_close(logits(loaded), logits(decoded(tmp_path / "out", llama)), rtol=1e-5, atol=1e-5)


def test_conv1d_models_are_written_like_transformers_does(save_model, tmp_path):
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY}
    model = save_model(tmp_path / "model", hf.GPT2Config(**sizes, pad_token_id=None))
    api.quantize(model, "nf4", tmp_path / "out", evaluate=False)
    assert torch.equal(logits(theirs(tmp_path / "out")), logits(in_4_bits(model, "nf4", True)))


def test_a_16_bit_model_is_what_transformers_makes_of_it(save_model, tmp_path):
    config = hf.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    model = save_model(tmp_path / "model", config, torch.bfloat16)
    api.quantize(model, "nf4", tmp_path / "out", evaluate=False)
    settings = hf.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    own = theirs(model, dtype=torch.bfloat16, quantization_config=settings)
    assert torch.equal(logits(theirs(tmp_path / "out", dtype=torch.bfloat16)), logits(own))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_a_lora_adapter_trains_on_a_written_folder(llama, tmp_path):
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    api.quantize(llama, "nf4", tmp_path / "out", evaluate=False)
    base = prepare_model_for_kbit_training(theirs(tmp_path / "out"), use_gradient_checkpointing=False)
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    packed = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(p, packed[n]) for n, p in model.named_parameters() if n in packed)


def test_gptq_on_nf4_beats_rounding_and_what_is_written_is_what_it_chose(llama, texts, tmp_path):
    text = [f"calibration.path={texts / 'calibration.txt'}", "calibration.sequences=24", "calibration.length=128"]
    report = api.quantize(llama, "gptq-nf4", tmp_path / "gptq", changes=text, work=tmp_path / "work", evaluate=False)
    plain = api.quantize(llama, "nf4", tmp_path / "rtn", evaluate=False)
    assert report.bits_per_weight == plain.bits_per_weight
    windows = texts / "evaluation.txt"
    kld = [api.evaluate(tmp_path / x, reference=llama, text=windows, max_tokens=2048).kld_mean for x in ("gptq", "rtn")]
    assert kld[0] < 0.8 * kld[1]
    # the work folder keeps shared values once, and gives back what was written
    api.export(tmp_path / "work", ["bitsandbytes"], tmp_path / "again")
    assert same(*(load_file(tmp_path / x / "model.safetensors") for x in ("gptq", "again")))
    held = load_file(tmp_path / "work" / "layer-00000.safetensors")
    rows, cols = held["model.layers.0.mlp.up_proj:codes"].shape
    sizes = {k: held[f"model.layers.0.mlp.up_proj:{k}"].numel() for k in ("absmax", "nested_absmax", "nested_offset")}
    assert sizes == {"absmax": rows * cols // 64, "nested_absmax": -(rows * cols // -64 // 256), "nested_offset": 1}


def test_gptq_searches_each_absmax_beside_the_nested_values_it_was_fitted_with():
    w, x = normal(24, 256), normal(600, 256, seed=1)
    x[:, ::7] *= 5
    hessian = x.T @ x / 600
    stats, grid = Stats(hessian, hessian.diagonal(), x.abs().mean(0), 600), grid_for(w, "nf4")
    errors = []
    for config in (gptq.Config(scale_search=False, sweeps=0), gptq.Config()):
        q = gptq.quantize(w, stats, grid, config)
        delta = dequantize(q) - w
        errors.append(float(((delta @ hessian) * delta).sum()))
        for name in grid.shared:
            assert torch.equal(q.params[name], fit_all(grid, w, hessian.diagonal())[name])
    assert errors[1] < 0.9 * errors[0]
    assert not torch.equal(q.params["absmax"], fit_all(grid, w, hessian.diagonal())["absmax"])
    assert torch.equal(library_decodes(exporter.pack(q)), dequantize(q))


def test_a_wished_absmax_is_stored_as_the_nearest_there_is_beside_the_nested_values():
    w = normal(8, 256)
    grid = grid_for(w, "nf4")
    params = {name: value.flatten(0, 1) for name, value in fit_all(grid, w, torch.ones(256)).items()}
    scale, offset = (1.07 * value for value in grid.levels(params))
    there_is = bnb.create_dynamic_map() * params["nested_absmax"] + params["nested_offset"]
    stored = grid.levels(grid.store_beside(params, scale, offset))[0]
    torch.testing.assert_close((stored - scale).abs(), (there_is - scale).abs().amin(1, keepdim=True))


def test_a_plan_knows_the_most_that_is_written(llama, tmp_path):
    plan = run.make_plan(llama, recipe.load("nf4"))
    report = api.quantize(llama, "nf4", tmp_path / "out", evaluate=False)
    written = sum(t.nbytes for t in load_file(tmp_path / "out" / "model.safetensors").values())
    assert 0 <= plan.sizes["bitsandbytes"] - written <= 6 * len(plan.quantized)
    # the header holds a length and an end of every tensor in digits, and is a multiple of 8
    assert 0 <= plan.files["bitsandbytes"] - report.bytes["bitsandbytes"] <= 8 * len(plan.quantized) + 8
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["load_in_4bit"]
