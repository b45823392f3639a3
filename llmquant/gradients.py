"""How much the model's predictions mind an error in what the token embedding, or a linear, gives.

A row of the embedding is not multiplied with activations, so there is no Hessian of
inputs. What it gives enters the residual stream, though, where some directions
matter more than others by orders of magnitude. Rounded to a row whose error is e,
the model diverges by about e F eᵀ / 2 nats a token, with the Fisher information

    F = E[g gᵀ], g the gradient of the log probability of the tokens that follow,
        drawn from the model itself, with respect to what the embedding gave

(Martens 2014, https://arxiv.org/abs/1412.1193, section 5). That has the form of an
algorithm's own objective, so F stands in for the Hessian, and error feedback moves
a row's rounding errors into directions that nobody looks at. For a linear, whose inputs have a Hessian, F of its
outputs tells which of them can absorb each other's errors (``algorithms.gptq``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn

from llmquant import calibrate
from llmquant.stats import Stats
from llmquant.stream import Stream

ROWS = 512  # whose outputs are seen together
TOKENS = 8192  # that gradients are taken of
SCALE = 2.0**50
"""Of gradients on their way back, where the dtype's range allows: products with small probabilities would else be
subnormal numbers, on which a CPU takes ten times as long."""
SHRINK = 0.1
"""Of F towards a multiple of the identity: no text has all tokens, and coarse grids leave the range of a quadratic. On
selection text 0.03 was better for 4 bits, 0.3 for 2, both by little."""


@dataclass(frozen=True)
class LayerInformation:
    """Fisher information of the outputs of a layer's linears, and of its own.

    linears: by the module's name in the layer; of ``ROWS`` rows after the other.
    layer: every token's error as a share of the token's size.
    """

    linears: Mapping[str, tuple[Float[Tensor, "_n _n"], ...]]
    layer: Float[Tensor, "hidden hidden"]


def measure(
    stream: Stream,
    tokens: Int[Tensor, "sequences time"],
    also_head: bool,
    linears: Sequence[Sequence[str]] = (),
    keep: Callable[[int, LayerInformation], None] = lambda index, of_layer: None,
    folder: Path | None = None,
    seed: int = 0,
) -> Stats:
    """Return how much the model minds errors of what the embedding gives, as an algorithm's statistics.

    also_head: the embedding is the output matrix too. What that use costs is added: E[(1 - sum(p²)) h hᵀ] of the
        activations h that it reads and the probabilities p that it gives, as an error z of a logit with the
        probability p costs p (1 - p) z² / 2.
    tokens: the first ``TOKENS`` of them are used.
    linears: the modules whose outputs are to be known, a sequence for each layer; linears, or what adds up the outputs
        of experts. keep: told what is known of a layer, the last one first.
    folder: a new one, for what every layer reads; None: that waits in memory.
    """
    tokens = tokens[: max(TOKENS // tokens.shape[1], stream.ranks.size)]
    generator = torch.Generator(stream.device)
    scale = SCALE if torch.finfo(stream.dtype).max > 1e38 else 1.0
    places = [None if folder is None else folder / str(index) for index in range(stream.layers + 1)]
    read = [stream.start(tokens, places[0])]  # by every layer; at last, the output of all
    for index, place in enumerate(places[1:]):
        with stream.layer(index) as layer:
            read.append(stream.passed(layer, index, read[-1], place))
    given = read.pop()
    own_batches = stream.own_batches(*tokens.shape)
    batches = [tokens[these].to(stream.device) for these in own_batches]
    total = torch.zeros(stream.hidden_size, stream.hidden_size, dtype=torch.float64, device=stream.device)
    gradients = []
    for these, of_batch, x in zip(own_batches, batches, given, strict=True):
        ends = [
            _at_the_end(stream, t[None], y[None], generator.manual_seed(seed + number))
            for number, t, y in zip(range(these.start, these.stop), of_batch, x, strict=True)
        ]
        gradients.append(torch.cat([gradient for gradient, _ in ends]) * scale)
        if also_head:
            head = torch.cat([head for _, head in ends])
            total += head.T @ head
    for index in reversed(range(stream.layers)):
        own = torch.zeros_like(total)
        sums: dict[str, list[Tensor]] = {}
        for y, gradient in zip(given, gradients, strict=True):
            sizes = y.float().square().mean(-1, keepdim=True).sqrt()
            relative = (gradient.float() / scale * sizes).flatten(0, 1)
            own += relative.T @ relative
        given = read.pop()
        with stream.layer(index) as layer:
            for i, x in enumerate(given):
                forward = partial(calibrate.run_layer, layer, call=given.call(x, index))
                with _kept(layer, linears[index] if linears else ()) as outputs:
                    gradients[i], *others = _pulled_back(forward, x, gradients[i], outputs)
                for name, gradient in zip(outputs, others, strict=True):
                    _add(sums, name, gradient.flatten(0, -2).float() / scale)
        stream.ranks.add(own, *(part for parts in sums.values() for part in parts))
        count = tokens.numel()
        known = {name: tuple(_shrunk(part / count) for part in parts) for name, parts in sums.items()}
        keep(index, LayerInformation(known, _shrunk(own / count)))
    for of_batch, gradient in zip(batches, gradients, strict=True):
        x = stream.model.get_submodule(stream.spec.embed)(of_batch)
        (embedded,) = _pulled_back(partial(_first_input, stream, of_batch), x, gradient, {})
        flat = embedded.flatten(0, 1).float() / scale
        total += flat.T @ flat
    stream.ranks.add(total)
    fisher = _shrunk(total / tokens.numel())
    square_mean = fisher.diagonal().clone()
    return Stats(fisher, square_mean, square_mean.sqrt(), tokens.numel())


def _add(sums: dict[str, list[Tensor]], name: str, gradient: Float[Tensor, "tokens rows"]) -> None:
    """Add the gradients at a linear's outputs to its sums, of ``ROWS`` rows after the other."""
    parts = torch.split(gradient, ROWS, dim=1)
    if name not in sums:
        sums[name] = [gradient.new_zeros(part.shape[1], part.shape[1], dtype=torch.float64) for part in parts]
    for of_part, part in zip(sums[name], parts, strict=True):
        of_part += part.T @ part


