"""Each protocol against the definition it is named after."""

import math

import pytest
import torch
import transformers as hf

from llmquant import protocols
from llmquant.errors import DataError, RecipeError
from llmquant.metrics import Scores


@pytest.fixture(scope="module")
def model():
    config = hf.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=0)
    torch.manual_seed(0)
    return hf.GPT2LMHeadModel(config).eval()


IDS = torch.randint(1, 50, (101,), generator=torch.Generator().manual_seed(0)).tolist()


@torch.no_grad()
def perplexity(model, windows):
    scores = Scores()
    for tokens, scored in zip(windows.tokens, windows.scored, strict=True):
        scores.add(model(tokens[None]).logits[0, :-1][scored], tokens[1:][scored])
    return scores.result(windows.units).perplexity


@torch.no_grad()
def log_p(model, context, token):
    return float(model(torch.tensor([context])).logits[0, -1].log_softmax(-1)[token])


def test_gptq_is_the_mean_over_windows_side_by_side(model):
    windows = protocols.windows(protocols.named("gptq"), IDS, 0, "text", 16)
    assert windows.tokens.flatten().tolist() == IDS[:96]
    losses = []
    with torch.no_grad():
        for i in range(6):  # the evaluation loop of the GPTQ paper: mean loss times context, over all tokens
            batch = torch.tensor([IDS[16 * i : 16 * (i + 1)]])
            losses.append(float(model(batch, labels=batch).loss) * 16)
    assert perplexity(model, windows) == pytest.approx(math.exp(sum(losses) / (6 * 16)), rel=1e-5)
    assert windows.label == "gptq: text, context 16, no overlap, no BOS, 6 windows, 90 tokens scored"


def test_llama_cpp_scores_the_second_half_of_each_window_behind_bos(model):
    windows = protocols.windows(protocols.named("llama.cpp"), IDS, 0, "text", 16)
    stream = [0, *IDS]
    total, count = 0.0, 0
    for start in range(0, len(stream) - 15, 16):
        chunk = [0, *stream[start + 1 : start + 16]]
        for position in range(9, 16):  # 16 / 2 - 1 predictions, as llama-perplexity counts
            total -= log_p(model, chunk[:position], chunk[position])
            count += 1
    assert count == int(windows.scored.sum())
    assert perplexity(model, windows) == pytest.approx(math.exp(total / count), rel=1e-5)
    full = protocols.windows(protocols.named("llama.cpp"), list(range(1, 512)), 0, "text", 4096)
    assert int(full.scored.sum()) == 255


def test_llama_cpp_without_a_bos_token_changes_no_token(model):
    windows = protocols.windows(protocols.named("llama.cpp"), IDS, None, "text", 16)
    assert windows.tokens.flatten().tolist() == IDS[:96]
    assert "no BOS" in windows.label


def test_sliding_is_the_loop_of_the_transformers_guide(model):
    windows = protocols.windows(protocols.named("sliding"), IDS, 0, "text", 16)
    total, count, scored_to = 0.0, 0, 1  # the first token has nothing before it
    for begin in range(0, len(IDS), 8):
        end = min(begin + 16, len(IDS))
        begin = end - 16  # the last window is full: at least as much context as the guide gives
        for position in range(scored_to, end):
            total -= log_p(model, IDS[begin:position], IDS[position])
            count += 1
        scored_to = end
        if end == len(IDS):
            break
    assert count == len(IDS) - 1 == int(windows.scored.sum())
    assert perplexity(model, windows) == pytest.approx(math.exp(total / count), rel=1e-5)


def test_word_predicts_every_token_once_and_counts_words(model):
    windows = protocols.windows(protocols.named("word"), IDS, 0, "text", 16, words=40)
    assert int(windows.scored.sum()) == len(IDS)
    stream, total, scored_to = [0, *IDS], 0.0, 1
    for begin in (0, 15, 30, 45, 60, 75, len(stream) - 16):  # each begins with the last token of the one before
        for position in range(scored_to, begin + 16):
            total -= log_p(model, stream[begin:position], stream[position])
        scored_to = begin + 16
    assert perplexity(model, windows) == pytest.approx(math.exp(total / 40), rel=1e-5)


def test_a_text_shorter_than_a_window_is_refused_with_its_length():
    with pytest.raises(DataError, match="has 5 tokens, and protocol gptq needs windows of 16"):
        protocols.windows(protocols.named("gptq"), [1, 2, 3, 4, 5], None, "text", 16)


def test_an_unknown_protocol_names_the_known_ones():
    with pytest.raises(RecipeError, match=r"Known: gptq, llama\.cpp, sliding, word"):
        protocols.named("lama.cpp")
