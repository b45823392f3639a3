"""Llama, and the families with the same layer: Mistral, Qwen2 and Qwen3."""

from __future__ import annotations

from llmquant.models.spec import Fold, ModelSpec, Site

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

ATTENTION = (
    Site("attn_in", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), Fold("input_layernorm")),
    Site("attn_out", ("self_attn.o_proj",), Fold("self_attn.v_proj", "v", head_dim="self_attn.head_dim")),
)
MLP = (
    Site("mlp_in", ("mlp.gate_proj", "mlp.up_proj"), Fold("post_attention_layernorm")),
    Site("mlp_out", ("mlp.down_proj",), Fold("mlp.up_proj", "rows")),
)
SPECS = (ModelSpec(layers="model.layers", head="lm_head", embed="model.embed_tokens", sites=(*ATTENTION, *MLP)),)
