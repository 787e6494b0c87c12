"""The model to train: its initial weights, its frozen parts, and its forward pass at several scales."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from svqvae_hf.hub.repositories import from_hub, public_name
from svqvae_hf.models.image_processing_svqvae import resize_latents
from svqvae_hf.models.modeling_svqvae import SVQVAE, AttnBlock, ResnetBlock
from svqvae_hf.models.quantizer import VQLosses, flatten_latents
from svqvae_hf.trainer.train_options import TrainOptions

RESIDUAL_GAIN = 0.1
VARIANCE_EPS = 1e-6
RECOMPILES = 4  # per block: with and without gradients, in training and evaluation


class Reconstructions(NamedTuple):
    """Output of [`MultiScaleForward`].

    Args:
        samples (`list[torch.Tensor]`): Reconstruction `(batch, 3, height, width)` at each scale in `pixel_range`, not
            clamped.
        latents (`torch.Tensor` of shape `(batch, codebook_embed_dim, h, w)`): Latents before quantisation.
        losses (`list[VQLosses]`): Losses of the quantizer at each scale; empty if nothing was quantised.
        ids (`list[torch.Tensor]`): Flat ids at each scale; empty if nothing was quantised.
    """

    samples: list[torch.Tensor]
    latents: torch.Tensor
    losses: list[VQLosses]
    ids: list[torch.Tensor]


class MultiScaleForward(nn.Module):
    """Forward pass of an SVQVAE in training, as one module for `accelerator.prepare`.

    Args:
        vqvae ([`SVQVAE`]): Model to train.
    """

    def __init__(self, vqvae: SVQVAE):
        super().__init__()
        self.vqvae = vqvae

    def forward(self, sample: torch.Tensor, scales: Sequence[float], quantize: bool) -> Reconstructions:
        """Encodes once, then quantises and decodes at each scale.

        Args:
            sample (`torch.Tensor` of shape `(batch, 3, height, width)`): Images in the model's `pixel_range`.
            scales (`Sequence[float]`): Scales of the reconstructions.
            quantize (`bool`): If false, latents are not quantised but only normalised, if the codebook is.
        """
        output = Reconstructions([], self.vqvae.encode(sample).latents, [], [])
        for scale in scales:
            latents = resize_latents(output.latents, scale)
            if quantize:
                latents, losses, (_, _, ids) = self.vqvae.quantize(latents)
                output.losses.append(losses)
                output.ids.append(ids)
            elif self.vqvae.config["codebook_l2_norm"]:
                latents = F.normalize(latents.float(), dim=1)
            output.samples.append(self.vqvae.decode(latents, force_not_quantize=True).sample.float())
        return output


def step_scales(options: TrainOptions, latent_side: int, step: int) -> list[float]:
    """Scales of a step, from the smallest to the largest: the fixed ones, one of them, or random latent sides.

    With `scale_probabilities` the step has one of the fixed scales. Without fixed scales it has the full scale and
    random smaller ones, which follow FlexVAR (arXiv 2502.20313, section 3.3). The largest are dropped until all
    scales together have at most `token_budget` times the tokens of the full one.
    """
    rng = np.random.default_rng((options.seed, step))
    if options.scale_probabilities:
        return [rng.choice(options.scales, p=options.scale_probabilities).item()]
    if options.scales:
        return sorted(options.scales)
    count = min(options.num_scales - 1, latent_side - 1)
    sides = sorted(rng.choice(np.arange(1, latent_side), size=count, replace=False).tolist())
    if options.token_budget is not None:
        while sides and sum(side**2 for side in sides) > (options.token_budget - 1) * latent_side**2:
            sides.pop()
    return [*(side / latent_side for side in sides), 1.0]


def load_model(options: TrainOptions) -> SVQVAE:
    """Makes a new model or loads a pretrained one, in training mode, with its frozen parts frozen.

    Raises:
        ValueError: If there is no such model, a crop side is not a multiple of f, or k-means would have fewer latents
            than codes.
    """
    options.check_sources("model_config_name_or_path", "pretrained_model_name_or_path")
    if options.pretrained_model_name_or_path is not None:
        vqvae = SVQVAE.from_pretrained(options.pretrained_model_name_or_path, torch_dtype=torch.float32)
    else:
        vqvae = SVQVAE.from_config(from_hub(SVQVAE.load_config, options.initial_model))
        initialise(vqvae)
    _check_fit(options, vqvae)
    vqvae.register_to_config(sample_size=options.resolution, _name_or_path=public_name(options.initial_model))
    if options.gradient_checkpointing:
        vqvae.enable_gradient_checkpointing()
    if options.torch_compile:
        blocks = [block for block in vqvae.modules() if isinstance(block, ResnetBlock)]
        # The compiler counts the recompilations of all blocks together, because they share one forward function.
        torch._dynamo.config.recompile_limit = RECOMPILES * len(blocks)
        for block in blocks:
            block.compile(dynamic=True)
    vqvae.train()
    for part in frozen_parts(options, vqvae):
        part.requires_grad_(False)
        if options.train == "decoder":  # the ids must stay, so no dropout and no counts of codes
            part.eval()
    return vqvae


def _check_fit(options: TrainOptions, vqvae: SVQVAE) -> None:
    for side in (options.resolution, *options.crop_sizes):
        if side % vqvae.f:
            raise ValueError(f"Crop sides must be multiples of f = {vqvae.f}, but one is {side}.")
    num_latents = options.kmeans_batches * options.train_batch_size * (options.resolution // vqvae.f) ** 2
    if options.kmeans_steps and num_latents < vqvae.config["codebook_size"]:
        raise ValueError(
            f"k-means needs at least as many latents as codes, {vqvae.config['codebook_size']}, but "
            f"`--kmeans_batches` = {options.kmeans_batches} gives {num_latents} in each process. Raise it."
        )


def frozen_parts(options: TrainOptions, vqvae: SVQVAE) -> list[nn.Module]:
    """Parts of the model that the optimizer leaves as they are."""
    if options.train == "decoder":
        return [vqvae.encoder, vqvae.quant_conv, vqvae.quantize]
    return [vqvae.quantize] if options.freeze_codebook or options.codebook_decay else []


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
        if isinstance(block, ResnetBlock | AttnBlock):
            last = block.conv2 if isinstance(block, ResnetBlock) else block.proj_out
            last.weight.data.mul_(RESIDUAL_GAIN)


@torch.no_grad()
def whiten_latents(vqvae: SVQVAE, samples: Iterable[torch.Tensor]) -> None:
    """Projects a new model's latents on the principal components of its features, with mean 0 and variance 1.

    A random projection would leave the latents in a narrow cone of the sphere, and training would then use only a few
    of their dimensions.

    Args:
        vqvae ([`SVQVAE`]): Model whose `quant_conv` is set.
        samples (`Iterable[torch.Tensor]`): Batches of images `(batch, 3, height, width)` in `pixel_range`.

    Raises:
        ValueError: If latents have more dimensions than features.
    """
    features_dim, dim = vqvae.config["z_channels"], vqvae.config["codebook_embed_dim"]
    if dim > features_dim:
        raise ValueError(
            f"A new model must have a `codebook_embed_dim` of at most its `z_channels` = {features_dim}, but it is "
            f"{dim}. Change its config."
        )
    features: list[torch.Tensor] = []
    was_training = vqvae.training
    vqvae.eval()  # without dropout
    hook = vqvae.quant_conv.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    for sample in samples:
        vqvae.encode(sample)
    hook.remove()
    vqvae.train(was_training)
    flat = torch.cat([flatten_latents(batch) for batch in features])  # (n, z_channels)
    variances, components = torch.linalg.eigh(flat.T.cov())
    weight = (components[:, -dim:] * variances[-dim:].clamp(min=VARIANCE_EPS).rsqrt()).T
    vqvae.quant_conv.load_state_dict({"weight": weight[..., None, None], "bias": -weight @ flat.mean(0)})
