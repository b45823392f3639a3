"""What models cost to run, side by side: memory, time to the first token, tokens a second, and what was lost.

Each runs in a process of its own, so that its memory is its own. They take turns, one
round each, so that what else the machine does meets all of them; figures are medians
of the rounds, and a ratio is the median of the ratios within a round.
"""

from __future__ import annotations

import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from llmquant import errors, evaluation, inference, memory
from llmquant.cpp_runtime import CppModel
from llmquant.errors import DataError, LlmquantError
from llmquant.evaluation import Runtime
from llmquant.gguf_checkpoint import GgufCheckpoint
from llmquant.packed import open_model
from llmquant.progress import Progress, silent
from llmquant.stream import context_of

TEXT = "The quick brown fox jumps over the lazy dog. "


@dataclass(frozen=True)
class Settings:
    """How models are measured.

    prompt, generated: tokens. rounds: in which each model is measured once.
    """

    prompt: int = 128
    generated: int = 32
    rounds: int = 5
    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Cost:
    """One line of a benchmark. Ratios are to the first line: above 1 is faster.

    weight_bytes: of the weights in memory; in llama.cpp, of the file. peak_bytes: of the process (of the GPU where that
        computes), loading included.
    first_token_seconds: from a prompt of ``Settings.prompt`` tokens to the first new one.
    prompt_rate, generation_rate: tokens a second; the second one after the first new token.
    """

    path: str
    format: str
    runtime: str
    weight_bytes: int
    peak_bytes: int
    first_token_seconds: float
    prompt_rate: float
    prompt_ratio: float
    generation_rate: float
    generation_ratio: float
    perplexity: float | None = None
    kld_mean: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


Round = tuple[float, float]
"""Seconds to the first token, and for each later one."""


def bench(
    paths: Sequence[str | Path],
    reference: str | Path | None = None,
    text: str | Path | None = None,
    max_tokens: int | None = None,
    settings: Settings = Settings(),
    progress: Progress = silent,
) -> list[Cost]:
    """Return a line for every model; a GGUF file gets another one in llama.cpp, where cyllama is installed.

    reference: the float model, measured first; with a text, divergences are from it.
    text: with it, every model's perplexity (protocol llama.cpp), of its decoded weights or in llama.cpp.
    """
    models = [*([reference] if reference else []), *(p for p in paths if str(p) != str(reference))]
    runs = [(str(model), runtime) for model in models for runtime in _runtimes(model)]
    with ExitStack() as stack:
        workers = []
        for i, (path, runtime) in enumerate(runs):
            progress("loading", i, len(runs))
            workers.append(stack.enter_context(_worker(path, runtime, settings)))
        rounds: list[list[Round]] = [[] for _ in runs]
        for i in range(settings.rounds + 1):  # the first one only warms up
            progress("measuring", i, settings.rounds + 1)
            for found, worker in zip(rounds, workers, strict=True):
                seconds = _ask(worker)
                if i:
                    found.append(seconds)
        sizes = [_ask(worker, last=True) for worker in workers]
    costs = []
    for (path, runtime), found, (format_, weights, peak) in zip(runs, rounds, sizes, strict=True):
        first = statistics.median(f for f, _ in found)
        prompt, generation = (
            statistics.median(theirs[i] / mine[i] for theirs, mine in zip(rounds[0], found, strict=True))
            for i in (0, 1)
        )
        rate = 1 / statistics.median(later for _, later in found)
        costs.append(
            Cost(path, format_, runtime, weights, peak, first, settings.prompt / first, prompt, rate, generation)
        )
    return costs if text is None else _with_accuracy(costs, runs, reference, text, max_tokens, settings, progress)


def _runtimes(model: str | Path) -> list[Runtime]:
    gguf = isinstance(open_model(model), GgufCheckpoint)
    return ["torch", "llama.cpp"] if gguf and find_spec("cyllama") else ["torch"]


