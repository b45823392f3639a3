"""What each model family is in GGUF: its architecture's name, its numbers, and the order of its rows.

Tensor names come from the gguf package's own map. Sources for the rest: llama.cpp's
model loaders (which keys they read, what they assume) and convert_hf_to_gguf.py.

Known difference: in llama.cpp every layer of Mistral and Phi-3 sees the whole
context, so texts longer than the model's sliding window give other logits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import gguf
import torch
from gguf import Keys
from jaxtyping import Int
from torch import Tensor
from transformers import CONFIG_MAPPING

from llmquant.errors import FormatError

BUFFERS = re.compile(r"\.(attn|attention)\.(masked_)?bias$|\.inv_freq$")
"""Tensors of older checkpoints that are no parameters: masks, and the frequencies of rotary embeddings."""
EXPERT = re.compile(r"\.experts\.(\d+)\.")
NUMBERS = tuple(
    key.removeprefix("{arch}.")
    for key in (
        *(Keys.LLM.VOCAB_SIZE, Keys.LLM.CONTEXT_LENGTH, Keys.LLM.EMBEDDING_LENGTH, Keys.LLM.BLOCK_COUNT),
        *(Keys.LLM.FEED_FORWARD_LENGTH, Keys.Attention.HEAD_COUNT, Keys.Attention.HEAD_COUNT_KV),
        *(Keys.Attention.KEY_LENGTH, Keys.Attention.LAYERNORM_RMS_EPS, Keys.Attention.LAYERNORM_EPS),
        *(Keys.Attention.SLIDING_WINDOW, Keys.LLM.ATTN_LOGIT_SOFTCAPPING, Keys.LLM.FINAL_LOGIT_SOFTCAPPING),
        *(Keys.Rope.FREQ_BASE, Keys.Rope.FREQ_BASE_SWA, Keys.Rope.DIMENSION_COUNT, Keys.Rope.SCALING_FACTOR),
        *(Keys.Rope.SCALING_ORIG_CTX_LEN, Keys.Rope.SCALING_ATTN_FACTOR),
    )
)
"""Keys below the architecture that are read as numbers."""
Order = Callable[[Any, int], Tensor]
"""(config, rows of the tensor) -> which row of the checkpoint each row of the file is."""


@dataclass(frozen=True)
class Entry:
    """One tensor: its name in the file and in the checkpoint.

    rows: the checkpoint's row that each row of the file is, or None for the same order.
    plus_one: the file holds the value plus one.
    stack: the matrices of all experts, of which the file makes one tensor; ``source`` is the first.
    """

    name: str
    source: str
    rows: Int[Tensor, " rows"] | None = None
    plus_one: bool = False
    stack: tuple[str, ...] = ()

    @property
    def sources(self) -> tuple[str, ...]:
        return self.stack or (self.source,)

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """Return its shape in the file. shapes: in the checkpoint, by name."""
        return (*([len(self.stack)] if self.stack else []), *shapes[self.source])


@dataclass(frozen=True)
class Layout:
    """A model in GGUF's terms.

    metadata: the keys below ``architecture``. extra: tensors that the checkpoint does not have.
    """

    architecture: str
    entries: tuple[Entry, ...]
    metadata: dict[str, Any]
    extra: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """
    architecture: ``general.architecture``.
    orders: end of a module's name -> the order of the rows of its weight and bias.
    norms_plus_one: norms that store w and apply 1 + w.
    extra_keys: the numbers beyond those that all families have.
    ropes: rotary embeddings that llama.cpp computes.
    partial: whether it can turn a part of each head only.
    fixed: setting of transformers' configuration -> the values that llama.cpp takes for granted.
    settings: (metadata below the architecture, names of the tensors) -> settings of transformers' configuration beyond
        those that all families have.
    check: raises FormatError for what llama.cpp does not compute.
    experts: its layers have experts; another family of the architecture may have none.
    """

    architecture: str
    orders: Mapping[str, Order] = field(default_factory=dict)
    norms_plus_one: bool = False
    extra_keys: Callable[[Any], dict[str, Any]] = lambda config: {}
    ropes: tuple[str, ...] = ("default", "linear", "yarn")
    partial: bool = False
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    settings: Callable[[Mapping[str, Any], Collection[str]], dict[str, Any]] = lambda keys, names: {}
    check: Callable[[Any], None] = lambda config: None
    experts: bool = False


def layout(config: Any, names: Mapping[str, tuple[int, ...]]) -> Layout:
    """Return how a model is written.

    config: the model's transformers configuration. names: the shape of every tensor of the checkpoint (that of a tied
        output matrix left out).

    Raises FormatError for a family or a feature that llama.cpp does not run, and for tensors without a place.
    """
    config = config.get_text_config()
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise FormatError(
            f"llama.cpp does not run models of type {config.model_type!r}; it runs {', '.join(sorted(FAMILIES))}"
        )
    for key, values in family.fixed.items():
        if (value := getattr(config, key, values[0])) not in values:
            raise FormatError(
                f"llama.cpp computes {config.model_type} models with {key} {' or '.join(map(repr, values))} only, "
                f"and this one has {value!r}"
            )
    family.check(config)
    arch = family.architecture
    metadata = {key.format(arch=arch): value for key, value in (_numbers(config) | family.extra_keys(config)).items()}
    scaling, extra = _rope(family, config)
    metadata |= {key.format(arch=arch): value for key, value in scaling.items()}
    return Layout(arch, tuple(_entries(family, config, names)), metadata, extra)


def configuration(metadata: Mapping[str, Any], extra: Mapping[str, Tensor], names: Collection[str]) -> Any:
    """Return the transformers configuration of a GGUF file's model: the inverse of ``layout``.

    extra: the tensors of the file that a checkpoint does not have. names: of all its tensors.

    Raises FormatError for an architecture or a setting that cannot be told in transformers' terms.
    """
    arch = metadata.get(Keys.General.ARCHITECTURE)
    experts = bool(metadata.get(Keys.LLM.EXPERT_COUNT.format(arch=arch)))
    kinds = [kind for kind, family in FAMILIES.items() if family.architecture == arch]
    kind = next((kind for kind in kinds if FAMILIES[kind].experts == experts), None)
    if kind is None:
        known = ", ".join(sorted({family.architecture for family in FAMILIES.values()}))
        raise FormatError(
            f"architecture {arch!r} cannot be computed here, only {known}; llama.cpp may: --runtime llama.cpp"
        )
    keys = {key.removeprefix(f"{arch}."): value for key, value in metadata.items()}
    for key in NUMBERS:
        value = keys.get(key, 1)
        if not isinstance(value, int | float) or not 0 <= value < 2**31:
            raise FormatError(f"{arch}.{key} is {value!r:.100}, not a number that a model can have")
    blocks = len({name.split(".")[1] for name in names if name.startswith("blk.")})
    if keys.get("block_count") != blocks:
        raise FormatError(f"{arch}.block_count is {keys.get('block_count')}, but there are tensors of {blocks} blocks")

    def number(key: str) -> Any:
        return keys.get(key.removeprefix("{arch}."))

    heads, hidden = number(Keys.Attention.HEAD_COUNT), number(Keys.LLM.EMBEDDING_LENGTH)
    if not heads or not hidden:
        raise FormatError(f"the metadata of architecture {arch} do not tell the {'heads' if hidden else 'hidden size'}")
    settings = {
        "vocab_size": number(Keys.LLM.VOCAB_SIZE) or len(metadata.get(Keys.Tokenizer.LIST, [])),
        "max_position_embeddings": number(Keys.LLM.CONTEXT_LENGTH),
        "hidden_size": hidden,
        "num_hidden_layers": number(Keys.LLM.BLOCK_COUNT),
        "intermediate_size": number(Keys.LLM.FEED_FORWARD_LENGTH),
        "n_inner": number(Keys.LLM.FEED_FORWARD_LENGTH),
        "num_attention_heads": heads,
        "num_key_value_heads": number(Keys.Attention.HEAD_COUNT_KV) or heads,
        "head_dim": number(Keys.Attention.KEY_LENGTH) or hidden // heads,
        "rms_norm_eps": number(Keys.Attention.LAYERNORM_RMS_EPS),
        "layer_norm_epsilon": number(Keys.Attention.LAYERNORM_EPS),
        "sliding_window": number(Keys.Attention.SLIDING_WINDOW) or None,
        "tie_word_embeddings": "output.weight" not in names,
        "rope_parameters": _rope_settings(number, extra, kind),
        "bos_token_id": metadata.get(Keys.Tokenizer.BOS_ID),
        "eos_token_id": metadata.get(Keys.Tokenizer.EOS_ID),
        "pad_token_id": metadata.get(Keys.Tokenizer.PAD_ID),
    }
    settings |= FAMILIES[kind].settings(keys, names)
    model_type = CONFIG_MAPPING[kind]
    known = model_type()
    undeclared = {"head_dim"} if FAMILIES[kind].experts else set()  # that modules read all the same
    own = {
        key: value
        for key, value in settings.items()
        if key in undeclared or (hasattr(known, key) and not isinstance(getattr(model_type, key, None), property))
    }
    return model_type(**own)


def _rope_settings(number: Callable[[str], Any], extra: Mapping[str, Tensor], kind: str) -> dict[str, Any] | None:
    """Return transformers' rope_parameters."""
    base = number(Keys.Rope.FREQ_BASE)
    if base is None:
        base = 10000.0
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(base)}
    head = number(Keys.Attention.KEY_LENGTH) or number(Keys.LLM.EMBEDDING_LENGTH) // number(Keys.Attention.HEAD_COUNT)
    turned = number(Keys.Rope.DIMENSION_COUNT) or head
    if turned != head:
        rope["partial_rotary_factor"] = turned / head
    scaling, factor = number(Keys.Rope.SCALING_TYPE), number(Keys.Rope.SCALING_FACTOR)
    original = number(Keys.Rope.SCALING_ORIG_CTX_LEN)
    if "rope_factors_long.weight" in extra:
        if not original:
            raise FormatError("its rotary factors are for an original context length, and it tells none")
        rope |= {"rope_type": "longrope", "factor": number(Keys.LLM.CONTEXT_LENGTH) / original}
        rope |= {f"{k}_factor": extra[f"rope_factors_{k}.weight"].tolist() for k in ("long", "short")}
        rope["original_max_position_embeddings"] = original
        rope["attention_factor"] = number(Keys.Rope.SCALING_ATTN_FACTOR)
    elif "rope_freqs.weight" in extra:
        rope |= _llama3_settings(rope, extra["rope_freqs.weight"], turned)
    elif scaling in ("linear", "yarn") and factor:
        rope |= {"rope_type": scaling, "factor": float(factor)}
        if original:
            rope["original_max_position_embeddings"] = original
        if scaling == "yarn":
            rope["attention_factor"] = (number(Keys.Rope.SCALING_ATTN_FACTOR) or 1.0) * _yarn_scale(factor)
    elif scaling not in (None, "none", "longrope"):
        raise FormatError(f"rotary scaling of type {scaling!r} cannot be computed here")
    if kind == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": float(number(Keys.Rope.FREQ_BASE_SWA) or 10000.0)}
        return {"full_attention": rope, "sliding_attention": local}
    return rope


