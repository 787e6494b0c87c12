"""The model to train: its initial weights, its frozen parts, and the scales of its steps."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from torch import nn

from svqvae_hf.hub.repositories import public_name
from svqvae_hf.loaders.pretrained_models import SVQVAE
from svqvae_hf.models.modeling_svqvae import AttnBlock, ResnetBlock
from svqvae_hf.tokens.context_model import ContextModel
from svqvae_hf.trainer.configs import load_network_config
from svqvae_hf.trainer.options import check_models
from svqvae_hf.trainer.train_options import TrainOptions

RESIDUAL_GAIN = 0.1  # of the last convolution of a residual branch, relative to its usual weights


def step_scales(options: TrainOptions, latent_side: int, step: int) -> list[float]:
    """Scales of a step, from the smallest to the largest: the fixed ones, one of them, or random ones.

    Args:
        options ([`TrainOptions`]): With `scales`, they are fixed. With `scale_probabilities`, a step has one of them.
        latent_side (`int`): Side of the latents at the full scale.
        step (`int`): Step of the run.
    """
    rng = np.random.default_rng((options.seed, step))
    if options.scale_probabilities:
        drawn_scale = rng.choice(options.scales, p=options.scale_probabilities)
        return [drawn_scale.item()]
    if options.scales:
        return sorted(options.scales)
    return _random_scales(options, latent_side, rng)


def _random_scales(options: TrainOptions, latent_side: int, rng: np.random.Generator) -> list[float]:
    """Random smaller scales and the full one, as in FlexVAR (arXiv 2502.20313, section 3.3).

    The largest of the smaller scales are dropped until all scales together have at most `token_budget` times as many
    tokens as the full one.
    """
    smaller_sides = np.arange(1, latent_side)
    num_smaller = min(options.num_scales - 1, len(smaller_sides))
    drawn_sides = rng.choice(smaller_sides, size=num_smaller, replace=False)
    sides = sorted(drawn_sides.tolist())
    if options.token_budget is not None:
        tokens_of_full_scale = latent_side**2
        max_tokens = (options.token_budget - 1) * tokens_of_full_scale  # of the smaller scales together
        while _count_tokens(sides) > max_tokens:
            sides.pop()  # the largest
    scales = [side / latent_side for side in sides]
    return scales + [1.0]


def _count_tokens(sides: Sequence[int]) -> int:
    """Number of tokens of square grids with these sides."""
    return sum(side**2 for side in sides)


def load_model(options: TrainOptions) -> SVQVAE:
    """Makes a new model or loads a pretrained one, in training mode. Parts that are not trained have no gradients.

    Raises:
        ValueError: If there is no such model, a crop side is not a multiple of f, or k-means would have fewer latents
            than codes.
    """
    check_models(options)
    if options.pretrained_model_name_or_path is not None:
        vqvae = SVQVAE.from_pretrained(options.pretrained_model_name_or_path, torch_dtype=torch.float32)
    else:
        vqvae = SVQVAE.from_config(load_network_config(options.initial_model, SVQVAE))
        initialise(vqvae)
    _check_crop_sides(options, vqvae)
    _check_kmeans(options, vqvae)
    name_of_source = public_name(options.initial_model)  # of the pretrained model, or of the config of a new one
    vqvae.register_to_config(sample_size=options.resolution, _name_or_path=name_of_source)
    if options.gradient_checkpointing:
        vqvae.enable_gradient_checkpointing()
    vqvae.train()
    for part in frozen_parts(options, vqvae):
        part.requires_grad_(False)
        if options.train == "decoder":  # dropout and counts of codes would change the ids
            part.eval()
    return vqvae


def _check_crop_sides(options: TrainOptions, vqvae: SVQVAE) -> None:
    """Raises ValueError unless all crops have whole latents."""
    for side in (options.resolution, *options.crop_sizes):
        if side % vqvae.f:
            raise ValueError(f"Crop sides must be multiples of f = {vqvae.f}, but one is {side}.")


def _check_kmeans(options: TrainOptions, vqvae: SVQVAE) -> None:
    """Raises ValueError if k-means would have fewer latents than codes."""
    if not options.kmeans_steps:
        return
    codebook_size = vqvae.config["codebook_size"]
    num_crops = options.kmeans_batches * options.per_device_train_batch_size * PartialState().num_processes
    latents_per_crop = (options.resolution // vqvae.f) ** 2
    num_latents = num_crops * latents_per_crop
    if num_latents < codebook_size:
        raise ValueError(
            f"k-means needs at least as many latents as codes, {codebook_size}, but `--kmeans_batches` = "
            f"{options.kmeans_batches} gives {num_latents}. Raise it."
        )


def frozen_parts(options: TrainOptions, vqvae: SVQVAE) -> list[nn.Module]:
    """Parts of the model that the optimizer does not train."""
    if options.train == "decoder":
        return [vqvae.encoder, vqvae.quant_conv, vqvae.quantize]
    if options.codebook_decay:  # a moving average moves the codes
        return [vqvae.quantize]
    return []


def initialise(vqvae: SVQVAE) -> None:
    """Initialises a new model: convolutions keep the variance, residual branches start small.

    Weights have gain 1 (He et al., arXiv 1502.01852, without the factor for the ReLU), because the path around the
    residual branches is linear. Biases are 0. PyTorch's default has a gain of 0.58: an image fades from block to
    block, and biases take its place.
    """
    for layer in vqvae.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    for block in vqvae.modules():
        if isinstance(block, ResnetBlock):
            block.conv2.weight.data.mul_(RESIDUAL_GAIN)
        elif isinstance(block, AttnBlock):
            block.proj_out.weight.data.mul_(RESIDUAL_GAIN)


def save_model(options: TrainOptions, vqvae: SVQVAE, folder: Path) -> None:
    """Saves the model, with the context model of its pretrained model if both have the same codes."""
    vqvae.save_pretrained(folder)
    context_model = _pretrained_context_model(options)
    if context_model is None:
        return
    if context_model.codebook_fingerprint == vqvae.codebook_fingerprint():
        context_model.save_pretrained(folder)


def _pretrained_context_model(options: TrainOptions) -> ContextModel | None:
    """Context model of the model that training started from; None if there is none or the Hub does not answer."""
    if options.pretrained_model_name_or_path is None:
        return None
    with suppress(OSError):
        return ContextModel.from_pretrained(options.pretrained_model_name_or_path)
    return None
