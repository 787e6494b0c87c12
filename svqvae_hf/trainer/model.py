"""The model that is trained: where it starts, and which part of it learns."""

from collections.abc import Iterable

import torch
from torch import nn

from svqvae_hf.models.modeling_svqvae import SVQVAE, AttnBlock, ResnetBlock
from svqvae_hf.models.quantizer import flatten_latents
from svqvae_hf.trainer.options import public_name
from svqvae_hf.trainer.train_options import TrainConfig

RESIDUAL_GAIN = 0.1
VARIANCE_EPS = 1e-6
RECOMPILES = 4  # of a block: with and without gradients, in training and evaluation


def load_model(config: TrainConfig) -> SVQVAE:
    """A new or a pretrained model in training mode, with the crop side as its sample size, its frozen parts frozen.

    Raises:
        ValueError: If there is no such model, a crop side is no multiple of f, or k-means would have fewer latents
            than codes.
    """
    config.check_sources("model_config_name_or_path", "pretrained_model_name_or_path")
    if config.pretrained_model_name_or_path is not None:
        vqvae = SVQVAE.from_pretrained(config.pretrained_model_name_or_path, torch_dtype=torch.float32)
    else:
        vqvae = SVQVAE.from_config(SVQVAE.load_config(config.model_config_name_or_path))
        initialise(vqvae)
    for side in (config.resolution, *config.crop_sizes):
        if side % vqvae.f:
            raise ValueError(f"Crop sides must be multiples of f = {vqvae.f}, but one is {side}.")
    num_latents = config.kmeans_batches * config.train_batch_size * (config.resolution // vqvae.f) ** 2
    if config.kmeans_steps and num_latents < vqvae.config["codebook_size"]:
        raise ValueError(
            f"k-means needs at least as many latents as codes, {vqvae.config['codebook_size']}, but "
            f"`--kmeans_batches` = {config.kmeans_batches} give {num_latents} in each process. Raise it."
        )
    source = config.pretrained_model_name_or_path or config.model_config_name_or_path
    vqvae.register_to_config(sample_size=config.resolution, _name_or_path=public_name(source))
    if config.gradient_checkpointing:
        vqvae.enable_gradient_checkpointing()
    if config.torch_compile:
        blocks = [block for block in vqvae.modules() if isinstance(block, ResnetBlock)]
        torch._dynamo.config.recompile_limit = RECOMPILES * len(blocks)  # all of them are one function to the compiler
        for block in blocks:
            block.compile(dynamic=True)
    for part in frozen_parts(config, vqvae):
        part.requires_grad_(False)
    return training_mode(config, vqvae)


def initialise(vqvae: SVQVAE) -> None:
    """Starts a new model with convolutions that keep the variance, and residual branches turned down.

    Biases are 0 and weights have the gain 1 (He et al., arXiv 1502.01852, without the factor for the ReLU), since the
    way past the residual branches is linear. With PyTorch's defaults, whose gain is 0.58, an image fades from level to
    level, and biases take its place.
    """
    for layer in vqvae.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
            nn.init.zeros_(layer.bias)
    for block in vqvae.modules():
        if isinstance(block, ResnetBlock | AttnBlock):
            last = block.conv2 if isinstance(block, ResnetBlock) else block.proj_out
            last.weight.data.mul_(RESIDUAL_GAIN)


@torch.no_grad()
def whiten_latents(vqvae: SVQVAE, samples: Iterable[torch.Tensor]) -> None:
    """Starts a new model's latents as the principal components of the encoder's features, of mean 0 and variance 1.

    A random projection leaves them in a narrow cone of the sphere, of which training then uses a few dimensions only.

    Args:
        vqvae ([`SVQVAE`]): Its `quant_conv` is set.
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
    flat = torch.cat([flatten_latents(each) for each in features])  # (n, z_channels)
    variances, components = torch.linalg.eigh(flat.T.cov())
    weight = (components[:, -dim:] * variances[-dim:].clamp(min=VARIANCE_EPS).rsqrt()).T
    vqvae.quant_conv.weight.copy_(weight[..., None, None])
    vqvae.quant_conv.bias.copy_(-weight @ flat.mean(0))


def frozen_parts(config: TrainConfig, vqvae: SVQVAE) -> list[nn.Module]:
    """What keeps its weights."""
    if config.train == "decoder":
        return [vqvae.encoder, vqvae.quant_conv, vqvae.quantize]
    return [vqvae.quantize] if config.freeze_codebook else []


def training_mode(config: TrainConfig, vqvae: SVQVAE) -> SVQVAE:
    """Training mode for what is trained; with the decoder alone, evaluation mode for what makes the ids."""
    vqvae.train()
    if config.train == "decoder":
        for part in frozen_parts(config, vqvae):
            part.eval()
    return vqvae


def gradient_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """Norm of the gradients of some parameters, a scalar."""
    return nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])
