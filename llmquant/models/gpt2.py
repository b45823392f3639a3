"""GPT-2. No scale passes the GELU before mlp.c_proj."""

from __future__ import annotations

from llmquant.models.spec import Fold, ModelSpec, Site

ARCHITECTURES = ("GPT2LMHeadModel",)

SPECS = (
    ModelSpec(
        layers="transformer.h",
        head="lm_head",
        embed="transformer.wte",
        conv1d=True,
        sites=(
            Site("attn_in", ("attn.c_attn",), Fold("ln_1")),
            Site("attn_out", ("attn.c_proj",), Fold("attn.c_attn", "qkv", head_dim="attn.head_dim")),
            Site("mlp_in", ("mlp.c_fc",), Fold("ln_2")),
            Site("mlp_out", ("mlp.c_proj",)),
        ),
    ),
)
