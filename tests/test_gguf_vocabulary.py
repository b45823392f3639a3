"""Tokenizers in GGUF's terms: real llama.cpp cuts texts into the same tokens as the Hugging Face tokenizer."""

import json
import random
import unicodedata

import gguf
import pytest
import tokenizers
import torch
import transformers as hf
from tokenizers import Regex, decoders, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llmquant import demo, gguf_file
from llmquant.cpp_runtime import CppModel
from llmquant.data import load_tokenizer
from llmquant.errors import FormatError
from llmquant.exporters.gguf import families, vocabulary, writer
from tests.test_gguf_families import SHARED

PIECES = [
    *("Hello", "world", "don't", "WE'LL", "I'm", "it's", "naïve", "café", "e\u0301", "Ünïcode", "\ufb01n", "ß"),
    *(
        "123",
        "7",
        "45678",
        "3.14",
        "1,000,000",
        "0x1F",
        "\uff12\uff13",
        "½",
        "def f(x):",
        "return x + 1",
        "x_1 += y**2",
    ),
    *("if (a && b) {", "}", "//", "'''", '"quoted"', "http://a.b/c?d=e&f", "<div>", "a-b-c", "...", "!?", "#", "@me"),
    *("漢字", "かな", "カナ", "한국어", "Привет", "мир", "שלום", "مرحبا", "हिन्दी", "ไทย", "ελληνικά"),
    *("😀", "👩‍👩‍👧", "🇩🇪", "❤️", "→", "€", "²", "™", "\u200b", "\u00a0", "\u3000"),
    *(" ", "  ", "    ", "\t", "\n", "\n\n", " \n", "\r\n", "\n    ", "\t\t"),
]
SPECIAL = ["<s>", "</s>", "<|user|>"]
TEXT = ["The quick brown fox doesn't jump; it's 2024 and I'll say naïve things, 1234567 times.\n"] * 3 + PIECES * 3


def lines(special=True):
    """Return 500 varied lines: single pieces, then pieces joined with and without spaces, some with special tokens."""
    rng = random.Random(0)
    found = ["", *PIECES, *(" " + piece for piece in PIECES)]
    while len(found) < 500:
        chosen = rng.choices(PIECES + (SPECIAL if special else []), k=rng.randint(2, 12))
        found.append(rng.choice(["", " "]).join(chosen))
    return found


def byte_level(words, normalizer=None, whole=False):
    model = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=whole))
    if normalizer is not None:
        model.normalizer = normalizer
    model.pre_tokenizer = words
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL[:2], initial_alphabet=alphabet)
    )
    return model


def unreachable(model):
    """Return the tokenizer with a token that no merge makes."""
    rules = json.loads(model.to_str())
    rules["model"]["vocab"]["Ġworld"] = len(rules["model"]["vocab"])
    return tokenizers.Tokenizer.from_str(json.dumps(rules))


def split(pattern, removed=False):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "removed" if removed else "isolated", invert=removed),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def sentencepiece(prefix):
    """Return BPE over characters with byte fallback, as converted from a SentencePiece model."""
    base = ["<unk>", *SPECIAL[:2], *(f"<0x{i:02X}>" for i in range(256))]
    trained = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    spaces = normalizers.Replace(" ", "▁")
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    trained.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    words = ["the quick brown fox", "hello world", "return x", "naïve café", "1234", "漢字 かな", "мир"] * 4
    trained.train_from_iterator(words, trainers.BpeTrainer(vocab_size=260 + 80, special_tokens=base))
    rules = json.loads(trained.to_str())
    rules["model"] |= {"byte_fallback": True, "fuse_unk": True}
    rules["added_tokens"] = rules["added_tokens"][:3]
    # a token has one score in llama.cpp, so keep the merges in the order of their tokens, each made once
    made, merges = set(), []
    for pair in rules["model"]["merges"]:
        token = "".join(pair if isinstance(pair, list) else pair.split(" "))
        if token not in made:
            made.add(token)
            merges.append(pair)
    rules["model"]["merges"] = merges
    return tokenizers.Tokenizer.from_str(json.dumps(rules))


def gemma():
    backend = sentencepiece(False)
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return backend


def metaspace():
    backend = sentencepiece(True)
    backend.normalizer = normalizers.Sequence([])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return backend


def nfkc():
    backend = sentencepiece(True)
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), backend.normalizer])
    return backend


def wrapped(backend):
    backend.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


