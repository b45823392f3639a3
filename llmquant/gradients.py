"""How much the model's predictions mind an error in what the token embedding gives.

A row of the embedding is not multiplied with activations, so there is no Hessian of
inputs. What it gives enters the residual stream, though, where some directions
matter more than others by orders of magnitude. Rounded to a row whose error is e,
the model diverges by about e F eᵀ / 2 nats a token, with the Fisher information

    F = E[g gᵀ], g the gradient of the log probability of the tokens that follow,
        drawn from the model itself, with respect to what the embedding gave

(Martens 2014, https://arxiv.org/abs/1412.1193, section 5). That has the form of an
algorithm's own objective, so F stands in for the Hessian, and error feedback moves
a row's rounding errors into directions that nobody looks at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llmquant import calibrate, memory
from llmquant.stats import Stats
from llmquant.stream import Stream

TOKENS = 8192  # that gradients are taken of
SHRINK = 0.1
"""Of F towards a multiple of the identity: no text has all tokens, and coarse grids leave the range of a quadratic. On
held-out text 0.03 is better for 4 bits, 0.3 for 2, both by little."""


def embedding_stats(stream: Stream, tokens: Int[Tensor, "sequences time"], also_head: bool, seed: int = 0) -> Stats:
    """Return the statistics with which an algorithm rounds the embedding's rows: the Fisher information as Hessian.

    also_head: the embedding is the output matrix too. What that use costs is added: E[(1 - sum(p²)) h hᵀ] of the
        activations h that it reads and the probabilities p that it gives, as an error z of a logit with the
        probability p costs p (1 - p) z² / 2.
    tokens: the first ``TOKENS`` of them are used. The float model computes them forth and back, as many sequences at
        a time as there is memory for what every layer reads.
    """
    tokens = tokens[: max(TOKENS // tokens.shape[1], 1)]
    generator = torch.Generator(stream.device).manual_seed(seed)
    total = torch.zeros(stream.hidden_size, stream.hidden_size, device=stream.device)
    layer_bytes = tokens.shape[1] * stream.hidden_size * stream.dtype.itemsize
    at_once = memory.available_bytes(stream.device) // (4 * stream.layers * layer_bytes)
    for part in torch.split(tokens, max(at_once, 1)):
        for of_embedding, of_head in _gradients(stream, part, generator):
            total.addmm_(of_embedding.T, of_embedding)
            if also_head:
                total.addmm_(of_head.T, of_head)
    fisher = total / tokens.numel()
    fisher.diagonal().add_(SHRINK * fisher.diagonal().mean())
    square_mean = fisher.diagonal().clone()
    return Stats(fisher, square_mean, square_mean.sqrt(), tokens.numel())


def _gradients(
    stream: Stream, tokens: Int[Tensor, "sequences time"], generator: torch.Generator
) -> Iterator[tuple[Float[Tensor, "tokens hidden"], Float[Tensor, "tokens hidden"]]]:
    """Yield for each batch its gradients at the embedding, and what the output matrix reads, weighted."""
    activations = stream.start(tokens)
    read = []  # by every layer, batch by batch
    for index in range(stream.layers):
        read.append(list(activations.batches))
        with stream.layer(index) as layer:
            stream.run(layer, index, activations)
    batches = torch.split(tokens.to(stream.device), len(activations.batches[0]))
    gradients, heads = [], []
    for of_batch, x in zip(batches, activations.batches, strict=True):
        ends = [
            _at_the_end(stream, t, y, generator)
            for t, y in zip(torch.split(of_batch, 1), torch.split(x, 1), strict=True)
        ]
        gradients.append(torch.cat([gradient for gradient, _ in ends]))
        heads.append(torch.cat([head for _, head in ends]))
    for index in reversed(range(stream.layers)):
        with stream.layer(index) as layer:
            for i, x in enumerate(read.pop()):
                forward = partial(calibrate.run_layer, layer, call=activations.call(x, index))
                gradients[i] = _pulled_back(forward, x, gradients[i])
    for of_batch, gradient, head in zip(batches, gradients, heads, strict=True):
        x = stream.model.get_submodule(stream.spec.embed)(of_batch)
        embedded = _pulled_back(partial(_first_input, stream, of_batch), x, gradient)
        yield embedded.flatten(0, 1).float(), head


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


def _pulled_back(forward: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient at x from that at forward(x)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (found,) = torch.autograd.grad(forward(x), x, gradient)
    return found


def _first_input(
    stream: Stream, tokens: Int[Tensor, "sequences time"], embedded: Float[Tensor, "sequences time hidden"]
) -> Float[Tensor, "sequences time hidden"]:
    """Return what the first layer reads if the embedding gives ``embedded``."""
    module = stream.model.get_submodule(stream.spec.embed)
    with module.register_forward_hook(lambda *_: embedded):
        return calibrate.start(stream.model, stream.spec, tokens)[0]
