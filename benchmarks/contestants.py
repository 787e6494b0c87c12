"""Models to compare: ours, the original and two of diffusers, all with the widths of the released SVQVAE."""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, VQModel
from diffusers.utils import logging
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from svqvae_hf import SVQVAE
from svqvae_hf.loaders.checkpoints import read_checkpoint

sys.path.insert(0, str(Path(__file__).parent.parent / "conversion"))

from compare import load_original

OURS, ORIGINAL, VQ_MODEL, KL = "svqvae-hf", "the original", "diffusers VQModel", "diffusers AutoencoderKL"
MULTIPLIERS = (1, 2, 2, 4)
LATENT_PIXELS = 2 ** (len(MULTIPLIERS) - 1)
CODEBOOK = (16384, 8)
TRACKED_CODES = 65_536  # length of the buffer of recent ids in the original's files


@dataclass(frozen=True)
class Contestant:
    """A model and the way it runs.

    Args:
        name (`str`): `OURS`, `ORIGINAL`, `VQ_MODEL` or `KL`.
        dtype (`torch.dtype`): Precision of weights and samples.
        checkpoint (`Path`): Weights from [`make_checkpoint`] for `OURS` and `ORIGINAL`; the others are random.
        original (`Path`, *optional*): Folder with the original's `svqvae.py`.
        device (`str`): Device of the model.
        channels_last (`bool`): Whether weights and samples have that memory format.
        compiled (`bool`): Whether the model is compiled.
    """

    name: str
    dtype: torch.dtype
    checkpoint: Path
    original: Path | None
    device: str
    channels_last: bool = False
    compiled: bool = False

    @property
    def label(self) -> str:
        """Name and precision, as in the tables."""
        return f"{self.name}, {str(self.dtype).removeprefix('torch.')}"

    def load(self) -> nn.Module:
        """Loads the model."""
        logging.set_verbosity_error()  # diffusers warns about `to(dtype)`, but our codebook stays float32
        if self.name == OURS:
            model = SVQVAE.from_single_file(self.checkpoint)
        elif self.name == ORIGINAL:
            model = load_original(self.original, read_checkpoint(self.checkpoint, SVQVAE))
        else:
            base_channels = read_checkpoint(self.checkpoint, SVQVAE).config["base_channels"]
            model = make_diffusers_model(self.name, base_channels).eval()
        model.requires_grad_(False).to(self.device, self.dtype)
        if self.channels_last:
            model.to(memory_format=torch.channels_last)
        if self.compiled:
            model.compile()
        return model

    def sample(self, height: int, width: int) -> torch.Tensor:
        """Draws a random image `(1, 3, height, width)` in [0, 1], the same for all contestants."""
        sample = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return sample.to(self.device, self.dtype, memory_format=layout)

    def reconstruct(self, model: nn.Module, sample: torch.Tensor) -> torch.Tensor:
        """Encodes, quantises and decodes without tiles, by calling the model."""
        with torch.inference_mode():
            return model(sample)[0] if self.name == ORIGINAL else model(sample).sample


def make_checkpoint(path: Path, base_channels: int) -> None:
    """Writes a checkpoint as released, but with random weights and all widths times `base_channels / 128`."""
    torch.manual_seed(0)
    model = SVQVAE(
        base_channels=base_channels, encoder_ch_mult=MULTIPLIERS, decoder_ch_mult=MULTIPLIERS, z_channels=32
    )
    tracked = {"quantize.codebook_used": torch.zeros(TRACKED_CODES)}
    save_file(model.state_dict() | tracked, path)


def make_diffusers_model(name: str, base_channels: int) -> nn.Module:
    """Makes `VQModel`, the same network weight by weight, or `AutoencoderKL` with latents of 8 channels."""
    plain = len(MULTIPLIERS) - 1
    widths = {
        "block_out_channels": tuple(base_channels * multiplier for multiplier in MULTIPLIERS),
        "down_block_types": ("DownEncoderBlock2D",) * plain + ("AttnDownEncoderBlock2D",),
        "up_block_types": ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * plain,
        "layers_per_block": 2,
    }
    size, dim = CODEBOOK
    if name == VQ_MODEL:
        return VQModel(latent_channels=32, num_vq_embeddings=size, vq_embed_dim=dim, **widths)
    return AutoencoderKL(latent_channels=dim, sample_size=256, **widths)


@functools.cache
def count_operations(base_channels: int, height: int, width: int) -> int:
    """Counts the floating-point operations of encoding and decoding an image, without the code search.

    Counted on diffusers' `VQModel`, which computes every convolution at its own resolution.
    """
    with torch.device("meta"), torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model = make_diffusers_model(VQ_MODEL, base_channels).eval()
        model(torch.empty(1, 3, height, width))
    return counter.get_total_flops()


def prepare_reconstruction(contestant: Contestant, height: int, width: int) -> Callable[[], torch.Tensor]:
    """Loads and warms up a model, and returns its reconstruction of an image as a function."""
    model = contestant.load()
    contestant.reconstruct(model, contestant.sample(LATENT_PIXELS, LATENT_PIXELS))
    return functools.partial(contestant.reconstruct, model, contestant.sample(height, width))
