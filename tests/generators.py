"""Small generators: pipelines with random language models, LlamaGen's golden models and a random transformer."""

import dataclasses

import torch
from conftest import ROOT, make_tiny
from next_scale_golden import make_transformer
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from svqvae_hf import LlamaGenForCausalLM, SVQVAEAutoregressivePipeline, SVQVAENextScalePipeline
from svqvae_hf.pipelines.sequences import SequenceLayout

SCALES = (0.25, 0.5, 1.0)
LAYOUT = SequenceLayout(64, 4, 32, 16, SCALES, 3)
LATENTS = dataclasses.replace(LAYOUT, scale_from="latents")
ONE_SCALE = SequenceLayout(64, 4, 32, 16, (1.0,), 3)
TRAINED = [1, 2, 3, 4]
NAMES = ["cat", "dog", "fox"]
GOLDEN = ROOT / "tests" / "golden"
CHECKPOINT = str(GOLDEN / "llamagen_gpt_{kind}_tiny.pt")


def make_language_model(cls=LlamaForCausalLM, layout=LAYOUT, **config):
    """Builds a language model whose next token depends strongly on the tokens before."""
    torch.manual_seed(0)
    common = {
        "vocab_size": layout.vocab_size,
        "initializer_range": 0.5,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if cls is GPT2LMHeadModel:
        sizes = {"n_positions": layout.length, "n_embd": 32, "n_layer": 2, "n_head": 2}
        return cls(GPT2Config(**(common | sizes | config))).eval()
    sizes = {
        "max_position_embeddings": layout.length,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    family = {LlamaForCausalLM: LlamaConfig, Qwen2ForCausalLM: Qwen2Config, Qwen3ForCausalLM: Qwen3Config}[cls]
    return cls(family(**(common | sizes | config))).eval()


def make_autoregressive(cls=LlamaForCausalLM, layout=LAYOUT, class_names=None, **config):
    pipeline = SVQVAEAutoregressivePipeline(
        make_tiny(),
        make_language_model(cls, layout, **config),
        num_classes=layout.num_classes,
        height=layout.height,
        width=layout.width,
        scales=layout.scales,
        scale_from=layout.scale_from,
        class_names=class_names,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_next_scale(**arguments) -> SVQVAENextScalePipeline:
    """A pipeline with f = 4, 64 codes and 3 classes, for 16 x 16 pixels."""
    pipeline = SVQVAENextScalePipeline(make_tiny(), make_transformer(), **({"schedule": TRAINED} | arguments))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_llamagen(
    kind: str, grid_size: int = 4, dtype: torch.dtype | None = None, **components
) -> SVQVAEAutoregressivePipeline:
    """A pipeline of images of 4 x 4 ids, 16 x 16 pixels."""
    model = LlamaGenForCausalLM.from_single_file(
        CHECKPOINT.format(kind=kind), grid_size=grid_size, num_attention_heads=4, dtype=dtype
    )
    pipeline = SVQVAEAutoregressivePipeline.from_llamagen(make_tiny(codebook_size=256), model, **components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