def _llama3_settings(rope: Mapping[str, Any], divisors: Tensor, turned: int) -> dict[str, Any]:
    """Return the settings that give these divisors of the frequencies; the original context is a power of two."""
    if len(divisors) != turned // 2:
        raise FormatError(f"rope_freqs.weight holds {len(divisors)} divisors for {turned} values of a head")
    for power in range(4, 21):
        settings = {
            "rope_type": "llama3",
            "factor": round(float(divisors.max()), 4),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 2**power,
        }
        if torch.allclose(_llama3_factors({**rope, **settings}, turned), divisors, rtol=1e-4):
            return settings
    raise FormatError("rope_freqs.weight holds divisors that are not those of Llama 3, and cannot be computed here")


def _entries(family: Family, config: Any, names: Mapping[str, tuple[int, ...]]) -> Iterable[Entry]:
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    known = gguf.get_tensor_name_map(numbers[family.architecture], config.num_hidden_layers)
    nowhere = []
    stacks: dict[str, dict[int, str]] = {}  # the experts of a layer by number
    for source in names:
        if expert := EXPERT.search(source):
            stacks.setdefault(EXPERT.sub(".experts.", source), {})[int(expert[1])] = source
    for source, shape in names.items():
        if BUFFERS.search(source):
            continue
        endings, stack = (".weight", ".bias"), stacks.get(together := EXPERT.sub(".experts.", source), {})
        if stack and source != stack[min(stack)]:
            continue
        name = known.get_name(together, endings) or known.get_name(source.removeprefix("transformer."), endings)
        if name is None or (EXPERT.search(source) and sorted(stack) != list(range(len(stack)))):
            nowhere.append(source)
            continue
        module = source.rpartition(".")[0]
        order = next((order for end, order in family.orders.items() if module.endswith(end)), None)
        plus_one = family.norms_plus_one and len(shape) == 1 and name.endswith("norm.weight")
        in_order = tuple(stack[number] for number in sorted(stack))
        yield Entry(name, source, order(config, shape[0]) if order else None, plus_one, in_order)
    if nowhere:
        raise FormatError(
            f"a GGUF file of architecture {family.architecture} has no place for {len(nowhere)} tensors: "
            + ", ".join(nowhere[:4])
        )


