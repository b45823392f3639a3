"""Phi-3 and Phi-4: Llama's layer with q, k, v in one linear, and gate and up in one linear."""

from __future__ import annotations

from llmquant.models.spec import Fold, ModelSpec, Site

ARCHITECTURES = ("Phi3ForCausalLM",)

SPECS = (
    ModelSpec(
        layers="model.layers",
        head="lm_head",
        embed="model.embed_tokens",
        sites=(
            Site("attn_in", ("self_attn.qkv_proj",), Fold("input_layernorm")),
            Site("attn_out", ("self_attn.o_proj",), Fold("self_attn.qkv_proj", "qkv", head_dim="self_attn.head_dim")),
            Site("mlp_in", ("mlp.gate_up_proj",), Fold("post_attention_layernorm")),
            Site("mlp_out", ("mlp.down_proj",), Fold("mlp.gate_up_proj", "rows")),
        ),
    ),
)
