"""Text to calibrate and to evaluate on: read, tokenized, cut into sequences."""

from __future__ import annotations

import difflib
import gzip
import hashlib
import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import AutoTokenizer

from llmquant import protocols
from llmquant.checkpoint import by_library, check_followed
from llmquant.errors import DataError

BATCH = 64  # documents tokenized at a time; more would read a stream further than needed
HELD_OUT = 16  # sequences kept back to measure on, as far as the text gives them
SPARE = 4  # a stream is read until it gives this many times the sequences asked for
MOST_TEXT = 2_000_000_000  # bytes of a file, unpacked
PIECE = 1 << 24  # bytes that are read at a time


class TextSource(BaseModel):
    """Where a text comes from.

    path: a local .txt, .jsonl, .json or .parquet file (text and jsonl also .gz). Wins over ``dataset``.
    dataset: a hub id, or the folder of a local dataset; with its config, data_files and split.
    field: the column that holds the text; or a list of {role, content} messages, which the
        tokenizer's chat template turns into text.
    streaming: read a dataset as it is needed instead of downloading all of it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path | None = None
    dataset: str | None = None
    config: str | None = None
    data_files: str | None = None
    split: str = "train"
    field: str = "text"
    streaming: bool = True

    @property
    def label(self) -> str:
        """What a report calls this text."""
        return self.path.name if self.path else "/".join(p for p in (self.dataset, self.config, self.split) if p)


class Calibration(TextSource):
    """The text to calibrate on, and how much of it.

    sequences: how many; length: tokens in each (by default the model's context, at most 2048).
    seed: chooses them among all that the text gives.
    bos: begin every sequence with the tokenizer's BOS token (by default if it adds one to texts).
    packing: "concat" joins the documents and cuts; "document" cuts each one by itself and drops
        what is left of it.
    """

    sequences: int = Field(default=128, ge=1)
    length: int | None = Field(default=None, ge=2)
    seed: int = 0
    bos: bool | None = None
    packing: Literal["concat", "document"] = "concat"


@dataclass(frozen=True)
class CalibrationTokens:
    """Sequences to calibrate on, and what a report says of them.

    held_out: other sequences of the same text, to measure on.
    available: how many sequences there were to choose from. sha256: of the tokens as little-endian int64.
    """

    tokens: Int[Tensor, "sequences length"]
    held_out: Int[Tensor, "others length"]
    source: str
    available: int
    bos: bool
    sha256: str

    def as_dict(self) -> dict[str, Any]:
        sequences, length = self.tokens.shape
        return {
            "text": self.source,
            "sequences": sequences,
            "length": length,
            "tokens": self.tokens.numel(),
            "available_sequences": self.available,
            "bos": self.bos,
            "sha256": self.sha256,
        }


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer of a model folder, or raise CheckpointError."""
    check_followed(folder)
    with by_library(folder, "has no tokenizer that transformers can load"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        tokenizer("a")  # not all that is wrong with it shows before
    return tokenizer


def documents(source: TextSource, tokenizer: Any) -> Iterator[str]:
    """Yield the documents of a text one by one; a .txt file is one document. Raises DataError."""
    if source.path is None and source.dataset is None:
        raise DataError("calibration: gives neither `path` nor `dataset`. Add --set calibration.path=FILE.")
    if source.path is not None and source.path.suffixes[-1:] != [".parquet"]:
        kind = next((s for s in reversed(source.path.suffixes) if s != ".gz"), ".txt")
        text = read_text(source.path)
        if kind not in (".jsonl", ".json"):
            yield text
            return
        rows = json_rows(source.path, text, lines=kind == ".jsonl")
    else:
        rows = _dataset_rows(source)
    for number, row in enumerate(rows, 1):
        if source.field not in row:
            near = difflib.get_close_matches(source.field, row, n=1)
            raise DataError(
                f"{source.label}: row {number} has no field {source.field!r}, only {', '.join(map(repr, row))}. Set "
                f"calibration.field" + (f"={near[0]}" if near else " to the one that holds the text")
            )
        yield _as_text(source, row[source.field], number, tokenizer)


def calibration_tokens(
    source: Calibration, tokenizer: Any, context: int, held_out: int = HELD_OUT
) -> CalibrationTokens:
    """Return sequences of equal length, chosen by the seed among all that the text gives.

    held_out: how many more to keep back, as far as the text gives them; asking for more changes none of the first.

    A streamed dataset is read until it has given ``SPARE`` times as many as are
    asked for. Raises DataError when there are too few.
    """
    found, use_bos, total = _sequences(source, tokenizer, context, SPARE * source.sequences)
    if len(found) < source.sequences:
        length = found.shape[1]
        raise DataError(
            f"{source.label}: gives {total} tokens, that is {len(found)} sequences of {length}; "
            f"{source.sequences} are asked for. Give more text"
            + (f", or --set calibration.sequences={len(found)}" if len(found) else "")
            + (f", or --set calibration.length={total // source.sequences}" if total >= 16 * source.sequences else "")
            + "."
        )
    order = _order(source, found)
    chosen = found[order[: source.sequences + held_out]]
    return _described(source, chosen[: source.sequences], chosen[source.sequences :], len(found), use_bos)


def training_tokens(source: Calibration, tokenizer: Any, context: int, tokens: int) -> CalibrationTokens:
    """Return all sequences of equal length that a text gives but those held out, in the order of the text.

    tokens: more than these are not read of a stream. Held out are two times ``HELD_OUT`` sequences from all over the
    text, or a quarter of a short one: the last that ``calibration_tokens`` would choose, so that what was calibrated on
    is not among them where a file gives that many more. Raises DataError when there are too few.
    """
    length = source.length or min(context, 2048)
    found, use_bos, total = _sequences(source, tokenizer, context, math.ceil(tokens / length) + 2 * HELD_OUT)
    if len(found) < 8:
        raise DataError(
            f"{source.label}: gives {total} tokens, that is {len(found)} sequences of {length}, and training needs 8. "
            "Give more text, or a smaller calibration.length"
        )
    count = min(2 * HELD_OUT, len(found) // 4)
    held_out = torch.zeros(len(found), dtype=torch.bool)
    held_out[_order(source, found)[-count:]] = True
    return _described(source, found[~held_out], found[held_out], len(found), use_bos)


def _sequences(
    source: Calibration, tokenizer: Any, context: int, enough: int
) -> tuple[Int[Tensor, "sequences length"], bool, int]:
    """Return all sequences of equal length that a text gives, whether each begins with BOS, and the count of tokens.

    enough: of a streamed dataset only so many are read.
    """
    length = source.length or min(context, 2048)
    if length > context:
        raise DataError(f"calibration.length is {length}, but the model takes at most {context} tokens")
    added = _bos(tokenizer)
    use_bos = added is not None if source.bos is None else source.bos
    bos = added if added is not None else tokenizer.bos_token_id
    if use_bos and bos is None:
        raise DataError("calibration.bos is true, but the tokenizer has no BOS token")
    payload = length - use_bos
    cut: list[int] = []  # whole sequences, one after the other
    rest: list[int] = []
    total = 0
    for ids in _tokenized(documents(source, tokenizer), tokenizer):
        total += len(ids)
        if source.packing == "document":
            rest.clear()
        # a chat template may begin with the BOS that this sequence gets anyway
        rest += ids[1:] if use_bos and not rest and ids[:1] == [bos] else ids
        whole = len(rest) // payload * payload
        cut += rest[:whole]
        del rest[:whole]
        if not source.path and len(cut) >= enough * payload:
            break
    found = torch.tensor(cut, dtype=torch.int64).view(-1, payload)
    if use_bos:
        found = torch.cat([torch.full((len(found), 1), bos, dtype=torch.int64), found], dim=1)
    return found, use_bos, total


def _order(source: Calibration, found: Int[Tensor, "sequences length"]) -> Int[Tensor, " sequences"]:
    """Return the order in which sequences are chosen."""
    return torch.randperm(len(found), generator=torch.Generator().manual_seed(source.seed))


def _described(
    source: Calibration, tokens: Tensor, held_out: Tensor, available: int, use_bos: bool
) -> CalibrationTokens:
    digest = hashlib.sha256(tokens.numpy().astype("<i8").tobytes()).hexdigest()
    return CalibrationTokens(tokens, held_out, source.label, available, use_bos, digest)


def held_out_windows(text: CalibrationTokens) -> protocols.Windows | None:
    """Return the sequences that were kept back, every token but the first scored; None if the text gave none."""
    count, length = text.held_out.shape
    if not count:
        return None
    label = (
        f"held-out: {text.source}, {count} sequences of {length} that were not calibrated on, "
        f"{'BOS' if text.bos else 'no BOS'}, {count * (length - 1)} tokens scored"
    )
    return protocols.Windows(text.held_out, torch.ones(count, length - 1, dtype=torch.bool), label)


def evaluation_windows(
    source: TextSource, protocol: protocols.Protocol, tokenizer: Any, context: int, max_tokens: int | None = None
) -> protocols.Windows:
    """Return a text's windows under a protocol; rows of a dataset are joined by blank lines.

    max_tokens: use only so much of the text's beginning.
    """
    text = "\n\n".join(documents(source, tokenizer))
    ids = next(_tokenized(iter([text]), tokenizer), [])
    words = len(text.split())
    if max_tokens is not None and max_tokens < len(ids):
        ids = ids[:max_tokens]
        words = len(tokenizer.decode(ids).split())
    bos = _bos(tokenizer)
    if bos is None and protocol.words:
        bos = tokenizer.eos_token_id
    return protocols.windows(protocol, ids, bos, source.label, context, words)


def _bos(tokenizer: Any) -> int | None:
    """Return the BOS token if the tokenizer puts one before every text."""
    bos: int | None = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else None


def _tokenized(texts: Iterator[str], tokenizer: Any) -> Iterator[list[int]]:
    while batch := list(islice(texts, BATCH)):
        # verbose: no warning about texts longer than the context; they are cut later
        yield from tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]


def read_text(path: Path) -> str:
    """Return the text of a file, unpacked, or raise DataError."""
    try:
        if path.is_char_device() or path.is_block_device():
            raise DataError(f"{path}: is a device, not a text")
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            pieces, left = [], MOST_TEXT + 1
            while left and (piece := file.read(min(left, PIECE))):  # a buffer of all that is asked for comes first
                pieces.append(piece)
                left -= len(piece)
        raw = b"".join(pieces)
        if len(raw) > MOST_TEXT:
            raise DataError(f"{path}: has more than {MOST_TEXT / 1e9:.0f} GB of text. Give a part of it")
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not text.strip():
        raise DataError(f"{path}: is empty")
    return text


def json_rows(path: Path, text: str, lines: bool) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON text, or of one with an object a line; raise DataError. path: for messages."""
    pieces = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()] if lines else [(1, text)]
    for number, piece in pieces:
        try:
            value = json.loads(piece)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: is not valid JSON: {error}") from None
        for row in value if isinstance(value, list) and not lines else [value]:
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number}: is {type(row).__name__}, not an object with fields")
            yield row


def _dataset_rows(source: TextSource) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset  # a second of start-up that local text does not need

    try:
        if source.path is not None:
            if not source.path.is_file():
                raise DataError(f"{source.path}: cannot be read: no such file")
            rows = load_dataset("parquet", data_files=str(source.path), split="train", streaming=True)
        else:
            rows = load_dataset(
                source.dataset,
                source.config,
                data_files=source.data_files,
                split=source.split,
                streaming=source.streaming,
            )
        yield from rows
    except (OSError, ValueError, RuntimeError, ArithmeticError, ImportError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{source.label}: the dataset cannot be read: {first}. Without network give a local file: "
            "--set calibration.path=FILE (or --text FILE to evaluate)."
        ) from None


def _as_text(source: TextSource, value: Any, number: int, tokenizer: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value):
        if not tokenizer.chat_template:
            raise DataError(f"{source.label}: row {number} holds chat messages, but the tokenizer has no chat template")
        text: str = tokenizer.apply_chat_template(value, tokenize=False)
        return text
    raise DataError(
        f"{source.label}: row {number}: field {source.field!r} holds {type(value).__name__}, neither text "
        "nor a list of {role, content} messages"
    )
