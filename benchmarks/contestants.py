"""Models to compare: ours, the original and two of diffusers, all with the widths of the released SVQVAE."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

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

OURS = "svqvae-hf"
ORIGINAL = "the original"
VQ_MODEL = "diffusers VQModel"
KL = "diffusers AutoencoderKL"
MULTIPLIERS = (1, 2, 2, 4)
LATENT_PIXELS = 2 ** (len(MULTIPLIERS) - 1)
CODEBOOK = (16384, 8)
TRACKED_CODES = 65_536  # length of the buffer of recent ids in the original's files


class Tiles(NamedTuple):
    """Arguments of a tiled call: side and overlap of tiles in pixels, and latents per tile side at each scale."""

    tile_size: int
    overlap: int
    patch_nums: tuple[int, ...]


class Contestant(NamedTuple):
    """A model and the way it runs.

    Args:
        name (`str`): `OURS`, `ORIGINAL`, `VQ_MODEL` or `KL`.
        dtype (`torch.dtype`): Precision of weights and samples.
        checkpoint (`Path`): Weights from [`make_checkpoint`] for `OURS` and `ORIGINAL`; the others are random.
        original (`Path`, *optional*): Folder with the original's `svqvae.py`.
        device (`str`): Device of the model.
    """

    name: str
    dtype: torch.dtype
    checkpoint: Path
    original: Path | None
    device: str

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
        return model.requires_grad_(False).to(self.device, self.dtype)

    def sample(self, side: int) -> torch.Tensor:
        """Draws a random image `(1, 3, side, side)` in [0, 1], the same for all contestants."""
        sample = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
        return sample.to(self.device, self.dtype)

    @torch.inference_mode()
    def reconstruct(self, model: nn.Module, sample: torch.Tensor, tiles: Tiles | None) -> Any:
        """Encodes, quantises and decodes, as a whole if `tiles` is None."""
        options = {} if tiles is None else tiles._asdict()
        output = model(sample, **options)
        if self.name == ORIGINAL:
            return output[0]
        return output.sample


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
    num_plain = len(MULTIPLIERS) - 1  # levels without attention
    widths = {
        "block_out_channels": tuple(base_channels * multiplier for multiplier in MULTIPLIERS),
        "down_block_types": ("DownEncoderBlock2D",) * num_plain + ("AttnDownEncoderBlock2D",),
        "up_block_types": ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * num_plain,
        "layers_per_block": 2,
    }
    size, dim = CODEBOOK
    if name == VQ_MODEL:
        return VQModel(latent_channels=32, num_vq_embeddings=size, vq_embed_dim=dim, **widths)
    return AutoencoderKL(latent_channels=dim, sample_size=256, **widths)


@functools.cache
def count_operations(base_channels: int, side: int) -> int:
    """Counts the floating-point operations of encoding and decoding an image, without the code search.

    Counted on diffusers' `VQModel`, which computes every convolution at its own resolution.
    """
    with torch.device("meta"), torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model = make_diffusers_model(VQ_MODEL, base_channels).eval()
        model(torch.empty(1, 3, side, side))
    return counter.get_total_flops()


def prepare(contestant: Contestant, side: int, tiles: Tiles | None = None) -> Callable[[], Any]:
    """Loads and warms up a model, and returns its reconstruction of an image as a function."""
    model = contestant.load()
    warm_up_side = LATENT_PIXELS if tiles is None else tiles.tile_size + LATENT_PIXELS
    contestant.reconstruct(model, contestant.sample(warm_up_side), tiles)
    return functools.partial(contestant.reconstruct, model, contestant.sample(side), tiles)
