"""Small generators: random and golden LlamaGen models, and a random transformer of scales."""

import torch
from conftest import ROOT, make_tiny
from next_scale_golden import make_transformer

from svqvae_hf import LlamaGenConfig, LlamaGenForCausalLM, SVQVAEAutoregressivePipeline, SVQVAENextScalePipeline

TRAINED = [1, 2, 3, 4]
NAMES = ["cat", "dog", "fox"]
GOLDEN = ROOT / "tests" / "golden"


def make_autoregressive(class_names=None, **config) -> SVQVAEAutoregressivePipeline:
    """A pipeline with 64 codes and 3 classes, of images of 4 x 4 ids, 16 x 16 pixels.

    The next id depends strongly on the ids before.
    """
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    codes = {"codebook_size": 64, "num_classes": 3, "grid_size": 4}
    model = LlamaGenForCausalLM(LlamaGenConfig(**(codes | sizes | {"initializer_range": 0.5} | config))).eval()
    pipeline = SVQVAEAutoregressivePipeline(make_tiny(), model, class_names=class_names)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_next_scale(**arguments) -> SVQVAENextScalePipeline:
    """A pipeline with f = 4, 64 codes and 3 classes, for 16 x 16 pixels."""
    pipeline = SVQVAENextScalePipeline(make_tiny(), make_transformer(), **({"schedule": TRAINED} | arguments))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_llamagen(kind, grid_size=4, dtype=None, **components) -> SVQVAEAutoregressivePipeline:
    """A pipeline of images of 4 x 4 ids, 16 x 16 pixels."""
    file, options = GOLDEN / f"llamagen_gpt_{kind}_tiny.pt", {"grid_size": grid_size, "num_attention_heads": 4}
    model = LlamaGenForCausalLM.from_single_file(file, **options, dtype=dtype)
    pipeline = SVQVAEAutoregressivePipeline(make_tiny(codebook_size=256), model, **components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
