"""The tokenizer of a model, in the keys that llama.cpp reads.

Two kinds can be told: byte-level BPE ("gpt2", with merges and the rule that cuts
text into words), and SentencePiece-like BPE with byte fallback ("llama", with a
score for every token). The rule is recognised from the tokenizer itself, not from
a hash of known models. Source: llama.cpp's src/llama-vocab.cpp.

Known differences: llama.cpp puts a space before what follows a special token in
SentencePiece texts, where tokenizers of prepend scheme "first" do not; and it has
one score for a token, where BPE has a rank for every pair that makes it.
"""

from __future__ import annotations

import json
from typing import Any

from gguf import Keys, TokenType

from llmquant.errors import FormatError

WORDS_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WORDS_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS_QWEN2 = WORDS_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
WORDS_BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"  # noqa: RUF001

RULES = {
    ("byte level",): "gpt-2",
    (WORDS_GPT2,): "gpt-2",
    (WORDS_LLAMA3,): "llama-bpe",
    (WORDS_QWEN2,): "qwen2",
    (WORDS_BLOOM,): "bloom",
    ("punctuation", "byte level", "digits", "[0-9][0-9][0-9]"): "falcon",
    ("punctuation", "byte level", "[0-9][0-9][0-9]"): "falcon",
}
"""The steps that cut a text into words -> llama.cpp's name for them."""


def metadata(tokenizer: Any, vocab_size: int) -> dict[str, Any]:
    """Return the ``tokenizer.*`` keys for a transformers tokenizer.

    vocab_size: rows of the embedding; ids without a token are padded.

    Raises FormatError for a tokenizer that llama.cpp has no equal for.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise FormatError(f"the tokenizer {type(tokenizer).__name__} has no tokenizer.json to make GGUF's keys of")
    rules = json.loads(backend.to_str())
    model = rules["model"]
    if model["type"] != "BPE":
        raise FormatError(f"llama.cpp has no equal for a tokenizer of kind {model['type']}; only BPE can be told")
    ids = model["vocab"] | {added["content"]: added["id"] for added in rules["added_tokens"]}
    if max(ids.values()) >= vocab_size:
        raise FormatError(f"the tokenizer has an id {max(ids.values())}, but the model only {vocab_size} embeddings")
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [int(TokenType.UNUSED)] * vocab_size
    for token, number in model["vocab"].items():
        tokens[number] = token
        types[number] = int(TokenType.NORMAL)
    keys: dict[str, Any] = {}
    if _byte_level(rules):
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        keys |= {Keys.Tokenizer.MODEL: "gpt2", Keys.Tokenizer.PRE: rule(rules), Keys.Tokenizer.MERGES: merges}
    elif model["byte_fallback"]:
        scores = _scores(model, vocab_size)
        for token, number in model["vocab"].items():
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                types[number] = int(TokenType.BYTE)
        keys |= {Keys.Tokenizer.MODEL: "llama", Keys.Tokenizer.PRE: "default", Keys.Tokenizer.SCORES: scores}
        keys[Keys.Tokenizer.ADD_PREFIX] = _prefixed(rules)
    else:
        raise FormatError("llama.cpp has no equal for BPE that is neither byte-level nor falls back to bytes")
    for added in rules["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = int(TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
    if model.get("unk_token") in ids:
        types[ids[model["unk_token"]]] = int(TokenType.UNKNOWN)
    keys |= {Keys.Tokenizer.LIST: tokens, Keys.Tokenizer.TOKEN_TYPE: types}
    return keys | _special(tokenizer)


def rule(rules: dict[str, Any]) -> str:
    """Return llama.cpp's name for how a byte-level tokenizer (its tokenizer.json) cuts a text into words."""
    steps = _steps(rules["pre_tokenizer"])
    normalizer = rules["normalizer"]
    if normalizer is not None and normalizer["type"] != "NFC":
        raise FormatError(f"llama.cpp has no equal for a byte-level tokenizer that normalizes by {normalizer}")
    if steps not in RULES:
        raise FormatError(
            "llama.cpp cuts text into words by named rules, and none of those known here is this tokenizer's: "
            f"{json.dumps(rules['pre_tokenizer'], ensure_ascii=False)}"
        )
    return RULES[steps]


def _steps(pre_tokenizer: dict[str, Any]) -> tuple[str, ...]:
    if pre_tokenizer["type"] == "Sequence":
        return tuple(step for inner in pre_tokenizer["pretokenizers"] for step in _steps(inner))
    match pre_tokenizer["type"]:
        case "ByteLevel":
            return ("byte level",) if pre_tokenizer["use_regex"] else ()
        case "Split":
            pattern = pre_tokenizer["pattern"]
            return (pattern.get("Regex") or pattern["String"],)
        case other:
            return (str(other).lower(),)


def _byte_level(rules: dict[str, Any]) -> bool:
    return "ByteLevel" in json.dumps(rules["pre_tokenizer"])


def _scores(model: dict[str, Any], vocab_size: int) -> list[float]:
    """Return minus the rank of the first merge that makes a token; what no merge makes comes last."""
    scores = [-1e6] * vocab_size
    for rank, pair in reversed(list(enumerate(model["merges"]))):
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        if left + right in model["vocab"]:
            scores[model["vocab"][left + right]] = -float(rank)
    return scores


def _prefixed(rules: dict[str, Any]) -> bool:
    """Whether a space is put before a text."""
    told = json.dumps(rules["normalizer"]) + json.dumps(rules["pre_tokenizer"])
    return '"Prepend"' in told or '"prepend_scheme": "first"' in told or '"prepend_scheme": "always"' in told


def _special(tokenizer: Any) -> dict[str, Any]:
    """Return the ids of special tokens, whether texts get them, and the chat template."""
    keys = {
        Keys.Tokenizer.BOS_ID: tokenizer.bos_token_id,
        Keys.Tokenizer.EOS_ID: tokenizer.eos_token_id,
        Keys.Tokenizer.UNK_ID: tokenizer.unk_token_id,
        Keys.Tokenizer.PAD_ID: tokenizer.pad_token_id,
    }
    text = tokenizer("a")["input_ids"]
    keys[Keys.Tokenizer.ADD_BOS] = tokenizer.bos_token_id is not None and text[0] == tokenizer.bos_token_id
    keys[Keys.Tokenizer.ADD_EOS] = tokenizer.eos_token_id is not None and text[-1] == tokenizer.eos_token_id
    if isinstance(tokenizer.chat_template, str):
        keys[Keys.Tokenizer.CHAT_TEMPLATE] = tokenizer.chat_template
    return {key: value for key, value in keys.items() if value is not None}