FALCON = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Punctuation("contiguous"),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        pre_tokenizers.Digits(individual_digits=False),
        pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
    ]
)
SMOLLM = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
TOKENIZERS = {
    "gpt-2": lambda: wrapped(byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))),
    "gpt-neox": lambda: wrapped(byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.NFC())),
    "llama 3": lambda: wrapped(unreachable(byte_level(split(vocabulary.WORDS_LLAMA3), whole=True))),
    "phi-4": lambda: wrapped(unreachable(byte_level(split(vocabulary.WORDS_LLAMA3, removed=True)))),
    "phi-4 mini": lambda: wrapped(byte_level(split(vocabulary.WORDS_GPT4O))),
    "mistral": lambda: wrapped(byte_level(split(vocabulary.WORDS_TEKKEN), whole=True)),
    "smollm": lambda: wrapped(byte_level(SMOLLM)),
    "qwen2": lambda: wrapped(byte_level(split(vocabulary.WORDS_QWEN2), normalizers.NFC())),
    "bloom": lambda: wrapped(byte_level(split(vocabulary.WORDS_BLOOM))),
    "falcon": lambda: wrapped(byte_level(FALCON)),
    "sentencepiece with a prefix": lambda: wrapped(sentencepiece(True)),
    "sentencepiece without": lambda: wrapped(sentencepiece(False)),
    "gemma": lambda: wrapped(gemma()),
    "metaspace": lambda: wrapped(metaspace()),
    "demo": lambda: load_tokenizer(demo.MODEL),
}


def lines_for(name):
    """Return the lines that have the same tokens in both worlds."""
    if name == "metaspace":  # llama.cpp puts a space behind special tokens, and before a text that has one
        return [line for line in lines(special=False) if not line.startswith(" ")]
    return lines(special=name != "demo")


def write(tokenizer, folder, name="A model"):
    """Write a GGUF file with the vocabulary, more embeddings than tokens, and a model of nothing but noise."""
    size = len(tokenizer) + 5
    config = hf.LlamaConfig(vocab_size=size, **{k: v for k, v in SHARED.items() if k != "vocab_size"})
    tensors = {n: p.detach() for n, p in hf.LlamaForCausalLM(config).named_parameters()}
    layout = families.layout(config, {name: tuple(t.shape) for name, t in tensors.items()})
    stored = [writer.Stored(e.name, tuple(tensors[e.source].shape), "f32") for e in layout.entries]
    data = ([tensors[e.source].contiguous().view(-1).view(torch.uint8)] for e in layout.entries)
    named = {"general.architecture": "llama", "general.name": vocabulary.model_name(name, tokenizer)}
    metadata = named | layout.metadata | vocabulary.metadata(tokenizer, size)
    (path,) = writer.write(folder / "model.gguf", metadata, stored, data)
    return path


@pytest.mark.parametrize("name", TOKENIZERS)
def test_llama_cpp_gives_the_same_tokens(name, tmp_path):
    tokenizer = TOKENIZERS[name]()
    judge = CppModel(write(tokenizer, tmp_path), 64)
    normalizer = tokenizer.backend_tokenizer.normalizer
    wrong = []
    for line in lines_for(name):
        if isinstance(normalizer, normalizers.NFC):
            line = normalizer.normalize_str(line)  # llama.cpp leaves this to its caller
        if name in ("mistral", "phi-4 mini") and any(unicodedata.category(c)[0] == "M" for c in line):
            continue  # llama.cpp's form of these rules knows letters, but not the marks on them
        wanted = tokenizer(line, add_special_tokens=False)["input_ids"]
        found = judge.tokens(line)
        if found != wanted:
            wrong.append((line, wanted, found))
    assert not wrong


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_file_gives_back_its_tokenizer(name, tmp_path):
    wanted = TOKENIZERS[name]()
    found = vocabulary.tokenizer(gguf_file.read(write(wanted, tmp_path)).metadata)
    texts = lines_for(name)
    ids = wanted(texts)["input_ids"]
    assert found(texts)["input_ids"] == ids
    assert found(texts, add_special_tokens=False)["input_ids"] == wanted(texts, add_special_tokens=False)["input_ids"]
    assert found.batch_decode(ids) == wanted.batch_decode(ids)
    assert (found.bos_token_id, found.eos_token_id) == (wanted.bos_token_id, wanted.eos_token_id)


@pytest.mark.parametrize("strips", [False, True])
@pytest.mark.parametrize("name", ["Phi 3 Mini", "phi3", "Phi-3.5-mini"])
def test_spaces_behind_the_special_tokens_of_phi_3_go_where_the_tokenizer_takes_them_away(name, strips, tmp_path):
    backend = sentencepiece(True)
    backend.add_special_tokens(["<unk>", "<s>", "<|endoftext|>"])
    backend.add_special_tokens([tokenizers.AddedToken(t, rstrip=strips) for t in ("</s>", "<|user|>")])
    wanted = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    path = write(wanted, tmp_path, name)
    judge, found = CppModel(path, 64), vocabulary.tokenizer(gguf_file.read(path).metadata)
    for line in ("<|user|>\n hello</s> \n", "<s> x", "<|endoftext|>\nx", "<|user|>x"):
        ids = wanted(line, add_special_tokens=False)["input_ids"]
        assert judge.tokens(line) == ids
        assert found(line, add_special_tokens=False)["input_ids"] == ids


def test_a_name_with_phi_3_does_no_harm_to_another_tokenizer(tmp_path):
    tokenizer = TOKENIZERS["gpt-2"]()
    assert (
        CppModel(write(tokenizer, tmp_path, "phi3 with gpt-2"), 64).tokens("Hello") == tokenizer("Hello")["input_ids"]
    )


