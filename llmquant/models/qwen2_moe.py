"""Qwen2-MoE: beside the experts one that all tokens pass, with a gate of its own. Some layers may have an MLP."""

from __future__ import annotations

from llmquant.models.llama import ATTENTION, MLP
from llmquant.models.spec import Experts, Fold, ModelSpec, Site

ARCHITECTURES = ("Qwen2MoeForCausalLM",)

SHARED = (
    Site("moe_in", ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"), Fold("post_attention_layernorm")),
    Site("shared_out", ("mlp.shared_expert.down_proj",), Fold("mlp.shared_expert.up_proj", "rows")),
)
ROUTERS = ("mlp.gate", "mlp.shared_expert_gate")

SPECS = (
    ModelSpec(
        layers="model.layers",
        head="lm_head",
        embed="model.embed_tokens",
        sites=(*ATTENTION, *SHARED),
        experts=Experts("mlp.experts", site="moe_in", routers=ROUTERS, dense=(*ATTENTION, *MLP)),
    ),
)
