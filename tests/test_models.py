import copy
import importlib
import itertools
from functools import cache

import pytest
import torch
import transformers as hf
from transformers.pytorch_utils import Conv1D

from llmquant import plugins
from llmquant.calibrate import (
    experts_of,
    finish,
    fold_scales,
    foldable,
    producer_rows,
    run_layer,
    score_linears,
    start,
    stepwise,
    storable_scales,
    watch,
    weight_of,
)
from llmquant.errors import UnsupportedModel
from llmquant.models import moe, spec_for

VOCAB, TIME = 61, 12
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = dict(**SIZES, intermediate_size=48, max_position_embeddings=64, pad_token_id=None)
MIXED = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA = dict(**LLAMA, **MIXED, num_key_value_heads=2, head_dim=12)
OPT = dict(**SIZES, ffn_dim=48, max_position_embeddings=64)
NEOX = dict(**SIZES, intermediate_size=48, max_position_embeddings=64)
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48}

MOE = LLAMA | {"num_key_value_heads": 2, "num_experts_per_tok": 2}
QWEN_MOE = MOE | {"num_experts": 4, "moe_intermediate_size": 24}

ALL = {"attn_in", "attn_out", "mlp_in", "mlp_out"}
GELU = ALL - {"mlp_out"}  # no scale passes the activation
ONE_NORM = {"attn_mlp_in", "attn_out"}
EXPERTS = {"attn_in", "attn_out", "moe_in", *(f"mlp.experts.{i}.out" for i in range(4))}

# id: (config, the sites that can be folded)
TINY = {
    "llama": (hf.LlamaConfig(**LLAMA, num_key_value_heads=4), ALL),
    "llama-gqa-tied": (hf.LlamaConfig(**LLAMA, num_key_value_heads=2, tie_word_embeddings=True), ALL),
    "llama-mqa-bias": (hf.LlamaConfig(**LLAMA, num_key_value_heads=1, attention_bias=True, mlp_bias=True), ALL),
    "mistral-sliding": (hf.MistralConfig(**LLAMA, num_key_value_heads=2, sliding_window=5), ALL),
    "qwen2-mixed": (hf.Qwen2Config(**LLAMA, **MIXED, num_key_value_heads=2, use_sliding_window=True), ALL),
    "qwen3-wide": (hf.Qwen3Config(**LLAMA, num_key_value_heads=2, head_dim=12), ALL),
    "gemma2": (hf.Gemma2Config(**GEMMA, attn_logit_softcapping=5.0, final_logit_softcapping=2.0), ALL),
    "gemma3": (hf.Gemma3TextConfig(**GEMMA), ALL),
    "gemma3-untied-bias": (hf.Gemma3TextConfig(**GEMMA, tie_word_embeddings=False, attention_bias=True), ALL),
    "phi3": (hf.Phi3Config(**LLAMA, num_key_value_heads=4), ALL),
    "phi3-gqa-sliding": (hf.Phi3Config(**LLAMA, num_key_value_heads=2, sliding_window=5), ALL),
    "gpt2": (hf.GPT2Config(**GPT2), GELU),
    "gpt2-untied": (hf.GPT2Config(**GPT2, tie_word_embeddings=False, scale_attn_by_inverse_layer_idx=True), GELU),
    "neox": (hf.GPTNeoXConfig(**NEOX), GELU),
    "neox-sequential": (hf.GPTNeoXConfig(**NEOX, use_parallel_residual=False, attention_bias=False), GELU),
    "opt": (hf.OPTConfig(**OPT), ALL),
    "opt-norm-after": (hf.OPTConfig(**OPT, do_layer_norm_before=False), {"attn_out", "mlp_out"}),
    "opt-350m": (
        hf.OPTConfig(**OPT, do_layer_norm_before=False, word_embed_proj_dim=16, tie_word_embeddings=False),
        {"attn_out", "mlp_out"},
    ),
    "opt-galactica": (hf.OPTConfig(**OPT, activation_function="gelu", enable_bias=False), GELU),
    "opt-plain-norm": (hf.OPTConfig(**OPT, layer_norm_elementwise_affine=False), {"attn_out", "mlp_out"}),
    "falcon-7b": (hf.FalconConfig(**SIZES), ONE_NORM),
    "falcon-7b-heads": (hf.FalconConfig(**SIZES, multi_query=False, bias=True), ONE_NORM),
    "falcon-40b": (hf.FalconConfig(**SIZES, new_decoder_architecture=True, num_kv_heads=2), GELU),
    "falcon-11b": (
        hf.FalconConfig(**SIZES, new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1),
        ONE_NORM,
    ),
    "falcon-rw": (
        hf.FalconConfig(
            **SIZES, parallel_attn=False, multi_query=False, alibi=True, bias=True, tie_word_embeddings=False
        ),
        GELU,
    ),
    "bloom": (hf.BloomConfig(**SIZES), GELU),
    "bloom-residual-after": (hf.BloomConfig(**SIZES, apply_residual_connection_post_layernorm=True), {"attn_out"}),
    "mixtral": (hf.MixtralConfig(**MOE, num_local_experts=4), EXPERTS),
    "qwen2-moe": (
        hf.Qwen2MoeConfig(**QWEN_MOE, shared_expert_intermediate_size=40, norm_topk_prob=True),
        EXPERTS | {"shared_out"},
    ),
    "qwen2-moe-mixed": (
        hf.Qwen2MoeConfig(
            **QWEN_MOE | {"num_experts_per_tok": 3}, shared_expert_intermediate_size=40, mlp_only_layers=[0]
        ),
        EXPERTS | ALL | {"shared_out"},
    ),
    "qwen3-moe": (hf.Qwen3MoeConfig(**QWEN_MOE, head_dim=12), EXPERTS),
    "qwen3-moe-mixed": (hf.Qwen3MoeConfig(**QWEN_MOE, decoder_sparse_step=2), EXPERTS | ALL),
    "olmoe": (hf.OlmoeConfig(**MOE, num_experts=4), EXPERTS),
    "olmoe-clipped": (hf.OlmoeConfig(**MOE, num_experts=4, clip_qkv=0.5), EXPERTS - {"attn_out"}),
}
WITH_EXPERTS = [key for key in TINY if "moe" in key or key == "mixtral"]


