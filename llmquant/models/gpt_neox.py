"""GPT-NeoX and Pythia. Attention and MLP have a norm each, so one table serves parallel and sequential residuals."""

from __future__ import annotations

from llmquant.models.spec import Fold, ModelSpec, Site

ARCHITECTURES = ("GPTNeoXForCausalLM",)

SPECS = (
    ModelSpec(
        layers="gpt_neox.layers",
        renamed=(("embed_out.", "lm_head."),),
        head="lm_head",
        embed="gpt_neox.embed_in",
        sites=(
            Site("attn_in", ("attention.query_key_value",), Fold("input_layernorm")),
            Site(
                "attn_out",
                ("attention.dense",),
                Fold("attention.query_key_value", "qkv_per_head", head_dim="attention.head_size"),
            ),
            Site("mlp_in", ("mlp.dense_h_to_4h",), Fold("post_attention_layernorm")),
            Site("mlp_out", ("mlp.dense_4h_to_h",)),
        ),
    ),
)