def _with_accuracy(
    costs: Sequence[Cost],
    runs: Sequence[tuple[str, Runtime]],
    reference: str | Path | None,
    text: str | Path,
    max_tokens: int | None,
    settings: Settings,
    progress: Progress,
) -> list[Cost]:
    device, trust = settings.device, settings.trust_remote_code
    windows = evaluation.read_windows(runs[0][0], text, "llama.cpp", max_tokens)
    base = None if reference is None else evaluation.Reference(reference, device, trust)
    found = []
    for cost, (path, runtime) in zip(costs, runs, strict=True):
        row = evaluation.evaluate(path, windows, base, None, device, trust, runtime, progress)
        found.append(Cost(**cost.as_dict() | {"perplexity": row.perplexity, "kld_mean": row.kld_mean}))
    return found


@contextmanager
def _worker(path: str, runtime: Runtime, settings: Settings) -> Iterator[Connection]:
    """Start a process that measures one model; give the end of a pipe to it once the model is loaded."""
    here, there = multiprocessing.Pipe()
    arguments = (there, path, runtime, settings, torch.get_num_threads())
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=arguments, daemon=True)
    process.start()
    there.close()
    try:
        with closing(here):
            _answer(here)
            yield here
    finally:
        process.terminate()
        process.join()


def _ask(worker: Connection, last: bool = False) -> Any:
    worker.send(last)
    return _answer(worker)


def _answer(worker: Connection) -> Any:
    try:
        found = worker.recv()
    except EOFError:
        raise LlmquantError("bench: a process ended before it was done; there may be too little memory") from None
    if isinstance(found, tuple) and found[0] == "error":
        raise getattr(errors, found[1])(found[2])
    return found


def _serve(pipe: Connection, path: str, runtime: Runtime, settings: Settings, threads: int) -> None:
    """Load a model, and measure it as often as the other end of the pipe says."""
    torch.set_num_threads(threads)
    try:
        memory.reset_peak()
        start = _in_program if runtime == "llama.cpp" else _in_this_process
        measure, weights, peak = start(path, settings)
        pipe.send(None)
        while not pipe.recv():
            pipe.send(measure())
        pipe.send((open_model(path).format, weights, peak()))
    except LlmquantError as error:
        pipe.send(("error", type(error).__name__, str(error)))
    except (EOFError, BrokenPipeError):  # no one listens any more
        return


def _in_this_process(path: str, settings: Settings) -> tuple[Callable[[], Round], int, Callable[[], int]]:
    """Return what measures a model once, the bytes of its weights, and what tells the peak memory."""
    model = inference.load(path, settings.dtype, settings.device, settings.trust_remote_code)
    context = context_of(model.config)
    if settings.prompt + settings.generated > context:
        raise DataError(
            f"{path}: takes {context} tokens at most, not {settings.prompt} and {settings.generated} more. "
            "Lower --prompt or --generated"
        )
    ids = torch.tensor([_prompt(inference.load_tokenizer(path)(TEXT)["input_ids"], settings)], device=model.device)
    cuda = model.device.type == "cuda"

    @torch.no_grad()
    def measure() -> Round:
        times = [time.perf_counter()]
        cache, new = DynamicCache(config=model.config), ids
        for _ in range(settings.generated):
            logits = model(new, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            new = logits[:, -1:].argmax(-1)
            new.item()  # which waits for a GPU
            times.append(time.perf_counter())
        return times[1] - times[0], (times[-1] - times[1]) / (settings.generated - 1)

    def peak() -> int:
        return int(torch.cuda.max_memory_allocated()) if cuda else memory.peak_bytes()

    gc.collect()
    return measure, inference.weight_bytes(model), peak


def _in_program(path: str, settings: Settings) -> tuple[Callable[[], Round], int, Callable[[], int]]:
    checkpoint = open_model(path)
    assert isinstance(checkpoint, GgufCheckpoint)
    program = CppModel(checkpoint.file.path, settings.prompt + settings.generated)
    ids = _prompt(program.tokens(TEXT), settings)

    def measure() -> Round:
        times = [time.perf_counter()]
        for _, _ in zip(range(settings.generated), program.greedy(ids), strict=False):
            times.append(time.perf_counter())
        return times[1] - times[0], (times[-1] - times[1]) / (settings.generated - 1)

    return measure, checkpoint.bytes, memory.peak_bytes


def _prompt(ids: Sequence[int], settings: Settings) -> list[int]:
    if not ids:
        raise DataError("bench: the tokenizer makes nothing of an English sentence")
    return [ids[i % len(ids)] for i in range(settings.prompt)]
