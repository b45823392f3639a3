"""Mixtral: Llama's attention, and experts in the place of the MLP."""

from __future__ import annotations

from llmquant.models.llama import ATTENTION
from llmquant.models.spec import Experts, Fold, ModelSpec, Site

ARCHITECTURES = ("MixtralForCausalLM",)

SPECS = (
    ModelSpec(
        layers="model.layers",
        head="lm_head",
        embed="model.embed_tokens",
        renamed=(
            ("block_sparse_moe.", "mlp."),
            ("w1.", "gate_proj."),
            ("w2.", "down_proj."),
            ("w3.", "up_proj."),
        ),
        sites=(*ATTENTION, Site("moe_in", (), Fold("post_attention_layernorm"))),
        experts=Experts("mlp.experts", site="moe_in", routers=("mlp.gate",)),
    ),
)