def _numbers(config: Any) -> dict[str, Any]:
    """Return the keys that all families have."""
    heads = config.num_attention_heads
    hidden = config.hidden_size
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    inner = next(
        (n for k in ("intermediate_size", "n_inner", "ffn_hidden_size") if (n := getattr(config, k, None))), None
    )
    context = next(
        (n for k in ("max_position_embeddings", "n_positions", "seq_length") if (n := getattr(config, k, None))), 2048
    )
    numbers = {
        Keys.LLM.VOCAB_SIZE: config.vocab_size,
        Keys.LLM.CONTEXT_LENGTH: context,
        Keys.LLM.EMBEDDING_LENGTH: hidden,
        Keys.LLM.BLOCK_COUNT: config.num_hidden_layers,
        Keys.LLM.FEED_FORWARD_LENGTH: inner or 4 * hidden,
        Keys.Attention.HEAD_COUNT: heads,
        Keys.Attention.HEAD_COUNT_KV: kv_heads,
    }
    if getattr(config, "rms_norm_eps", None) is not None:
        numbers[Keys.Attention.LAYERNORM_RMS_EPS] = config.rms_norm_eps
    else:
        numbers[Keys.Attention.LAYERNORM_EPS] = next(
            getattr(config, k) for k in ("layer_norm_eps", "layer_norm_epsilon") if hasattr(config, k)
        )
    if getattr(config, "head_dim", None):
        numbers[Keys.Attention.KEY_LENGTH] = numbers[Keys.Attention.VALUE_LENGTH] = config.head_dim
    return numbers


