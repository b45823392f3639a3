"""BLOOM."""

from __future__ import annotations

from dataclasses import replace

from llmquant.models.spec import Fold, ModelSpec, Site

ARCHITECTURES = ("BloomForCausalLM",)

QKV = "self_attention.query_key_value"
ATTN_IN = Site("attn_in", (QKV,), Fold("input_layernorm"))
ATTN_OUT = Site("attn_out", ("self_attention.dense",), Fold(QKV, "qkv_per_head", head_dim="self_attention.head_dim"))
MLP_IN = Site("mlp_in", ("mlp.dense_h_to_4h",), Fold("post_attention_layernorm"))
MLP_OUT = Site("mlp_out", ("mlp.dense_4h_to_h",))

PLAIN = ModelSpec(
    layers="transformer.h",
    head="lm_head",
    embed="transformer.word_embeddings",
    layer_returns_tuple=True,
    sites=(ATTN_IN, ATTN_OUT, MLP_IN, MLP_OUT),
)
SPECS = (
    # the output of a norm is also the residual
    replace(
        PLAIN,
        sites=(replace(ATTN_IN, fold=None), ATTN_OUT, replace(MLP_IN, fold=None), MLP_OUT),
        when={"apply_residual_connection_post_layernorm": True},
    ),
    PLAIN,
)