def config_json(key):
    """What a config.json holds if it names every value."""
    config = TINY[key][0]
    return {**config.to_dict(), "architectures": [hf.AutoModelForCausalLM._model_mapping[type(config)].__name__]}


def fused(key):
    """Return a model as transformers builds it, with random float64 parameters."""
    config = copy.deepcopy(TINY[key][0])
    config._experts_implementation = "eager"  # the others have no float64
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    g = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.normal_(std=0.3, generator=g)
    return model


@cache
def build(key):
    model = fused(key)
    return model, moe.unfused(model, spec_for(config_json(key)))


@pytest.fixture(params=TINY, ids=str)
def tiny(request):
    """A model with random float64 parameters, its spec, and the names of the sites that can be folded."""
    model, spec = build(request.param)
    return copy.deepcopy(model), spec, TINY[request.param][1]


def tokens(seed):
    return torch.randint(2, VOCAB, (2, TIME), generator=torch.Generator().manual_seed(seed))


def layers_of(model, spec):
    return list(model.get_submodule(spec.layers))


def sites_of(model, spec):
    """Every layer with each of its sites."""
    return [(layer, site) for i, layer in enumerate(layers_of(model, spec)) for site in spec.sites_of(i)]


def linears_of(layer):
    return {name: m for name, m in layer.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D))}