def test_added_tokens_without_an_embedding_are_left_out():
    tokenizer = TOKENIZERS["gpt-2"]()
    size = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<image>"})
    keys = vocabulary.metadata(tokenizer, size)
    assert len(keys["tokenizer.ggml.tokens"]) == size
    assert "<image>" not in keys["tokenizer.ggml.tokens"]
    assert "tokenizer.ggml.padding_token_id" not in keys


def test_special_tokens_that_only_the_model_knows_are_told():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)))
    keys = vocabulary.metadata(tokenizer, len(tokenizer), hf.LlamaConfig(bos_token_id=0, eos_token_id=[1, 0]))
    assert (keys["tokenizer.ggml.bos_token_id"], keys["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert (keys["tokenizer.ggml.add_bos_token"], keys["tokenizer.ggml.add_eos_token"]) == (False, False)


def test_chat_templates_have_names(tmp_path):
    tokenizer = TOKENIZERS["gpt-2"]()
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(tmp_path)
    keys = vocabulary.metadata(load_tokenizer(tmp_path), len(tokenizer))
    assert keys["tokenizer.chat_template"] == "{{ messages }}"
    assert keys["tokenizer.chat_template.tool_use"] == "{{ tools }}"
    assert keys["tokenizer.chat_templates"] == ["tool_use"]


def test_every_token_has_a_type_and_ids_without_one_are_padded():
    tokenizer = TOKENIZERS["sentencepiece with a prefix"]()
    keys = vocabulary.metadata(tokenizer, len(tokenizer) + 5)
    types = dict(zip(keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"], strict=True))
    assert types["<0x41>"] == gguf.TokenType.BYTE
    assert types["<unk>"] == gguf.TokenType.UNKNOWN
    assert types["<|user|>"] == gguf.TokenType.CONTROL
    assert types["▁"] == gguf.TokenType.NORMAL
    assert sum(t == gguf.TokenType.UNUSED for t in types.values()) == 5
    assert len(set(keys["tokenizer.ggml.tokens"])) == len(tokenizer) + 5


def test_bos_eos_and_the_chat_template_are_told():
    tokenizer = load_tokenizer(demo.MODEL)
    tokenizer.chat_template = "{{ messages }}"
    keys = vocabulary.metadata(tokenizer, len(tokenizer))
    assert keys["tokenizer.ggml.add_bos_token"] is True
    assert keys["tokenizer.ggml.add_eos_token"] is False
    assert keys["tokenizer.ggml.bos_token_id"] == 0
    assert keys["tokenizer.chat_template"] == "{{ messages }}"


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        (lambda: tokenizers.Tokenizer(tokenizers.models.WordPiece({"a": 0})), "no equal for a tokenizer of kind WordP"),
        (lambda: tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])), "neither byte-level nor falls back"),
        (nfkc, 'no equal for a SentencePiece tokenizer that changes texts by {"type": "NFKC"}'),
        (lambda: byte_level(split(r"\d")), r'none of those known here is this tokenizer\'s: .*"Regex": "\\\\d"'),
        (lambda: byte_level(pre_tokenizers.ByteLevel(), normalizers.Lowercase()), "normalizes by .*Lowercase"),
        (lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)), "none of those known here"),
        (lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), whole=True), "ignore_merges True"),
    ],
)
def test_a_tokenizer_that_llama_cpp_has_no_equal_for_is_refused(backend, message):
    with pytest.raises(FormatError, match=message):
        vocabulary.metadata(PreTrainedTokenizerFast(tokenizer_object=backend()), 2000)


def test_a_vocabulary_larger_than_the_embedding_is_refused():
    with pytest.raises(FormatError, match=r"has an id \d+, but the model only 10 embeddings"):
        vocabulary.metadata(load_tokenizer(demo.MODEL), 10)


BROKEN = {"tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.token_type": [1, 1], "tokenizer.ggml.merges": ["a b"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "is of kind None, and only gpt2 and llama are read"),
        ({"tokenizer.ggml.model": "t5"}, "is of kind 't5'"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "viking"}, "by the rule 'viking', which is not known"),
        ({"tokenizer.ggml.model": "llama"}, "scores is not a list of type float"),
        ({"tokenizer.ggml.tokens": "ab"}, "tokens is not a list of type str"),
        ({"tokenizer.ggml.token_type": [1]}, "token_type has 1 items for 2 tokens"),
    ],
)
def test_a_file_whose_tokenizer_cannot_be_read_says_why(changes, message):
    with pytest.raises(FormatError, match=message):
        vocabulary.tokenizer(BROKEN | changes)


def test_tokens_that_are_no_text_are_passed_over():
    keys = BROKEN | {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2"}
    keys |= {"tokenizer.ggml.tokens": ["a", "b\udce4", "b"], "tokenizer.ggml.token_type": [1, 3, 1]}
    assert vocabulary.tokenizer(keys | {"tokenizer.ggml.bos_token_id": 1})("ab")["input_ids"] == [0, 2]
