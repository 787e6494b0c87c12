"""Parts of training scripts: a script shows its loop, forward pass, loss and update, and takes the rest from here.

`training/train.py` of the repository is such a script. One of your own needs the extra `svqvae-hf[train]`, and may
reuse any part:

- the run: [`Run`] owns accelerator, signals, exact resumption, checkpoints, log, averaged weights and the result;
- options, as dataclasses that are read from flags or YAML: [`RunOptions`] to subclass, [`ImageOptions`],
  [`PipelineOptions`], [`TrainOptions`], [`read_options`];
- optimization: [`make_optimizer`], [`clip_and_step`];
- the model: [`load_model`], [`start_linear`], [`whiten_latents`], [`MultiScaleForward`], and its codebook:
  [`initialise_codebook`], [`CodebookAverage`], [`DeadCodeReset`], [`forget_codes`];
- losses: [`Objective`] with its [`LossWeights`], or its parts [`PatchDiscriminator`], [`LeCAM`], [`UniformityLoss`];
- data: [`ImageSource`] or the [`CropLoader`] under it, [`TokenSource`] and [`SequenceLoader`];
- the log: [`ScaleStatistics`], [`image_grid`], [`log_image`].
"""

from svqvae_hf.trainer.data.crop_loader import CropBatch, CropLoader
from svqvae_hf.trainer.data.crops import CropPolicy, centre_crops
from svqvae_hf.trainer.data.image_source import ImageSource
from svqvae_hf.trainer.data.token_sequences import SequenceLoader, TokenSource
from svqvae_hf.trainer.losses.adversarial import (
    LeCAM,
    PatchDiscriminator,
    adaptive_weight,
    hinge_discriminator_loss,
    hinge_generator_loss,
)
from svqvae_hf.trainer.losses.moving_average import MovingAverage
from svqvae_hf.trainer.losses.objective import Objective, Pair, make_pairs
from svqvae_hf.trainer.losses.uniformity import UniformityLoss
from svqvae_hf.trainer.losses.weights import LossWeight, LossWeights
from svqvae_hf.trainer.network.codebook import CodebookAverage, DeadCodeReset, forget_codes, initialise_codebook
from svqvae_hf.trainer.network.linear_start import start_linear
from svqvae_hf.trainer.network.model import (
    MultiScaleForward,
    Reconstructions,
    initialise,
    load_model,
    step_scales,
    whiten_latents,
)
from svqvae_hf.trainer.optimization import clip_and_step, gradient_norm, make_optimizer, parameter_groups
from svqvae_hf.trainer.options import (
    ImageOptions,
    PipelineOptions,
    RunOptions,
    changeable,
    option,
    read_options,
    required,
)
from svqvae_hf.trainer.pipeline_run import latent_side, load_frozen_vqvae, log_samples, pipeline_card
from svqvae_hf.trainer.run import Run, make_accelerator, one_line_errors
from svqvae_hf.trainer.tracking import ScaleStatistics, image_grid, log_image
from svqvae_hf.trainer.train_options import TrainOptions

__all__ = [
    "CropBatch",
    "CropLoader",
    "CropPolicy",
    "CodebookAverage",
    "DeadCodeReset",
    "ImageOptions",
    "ImageSource",
    "LeCAM",
    "LossWeight",
    "LossWeights",
    "MovingAverage",
    "MultiScaleForward",
    "Objective",
    "Pair",
    "PatchDiscriminator",
    "PipelineOptions",
    "Reconstructions",
    "Run",
    "RunOptions",
    "ScaleStatistics",
    "SequenceLoader",
    "TokenSource",
    "TrainOptions",
    "UniformityLoss",
    "adaptive_weight",
    "centre_crops",
    "changeable",
    "clip_and_step",
    "forget_codes",
    "gradient_norm",
    "hinge_discriminator_loss",
    "hinge_generator_loss",
    "image_grid",
    "initialise",
    "initialise_codebook",
    "latent_side",
    "load_frozen_vqvae",
    "load_model",
    "log_image",
    "log_samples",
    "make_accelerator",
    "make_optimizer",
    "make_pairs",
    "one_line_errors",
    "option",
    "parameter_groups",
    "pipeline_card",
    "read_options",
    "required",
    "start_linear",
    "step_scales",
    "whiten_latents",
]