def _shrunk(sums: Float64[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    fisher = sums.float()
    fisher.diagonal().add_(SHRINK * fisher.diagonal().mean())
    return fisher


@contextmanager
def _kept(layer: nn.Module, linears: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Give a mapping that gets the outputs of some linears, as part of the graph, when the layer is computed."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str, _linear: nn.Module, _inputs: object, output: Tensor) -> None:
        outputs[name] = output

    with ExitStack() as hooks:
        for name in linears:
            hooks.enter_context(layer.get_submodule(name).register_forward_hook(partial(keep, name)))
        yield outputs


def _at_the_end(
    stream: Stream,
    tokens: Int[Tensor, "sequences time"],
    x: Float[Tensor, "sequences time hidden"],
    generator: torch.Generator,
) -> tuple[Float[Tensor, "sequences time hidden"], Float[Tensor, "tokens hidden"]]:
    """Return the gradient at the last layer's output, and what the output matrix reads, weighted."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = calibrate.finish(stream.model, stream.spec, tokens, x)
        log_p = logits.float().flatten(0, 1).log_softmax(1)
        p = log_p.detach().exp()
        drawn = torch.multinomial(p, 1, generator=generator)
        (gradient,) = torch.autograd.grad(log_p.gather(1, drawn).sum(), x)
    read = stream.before_head(tokens, x.detach()).flatten(0, 1).float()
    return gradient, read * (1 - p.square().sum(1, keepdim=True)).sqrt()


def _pulled_back(
    forward: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor, outputs: Mapping[str, Tensor]
) -> list[Tensor]:
    """Return the gradients at x, and at the ``outputs`` that forward(x) leaves, from that at forward(x)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = forward(x)
        at = [x, *outputs.values()]
        return list(torch.autograd.grad(y, at, gradient, materialize_grads=True))


def _first_input(
    stream: Stream, tokens: Int[Tensor, "sequences time"], embedded: Float[Tensor, "sequences time hidden"]
) -> Float[Tensor, "sequences time hidden"]:
    """Return what the first layer reads if the embedding gives ``embedded``."""
    module = stream.model.get_submodule(stream.spec.embed)
    with module.register_forward_hook(lambda *_: embedded):
        return calibrate.start(stream.model, stream.spec, tokens)[0]
