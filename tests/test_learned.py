"""Learned rounding, judged by the layer's own outputs on sequences that it never saw."""

import copy

import pytest
import torch
import transformers as hf

from llmquant import learned, training
from llmquant.distillation import Training
from llmquant.errors import CalibrationError, RecipeError
from llmquant.grid import QuantizedTensor, dequantize, encode_all, fit_all
from llmquant.grids import affine, mxfp4, nf4, q2_k, q3_k, q6_k
from llmquant.recipe import Recipe

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj")
GRIDS = {
    "w2": affine.Config(2, 32, symmetric=False),
    "symmetric": affine.Config(3, 32, symmetric=True),
    "nf4": nf4.Config(),
    "mxfp4": mxfp4.Config(),
    "q2_k": q2_k.Config(),
    "q3_k": q3_k.Config(),
    "q6_k": q6_k.Config(),
}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nearest(w, config):
    grid = config.bind(*w.shape, torch.float32)
    params = fit_all(grid, w, torch.ones(w.shape[1]))
    return QuantizedTensor(grid, encode_all(grid, w, params), params)


@pytest.fixture(scope="module")
def layer():
    torch.manual_seed(0)
    config = hf.LlamaConfig(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_hidden_layers=1)
    model = hf.LlamaModel(config).eval().requires_grad_(False)
    for parameter in model.layers[0].parameters():
        if parameter.ndim == 2:
            parameter.copy_(normal(*parameter.shape, seed=len(parameter)) / 8)

    def call(x):
        position = torch.arange(x.shape[1])[None]
        return (), {"position_embeddings": model.rotary_emb(x, position), "attention_mask": None}

    return model.layers[0], call


def output(layer, call, x):
    args, kwargs = call(x)
    out = layer(x, *args, **kwargs)
    return out[0] if isinstance(out, tuple) else out


def rounded(layer, done):
    """Return a copy of the layer with quantized weights."""
    layer = copy.deepcopy(layer)
    for name, q in done.items():
        layer.get_submodule(name).weight.copy_(dequantize(q))
    return layer


def relative_error(layer, call, x, y, metric):
    error = (output(layer, call, x) - y) / y.square().mean(-1, keepdim=True).sqrt()
    return float(((error @ metric) * error).sum(-1).mean())


def changing(way, done, weights, rate):
    if way == "signs":
        return learned.SignSteps(done, weights, learned.LearnedRounding(rate=rate))
    return training.AdamSteps(done, Training(rate=rate, scale_rate=rate / 4))


@pytest.mark.parametrize("way", ["signs", "adam"])
@pytest.mark.parametrize("name", ["w2", "symmetric"])
@torch.no_grad()
def test_tuned_linears_lower_the_error_on_sequences_that_were_not_seen(layer, name, way):
    block, call = layer
    x, fresh = normal(40, 24, 64, seed=1), normal(16, 24, 64, seed=2)
    y, wanted = output(block, call, x), output(block, call, fresh)
    weights = {local: block.get_submodule(local).weight for local in LINEARS}
    done = {local: nearest(w, GRIDS[name]) for local, w in weights.items()}
    root = normal(64, 64, seed=3)
    metric = root @ root.T / 64
    steps = changing(way, done, weights, 0.02)
    tuned, told = learned.tune(block, done, steps, x, y, call, metric, steps=60, tokens=24 * 16)
    before, after = (relative_error(rounded(block, d), call, fresh, wanted, metric) for d in (done, tuned))
    assert after < 0.9 * before
    assert told["output_error"] < 0.9
    changed = sum(int((tuned[n].codes != done[n].codes).sum()) for n in done)
    assert told["changed"] == round(changed / sum(q.codes.numel() for q in done.values()), 4) > 0
    for local in LINEARS:
        assert way == "adam" or tuned[local].params is done[local].params
        assert int(tuned[local].codes.max()) < len(tuned[local].grid.table)


@pytest.mark.parametrize("way", ["signs", "adam"])
@torch.no_grad()
def test_what_does_not_help_is_not_kept(layer, way):
    block, call = layer
    x = normal(16, 8, 64, seed=1)
    weights = {local: block.get_submodule(local).weight for local in LINEARS}
    done = {local: nearest(w, affine.Config(8, 32, symmetric=False)) for local, w in weights.items()}
    steps = changing(way, done, weights, 1.0)  # every weight, a level aside
    y = output(block, call, x)
    tuned, told = learned.tune(block, done, steps, x, y, call, torch.eye(64), steps=4, tokens=64)
    assert told == {"output_error": 1.0, "changed": 0.0}
    assert all(torch.equal(tuned[n].codes, done[n].codes) for n in done)


@pytest.mark.parametrize("name", GRIDS)
def test_every_place_begins_inside_its_code_and_nearer_to_the_weight(name):
    w = normal(8, 256)
    q = nearest(w, GRIDS[name])
    moved = QuantizedTensor(q.grid, (q.codes.int() + 1).clamp(max=len(q.grid.table) - 1).to(torch.uint8), q.params)
    for start in (q, moved):
        linear = learned._Linear.of(start, w)
        assert torch.equal(linear.codes(), start.codes)
        torch.testing.assert_close(linear.weight(), dequantize(start))
        towards = (linear.place - start.codes) * linear.scale * (w - dequantize(start))
        assert (towards >= 0).all()


@torch.no_grad()
def test_too_few_sequences_are_refused(layer):
    block, call = layer
    x = normal(7, 8, 64)
    with pytest.raises(CalibrationError, match=r"needs 8 sequences .* and there are 7"):
        learned.tune(block, {}, changing("signs", {}, {}, 0.1), x, x, call, torch.eye(64), steps=1, tokens=8)


def test_rounded_activations_are_refused():
    with pytest.raises(RecipeError, match="learned_rounding: only where activations stay float"):
        Recipe(
            name="x",
            grid={"name": "affine", "bits": 8, "strategy": "channel"},
            activations={"type": "int8", "dynamic": True},
            learned_rounding={},
        )
