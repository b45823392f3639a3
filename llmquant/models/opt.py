"""OPT (and Galactica, whose GELU keeps fc2 from being folded)."""

from __future__ import annotations

from dataclasses import replace

from llmquant.models.spec import Fold, ModelSpec, Site

ARCHITECTURES = ("OPTForCausalLM",)

ATTN_IN = Site("attn_in", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), Fold("self_attn_layer_norm"))
ATTN_OUT = Site("attn_out", ("self_attn.out_proj",), Fold("self_attn.v_proj", "v", head_dim="self_attn.head_dim"))
MLP_IN = Site("mlp_in", ("fc1",), Fold("final_layer_norm"))
MLP_OUT = Site("mlp_out", ("fc2",), Fold("fc1", "rows", relu="activation_fn"))

NORM_BEFORE = ModelSpec(
    layers="model.decoder.layers",
    head="lm_head",
    embed="model.decoder.embed_tokens",
    sites=(ATTN_IN, ATTN_OUT, MLP_IN, MLP_OUT),
)
SPECS = (
    # the 350m: norms come after the residual sum, and their output is also the next residual
    replace(
        NORM_BEFORE,
        sites=(replace(ATTN_IN, fold=None), ATTN_OUT, replace(MLP_IN, fold=None), MLP_OUT),
        when={"do_layer_norm_before": False},
    ),
    NORM_BEFORE,
)
