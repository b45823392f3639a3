"""Every family in real llama.cpp: the logits of a float32 file are those of transformers."""

import pytest
import torch
import transformers as hf

from llmquant.cpp_runtime import CppModel
from llmquant.errors import FormatError
from llmquant.exporters.gguf import families, writer

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
GEMMA = SHARED | {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}
CLASSIC = {"vocab_size": VOCABULARY, "n_layer": 3, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
FALCON = {k: v for k, v in BASE.items() if k != "max_position_embeddings"} | {"alibi": False, "bias": False}
CONFIGS = {
    "llama with biases": lambda: hf.LlamaConfig(**SHARED, attention_bias=True),
    "llama 3": lambda: hf.LlamaConfig(**SHARED, rope_parameters=LLAMA3),
    "llama, linear scaling": lambda: hf.LlamaConfig(
        **SHARED, rope_parameters=ROPE | {"rope_type": "linear", "factor": 2.0}
    ),
    "llama, yarn": lambda: hf.LlamaConfig(
        **SHARED,
        rope_parameters=ROPE | {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
    ),
    "llama, tied": lambda: hf.LlamaConfig(**SHARED, head_dim=32, tie_word_embeddings=True),
    "mistral": lambda: hf.MistralConfig(**SHARED),
    "qwen2": lambda: hf.Qwen2Config(**SHARED),
    "qwen3": lambda: hf.Qwen3Config(**SHARED, head_dim=32),
    "gemma2": lambda: hf.Gemma2Config(**GEMMA),
    "gemma3": lambda: hf.Gemma3TextConfig(**GEMMA | {"num_hidden_layers": 7}),
    "phi3": lambda: hf.Phi3Config(**SHARED, pad_token_id=0),
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
    "gpt-neox": lambda: hf.GPTNeoXConfig(
        **BASE, intermediate_size=256, rope_parameters=ROPE | {"rope_type": "default", "partial_rotary_factor": 0.25}
    ),
    "gpt-neox, one after the other": lambda: hf.GPTNeoXConfig(
        **BASE, intermediate_size=256, use_parallel_residual=False
    ),
    "falcon 7b": lambda: hf.FalconConfig(**FALCON, multi_query=True, new_decoder_architecture=False),
    "falcon 40b": lambda: hf.FalconConfig(**FALCON, num_kv_heads=2, new_decoder_architecture=True),
    "bloom": lambda: hf.BloomConfig(**CLASSIC, hidden_size=64),
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
    conv1d = {name for name, module in model.named_modules() if type(module).__name__ == "Conv1D"}
    tensors = {
        name: p.detach().T if name.removesuffix(".weight") in conv1d and p.ndim == 2 else p.detach()
        for name, p in model.named_parameters()
    }
    layout = families.layout(model.config, {name: tuple(t.shape) for name, t in tensors.items()})
    values = {}
    for entry in layout.entries:
        value = tensors[entry.source]
        value = value if entry.rows is None else value[entry.rows]
        values[entry.name] = value + 1 if entry.plus_one else value
    values |= layout.extra
    metadata = {
        "general.architecture": layout.architecture,
        "tokenizer.ggml.model": "no_vocab",
        **layout.metadata,
    }
    stored = [writer.Stored(name, tuple(value.shape), "f32") for name, value in values.items()]
    data = (value.contiguous().view(-1).view(torch.uint8) for value in values.values())
    (path,) = writer.write(folder / "model.gguf", metadata, stored, data)
    return path


@pytest.mark.filterwarnings("ignore")  # transformers' own about tiny configurations
@pytest.mark.parametrize("name", CONFIGS)
def test_llama_cpp_gives_the_logits_of_transformers(name, tmp_path):
    model = build(CONFIGS[name]())
    tokens = torch.randint(0, VOCABULARY, (TIME,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model(tokens[None]).logits[0]
    found = CppModel(write(model, tmp_path), TIME, exact=True).logits(tokens)
    assert float((found - wanted).abs().max()) <= 1e-3 * float(wanted.abs().max())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (hf.OPTConfig(), "llama.cpp does not run models of type 'opt'; it runs bloom, falcon"),
        (hf.FalconConfig(alibi=True), "Falcon models with rotary positions and parallel attention only"),
        (hf.Gemma2Config(**GEMMA | {"query_pre_attn_scalar": 64}), "scales attention by the head size 32"),
        (hf.Gemma3TextConfig(**GEMMA, layer_types=["full_attention"] * 3), "every 6th layer"),
        (hf.LlamaConfig(**SHARED, rope_parameters=ROPE | {"rope_type": "dynamic", "factor": 2.0}), "'dynamic'"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(config, message):
    with pytest.raises(FormatError, match=message):
        families.layout(config, {})


def test_a_tensor_without_a_place_is_named():
    with pytest.raises(FormatError, match=r"no place for 1 tensors: model\.layers\.0\.strange\.weight"):
        families.layout(hf.LlamaConfig(**SHARED), {"model.layers.0.strange.weight": (4, 4)})
