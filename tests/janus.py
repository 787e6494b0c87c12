"""Small random JanusVQVAEs of transformers, and files that hold one."""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import JanusVQVAE, JanusVQVAEConfig

FORMATS = ("janus-vqvae", "janus")
OTHERS = ("lm_head.weight", "model.language_model.norm.weight", "model.vision_model.a", "model.aligner.fc1.bias")
GENERATION = ("model.generation_embeddings.weight", "model.generation_head.a", "model.generation_aligner.a")


def make_janus(side: int) -> JanusVQVAE:
    """Builds a model for images of `side` x `side` ids. Its codes have length one, as its encoder expects."""
    torch.manual_seed(0)
    sizes = {"base_channels": 32, "channel_multiplier": (1, 2, 2), "num_res_blocks": 1, "latent_channels": 16}
    model = JanusVQVAE(JanusVQVAEConfig(**sizes, num_embeddings=64, num_patches=side)).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.1
    codes = model.quantize.embedding.weight
    codes.data = F.normalize(codes.data, dim=1)
    return model


def save_janus(folder: Path, name: str) -> Path:
    """Saves a model alone, or under its names in Janus with weights of Janus beside it."""
    model = make_janus(6)
    if name == "janus-vqvae":
        model.save_pretrained(folder)
    else:
        named = {f"model.vqmodel.{key}": tensor for key, tensor in model.state_dict().items()}
        save_file(named | {key: torch.ones(2) for key in OTHERS + GENERATION}, folder / "model.safetensors")
    return folder / "model.safetensors"