def _rope(family: Family, config: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the keys and extra tensors of the rotary embedding."""
    rope = getattr(config, "rope_parameters", None)
    if not rope or getattr(config, "alibi", False):
        return {}, {}
    local: dict[str, Any] = {}
    if "full_attention" in rope:  # one for each kind of layer
        sliding, rope = rope["sliding_attention"], rope["full_attention"]
        local = {Keys.Rope.FREQ_BASE_SWA: float(sliding["rope_theta"])}
        if sliding.get("rope_type", "default") != "default":
            raise FormatError(f"llama.cpp does not scale the rotary embedding of sliding layers: {sliding}")
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    turned = int(head * rope.get("partial_rotary_factor", 1.0))
    kind, factor = rope.get("rope_type", "default"), rope.get("factor")
    if kind not in family.ropes:
        raise FormatError(
            f"llama.cpp does not compute {config.model_type} models with rotary embeddings of type {kind!r}, only "
            + ", ".join(family.ropes)
        )
    if turned != head and not family.partial:
        raise FormatError(f"llama.cpp turns all {head} values of a {config.model_type} head, not {turned} of them")
    keys: dict[str, Any] = {Keys.Rope.DIMENSION_COUNT: turned, Keys.Rope.FREQ_BASE: float(rope["rope_theta"])} | local
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    if kind == "linear":
        keys |= {Keys.Rope.SCALING_TYPE: kind, Keys.Rope.SCALING_FACTOR: float(factor)}
    elif kind == "yarn":
        keys |= _yarn(rope, float(factor or config.max_position_embeddings / original))
        keys[Keys.Rope.SCALING_ORIG_CTX_LEN] = original
    elif kind == "llama3":
        return keys, {"rope_freqs.weight": _llama3_factors(rope, turned)}
    elif kind == "longrope":
        scale = factor or config.max_position_embeddings / original
        attention = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
        keys[Keys.Rope.SCALING_ORIG_CTX_LEN] = original
        keys[Keys.Rope.SCALING_ATTN_FACTOR] = float(rope.get("attention_factor") or attention)
        long, short = (torch.tensor(rope[k], dtype=torch.float32) for k in ("long_factor", "short_factor"))
        return keys, {"rope_factors_long.weight": long, "rope_factors_short.weight": short}
    return keys, {}


def _yarn(rope: Mapping[str, Any], factor: float) -> dict[str, Any]:
    ramp = (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1, rope.get("truncate", True))
    if ramp != (32, 1, True):
        raise FormatError(
            "llama.cpp computes these models with YaRN's beta_fast 32, beta_slow 1 and truncate true only, and this "
            "one has {}, {} and {}".format(*ramp)
        )
    keys: dict[str, Any] = {Keys.Rope.SCALING_TYPE: "yarn", Keys.Rope.SCALING_FACTOR: factor}
    attention, usual = rope.get("attention_factor"), _yarn_scale(factor)
    if attention is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        attention = _yarn_scale(factor, rope["mscale"]) / _yarn_scale(factor, rope["mscale_all_dim"])
    if attention is not None and attention != usual:
        keys[Keys.Rope.SCALING_ATTN_FACTOR] = attention / usual
    return keys


def _yarn_scale(factor: float, share: float = 1.0) -> float:
    """Return what YaRN multiplies queries and keys by (YaRN paper, section 3.4)."""
    return 0.1 * share * math.log(factor) + 1 if factor > 1 else 1.0


def _llama3_factors(rope: Mapping[str, Any], turned: int) -> Tensor:
    """Return what Llama 3.1 divides each rotary frequency by: 1 for high ones, ``factor`` for low ones."""
    frequency = torch.pow(float(rope["rope_theta"]), -torch.arange(0, turned, 2, dtype=torch.float32) / turned)
    waves = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)  # that fit into the first context
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    share = ((waves - low) / (high - low)).clamp(0, 1)
    divisor: Tensor = 1 / ((1 - share) / rope["factor"] + share)
    return divisor


def _halves_to_pairs(heads: Callable[[Any], int]) -> Order:
    """Return the order of rotary rows for a program that turns neighbours: (x0, x1), not (x0, x_half)."""

    def order(config: Any, rows: int) -> Tensor:
        return torch.arange(rows).view(heads(config), 2, -1).transpose(1, 2).flatten()

    return order


def _thirds(config: Any, rows: int) -> Tensor:
    """All queries, keys and values, from (query, key, value) of each head."""
    return torch.arange(rows).view(config.num_attention_heads, 3, -1).transpose(0, 1).flatten()


def _grouped(config: Any, rows: int) -> Tensor:
    """All queries, keys and values, from the (queries, key, value) of each key-value head."""
    head = config.hidden_size // config.num_attention_heads
    index = torch.arange(rows).view(_falcon_kv_heads(config), -1, head)
    return torch.cat([index[:, :-2].flatten(), index[:, -2].flatten(), index[:, -1].flatten()])


def _falcon_kv_heads(config: Any) -> int:
    if config.new_decoder_architecture:
        return int(config.num_kv_heads)
    return 1 if config.multi_query else int(config.num_attention_heads)


def _falcon_settings(keys: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    kv_heads = keys.get("attention.head_count_kv", 1)
    two_norms = "blk.0.attn_norm_2.weight" in names
    return {
        "alibi": False,
        "bias": "blk.0.attn_qkv.bias" in names,
        "multi_query": kv_heads == 1,
        "new_decoder_architecture": two_norms or 1 < kv_heads < keys.get("attention.head_count", 1),
        "num_ln_in_parallel_attn": 2 if two_norms else 1,
        "num_kv_heads": kv_heads,
        "ffn_hidden_size": keys.get("feed_forward_length"),
    }


def _falcon_keys(config: Any) -> dict[str, Any]:
    return {Keys.Attention.HEAD_COUNT_KV: _falcon_kv_heads(config), Keys.LLM.TENSOR_DATA_LAYOUT: "jploski"}


def _check_falcon(config: Any) -> None:
    if config.alibi or not (config.parallel_attn or config.new_decoder_architecture):
        raise FormatError("llama.cpp runs Falcon models with rotary positions and parallel attention only")


def _sliding(config: Any) -> dict[str, Any]:
    return {Keys.Attention.SLIDING_WINDOW: config.sliding_window} if config.sliding_window else {}


def _phi3_keys(config: Any) -> dict[str, Any]:
    return {Keys.Attention.SLIDING_WINDOW: config.sliding_window or 0}  # without the key, some releases take one


def _gemma_keys(config: Any) -> dict[str, Any]:
    caps = {
        Keys.LLM.ATTN_LOGIT_SOFTCAPPING: config.attn_logit_softcapping,
        Keys.LLM.FINAL_LOGIT_SOFTCAPPING: config.final_logit_softcapping,
    }
    return _sliding(config) | {key: cap for key, cap in caps.items() if cap is not None}


def _gemma_settings(keys: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    divisor = keys.get("attention.key_length")
    if keys.get("block_count") == LARGEST_GEMMA.get(keys[Keys.General.ARCHITECTURE]):
        divisor = keys.get("embedding_length", 0) // keys.get("attention.head_count", 1)
    return {
        "query_pre_attn_scalar": divisor,
        "attn_logit_softcapping": keys.get("attn_logit_softcapping"),
        "final_logit_softcapping": keys.get("final_logit_softcapping"),
    }


def _check_gemma(config: Any) -> None:
    every = 2 if config.model_type == "gemma2" else 6
    wanted = [
        "full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(config.num_hidden_layers)
    ]
    if list(config.layer_types) != wanted:
        raise FormatError(f"llama.cpp lets every {every}th layer see the whole context; this model's layers differ")
    divisor = config.head_dim
    if config.num_hidden_layers == LARGEST_GEMMA[FAMILIES[config.model_type].architecture]:
        divisor = config.hidden_size // config.num_attention_heads
    if config.query_pre_attn_scalar != divisor:
        raise FormatError(
            f"llama.cpp scales attention by the head size {divisor}, not query_pre_attn_scalar "
            f"{config.query_pre_attn_scalar}"
        )
    if config.model_type == "gemma2" and None in (config.attn_logit_softcapping, config.final_logit_softcapping):
        raise FormatError("llama.cpp caps the logits and the attention of Gemma 2, and this model does not")


def _phi3_settings(keys: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    original = keys.get("rope.scaling.original_context_length", keys.get("context_length"))
    return {"original_max_position_embeddings": original}


def _biases(keys: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {"attention_bias": "blk.0.attn_q.bias" in names, "mlp_bias": "blk.0.ffn_up.bias" in names}


def _neox_settings(keys: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {
        "use_parallel_residual": keys.get("use_parallel_residual", True),
        "layer_norm_eps": keys.get("attention.layer_norm_epsilon"),
        "attention_bias": "blk.0.attn_qkv.bias" in names,
    }


def _neox_keys(config: Any) -> dict[str, Any]:
    return {Keys.LLM.USE_PARALLEL_RESIDUAL: config.use_parallel_residual}


def _expert_keys(config: Any) -> dict[str, Any]:
    keys = {
        Keys.LLM.EXPERT_COUNT: getattr(config, "num_local_experts", None) or config.num_experts,
        Keys.LLM.EXPERT_USED_COUNT: config.num_experts_per_tok,
        Keys.LLM.EXPERT_FEED_FORWARD_LENGTH: getattr(config, "moe_intermediate_size", None),
        Keys.LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH: getattr(config, "shared_expert_intermediate_size", None),
    }
    return {key: value for key, value in keys.items() if value is not None}


def _expert_settings(keys: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {
        "num_experts": keys.get("expert_count"),
        "num_local_experts": keys.get("expert_count"),
        "num_experts_per_tok": keys.get("expert_used_count"),
        "moe_intermediate_size": keys.get("expert_feed_forward_length"),
        "shared_expert_intermediate_size": keys.get("expert_shared_feed_forward_length"),
    }


def _qwen3_moe_settings(keys: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return _expert_settings(keys, names) | {"norm_topk_prob": True}


def _check_olmoe(config: Any) -> None:
    if config.num_key_value_heads != config.num_attention_heads:
        raise FormatError(
            f"llama.cpp wants keys and values for each of an OLMoE model's {config.num_attention_heads} heads, not "
            f"{config.num_key_value_heads}"
        )


ROTATED = {
    "self_attn.q_proj": _halves_to_pairs(lambda config: config.num_attention_heads),
    "self_attn.k_proj": _halves_to_pairs(lambda config: config.num_key_value_heads),
}
SILU = ("silu", "swish")
ALL_EXPERTS = {
    "hidden_act": SILU,
    "use_sliding_window": (False,),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([],),
}
GELU = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")  # llama.cpp has one for all
GEMMA = {"hidden_activation": GELU, "attention_bias": (False,)}
LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}
"""Layers of the 27B models, by which llama.cpp knows that their attention is scaled in another way."""
FAMILIES = {
    "llama": Family(
        "llama",
        ROTATED,
        ropes=("default", "linear", "yarn", "llama3"),
        fixed={"hidden_act": SILU},
        settings=_biases,
    ),
    "mistral": Family("llama", ROTATED, fixed={"hidden_act": SILU}),
    "qwen2": Family("qwen2", fixed={"hidden_act": SILU, "use_sliding_window": (False,)}),
    "qwen3": Family("qwen3", fixed={"hidden_act": SILU, "use_sliding_window": (False,), "attention_bias": (False,)}),
    "mixtral": Family(
        "llama",
        ROTATED,
        extra_keys=_expert_keys,
        fixed={"hidden_act": SILU},
        settings=_expert_settings,
        experts=True,
    ),
    "qwen2_moe": Family(
        "qwen2moe",
        extra_keys=_expert_keys,
        fixed=ALL_EXPERTS | {"norm_topk_prob": (False,), "qkv_bias": (True,), "tie_word_embeddings": (False,)},
        settings=_expert_settings,
        experts=True,
    ),
    "qwen3_moe": Family(
        "qwen3moe",
        extra_keys=_expert_keys,
        fixed=ALL_EXPERTS | {"norm_topk_prob": (True,), "attention_bias": (False,)},
        settings=_qwen3_moe_settings,
        experts=True,
    ),
    "olmoe": Family(
        "olmoe",
        extra_keys=_expert_keys,
        fixed={
            "hidden_act": SILU,
            "norm_topk_prob": (False,),
            "attention_bias": (False,),
            "clip_qkv": (None,),
            "tie_word_embeddings": (False,),
        },
        settings=_expert_settings,
        check=_check_olmoe,
        experts=True,
    ),
    "gemma2": Family(
        "gemma2",
        norms_plus_one=True,
        extra_keys=_gemma_keys,
        fixed=GEMMA | {"tie_word_embeddings": (True,)},
        settings=_gemma_settings,
        check=_check_gemma,
    ),
    "gemma3_text": Family(
        "gemma3",
        norms_plus_one=True,
        extra_keys=_gemma_keys,
        ropes=("default", "linear"),
        fixed=GEMMA | {"attn_logit_softcapping": (None,)},
        settings=_gemma_settings,
        check=_check_gemma,
    ),
    "phi3": Family(
        "phi3",
        extra_keys=_phi3_keys,
        ropes=("default", "longrope"),
        partial=True,
        fixed={"hidden_act": SILU},
        settings=_phi3_settings,
    ),
    "gpt2": Family(
        "gpt2",
        fixed={
            "activation_function": GELU,
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
        },
    ),
    "gpt_neox": Family(
        "gptneox",
        {"query_key_value": _thirds},
        extra_keys=_neox_keys,
        partial=True,
        fixed={"hidden_act": GELU, "attention_bias": (True,), "tie_word_embeddings": (False,)},
        settings=_neox_settings,
    ),
    "falcon": Family(
        "falcon",
        {"query_key_value": _grouped},
        extra_keys=_falcon_keys,
        fixed={"activation": GELU, "bias": (False,)},
        settings=_falcon_settings,
        check=_check_falcon,
    ),
    "bloom": Family(
        "bloom",
        {"query_key_value": _thirds},
        fixed={"apply_residual_connection_post_layernorm": (False,)},
    ),
}
"""transformers' model_type -> the family. The first of an architecture is what a file of it is read as."""
