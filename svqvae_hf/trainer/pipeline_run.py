"""Parts of a run that trains a generator on an SVQVAE's latents or ids, and saves a pipeline."""

import math
from typing import Any, TypeVar

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torchvision.utils import make_grid

from svqvae_hf.hub import model_cards
from svqvae_hf.hub.repositories import public_name
from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.trainer.options import PipelineOptions
from svqvae_hf.trainer.run import Run
from svqvae_hf.trainer.tracking import log_image

Options = TypeVar("Options", bound=PipelineOptions)


def load_frozen_vqvae(options: PipelineOptions, pixel_range: tuple[float, float]) -> SVQVAE:
    """Loads the pipeline's SVQVAE, which is not trained.

    Args:
        options ([`PipelineOptions`]): Options.
        pixel_range (`tuple[float, float]`): Pixel range of the pipeline, which may differ from the SVQVAE's own.

    Raises:
        ValueError: If there is no such SVQVAE, or no such config of the network.
    """
    options.check_sources("vqvae_name_or_path", "model_config_name_or_path")
    vqvae = SVQVAE.from_pretrained(options.vqvae_name_or_path, pixel_range=pixel_range, torch_dtype=torch.float32)
    vqvae.register_to_config(_name_or_path=public_name(options.vqvae_name_or_path))
    return vqvae.requires_grad_(False)


def latent_side(vqvae: SVQVAE, resolution: int) -> int:
    """Side of the latents of a crop.

    Raises:
        ValueError: If the resolution is not a multiple of f.
    """
    if resolution % vqvae.f:
        raise ValueError(f"`--resolution` must be a multiple of f = {vqvae.f} of the SVQVAE, but is {resolution}.")
    return resolution // vqvae.f


def log_samples(run: Run[Any], images: np.ndarray, steps_done: int) -> None:
    """Writes sampled images as one picture, on the main process.

    Args:
        run ([`Run`]): The run.
        images (`np.ndarray` of shape `(count, height, width, 3)`): Images in [0, 1].
        steps_done (`int`): Steps done before they were sampled.
    """
    if run.accelerator.is_main_process:
        columns = math.ceil(len(images) ** 0.5)
        grid = make_grid(torch.from_numpy(images).permute(0, 3, 1, 2), nrow=columns, padding=4, pad_value=1.0)
        pixels = (grid.permute(1, 2, 0) * 255).round().byte().numpy()
        log_image(run.accelerator, pixels, run.output_dir / "samples", steps_done)


def pipeline_card(
    run: Run[Options],
    pipeline: DiffusionPipeline,
    *,
    script: str,
    summary: str,
    call: str,
    pipeline_tag: str = "unconditional-image-generation",
) -> str:
    """Writes the card of a pipeline.

    Args:
        run ([`Run`]): The run that trained it.
        pipeline (`DiffusionPipeline`): The pipeline.
        script (`str`): The script that trained it, such as `training/train_masked.py`.
        summary (`str`): A sentence about the pipeline.
        call (`str`): Arguments of the pipeline's call in the example.
        pipeline_tag (`str`, defaults to `"unconditional-image-generation"`): Task of the Hub.
    """
    rows = {"SVQVAE": f"`{public_name(run.options.vqvae_name_or_path)}`"} | run.provenance(script, "images")
    return model_cards.pipeline_card(
        type(pipeline),
        repo_id=run.name,
        summary=summary,
        call=call,
        tags=["svqvae", type(run.network).__name__.lower()],
        provenance=rows,
        license=run.options.license,
        pipeline_tag=pipeline_tag,
    )
