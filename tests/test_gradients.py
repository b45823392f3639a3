"""Gradients at the embedding, a layer at a time, against autograd through the whole model."""

import pytest
import torch
import transformers as hf

from llmquant import gradients
from llmquant import stream as stream_module
from llmquant.run import load_float
from llmquant.stream import Stream

VOCABULARY = 384  # of the tokenizer
SHARED = {"vocab_size": VOCABULARY, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 1}
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**SHARED, **LLAMA),
    "gemma3, tied, scaled embedding": lambda: hf.Gemma3TextConfig(**SHARED, **LLAMA, head_dim=8, sliding_window=8),
    "bloom, tied, a norm behind the embedding": lambda: hf.BloomConfig(**SHARED, hidden_size=32, n_layer=2, n_head=4),
    "gpt2, positions": lambda: hf.GPT2Config(
        **SHARED, n_positions=64, n_embd=32, n_layer=2, n_head=4, tie_word_embeddings=False
    ),
    "mixtral": lambda: hf.MixtralConfig(**SHARED, **LLAMA, num_local_experts=4, num_experts_per_tok=2),
}


def expected(model, tokens):
    """The sum of g gᵀ, by one backward pass through the whole model, sequence by sequence as the draws go."""
    generator = torch.Generator()
    total = torch.zeros(32, 32)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for number, sequence in enumerate(tokens.split(1)):
        generator.manual_seed(number)
        seen = {}

        def keep(_module, _inputs, output, seen=seen):
            seen["embedded"] = output.detach().requires_grad_()
            return seen["embedded"]

        def read(_module, inputs, seen=seen):
            seen["head"] = inputs[0].detach()

        hooks = (
            model.get_input_embeddings().register_forward_hook(keep),
            model.get_output_embeddings().register_forward_pre_hook(read),
        )
        log_p = model(sequence, use_cache=False).logits[0].log_softmax(1)
        for hook in hooks:
            hook.remove()
        p = log_p.detach().exp()
        drawn = torch.multinomial(p, 1, generator=generator)
        (g,) = torch.autograd.grad(log_p.gather(1, drawn).sum(), seen["embedded"])
        total += g[0].T @ g[0]
        if tied:
            share = (1 - p.square().sum(1))[:, None]
            total += seen["head"][0].T @ (share * seen["head"][0])
    return total / tokens.numel()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_information_at_the_embedding_is_that_of_autograd(name, save_model, tmp_path, monkeypatch):
    folder = save_model(tmp_path / "model", CONFIGS[name]())
    also_head = "tied" in name
    tokens = torch.randint(2, VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(1))
    stats = gradients.measure(Stream(load_float(folder), torch.device("cpu")), tokens, also_head)
    truth = expected(hf.AutoModelForCausalLM.from_pretrained(folder).eval(), tokens)
    truth.diagonal().add_(gradients.SHRINK * truth.diagonal().mean())
    torch.testing.assert_close(stats.hessian, truth, rtol=1e-3, atol=1e-4 * float(truth.abs().max()))
    assert stats.tokens == 60
    monkeypatch.setattr(stream_module, "BATCH_TOKENS", 24)
    of_all = gradients.measure(Stream(load_float(folder), torch.device("cpu")), tokens, also_head)
    torch.testing.assert_close(of_all.hessian, stats.hessian)
    again = gradients.measure(
        Stream(load_float(folder), torch.device("cpu")), tokens, also_head, folder=tmp_path / "files"
    )
    assert list((tmp_path / "files").iterdir())
    assert torch.equal(again.hessian, of_all.hessian)


def test_no_more_tokens_are_used_than_stated(llama, monkeypatch):
    monkeypatch.setattr(gradients, "TOKENS", 40)
    tokens = torch.randint(2, VOCABULARY, (9, 16), generator=torch.Generator().manual_seed(1))
    assert gradients.measure(Stream(load_float(llama), torch.device("cpu")), tokens, False).tokens == 32


LINEARS = {
    "llama": ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"),
    "gpt2, positions": ("attn.c_attn", "mlp.c_proj"),
    "mixtral": ("self_attn.o_proj", "mlp.experts"),  # what the experts give, added up
}


@pytest.mark.parametrize("name", LINEARS)
def test_the_information_at_outputs_is_that_of_autograd(name, save_model, tmp_path, monkeypatch):
    monkeypatch.setattr(gradients, "ROWS", 20)
    folder = save_model(tmp_path / "model", CONFIGS[name]())
    tokens = torch.randint(2, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))
    stream = Stream(load_float(folder), torch.device("cpu"))
    found = {}
    gradients.measure(stream, tokens, False, [LINEARS[name]] * stream.layers, found.__setitem__)
    model = hf.AutoModelForCausalLM.from_pretrained(folder).eval()
    places = {f"{stream.spec.layers}.{i}.{local}": (i, local) for i in (0, 1) for local in LINEARS[name]}
    places |= {f"{stream.spec.layers}.{i}": (i, None) for i in (0, 1)}
    sums = dict.fromkeys(places, 0.0)
    generator = torch.Generator()
    model.requires_grad_(False)
    for number, sequence in enumerate(tokens.split(1)):
        generator.manual_seed(number)
        seen = {}

        def begin(_module, _inputs, output):
            return output.detach().requires_grad_()

        def keep(place, output, seen=seen):
            seen[place] = output[0] if isinstance(output, tuple) else output

        hooks = [model.get_input_embeddings().register_forward_hook(begin)]
        for place in places:
            module = model.get_submodule(place)
            hooks.append(module.register_forward_hook(lambda _m, _i, output, place=place: keep(place, output)))
        log_p = model(sequence, use_cache=False).logits[0].log_softmax(1)
        for hook in hooks:
            hook.remove()
        drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
        gradients_ = torch.autograd.grad(log_p.gather(1, drawn).sum(), list(seen.values()))
        for (place, output), g in zip(seen.items(), gradients_, strict=True):
            relative = g if places[place][1] else g * output.detach().square().mean(-1, keepdim=True).sqrt()
            relative = relative.flatten(0, -2)
            sums[place] += relative.T @ relative
    for place, (index, local) in places.items():
        truth = sums[place] / tokens.numel()
        parts = found[index].linears[local] if local else (found[index].layer,)
        assert [len(part) for part in parts] == ([len(p) for p in truth.split(20)] if local else [32])
        row = 0
        for part in parts:
            want = truth[row : row + len(part), row : row + len(part)].clone()
            want.diagonal().add_(gradients.SHRINK * want.diagonal().mean())
            torch.testing.assert_close(part, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))
            row += len(part)
