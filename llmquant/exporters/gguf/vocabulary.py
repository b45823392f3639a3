"""The tokenizer of a model, in the keys that llama.cpp reads, and back.

Two kinds can be told: byte-level BPE ("gpt2", with merges and the rule that cuts
text into words), and SentencePiece-like BPE with byte fallback ("llama", with a
score for every token). The rule is recognised from the tokenizer itself, not from
a hash of known models. Source: llama.cpp's src/llama-vocab.cpp.

Known differences: llama.cpp puts a space before SentencePiece texts and what follows
a special token in them, where tokenizers with a Metaspace step do not if there is
one already, or (scheme "first") behind special tokens; it has one score for a
token, where BPE has a rank for every pair that makes it; it does not normalize
texts to NFC; its rules tekken and gpt-4o cut words at combining marks; and it takes
the spaces behind special tokens away for models called Phi-3 alone (``model_name``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from gguf import Keys, TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from llmquant.errors import FormatError

WORDS_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WORDS_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS_QWEN2 = WORDS_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
WORDS_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS_GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS_BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"  # noqa: RUF001


@dataclass(frozen=True)
class Rule:
    """How llama.cpp, under a name, cuts a text into words.

    steps: that do it, one after the other. nfc: tokenizers of this name normalize texts to NFC first.
    whole: a word that is a token is not taken apart ("ignore_merges").
    """

    name: str
    steps: tuple[str, ...]
    nfc: bool = False
    whole: bool = False


RULES = (
    Rule("gpt-2", ("gpt-2",)),
    Rule("olmo", ("gpt-2",), nfc=True),  # GPT-NeoX
    Rule("llama-bpe", (WORDS_LLAMA3,), whole=True),
    Rule("dbrx", (WORDS_LLAMA3,)),  # Phi-4
    Rule("qwen2", (WORDS_QWEN2,), nfc=True),
    Rule("deepseek-r1-qwen", (WORDS_QWEN2,)),
    Rule("tekken", (WORDS_TEKKEN,), whole=True),  # Mistral
    Rule("gpt-4o", (WORDS_GPT4O,)),  # Phi-4-mini
    Rule("smollm", ("digit", "gpt-2")),
    Rule("bloom", (WORDS_BLOOM,)),
    Rule("falcon", ("punctuation", "gpt-2", "digits", "[0-9][0-9][0-9]")),
    Rule("falcon", ("punctuation", "gpt-2", "[0-9][0-9][0-9]")),
)
"""Of one name, the first is what a file is read as."""

STEPS: dict[str, Callable[[], Any]] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "digit": lambda: pre_tokenizers.Digits(individual_digits=True),
    "digits": lambda: pre_tokenizers.Digits(individual_digits=False),
    "punctuation": lambda: pre_tokenizers.Punctuation("contiguous"),
}
"""Steps that are no patterns."""
ISOLATED = (("Isolated", False), ("Removed", True))  # the same for patterns that leave nothing out
SPECIAL = {
    "bos": Keys.Tokenizer.BOS_ID,
    "eos": Keys.Tokenizer.EOS_ID,
    "unk": Keys.Tokenizer.UNK_ID,
    "pad": Keys.Tokenizer.PAD_ID,
}
UNSTRIPPED = ("<unk>", "<s>", "<|endoftext|>")  # special tokens of Phi-3 that keep the spaces behind them
LONGEST = 4096  # characters of a token; what it takes to join one grows with their square
PIECES = (TokenType.NORMAL, TokenType.USER_DEFINED)
ADDED = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
SURROGATES = re.compile("[\ud800-\udfff]")  # tokens that are no UTF-8


def metadata(tokenizer: Any, vocab_size: int, config: Any = None) -> dict[str, Any]:
    """Return the ``tokenizer.*`` keys for a transformers tokenizer.

    vocab_size: rows of the embedding; ids without a token are padded, added tokens without a row left out.
    config: the model's configuration, which knows special tokens that the tokenizer does not.

    Raises FormatError for a tokenizer that llama.cpp has no equal for.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise FormatError(f"the tokenizer {type(tokenizer).__name__} has no tokenizer.json to make GGUF's keys of")
    rules = json.loads(backend.to_str())
    model = rules["model"]
    if model["type"] != "BPE":
        raise FormatError(f"llama.cpp has no equal for a tokenizer of kind {model['type']}; only BPE can be told")
    largest = max(model["vocab"].values())
    if largest >= vocab_size:
        raise FormatError(f"the tokenizer has an id {largest}, but the model only {vocab_size} embeddings")
    added_tokens = [added for added in rules["added_tokens"] if added["id"] < vocab_size]
    ids = model["vocab"] | {added["content"]: added["id"] for added in added_tokens}
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
    for added in added_tokens:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = int(TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
    if model.get("unk_token") in ids:
        types[ids[model["unk_token"]]] = int(TokenType.UNKNOWN)
    keys |= {Keys.Tokenizer.LIST: tokens, Keys.Tokenizer.TOKEN_TYPE: types}
    special = {key: number for key, number in _special(tokenizer, config).items() if number < vocab_size}
    return keys | special | _ends(tokenizer) | _templates(tokenizer.chat_template)


def model_name(name: str, tokenizer: Any) -> str:
    """Return a model's name, spelled such that llama.cpp takes spaces behind special tokens away if the tokenizer does.

    It does so where it finds phi-3 or phi3 in the name, and then wants the tokens of Phi-3.
    """
    added = {str(token): token.rstrip for token in tokenizer.added_tokens_decoder.values()}
    strips = any(added.values()) and {"</s>", *UNSTRIPPED} <= added.keys()
    return re.sub("phi[ -]?3", "Phi-3" if strips else "Phi 3", name, flags=re.IGNORECASE)


def rule(rules: dict[str, Any]) -> str:
    """Return llama.cpp's name for how a byte-level tokenizer (its tokenizer.json) cuts a text into words."""
    normalizers = _flat(rules["normalizer"])
    if normalizers not in ([], [{"type": "NFC"}]):
        raise FormatError(f"llama.cpp has no equal for a byte-level tokenizer that normalizes by {normalizers}")
    steps = tuple(name for step in _flat(rules["pre_tokenizer"]) if (name := _step(step)))
    wanted = (steps, rules["model"].get("ignore_merges", False))
    named = [rule for rule in RULES if (rule.steps, rule.whole) == wanted]
    if not named:
        raise FormatError(
            "llama.cpp cuts text into words by named rules, and none of those known here is this tokenizer's: "
            f"{json.dumps(rules['pre_tokenizer'], ensure_ascii=False)}, ignore_merges {wanted[1]}"
        )
    return next((rule for rule in named if rule.nfc == bool(normalizers)), named[0]).name


def _step(step: dict[str, Any]) -> str:
    """Return what a pre-tokenizer is called in a rule: a name of ``STEPS``, or its pattern."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": regex}:
            return "gpt-2" if regex else ""
        case {"type": "Split", "pattern": {"Regex": pattern}} if (step["behavior"], step["invert"]) in ISOLATED:
            return "gpt-2" if pattern == WORDS_GPT2 else str(pattern)
        case {"type": "Digits", "individual_digits": alone}:
            return "digit" if alone else "digits"
        case {"type": "Punctuation", "behavior": "Contiguous"}:
            return "punctuation"
        case _:
            return json.dumps(step, ensure_ascii=False)


def _flat(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [part for inner in step.get("normalizers") or step.get("pretokenizers") or [] for part in _flat(inner)]
    return [step]


def tokenizer(metadata: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a file, whoever wrote it: the inverse of ``metadata``.

    Raises FormatError for keys that are broken, or of a kind that is not known here.
    """
    kind = metadata.get(Keys.Tokenizer.MODEL)
    tokens = _array(metadata, Keys.Tokenizer.LIST, str)
    types = _array(metadata, Keys.Tokenizer.TOKEN_TYPE, int, len(tokens))
    if max(map(len, tokens), default=0) > LONGEST:
        raise FormatError(f"a token has {max(map(len, tokens))} characters; no tokenizer has more than {LONGEST}")
    ids = {token: number for number, token in enumerate(tokens) if token and not SURROGATES.search(token)}
    if kind == "gpt2":
        rule = _rule(metadata)
        backend, adds_bos = _byte_level_bpe(metadata, ids, rule), rule.whole
    elif kind == "llama":
        pieces = {token for token, number in ids.items() if types[number] in PIECES}
        backend, adds_bos = _sentencepiece_bpe(metadata, ids, pieces), True
    else:
        raise FormatError(f"its tokenizer is of kind {kind!r}, and only gpt2 and llama are read")
    strips = re.search("phi-?3", str(metadata.get(Keys.General.NAME)).lower()) is not None
    backend.add_tokens(
        [
            AddedToken(
                token,
                rstrip=strips and token not in UNSTRIPPED,
                normalized=False,
                special=types[number] != TokenType.USER_DEFINED,
            )
            for token, number in ids.items()
            if types[number] in ADDED
        ]
    )
    special = {
        f"{name}_token": token
        for token, number in ids.items()
        for name, key in SPECIAL.items()
        if metadata.get(key) == number
    }
    ends = {
        "bos": metadata.get(Keys.Tokenizer.ADD_BOS, adds_bos),
        "eos": metadata.get(Keys.Tokenizer.ADD_EOS, False),
    }
    first, last = ([end] if added and f"{end}_token" in special else [] for end, added in ends.items())
    backend.post_processor = processors.TemplateProcessing(
        single=[*first, "$A", *last],
        special_tokens=[(end, ids[special[f"{end}_token"]]) for end in (*first, *last)],
    )
    template = metadata.get(Keys.Tokenizer.CHAT_TEMPLATE)
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template or None, **special)


