"""FlexVAR's tiny transformer with the outputs of the original code, and a tiny one of our own."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from svqvae_hf import NextScaleTransformer

GOLDEN = Path(__file__).parent / "golden" / "flexvar_transformer_tiny.pth"
OUTPUTS = load_file(GOLDEN.with_suffix(".outputs.safetensors"))
NO_CLASS = 10
SIZES = [(1, 1), (2, 1), (3, 2), (5, 4)]


def make_transformer(**config) -> NextScaleTransformer:
    """A transformer whose logits depend strongly on all its inputs."""
    torch.manual_seed(0)
    tiny = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "num_classes": 3}
    tiny |= {"codebook_size": 64, "codebook_embed_dim": 8, "position_size": 6}
    transformer = NextScaleTransformer(**(tiny | config)).eval()
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return transformer


def make_codes(transformer, sizes=SIZES, batch=2) -> list[torch.Tensor]:
    dim = transformer.config["codebook_embed_dim"]
    return [F.normalize(torch.randn(batch, dim, *size), dim=1) for size in sizes]


@dataclass
class Golden:
    """Teacher forcing on one schedule of the golden file."""

    name: str

    @property
    def sizes(self) -> list[tuple[int, int]]:
        return [(side, side) for side in OUTPUTS[f"{self.name}.schedule"].tolist()]

    def split(self, key: str) -> list[torch.Tensor]:
        """Ids of a run, one grid per scale."""
        parts = OUTPUTS[f"{self.name}.{key}.ids"].long().split([height * width for height, width in self.sizes], 1)
        return [ids.unflatten(1, size) for ids, size in zip(parts, self.sizes, strict=True)]

    @property
    def codes(self) -> list[torch.Tensor]:
        codebook = F.normalize(OUTPUTS["codebook"], dim=-1)
        return [codebook[ids].permute(0, 3, 1, 2) for ids in self.split("teacher_forced")]
