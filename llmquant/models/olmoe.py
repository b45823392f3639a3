"""OLMoE. Values of attention that are cut off at a limit (clip_qkv) let no scale pass."""

from __future__ import annotations

from dataclasses import replace

from llmquant.models.llama import ATTENTION
from llmquant.models.spec import Experts, Fold, ModelSpec, Site

ARCHITECTURES = ("OlmoeForCausalLM",)

ATTN_IN, ATTN_OUT = ATTENTION
MOE_IN = Site("moe_in", (), Fold("post_attention_layernorm"))

CLIPPED = ModelSpec(
    layers="model.layers",
    head="lm_head",
    embed="model.embed_tokens",
    sites=(ATTN_IN, replace(ATTN_OUT, fold=None), MOE_IN),
    experts=Experts("mlp.experts", site="moe_in", routers=("mlp.gate",)),
)
SPECS = (replace(CLIPPED, sites=(ATTN_IN, ATTN_OUT, MOE_IN), when={"clip_qkv": None}), CLIPPED)