def _array(metadata: Mapping[str, Any], key: str, type_: type, length: int | None = None) -> list[Any]:
    found = metadata.get(key)
    if not isinstance(found, list) or not all(isinstance(item, type_) for item in found):
        raise FormatError(f"{key} is not a list of type {type_.__name__}, as the tokenizer needs")
    if length is not None and len(found) != length:
        raise FormatError(f"{key} has {len(found)} items for {length} tokens")
    return found


def _rule(metadata: Mapping[str, Any]) -> Rule:
    name = metadata.get(Keys.Tokenizer.PRE)
    found = next((rule for rule in RULES if rule.name == name), None)
    if found is None:
        raise FormatError(
            f"its tokenizer cuts text into words by the rule {name!r}, which is not known here, only "
            + ", ".join(dict.fromkeys(rule.name for rule in RULES))
        )
    return found


def _byte_level_bpe(metadata: Mapping[str, Any], ids: dict[str, int], rule: Rule) -> Tokenizer:
    pairs = [pair.partition(" ")[::2] for pair in _array(metadata, Keys.Tokenizer.MERGES, str)]
    merges = [(left, right) for left, right in pairs if {left, right, left + right} <= ids.keys()]
    backend = Tokenizer(BPE(ids, merges, ignore_merges=rule.whole))
    if rule.nfc:
        backend.normalizer = normalizers.NFC()
    steps = [STEPS[step]() if step in STEPS else pre_tokenizers.Split(Regex(step), "isolated") for step in rule.steps]
    if "gpt-2" not in rule.steps:
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece_bpe(metadata: Mapping[str, Any], ids: dict[str, int], pieces: Collection[str]) -> Tokenizer:
    """Return BPE that joins what gives the token with the best score.

    pieces: tokens that may be joined, or come of that.
    """
    scores = _array(metadata, Keys.Tokenizer.SCORES, float, len(metadata[Keys.Tokenizer.LIST]))
    cuts = ((token, cut) for token in pieces for cut in range(1, len(token)))
    pairs = [(token[:cut], token[cut:]) for token, cut in cuts if token[:cut] in pieces and token[cut:] in pieces]
    pairs.sort(key=lambda pair: (-scores[ids["".join(pair)]], ids["".join(pair)], pair))
    unknown = next((token for token, number in ids.items() if number == metadata.get(Keys.Tokenizer.UNK_ID)), None)
    backend = Tokenizer(BPE(ids, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces: normalizers.Normalizer = normalizers.Replace(" ", "▁")
    undone = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get(Keys.Tokenizer.ADD_PREFIX, True):
        spaces = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        undone.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = spaces
    backend.decoder = decoders.Sequence(undone)
    return backend


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
    """Return whether a space is put before a text; raise FormatError where more than that is done to it."""
    prefixed = False
    for step in _flat(rules["normalizer"]) + _flat(rules["pre_tokenizer"]):
        match step:
            case {"type": "Prepend", "prepend": "▁"}:
                prefixed = True
            case {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme}:
                prefixed = prefixed or scheme != "never"
            case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
                pass
            case {"type": "Split", "pattern": {"String": " "}}:  # there is none left
                pass
            case _:
                raise FormatError(
                    "llama.cpp has no equal for a SentencePiece tokenizer that changes texts by "
                    + json.dumps(step, ensure_ascii=False)
                )
    return prefixed


def _special(tokenizer: Any, config: Any) -> dict[str, int]:
    """Return the ids of special tokens."""
    keys = {}
    for name, key in SPECIAL.items():
        number = getattr(tokenizer, f"{name}_token_id")
        if number is None:
            number = getattr(config, f"{name}_token_id", None)
        if isinstance(number, list):  # several tokens may end a text
            number = number[0]
        if number is not None:
            keys[key] = int(number)
    return keys


def _ends(tokenizer: Any) -> dict[str, bool]:
    """Return whether texts get a token at their beginning and their end."""
    text, bos, eos = tokenizer("a")["input_ids"], tokenizer.bos_token_id, tokenizer.eos_token_id
    return {
        Keys.Tokenizer.ADD_BOS: bos is not None and text[0] == bos,
        Keys.Tokenizer.ADD_EOS: eos is not None and text[-1] == eos,
    }


def _templates(templates: str | Mapping[str, str] | None) -> dict[str, Any]:
    """Return the chat template, or several by their names, of which one may be the default."""
    if isinstance(templates, Mapping):
        named = {re.sub("[^A-Za-z0-9]", "_", name): text for name, text in templates.items()}
        default = _templates(named.pop("default", None))
        keys = {Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name): text for name, text in named.items()}
        return default | keys | {Keys.Tokenizer.CHAT_TEMPLATES: list(named)}
    return {} if templates is None else {Keys.Tokenizer.CHAT_TEMPLATE: templates}