def scales_for(layer, site, seed=1):
    """Random scales that are equal where columns share a row of the producer."""
    rows = producer_rows(layer, site)
    spread = torch.rand(int(rows.max()) + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (0.5 + 1.5 * spread)[rows]


@torch.no_grad()
def test_running_layers_one_by_one_equals_the_model(tiny):
    model, spec, _ = tiny
    x, _ = start(model, spec, tokens(0))
    _, calls = start(model, spec, tokens(1))
    for layer, call in zip(layers_of(model, spec), calls, strict=True):
        x = run_layer(layer, x, call)
    logits = finish(model, spec, tokens(2), x)
    torch.testing.assert_close(logits, model(tokens(0)).logits, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_neither_start_nor_finish_computes_a_layer(tiny):
    model, spec, _ = tiny
    last = torch.randn(2, TIME, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x, logits = start(model, spec, tokens(0))[0], finish(model, spec, tokens(0), last)
    model.get_submodule(spec.layers).to("meta")
    assert torch.equal(finish(model, spec, tokens(0), last), logits)
    model.get_submodule(spec.head).to("meta")
    assert torch.equal(start(model, spec, tokens(0))[0], x)


@torch.no_grad()
def test_a_forward_that_raises_leaves_the_model_as_it_was():
    model, spec = build("opt-350m")
    layers, before = layers_of(model, spec), model(tokens(0)).logits
    with pytest.raises(IndexError):
        start(model, spec, tokens(0) + VOCAB)
    with pytest.raises(RuntimeError):
        finish(model, spec, tokens(0), torch.zeros(2, TIME, 33, dtype=torch.float64))
    assert all(a is b for a, b in zip(layers, layers_of(model, spec), strict=True))
    assert torch.equal(model(tokens(0)).logits, before)


def test_paths_lead_to_the_embedding_and_the_head(tiny):
    model, spec, _ = tiny
    assert model.get_submodule(spec.embed) is model.get_input_embeddings()
    assert model.get_submodule(spec.head) is model.get_output_embeddings()


def test_every_linear_of_a_layer_is_in_exactly_one_site(tiny):
    model, spec, _ = tiny
    routers = spec.experts.routers if spec.experts else ()
    for index, layer in enumerate(layers_of(model, spec)):
        assert sorted(name for site in spec.sites_of(index) for name in site.linears) == sorted(
            linears_of(layer).keys() - routers
        )


def test_weights_are_rows_by_cols(tiny):
    model, spec, _ = tiny
    for linear in linears_of(layers_of(model, spec)[0]).values():
        assert spec.conv1d == isinstance(linear, Conv1D)
        x = torch.randn(3, weight_of(linear).shape[1], dtype=torch.float64)
        bias = 0 if linear.bias is None else linear.bias
        torch.testing.assert_close(x @ weight_of(linear).T + bias, linear(x))


@torch.no_grad()
def test_a_site_is_what_reads_the_same_activations(tiny):
    model, spec, _ = tiny
    x, calls = start(model, spec, tokens(0))
    layer, call, sites = layers_of(model, spec)[1], calls[1], spec.sites_of(1)
    reads, seen = {}, []
    hooks = [
        linear.register_forward_pre_hook(lambda _, inputs, name=name: reads.update({name: inputs[0].flatten(0, -2)}))
        for name, linear in linears_of(layer).items()
    ]
    with watch(layer, sites, lambda site, x: seen.append((site, x))):
        run_layer(layer, x, call)
    for hook in hooks:
        hook.remove()
    assert [site for site, _ in seen] == list(sites)  # once each, in computing order
    for site, activations in seen:
        assert site.expert or activations.shape[0] == 2 * TIME
        assert all(torch.equal(reads[name], activations) for name in site.linears)
    for a, b in itertools.combinations([x for site, x in seen if not site.expert], 2):
        assert not torch.equal(a, b)


@torch.no_grad()
def test_a_layer_in_steps_stops_before_each_site_and_gives_its_output(tiny):
    model, spec, _ = tiny
    layer, sites = layers_of(model, spec)[1], spec.sites_of(1)
    inputs, calls = zip(*(start(model, spec, tokens(seed)) for seed in (0, 1)), strict=True)
    computed = []
    for name, linear in linears_of(layer).items():
        linear.register_forward_hook(lambda *_, name=name: computed.append(name))
    with stepwise(layer, sites) as begin:
        running = [begin(x, call[1]) for x, call in zip(inputs, calls, strict=True)]
        for site in sites:
            assert all(next(steps)[0] == site for steps in running)
            assert not set(computed) & set(site.linears)
        outputs = [next(steps) for steps in running]
        abandoned = begin(inputs[0], calls[0][1])
        next(abandoned)
        abandoned.close()
    for x, call, (site, out) in zip(inputs, calls, outputs, strict=True):
        assert site is None
        assert torch.equal(out, run_layer(layer, x, call[1]))


@torch.no_grad()
@pytest.mark.parametrize("key", WITH_EXPERTS)
def test_experts_of_their_own_compute_what_the_fused_ones_do(key):
    wanted = fused(key)(tokens(0)).logits
    torch.testing.assert_close(build(key)[0](tokens(0)).logits, wanted, rtol=1e-12, atol=1e-12)
    build(key)[0].model.layers[1].mlp.experts[2].down_proj.weight.mul_(1.1)
    try:
        assert (build(key)[0](tokens(0)).logits - wanted).abs().max() > 1e-3
    finally:
        build(key)[0].model.layers[1].mlp.experts[2].down_proj.weight.div_(1.1)


@torch.no_grad()
@pytest.mark.parametrize("key", WITH_EXPERTS)
def test_an_expert_reads_the_tokens_that_are_routed_to_it(key):
    model, spec = build(key)
    x, calls = start(model, spec, tokens(0))
    seen = {}
    stops = [experts_of(spec, 1), *spec.sites_of(1)]
    with watch(layers_of(model, spec)[1], stops, lambda site, *inputs: seen.update({site.name: inputs})):
        run_layer(layers_of(model, spec)[1], x, calls[1])
    everything, chosen, _ = seen["mlp.experts"]
    assert torch.equal(everything, seen["moe_in"][0])
    for number in range(4):
        mine = (chosen == number).any(1)
        assert torch.equal(seen[f"mlp.experts.{number}.in"][0], everything[mine])
        assert len(seen[f"mlp.experts.{number}.out"][0]) == int(mine.sum())


def test_layers_without_experts_have_the_sites_of_an_mlp():
    _, spec = build("qwen2-moe-mixed")
    assert [site.name for site in spec.sites_of(0)] == ["attn_in", "attn_out", "mlp_in", "mlp_out"]
    assert len(spec.sites_of(1)) == 4 + 2 * 4
    assert experts_of(spec, 0) is None


def test_experts_that_cannot_be_taken_apart_are_refused():
    model = hf.AutoModelForCausalLM.from_config(copy.deepcopy(TINY["mixtral"][0]))
    experts = model.model.layers[1].mlp.experts
    experts.gate_up_proj_bias = torch.nn.Parameter(torch.zeros(4, 96))
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.1\.mlp\.experts: its parameters are .*bias"):
        moe.unfused(model, spec_for(config_json("mixtral")))


@torch.no_grad()
def test_nothing_is_seen_outside_watch():
    model, spec = build("llama")
    x, calls = start(model, spec, tokens(0))
    seen = []
    with watch(layers_of(model, spec)[0], spec.sites, lambda site, x: seen.append(site)):
        pass
    run_layer(layers_of(model, spec)[0], x, calls[0])
    assert not seen


@torch.no_grad()
def test_folding_leaves_the_function_unchanged(tiny):
    model, spec, folded = tiny
    before = model(tokens(0)).logits
    absorb = {site.name for layer, site in sites_of(model, spec) if foldable(layer, site)}
    assert absorb == folded
    for layer, site in sites_of(model, spec):
        if site.name in folded:
            fold_scales(layer, site, scales_for(layer, site))
            # norms compute in float32
            torch.testing.assert_close(model(tokens(0)).logits, before, rtol=1e-4, atol=1e-5, msg=site.name)


@torch.no_grad()
def test_folding_multiplies_the_columns_of_the_site(tiny):
    model, spec, folded = tiny
    for site in spec.sites_of(1):
        if site.name in folded:
            fresh = copy.deepcopy(model)
            layer = layers_of(fresh, spec)[1]
            scales = scales_for(layer, site)
            wanted = [weight_of(layer.get_submodule(name)) * scales for name in site.readers]
            before = fresh(tokens(0)).logits
            fold_scales(layer, site, scales)
            for name, weight in zip(site.readers, wanted, strict=True):
                assert torch.equal(weight_of(layer.get_submodule(name)), weight)
                weight_of(layer.get_submodule(name)).div_(scales)
            # so the producer alone makes a difference, and the test above could have failed
            assert (fresh(tokens(0)).logits - before).abs().max() > 1e-3


def test_a_site_that_cannot_be_folded_refuses_scales(tiny):
    model, spec, folded = tiny
    for layer, site in sites_of(model, spec):
        if site.name not in folded:
            with pytest.raises(ValueError, match=f"site {site.name}: no module"):
                fold_scales(layer, site, torch.ones(weight_of(layer.get_submodule(site.linears[0])).shape[1]))


def test_heads_that_share_values_must_share_scales():
    model, spec = build("llama-gqa-tied")
    layer, site = model.model.layers[0], spec.sites[1]
    # 4 heads of 8 columns, 2 heads of values
    assert producer_rows(layer, site).tolist() == [*range(8), *range(8), *range(8, 16), *range(8, 16)]
    with pytest.raises(ValueError, match=r"share a row of self_attn\.v_proj"):
        fold_scales(layer, site, torch.arange(1.0, 33.0))


def test_a_small_norm_weight_keeps_its_bits_where_1_plus_w_would_lose_them():
    model, spec = build("gemma3")
    layer = copy.deepcopy(model.model.layers[0]).bfloat16()
    w = layer.input_layernorm.weight
    w.data.fill_(2**-10)  # 1 + w is 1 in bfloat16
    fold_scales(layer, spec.sites[0], torch.ones(32))
    assert torch.equal(w, torch.full_like(w, 2**-10))


def test_storable_scales_leave_norms_that_bfloat16_holds(tiny):
    model, spec, folded = tiny
    for layer, site in sites_of(model.bfloat16().float(), spec):
        if site.name in folded:
            scales = scales_for(layer, site).float()
            storable = storable_scales(layer, site, scales, torch.bfloat16)
            norm = layer.get_submodule(site.fold.module)
            if not site.fold.kind.startswith("norm"):
                assert torch.equal(storable, scales)
                continue
            one = float(site.fold.kind == "norm_plus_one")
            # of 1 + w, w itself has the rounding error
            tolerance = 2**-8 * (norm.weight.abs() / (norm.weight + one).abs() + one)
            assert ((storable / scales - 1).abs() <= 2 * tolerance).all()
            fold_scales(layer, site, storable)
            stored = norm.weight.bfloat16().float()
            torch.testing.assert_close(norm.weight, stored, rtol=1e-6, atol=1e-6)


def test_a_weight_of_zero_takes_any_scale():
    model, spec = build("llama")
    layer = copy.deepcopy(model.model.layers[0])
    layer.input_layernorm.weight.data[3] = 0
    assert torch.equal(
        storable_scales(layer, spec.sites[0], torch.full((32,), 2.0), torch.bfloat16)[3], torch.tensor(2.0)
    )


@torch.no_grad()
@pytest.mark.parametrize(
    ("key", "dtype", "scale"),
    [("gemma3", torch.bfloat16, 5e3), ("llama", torch.float16, 1e9), ("llama", torch.float16, 1e-7)],
)
def test_a_norm_that_would_be_stored_as_zero_or_infinity_keeps_its_weight(key, dtype, scale):
    model, spec = build(key)
    model = copy.deepcopy(model).to(dtype).double()
    layer, site = layers_of(model, spec)[0], spec.sites[0]
    before = model(tokens(0)).logits
    scales = torch.ones(32)
    scales[3] = scale
    storable = storable_scales(layer, site, scales, dtype)
    fold_scales(layer, site, storable.double())
    norm = layer.get_submodule(site.fold.module)
    norm.weight.copy_(norm.weight.to(dtype))
    torch.testing.assert_close(model(tokens(0)).logits, before, rtol=1e-4, atol=1e-5)
    assert storable[3] == 1


# as every family calls them; a linear that computes values too is listed with the others
QUERIES_AND_KEYS = {
    "llama": {"self_attn.q_proj", "self_attn.k_proj"},
    "gemma3": {"self_attn.q_proj", "self_attn.k_proj"},
    "opt-norm-after": {"self_attn.q_proj", "self_attn.k_proj"},
    "phi3": {"self_attn.qkv_proj"},
    "gpt2": {"attn.c_attn"},
    "neox": {"attention.query_key_value"},
    "falcon-7b": {"self_attention.query_key_value"},
    "bloom": {"self_attention.query_key_value"},
    "qwen2-moe-mixed": {"self_attn.q_proj", "self_attn.k_proj"},
}


@pytest.mark.parametrize("key", QUERIES_AND_KEYS)
def test_queries_and_keys_are_known_in_every_family(key):
    assert score_linears(build(key)[1]) == QUERIES_AND_KEYS[key]


@pytest.mark.parametrize("key", TINY)
def test_a_config_that_leaves_out_default_values_has_the_same_spec(key):
    full, diff = config_json(key), TINY[key][0].to_diff_dict()
    assert len(diff) < len(full)
    assert spec_for({**diff, "architectures": full["architectures"]}) is spec_for(full)


@pytest.mark.parametrize("name", plugins.names("models"))
def test_the_last_spec_of_a_family_asks_for_nothing(name):
    specs = importlib.import_module(f"llmquant.models.{name}").SPECS
    assert [bool(spec.when) for spec in specs] == [True] * (len(specs) - 1) + [False]


def test_every_architecture_and_every_spec_is_tested_here():
    families = [plugins.load("models", name, "models") for name in plugins.names("models")]
    built = [build(key) for key in TINY]
    assert {a for f in families for a in f.ARCHITECTURES} == {type(model).__name__ for model, _ in built}
    assert {id(spec) for f in families for spec in f.SPECS} == {id(spec_for(config_json(key))) for key in TINY}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"architectures": ["LamaForCausalLM"]},
            r"'LamaForCausalLM' is not supported.*nearest.*'LlamaForCausalLM'\. Sup",
        ),
        ({"architectures": ["T5ForConditionalGeneration"]}, "Supported: BloomForCausalLM, .*Qwen3ForCausalLM"),
        ({"architectures": []}, "architectures: '' is not supported"),
        ({}, "architectures: '' is not supported"),
    ],
)
def test_an_unknown_architecture_is_named_with_the_nearest_and_all_known(config, message):
    with pytest.raises(UnsupportedModel, match=message):
        spec_for(config)
