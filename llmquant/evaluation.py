"""Perplexity of a saved model, and its divergence from the float model, a layer at a time.

What is evaluated is what was saved: packed files are decoded, layer by layer, and
linears whose activations have 8 bits, too, are computed in integers.
Logits exist for one window at a time, for both models together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from llmquant import data, memory, protocols
from llmquant.cpp_runtime import CppModel
from llmquant.errors import CheckpointError
from llmquant.gguf_checkpoint import GgufCheckpoint
from llmquant.metrics import Scores
from llmquant.packed import open_model, tokenizer_of
from llmquant.progress import Progress, silent
from llmquant.protocols import Windows
from llmquant.run import device_of
from llmquant.stream import Stream

WIKITEXT2 = data.TextSource(dataset="Salesforce/wikitext", config="wikitext-2-raw-v1", split="test")


Runtime = Literal["torch", "llama.cpp"]


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
    tokenizer = tokenizer_of(checkpoint)
    context = Stream(checkpoint, device_of("cpu"), weights=False).context
    return data.evaluation_windows(_source(text), protocols.named(protocol), tokenizer, context, max_tokens)


def evaluate(
    path: str | Path,
    windows: Windows,
    reference: Reference | None = None,
    recipe: str | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    runtime: Runtime = "torch",
    progress: Progress = silent,
    scores: Scores | None = None,
) -> Row:
    """Return the figures of one model, float or packed, on the windows of a text.

    runtime: "torch" decodes the weights and computes in float, or in integers where the file says that a runtime
        does; "llama.cpp" lets that program run a GGUF file.
    scores: collects here, empty so far, for who wants the figures of every token.
    """
    started = time.monotonic()
    memory.reset_peak()
    checkpoint = open_model(path)
    theirs = None if reference is None else reference.hidden(windows, progress)
    predict: Callable[[int], Tensor]
    if runtime == "llama.cpp":
        if not isinstance(checkpoint, GgufCheckpoint):
            raise CheckpointError(f"{path}: --runtime llama.cpp runs GGUF files only")
        program = CppModel(checkpoint.file.path, windows.tokens.shape[1])
        vocabulary, weights = program.vocabulary, checkpoint.weights
        predict = partial(_predict_by_program, program, windows)
    else:
        stream = Stream(checkpoint, device_of(device), trust_remote_code)
        vocabulary, weights = stream.vocabulary, stream.weights
    if windows.tokens.max() >= vocabulary:
        raise CheckpointError(f"{path}: has {vocabulary} token ids, but the text was tokenized for another model")
    if runtime == "torch":
        itself = reference is not None and reference.stream.checkpoint.path.samefile(checkpoint.path)
        counter = _counter(progress, Path(path).name, stream.layers)
        mine = theirs if itself and theirs is not None else stream.hidden(windows.tokens, counter)
        predict = partial(_predict, stream, windows, mine)
    scores = Scores() if scores is None else scores
    count = len(windows.tokens)
    for i in range(count):
        progress("scoring", i, count)
        logits = predict(i)
        expected = None
        if reference is not None and theirs is not None:
            expected = _predict(reference.stream, windows, theirs, i).to(logits.device)
        targets = windows.tokens[i, 1:][windows.scored[i]].to(logits.device)
        scores.add(logits, targets, expected)
    progress("scoring", count, count)
    result = scores.result(windows.units)
    return Row(
        recipe=recipe or Path(path).name,
        format=checkpoint.format + ("" if runtime == "torch" else f" in {runtime}"),
        path=str(path),
        bytes=checkpoint.bytes,
        bpw=round(8 * checkpoint.bytes / weights, 4),
        protocol=windows.label,
        **asdict(result),
        seconds=round(time.monotonic() - started, 2),
        peak_rss_bytes=memory.peak_bytes(),
    )


@torch.no_grad()
def residual_errors(
    path: str | Path,
    windows: Windows,
    reference: Reference,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> list[float]:
    """Return ||x - float x|| / ||float x|| of the residual stream x after each layer, over all tokens of the windows.

    Computes both models once more, side by side, and keeps the activations of both.
    """
    streams = (Stream(open_model(path), device_of(device), trust_remote_code), reference.stream)
    both = [stream.start(windows.tokens) for stream in streams]
    found = []
    for index in range(streams[0].layers):
        progress("residual stream", index, streams[0].layers)
        for stream, activations in zip(streams, both, strict=True):
            with stream.layer(index) as layer:
                stream.run(layer, index, activations)
        noise = signal = 0.0
        for x, expected in zip(*both, strict=True):
            noise += float((x.double() - expected.double()).square().sum())
            signal += float(expected.double().square().sum())
        found.append((noise / signal) ** 0.5)
    return found


def _predict(stream: Stream, windows: Windows, hidden: Sequence[Tensor], i: int) -> Float[Tensor, "scored vocab"]:
    """Return the logits that are scored in one window, from the last layer's output."""
    counted = windows.scored[i].to(stream.device)
    return stream.finish(windows.tokens[i : i + 1], hidden[i])[0, :-1][counted]


def _predict_by_program(program: CppModel, windows: Windows, i: int) -> Float[Tensor, "scored vocab"]:
    return program.logits(windows.tokens[i])[:-1][windows.scored[i]]


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
