"""Qwen3-MoE: Qwen3's attention and experts; some layers may have an MLP instead."""

from __future__ import annotations

from llmquant.models.llama import ATTENTION, MLP
from llmquant.models.spec import Experts, Fold, ModelSpec, Site

ARCHITECTURES = ("Qwen3MoeForCausalLM",)

SPECS = (
    ModelSpec(
        layers="model.layers",
        head="lm_head",
        embed="model.embed_tokens",
        sites=(*ATTENTION, Site("moe_in", (), Fold("post_attention_layernorm"))),
        experts=Experts("mlp.experts", site="moe_in", routers=("mlp.gate",), dense=(*ATTENTION, *MLP)),
    ),
)
