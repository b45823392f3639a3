"""Falcon. Attention and MLP run in parallel behind one norm (7B), two norms (40B), or one after the other (RW)."""

from __future__ import annotations

from dataclasses import replace

from llmquant.models.spec import Fold, ModelSpec, Site

ARCHITECTURES = ("FalconForCausalLM",)

QKV, UP = "self_attention.query_key_value", "mlp.dense_h_to_4h"
ATTN_OUT = Site("attn_out", ("self_attention.dense",), Fold(QKV, "qkv_per_head", head_dim="self_attention.head_dim"))
MLP_OUT = Site("mlp_out", ("mlp.dense_4h_to_h",))

ONE_NORM = ModelSpec(
    layers="transformer.h",
    head="lm_head",
    embed="transformer.word_embeddings",
    layer_returns_tuple=True,
    sites=(Site("attn_mlp_in", (QKV, UP), Fold("input_layernorm")), ATTN_OUT, MLP_OUT),
)
SPECS = (
    replace(ONE_NORM, when={"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1}),
    replace(
        ONE_NORM,
        sites=(Site("attn_in", (QKV,), Fold("ln_attn")), ATTN_OUT, Site("mlp_in", (UP,), Fold("ln_mlp")), MLP_OUT),
        when={"new_decoder_architecture": True},
    ),
    replace(
        ONE_NORM,
        sites=(
            Site("attn_in", (QKV,), Fold("input_layernorm")),
            ATTN_OUT,
            Site("mlp_in", (UP,), Fold("post_attention_layernorm")),
            MLP_OUT,
        ),
        when={"parallel_attn": False},
    ),
    ONE_NORM,
)
