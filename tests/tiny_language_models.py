"""Tiny random language models of three architectures with their tokenizers, and extended ones."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch
from conftest import make_tiny
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from svqvae_hf.language.extension import extend_language_model

TEXTS = ["a pear above a sailboat on white", "a cat left of a red key", "user: draw\nassistant: <draws>"]
CHAT_ML = """{% for message in messages %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""
SIZE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
FAMILIES = ("llama", "qwen", "neox")
GRIDS = [(2, 2), (2, 3), (4, 4)]


def byte_tokenizer(**special) -> PreTrainedTokenizerFast:
    """Tokenizer of bytes, as Qwen's and GPT-NeoX's are."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    names = sorted(special.values())
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=names, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def space_tokenizer(**special) -> PreTrainedTokenizerFast:
    """Tokenizer with a mark for spaces and bytes for what it does not know, as Llama's is."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    names = ["<unk>", *sorted(special.values()), *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=names, show_progress=False)
    tokenizer.train_from_iterator([text.replace(" ", "▁") for text in TEXTS], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special)


def make_language_model(family: str):
    """Language model and tokenizer: `llama` ties its head, `qwen` has padded rows, `neox` names layers otherwise."""
    torch.manual_seed(0)
    if family == "llama":
        tokenizer = space_tokenizer(bos_token="<s>", eos_token="</s>")
        config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **SIZE)
        model = LlamaForCausalLM(config)
    elif family == "qwen":
        tokenizer = byte_tokenizer(eos_token="<|im_end|>", pad_token="<|endoftext|>", additional="<|im_start|>")
        tokenizer.chat_template = CHAT_ML
        config = Qwen2Config(vocab_size=len(tokenizer) + 100, tie_word_embeddings=False, num_key_value_heads=2, **SIZE)
        model = Qwen2ForCausalLM(config)
    else:
        tokenizer = byte_tokenizer(eos_token="<|endoftext|>")
        model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **SIZE))
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.config.bos_token_id = model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


def save_language_model(folder: Path, family: str, **options) -> Path:
    """Saves a tiny language model with its tokenizer."""
    model, tokenizer = make_language_model(family)
    model.to(options.pop("dtype", torch.float32)).save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)
    return folder


@cache
def extended(family: str) -> Path:
    """Folder of an extended language model, with its original in `original` beside it. Read-only."""
    folder = Path(tempfile.mkdtemp(prefix="svqvae-language-"))
    atexit.register(shutil.rmtree, folder)
    make_tiny(sample_size=16).save_pretrained(folder / "vqvae")
    save_language_model(folder / "original", family)
    extend_language_model(folder / "original", folder / "extended", folder / "vqvae", GRIDS)
    return folder / "extended"


@cache
def load_extended(family: str = "llama"):
    """An extended language model and its processor. Read-only."""
    folder = extended(family)
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
