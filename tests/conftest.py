"""Tiny models, a tokenizer and text, made here: no test needs the network or a download."""

import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from llmquant.demo import text as documentation

VOCABULARY = 384


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """Two disjoint files of documentation, about 60,000 characters each."""
    folder = tmp_path_factory.mktemp("texts")
    for split in ("calibration", "evaluation"):
        (folder / f"{split}.txt").write_text(documentation.text(split)[:60_000], "utf-8")
    return folder


@pytest.fixture(scope="session")
def tokenizer(texts):
    """A byte-level BPE that puts <s> before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(texts / "calibration.txt")], trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 0)])
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def save_model(tokenizer):
    """Return a function that writes a random model of a configuration into a folder."""

    def save(folder, config, dtype=torch.float32, **options):
        generator = torch.Generator().manual_seed(0)
        model = hf.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            scale = 0.1 if parameter.ndim > 1 else 0.02
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale + (parameter.ndim == 1)
        model.to(dtype).save_pretrained(folder, **options)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def llama(save_model, tmp_path_factory):
    """A small Llama with grouped-query attention, float32."""
    config = hf.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=None,
    )
    return save_model(tmp_path_factory.mktemp("llama"), config)


@pytest.fixture
def calibrated(texts):
    """Changes that make a shipped recipe run on the small text and the small models."""
    return [
        f"calibration.path={texts / 'calibration.txt'}",
        "calibration.sequences=16",
        "calibration.length=128",
        "grid.group_size=32",
    ]


@pytest.fixture
def read_json():
    return lambda path: json.loads(path.read_text("utf-8"))
