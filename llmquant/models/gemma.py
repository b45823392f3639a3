"""Gemma 2 and Gemma 3 (text). Their norms apply 1 + weight, and a second norm follows each block."""

from __future__ import annotations

from llmquant.models.spec import Fold, ModelSpec, Site

ARCHITECTURES = ("Gemma2ForCausalLM", "Gemma3ForCausalLM")

SPECS = (
    ModelSpec(
        layers="model.layers",
        head="lm_head",
        embed="model.embed_tokens",
        sites=(
            Site(
                "attn_in",
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                Fold("input_layernorm", "norm_plus_one"),
            ),
            Site("attn_out", ("self_attn.o_proj",), Fold("self_attn.v_proj", "v", head_dim="self_attn.head_dim")),
            Site("mlp_in", ("mlp.gate_proj", "mlp.up_proj"), Fold("pre_feedforward_layernorm", "norm_plus_one")),
            Site("mlp_out", ("mlp.down_proj",), Fold("mlp.up_proj", "rows")),
        ),
    ),
)
