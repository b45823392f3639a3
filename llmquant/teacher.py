"""The float model that a student learns from: what it predicts for the sequences of a training.

Its layers are computed once, one after the other, before the first step. What the last one gives is kept in files, so
that while the student is trained only the teacher's output matrix is in memory, and a text costs it nothing when it is
read again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from torch import Tensor, nn

from llmquant import memory
from llmquant.distillation import Predictions
from llmquant.progress import Progress
from llmquant.stream import Stream, batch_file


@contextmanager
def heard(module: nn.Module) -> Iterator[list[Tensor]]:
    """While active, gather what a module reads."""
    inputs: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    try:
        yield inputs
    finally:
        hook.remove()


class Teacher:
    """What the float model predicts for some sequences of equal length."""

    def __init__(
        self,
        stream: Stream,
        tokens: Int[Tensor, "sequences time"],
        folder: Path,
        name: str,
        computing: AbstractContextManager[Any],
        progress: Progress,
    ) -> None:
        """Compute all layers; every rank its share of the sequences, and all can then ask for each.

        stream: of the float model; what is outside its layers stays loaded. folder: of this rank, beside those of the
        others, which have their numbers for names. name: of the files' folder in it. computing: with what precision.
        """
        ranks = stream.ranks
        self._stream, self.tokens = stream, tokens
        self._folders = [folder.parent / str(rank) / name for rank in range(ranks.size)]
        stream.load()
        missing = max(ranks.size - len(tokens), 0)  # every rank needs one to compute
        tokens = torch.cat([tokens, tokens[:1].expand(missing, -1)])
        self._batch = stream.batches(*tokens.shape)[0].stop
        with computing:
            outputs = stream.start(tokens, folder / name)
            for index in range(stream.layers):
                progress("the float model", index, stream.layers)
                with stream.layer(index) as layer:
                    stream.run(layer, index, outputs)
        memory.trim()
        ranks.wait()

    def predict(self, these: Sequence[int]) -> Predictions:
        """Return what is predicted for some of the sequences."""
        outputs = torch.stack([self._output(i) for i in these]).to(self._stream.device)
        with heard(self._stream.model.get_submodule(self._stream.spec.head)) as inputs:
            logits = self._stream.finish(self.tokens[list(these)], outputs)
        return Predictions(logits, *inputs)

    def _output(self, sequence: int) -> Float[Tensor, "time hidden"]:
        """Return what the last layer gives for a sequence."""
        batch, row = divmod(sequence, self._batch)
        number, rank = divmod(batch, len(self._folders))
        with safe_open(batch_file(self._folders[rank], number), "pt") as file:
            output: Tensor = file.get_slice("x")[row]
        return output
