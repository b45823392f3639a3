"""Calibration text: which tokens come out of which file."""

import gzip
import json

import datasets
import pytest
import torch

from llmquant import data, protocols
from llmquant.errors import DataError

TEXT = "The quick brown fox jumps over the lazy dog. " * 200


def calibration(path, **options):
    return data.Calibration(path=path, **{"sequences": 4, "length": 32} | options)


def plain_ids(tokenizer, text):
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def test_sequences_are_cut_from_the_text_and_begin_with_bos(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    found = data.calibration_tokens(calibration(path), tokenizer, 256)
    ids = plain_ids(tokenizer, TEXT)
    cut = [[0, *ids[i : i + 31]] for i in range(0, len(ids) - 30, 31)]
    assert found.tokens.shape == (4, 32)
    assert found.available == len(cut)
    assert all(row in cut for row in found.tokens.tolist())
    assert all(row in cut for row in found.held_out.tolist())
    chosen = {tuple(row) for row in found.tokens.tolist()}
    # the text repeats itself, so compare places, not tokens: other seeds choose others
    other = data.calibration_tokens(calibration(path, seed=1), tokenizer, 256)
    assert found.sha256 != other.sha256 or len(chosen) == 1
    again = data.calibration_tokens(calibration(path), tokenizer, 256)
    assert (found.sha256, found.tokens.tolist()) == (again.sha256, again.tokens.tolist())


def test_bos_can_be_left_out(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    found = data.calibration_tokens(calibration(path, bos=False), tokenizer, 256)
    assert not (found.tokens == 0).any()
    assert not found.bos


def test_documents_are_joined_or_kept_apart(tokenizer, tmp_path):
    path = tmp_path / "text.jsonl"
    texts = [f"Document {i}. " + "word " * (20 + 40 * (i % 2)) for i in range(20)]
    path.write_text("\n".join(json.dumps({"text": t}) for t in texts))
    joined = data.calibration_tokens(calibration(path, sequences=2, bos=False), tokenizer, 256)
    stream = [t for text in texts for t in plain_ids(tokenizer, text)]
    assert joined.available == len(stream) // 32
    apart = data.calibration_tokens(calibration(path, sequences=2, bos=False, packing="document"), tokenizer, 256)
    assert apart.available == sum(len(plain_ids(tokenizer, t)) // 32 for t in texts)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "parquet", "dataset"])
def test_every_kind_of_file_gives_the_same_documents(kind, tokenizer, tmp_path):
    rows = [{"id": i, "content": f"Document number {i}."} for i in range(5)]
    path = tmp_path / f"rows.{kind}"
    lines = "\n".join(map(json.dumps, rows))
    if kind == "jsonl":
        path.write_text(lines)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        path.mkdir()
        datasets.Dataset.from_list(rows).to_parquet(path / "train-00000.parquet")
    where = {"dataset": str(path)} if kind == "dataset" else {"path": path}
    source = data.TextSource(**where, field="content")
    assert list(data.documents(source, tokenizer)) == [row["content"] for row in rows]


def test_chat_messages_go_through_the_chat_template(tokenizer, tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text(
        json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]})
    )
    source = data.TextSource(path=path, field="messages")
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        list(data.documents(source, tokenizer))
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    try:
        assert list(data.documents(source, tokenizer)) == ["[user] Hi\n[assistant] Yes\n"]
    finally:
        tokenizer.chat_template = None


def test_a_bos_token_in_the_chat_template_is_not_doubled(tokenizer, tmp_path):
    path = tmp_path / "chat.jsonl"
    rows = [{"messages": [{"role": "user", "content": "A question about foxes. " * 8}]}] * 6
    path.write_text("\n".join(map(json.dumps, rows)))
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    try:
        source = calibration(path, field="messages", packing="document")
        found = data.calibration_tokens(source, tokenizer, 256)
    finally:
        tokenizer.chat_template = None
    assert (found.tokens[:, 0] == 0).all()
    assert not (found.tokens[:, 1:] == 0).any()


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("short.txt", "Hello there.", {}, r"gives \d+ tokens, that is 0 sequences of 32; 4 are asked for"),
        (
            "a.jsonl",
            '{"txt": "a"}',
            {"field": "text"},
            r"row 1 has no field 'text', only 'txt'. Set calibration.field=txt",
        ),
        ("a.jsonl", '{"text": "a"}\n{broken', {}, "a.jsonl:2: is not valid JSON"),
        ("a.jsonl", '["a"]', {}, "a.jsonl:1: is list, not an object"),
        ("a.jsonl", '{"text": 3}', {}, "holds int, neither text nor a list"),
        ("long.txt", TEXT, {"length": 512}, "calibration.length is 512, but the model takes at most 256"),
    ],
)
def test_a_useless_text_is_refused_with_numbers_and_remedy(name, content, options, message, tokenizer, tmp_path):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        data.calibration_tokens(calibration(path, **options), tokenizer, 256)


def test_an_unreachable_dataset_says_what_to_do_without_network(tokenizer):
    source = data.Calibration(dataset="llmquant-no-such/dataset")
    with pytest.raises(DataError, match=r"--set calibration\.path=FILE"):
        data.calibration_tokens(source, tokenizer, 256)


def test_evaluation_text_is_limited_to_the_tokens_asked_for(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    source = data.TextSource(path=path)
    windows = data.evaluation_windows(source, protocols.named("gptq"), tokenizer, 64, max_tokens=200)
    assert windows.tokens.flatten().tolist() == plain_ids(tokenizer, TEXT)[: 3 * 64]
    assert windows.tokens.dtype == torch.int64


def test_words_are_those_of_the_tokens_that_are_scored(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("short " * 300 + "extraordinarily-long-compounds " * 300)
    kept = 150
    windows = data.evaluation_windows(
        data.TextSource(path=path), protocols.named("word"), tokenizer, 64, max_tokens=kept
    )
    text = tokenizer.decode(plain_ids(tokenizer, path.read_text())[:kept])
    assert windows.units == len(text.split())
