"""Perplexity of a saved model, and its divergence from the float model, a layer at a time.

What is evaluated is what was saved: packed files are decoded, layer by layer.
Logits exist for one window at a time, for both models together.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llmquant import data, memory, protocols
from llmquant.checkpoint import Checkpoint
from llmquant.errors import CheckpointError
from llmquant.metrics import Scores
from llmquant.packed import PackedCheckpoint, open_model
from llmquant.protocols import Windows
from llmquant.run import Progress, device_of, silent
from llmquant.stream import Stream

WIKITEXT2 = data.TextSource(dataset="Salesforce/wikitext", config="wikitext-2-raw-v1", split="test")


@dataclass(frozen=True)
class Row:
    """One line of a comparison.

    bytes: size of the weights' files. bpw: these, in bits, over the number of weights.
    kld_*: KL divergence from the reference, nats a token. top1: share of tokens whose likeliest
        next token is the reference's. None without a reference.
    seconds, peak_rss_bytes: of quantizing where that was part of it, else of evaluating.
    """

    recipe: str
    format: str
    path: str
    bytes: int
    bpw: float
    protocol: str
    perplexity: float
    perplexity_error: float
    kld_mean: float | None
    kld_error: float | None
    kld_median: float | None
    kld_p99: float | None
    top1: float | None
    perplexity_ratio: float | None
    seconds: float
    peak_rss_bytes: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Reference:
    """The float model's side of a comparison, computed once for one text."""

    def __init__(self, model: str | Path, device: str = "auto", trust_remote_code: bool = False) -> None:
        self.stream = Stream(open_model(model), device_of(device), trust_remote_code)
        self._for: Windows | None = None
        self._hidden: list[Tensor] = []

    def hidden(self, windows: Windows, progress: Progress) -> list[Tensor]:
        """Return the last layer's output of every window."""
        if self._for is not windows:
            self._hidden = self.stream.hidden(windows.tokens, _counter(progress, "float model", self.stream.layers))
            self._for = windows
        return self._hidden


def read_windows(
    model: str | Path, text: str | Path | data.TextSource, protocol: str = "llama.cpp", max_tokens: int | None = None
) -> Windows:
    """Return the windows of a text under a named protocol, with the model's tokenizer and context.

    text: a file, "wikitext2", or a TextSource.
    """
    checkpoint = open_model(model)
    tokenizer = data.load_tokenizer(checkpoint.folder)
    context = Stream(checkpoint, device_of("cpu"), weights=False).context
    return data.evaluation_windows(_source(text), protocols.named(protocol), tokenizer, context, max_tokens)


def evaluate(
    path: str | Path,
    windows: Windows,
    reference: Reference | None = None,
    recipe: str | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Row:
    """Return the figures of one model folder, float or packed, on the windows of a text."""
    started = time.monotonic()
    memory.reset_peak()
    checkpoint = open_model(path)
    stream = Stream(checkpoint, device_of(device), trust_remote_code)
    if windows.tokens.max() >= stream.vocabulary:
        raise CheckpointError(
            f"{path}: has {stream.vocabulary} token ids, but the text was tokenized for another model"
        )
    theirs = None if reference is None else reference.hidden(windows, progress)
    itself = reference is not None and reference.stream.checkpoint.folder.samefile(checkpoint.folder)
    mine = (
        theirs
        if itself and theirs is not None
        else stream.hidden(windows.tokens, _counter(progress, Path(path).name, stream.layers))
    )
    scores = Scores()
    for i, x in enumerate(mine):
        progress("scoring", i, len(mine))
        tokens = windows.tokens[i : i + 1]
        counted = windows.scored[i].to(stream.device)
        logits = stream.finish(tokens, x)[0, :-1][counted]
        expected = None
        if reference is not None and theirs is not None:
            expected = reference.stream.finish(tokens, theirs[i])[0, :-1][counted]
        scores.add(logits, tokens[0, 1:].to(stream.device)[counted], expected)
    progress("scoring", len(mine), len(mine))
    result = scores.result(windows.units)
    size = sum((checkpoint.folder / f).stat().st_size for f in {info.file for info in checkpoint.infos.values()})
    return Row(
        recipe=recipe or Path(path).name,
        format=_format(checkpoint),
        path=str(path),
        bytes=size,
        bpw=round(8 * size / stream.weights, 4),
        protocol=windows.label,
        **asdict(result),
        seconds=round(time.monotonic() - started, 2),
        peak_rss_bytes=memory.peak_bytes(),
    )


def _format(checkpoint: Checkpoint) -> str:
    if isinstance(checkpoint, PackedCheckpoint):
        return checkpoint.format
    return str(next(iter(checkpoint.infos.values())).dtype).removeprefix("torch.")


def _source(text: str | Path | data.TextSource) -> data.TextSource:
    if isinstance(text, data.TextSource):
        return text
    return WIKITEXT2 if str(text) == "wikitext2" else data.TextSource(path=Path(text))


def _counter(progress: Progress, what: str, total: int) -> Any:
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        progress(f"evaluating {what}", done, total)

    return step
