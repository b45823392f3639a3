"""Every family in real llama.cpp: the logits of a float32 file are those of transformers."""

import pytest
import torch
import transformers as hf

from llmquant.cpp_runtime import CppModel
from llmquant.errors import FormatError
from llmquant.exporters.gguf import families, writer
from llmquant.gguf_checkpoint import GgufCheckpoint
from llmquant.models import moe, spec_for

VOCABULARY, TIME = 256, 40
BASE = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
SHARED = BASE | {"num_key_value_heads": 2, "intermediate_size": 96, "bos_token_id": 1, "eos_token_id": 2}
ROPE = {"rope_theta": 10000.0}
LLAMA3 = ROPE | {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONG = ROPE | {
    "rope_type": "longrope",
    "long_factor": [1.0 + i / 4 for i in range(8)],
    "short_factor": [1.0 + i / 8 for i in range(8)],
    "factor": 4.0,
}
YARN = ROPE | {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
GEMMA = SHARED | {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}
GEMMA_7 = GEMMA | {"num_hidden_layers": 7}
PART = {"rope_type": "default", "partial_rotary_factor": 0.5}
EXPERTS = SHARED | {"num_experts_per_tok": 2}
CLASSIC = {"vocab_size": VOCABULARY, "n_layer": 3, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
FALCON = {k: v for k, v in BASE.items() if k != "max_position_embeddings"} | {"alibi": False, "bias": False}
CONFIGS = {
    "llama with biases": lambda: hf.LlamaConfig(**SHARED, attention_bias=True),
    "llama 3": lambda: hf.LlamaConfig(**SHARED, rope_parameters=LLAMA3),
    "llama, linear scaling": lambda: hf.LlamaConfig(
        **SHARED, rope_parameters=ROPE | {"rope_type": "linear", "factor": 2.0}
    ),
    "llama, yarn": lambda: hf.LlamaConfig(**SHARED, rope_parameters=YARN),
    "llama, yarn with a factor for attention": lambda: hf.LlamaConfig(
        **SHARED, rope_parameters=YARN | {"attention_factor": 1.3}
    ),
    "llama, yarn with mscale": lambda: hf.LlamaConfig(
        **SHARED, rope_parameters=YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}
    ),
    "llama with biases in the mlp": lambda: hf.LlamaConfig(**SHARED, mlp_bias=True),
    "llama, tied": lambda: hf.LlamaConfig(**SHARED, head_dim=32, tie_word_embeddings=True),
    "mistral": lambda: hf.MistralConfig(**SHARED),
    "mistral nemo": lambda: hf.MistralConfig(**SHARED, head_dim=32, sliding_window=None),
    "qwen2": lambda: hf.Qwen2Config(**SHARED),
    "qwen2, tied, yarn": lambda: hf.Qwen2Config(**SHARED, rope_parameters=YARN, tie_word_embeddings=True),
    "qwen3": lambda: hf.Qwen3Config(**SHARED, head_dim=32),
    "gemma2": lambda: hf.Gemma2Config(**GEMMA),
    "gemma3": lambda: hf.Gemma3TextConfig(**GEMMA_7),
    "gemma3 4b": lambda: hf.Gemma3TextConfig(
        **GEMMA_7,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        },
        final_logit_softcapping=5.0,
    ),
    "phi3": lambda: hf.Phi3Config(**SHARED, pad_token_id=0),
    "phi4 mini": lambda: hf.Phi3Config(
        **SHARED,
        pad_token_id=0,
        tie_word_embeddings=True,
        original_max_position_embeddings=32,
        rope_parameters=LONG
        | {
            "original_max_position_embeddings": 32,
            "partial_rotary_factor": 0.75,
            "long_factor": [1.0 + i / 4 for i in range(6)],
            "short_factor": [1.0 + i / 8 for i in range(6)],
            "attention_factor": 1.3,
        },
    ),
    "phi3, short of longrope": lambda: hf.Phi3Config(
        **SHARED | {"max_position_embeddings": 2048},
        pad_token_id=0,
        original_max_position_embeddings=512,
        rope_parameters=LONG | {"original_max_position_embeddings": 512},
    ),
    "phi3, long of longrope": lambda: hf.Phi3Config(
        **SHARED,
        pad_token_id=0,
        original_max_position_embeddings=32,
        rope_parameters=LONG | {"original_max_position_embeddings": 32},
    ),
    "gpt2": lambda: hf.GPT2Config(**CLASSIC, n_embd=64, n_positions=128),
    "gpt2, narrow and untied": lambda: hf.GPT2Config(
        **CLASSIC, n_embd=64, n_positions=128, n_inner=96, tie_word_embeddings=False
    ),
    "gpt-neox": lambda: hf.GPTNeoXConfig(
        **BASE, intermediate_size=256, rope_parameters=ROPE | {"rope_type": "default", "partial_rotary_factor": 0.25}
    ),
    "gpt-neox, one after the other": lambda: hf.GPTNeoXConfig(
        **BASE, intermediate_size=256, use_parallel_residual=False
    ),
    "falcon 7b": lambda: hf.FalconConfig(**FALCON, multi_query=True, new_decoder_architecture=False),
    "falcon 11b": lambda: hf.FalconConfig(
        **FALCON, num_kv_heads=2, new_decoder_architecture=True, num_ln_in_parallel_attn=1, ffn_hidden_size=96
    ),
    "falcon, a value for every head": lambda: hf.FalconConfig(
        **FALCON, multi_query=False, new_decoder_architecture=False, tie_word_embeddings=False
    ),
    "falcon 40b": lambda: hf.FalconConfig(**FALCON, num_kv_heads=2, new_decoder_architecture=True),
    "bloom": lambda: hf.BloomConfig(**CLASSIC, hidden_size=64),
    "mixtral": lambda: hf.MixtralConfig(**EXPERTS, num_local_experts=4),
    "mixtral, tied": lambda: hf.MixtralConfig(**EXPERTS, num_local_experts=8, tie_word_embeddings=True),
    "qwen2-moe": lambda: hf.Qwen2MoeConfig(
        **EXPERTS, num_experts=6, moe_intermediate_size=32, shared_expert_intermediate_size=80
    ),
    "qwen3-moe": lambda: hf.Qwen3MoeConfig(
        **EXPERTS, num_experts=5, moe_intermediate_size=32, head_dim=32, norm_topk_prob=True
    ),
    "olmoe": lambda: hf.OlmoeConfig(**EXPERTS | {"num_key_value_heads": 4}, num_experts=4, pad_token_id=0),
    "qwen3-moe, tied": lambda: hf.Qwen3MoeConfig(
        **EXPERTS, num_experts=5, moe_intermediate_size=32, head_dim=32, norm_topk_prob=True, tie_word_embeddings=True
    ),
}


def build(config):
    """Return a model with weights that make every part of it matter."""
    config._attn_implementation = "eager"
    model = hf.AutoModelForCausalLM.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        zero_based = parameter.ndim > 1 or "bias" in name or "gemma" in config.model_type
        parameter.data = noise * (0.15 if parameter.ndim > 1 else 0.3) + (0 if zero_based else 1)
    model.tie_weights()
    return model


def write(model, folder):
    """Write a model as a float32 GGUF file, with tokens that are only numbers."""
    moe.unfused(model, spec_for({"architectures": [type(model).__name__]}))
    conv1d = {name for name, module in model.named_modules() if type(module).__name__ == "Conv1D"}
    tensors = {
        name: p.detach().T if name.removesuffix(".weight") in conv1d and p.ndim == 2 else p.detach()
        for name, p in model.named_parameters()
    }
    layout = families.layout(model.config, {name: tuple(t.shape) for name, t in tensors.items()})
    values = {}
    for entry in layout.entries:
        value = torch.stack([tensors[name] for name in entry.stack]) if entry.stack else tensors[entry.source]
        value = value if entry.rows is None else value[entry.rows]
        values[entry.name] = value + 1 if entry.plus_one else value
    values |= layout.extra
    metadata = {
        "general.architecture": layout.architecture,
        "tokenizer.ggml.model": "no_vocab",
        **layout.metadata,
    }
    stored = [writer.Stored(name, tuple(value.shape), "f32") for name, value in values.items()]
    data = ([value.contiguous().view(-1).view(torch.uint8)] for value in values.values())
    (path,) = writer.write(folder / "model.gguf", metadata, stored, data)
    return path


def difference(model, folder):
    """Return how far llama.cpp's logits are from transformers', as a part of the largest."""
    tokens = torch.randint(0, VOCABULARY, (TIME,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model(tokens[None]).logits[0]
    found = CppModel(write(model, folder), TIME, exact=True).logits(tokens)
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.filterwarnings("ignore")  # transformers' own about tiny configurations
@pytest.mark.parametrize("name", CONFIGS)
def test_llama_cpp_gives_the_logits_of_transformers(name, tmp_path):
    assert difference(build(CONFIGS[name]()), tmp_path) <= 1e-3


@pytest.mark.parametrize("name", ["gpt2", "gpt2, narrow and untied", "gemma2", "qwen3-moe"])
def test_a_file_reads_as_the_weights_it_was_made_of(name, tmp_path):
    model = build(CONFIGS[name]())
    found = GgufCheckpoint(write(model, tmp_path))
    for parameter, value in model.named_parameters():  # square ones that are stored transposed, too
        torch.testing.assert_close(found.read(parameter), value.data, msg=parameter)


@pytest.mark.parametrize(("config", "layers"), [(hf.Gemma2Config, 46), (hf.Gemma3TextConfig, 62)])
def test_attention_of_the_largest_gemmas_is_scaled_in_their_way(config, layers, tmp_path):
    scaled = {"num_hidden_layers": layers, "query_pre_attn_scalar": 64 // 4}
    model = build(config(**GEMMA | scaled))
    for layer in model.model.layers:  # GELU differs by 1e-3, which adds up in so many layers
        layer.post_feedforward_layernorm.weight.data -= 0.9
    assert difference(model, tmp_path) <= 1e-3
    with pytest.raises(FormatError, match="scales attention by the head size 16"):
        families.layout(config(**GEMMA | scaled | {"query_pre_attn_scalar": 32}), {})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (hf.OPTConfig(), "llama.cpp does not run models of type 'opt'; it runs bloom, falcon"),
        (hf.FalconConfig(alibi=True), "Falcon models with rotary positions and parallel attention only"),
        (hf.Gemma2Config(**GEMMA | {"query_pre_attn_scalar": 64}), "scales attention by the head size 32"),
        (hf.Gemma3TextConfig(**GEMMA, layer_types=["full_attention"] * 3), "every 6th layer"),
        (hf.Gemma2Config(**GEMMA, attn_logit_softcapping=None), "caps the logits and the attention of Gemma 2"),
        (hf.Gemma2Config(**GEMMA, tie_word_embeddings=False), "tie_word_embeddings True only, and this one has False"),
        (hf.Gemma3TextConfig(**GEMMA_7, attn_logit_softcapping=5.0), "attn_logit_softcapping None only"),
        (hf.Gemma3TextConfig(**GEMMA_7, attention_bias=True), "attention_bias False only"),
        (hf.LlamaConfig(**SHARED, rope_parameters=ROPE | {"rope_type": "dynamic", "factor": 2.0}), "'dynamic'"),
        (hf.LlamaConfig(**SHARED, rope_parameters=YARN | {"beta_fast": 16.0}), "one has 16.0, 1 and True"),
        (hf.LlamaConfig(**SHARED, rope_parameters=ROPE | PART), "turns all 16 values of a llama head, not 8"),
        (hf.LlamaConfig(**SHARED, hidden_act="gelu"), "hidden_act 'silu' or 'swish' only, and this one has 'gelu'"),
        (hf.Qwen2Config(**SHARED, rope_parameters=LLAMA3), "type 'llama3', only default, linear, yarn"),
        (hf.Qwen2Config(**SHARED, use_sliding_window=True), "use_sliding_window False only"),
        (hf.Qwen3Config(**SHARED, attention_bias=True), "attention_bias False only"),
        (hf.GPT2Config(**CLASSIC, activation_function="relu"), "activation_function 'gelu' or .* has 'relu'"),
        (hf.GPT2Config(**CLASSIC, scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx False only"),
        (hf.GPTNeoXConfig(**BASE, tie_word_embeddings=True), "tie_word_embeddings False only"),
        (hf.GPTNeoXConfig(**BASE, attention_bias=False), "attention_bias True only"),
        (hf.FalconConfig(**FALCON | {"bias": True}), "bias False only"),
        (hf.Qwen2MoeConfig(**EXPERTS, mlp_only_layers=[1]), r"mlp_only_layers \[\] only, and this one has \[1\]"),
        (hf.Qwen2MoeConfig(**EXPERTS, norm_topk_prob=True), "norm_topk_prob False only"),
        (hf.Qwen2MoeConfig(**EXPERTS, tie_word_embeddings=True), "tie_word_embeddings False only"),
        (hf.Qwen3MoeConfig(**EXPERTS, norm_topk_prob=False), "norm_topk_prob True only"),
        (hf.Qwen3MoeConfig(**EXPERTS, norm_topk_prob=True, decoder_sparse_step=2), "decoder_sparse_step 1 only"),
        (
            hf.OlmoeConfig(**EXPERTS),
            "keys and values for each of an OLMoE model's 4 heads, not 2",
        ),
        (hf.OlmoeConfig(**EXPERTS, clip_qkv=8.0), "clip_qkv None only"),
        (hf.BloomConfig(**CLASSIC, apply_residual_connection_post_layernorm=True), "post_layernorm False only"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(config, message):
    with pytest.raises(FormatError, match=message):
        families.layout(config, {})


def test_a_tensor_without_a_place_is_named():
    with pytest.raises(FormatError, match=r"no place for 1 tensors: model\.layers\.0\.strange\.weight"):
        families.layout(hf.LlamaConfig(**SHARED), {"model.layers.0.strange.weight": (4, 4)})


def test_a_matrix_of_all_experts_is_one_tensor():
    of_experts = {f"model.layers.1.mlp.experts.{i}.up_proj.weight": (24, 64) for i in (2, 0, 1)}
    (entry,) = families.layout(hf.Qwen3MoeConfig(**EXPERTS, norm_topk_prob=True), of_experts).entries
    assert entry.name == "blk.1.ffn_up_exps.weight"
    assert entry.shape(of_experts) == (3, 24, 64)
    assert entry.sources == tuple(sorted(of_experts))
    of_experts.pop(entry.sources[1])
    with pytest.raises(FormatError, match=r"no place for 1 tensors: model\.layers\.1\.mlp\.experts\.0\.up_proj"):
        families.layout(hf.Qwen3MoeConfig(**EXPERTS, norm_topk_prob=True), of_experts)


@pytest.mark.parametrize(
    ("config", "buffers", "weight"),
    [
        (hf.LlamaConfig(**SHARED), ["model.layers.0.self_attn.rotary_emb.inv_freq"], "model.norm.weight"),
        (
            hf.GPT2Config(**CLASSIC),
            ["transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"],
            "transformer.h.0.attn.c_attn.bias",
        ),
        (
            hf.GPTNeoXConfig(**BASE),
            ["gpt_neox.layers.0.attention.bias", "gpt_neox.layers.0.attention.rotary_emb.inv_freq"],
            "gpt_neox.layers.0.attention.dense.bias",
        ),
    ],
)
def test_buffers_of_older_checkpoints_are_left_out(config, buffers, weight):
    layout = families.layout(config, dict.fromkeys([*buffers, weight], (64,)))
    assert [entry.source for entry in layout.entries] == [weight]
