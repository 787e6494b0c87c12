"""Trains an SVQVAE: `python training/train.py --train_data_dir PHOTOS --output_dir OUT ...`.

With several GPUs: `accelerate launch training/train.py ...`.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from typing import cast

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast
from svqvae_validation import (
    closing_line,
    digests_of,
    open_validation_sets,
    remember_validations,
    rows_of_validations,
    validate,
)
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful

from svqvae_hf import SVQVAE
from svqvae_hf.evaluation.metrics import count_codes
from svqvae_hf.hub.model_cards import model_card
from svqvae_hf.hub.repositories import is_hub_id
from svqvae_hf.models.modeling_svqvae import SVQVAEOutput
from svqvae_hf.models.quantizer import flatten_latents
from svqvae_hf.trainer.codebook import CodebookAverage, DeadCodeReset, forget_codes, initialise_codebook
from svqvae_hf.trainer.data.image_source import ImageSource
from svqvae_hf.trainer.linear_start import start_linear
from svqvae_hf.trainer.losses.objective import Objective, Pair
from svqvae_hf.trainer.model import load_model, save_model, step_scales
from svqvae_hf.trainer.optimization import loss_scale, rescale_gradients
from svqvae_hf.trainer.publishing import Result, provenance
from svqvae_hf.trainer.run import Run, run_script
from svqvae_hf.trainer.tracking import ScaleStatistics, progress
from svqvae_hf.trainer.train_options import TrainOptions
from svqvae_hf.trainer.weights import Weights

SCRIPT = "training/train.py"
START_BATCHES = 16
RESET_BATCHES = 16  # batches of fresh crops whose latents replace dead codes; one step has too few different crops
KERNEL_NDIM = 4  # only weights of convolutions decay, so no code does
DISCRIMINATOR_LEARNING_RATE = 1e-4

logger = get_logger(__name__, log_level="INFO")


def train(run: Run[TrainOptions]) -> None:
    """Trains an SVQVAE, from the start or from a checkpoint, and saves it with its card in the output folder."""
    options = run.options
    accelerator = run.accelerator

    # Model and images
    vqvae = load_model(options).to(accelerator.device)
    pixel_range = vqvae.config["pixel_range"]
    images = ImageSource(options, accelerator, pixel_range, synthetic_fraction=options.synthetic_fraction)
    sides = [options.resolution, *options.crop_sizes]
    loader = images.loader(sides, options.max_steps, options.seed, options.gradient_accumulation_steps)
    validation_sets = open_validation_sets(options, images)
    run.identify(digests_of(images, validation_sets))
    objective = Objective(options, vqvae, mean=partial(accelerator.reduce, reduction="mean"))
    statistics = ScaleStatistics(vqvae.config["codebook_size"], by_octave=not options.scales)

    # Optimizers
    is_new_model = options.model_config_name_or_path is not None
    if run.is_new and is_new_model and options.start == "linear":
        start_new_model(options, vqvae, images)
    weights = run.train(vqvae, options.learning_rate, decayed_ndim=KERNEL_NDIM)
    model = weights.model
    accumulated_models = [model]
    codes = Codes(options, vqvae, images, weights)
    validations = remember_validations(options, vqvae, validation_sets)
    states: dict[str, Stateful] = {
        "weights": weights,
        "codebook_average": codes.codebook_average,
        "dead_codes": codes.dead_code_reset,
        "validations": validations,
        "loader": loader,
    }
    adversary: Adversary | None = None
    if objective.discriminator is not None:
        adversary = Adversary(run, objective, objective.discriminator)
        accumulated_models.append(adversary.weights.model)
        states["discriminator"] = adversary.weights
    checkpoints = run.begin(vqvae, states, loader.contents)
    batches = iter(loader)

    def validate_after(steps_done: int) -> None:
        if validation_sets:
            validate(run, weights, objective, validation_sets, validations, steps_done)

    if run.is_new:
        validate_after(0)
    for step in checkpoints.steps():
        quantize = step >= options.quantize_from
        active_adversary = adversary if objective.is_adversarial(step) else None
        if step in options.kmeans_steps:
            codes.set_by_kmeans(step)

        for batch in islice(batches, options.gradient_accumulation_steps):
            with accelerator.accumulate(*accumulated_models):
                # Forward pass and gradients
                sample = images.to_device(batch)  # (B, 3, side, side)
                latent_side = sample.shape[-1] // vqvae.f
                scales = step_scales(options, latent_side, step)
                output = model(sample, scales, scale_from="latents", force_not_quantize=not quantize)
                pairs = objective.pairs(sample, output)
                with accelerator.autocast():
                    loss, numbers = objective(pairs, output, step)
                accelerator.backward(loss)
                if active_adversary is not None:
                    numbers |= active_adversary.backward(pairs)

                # Updates, after the last batch of a step
                if accelerator.sync_gradients:
                    old_loss_scale = loss_scale(accelerator)
                    numbers |= weights.update()
                    if active_adversary is not None:
                        numbers |= active_adversary.update(old_loss_scale)

                # Codes, outside gradient descent
                if quantize:
                    codes.follow_average(output)
                    codes.count_uses(output)
                    if codes.is_replacement_due(step):
                        numbers |= codes.replace_dead(step)
                megapixels = sample[:, 0].numel() / 1e6
                run.log.add({"loss": loss} | numbers, images=len(sample), megapixels=megapixels)
                statistics.add(scales, pairs, output.ids or [])

        if options.logs_after(step):
            summary = statistics.summary(accelerator.reduce)
            run.log.write_training(step + 1, summary | {"lr": weights.lr})
        steps_done = step + 1
        # The last validation is in the last checkpoint, too: a longer run may end with these weights.
        if options.validates_after(step) or steps_done == options.max_steps:
            validate_after(steps_done)
        checkpoints.after(step)

    if not validations.first:  # the first validation set was added when no step was left
        validate_after(options.max_steps)

    # Result
    vqvae.load_state_dict(validations.weights or weights.final())
    if accelerator.is_main_process:
        rows = provenance(SCRIPT, options.max_steps, loader.share.step_size, f"crops of {options.resolution}² pixels")
        rows |= rows_of_validations(validation_sets, validations, options.max_steps)
        card = make_card(options, run.result, vqvae, rows)
        run.result.publish(partial(save_model, options, vqvae), card)
    if validation_sets:
        logger.info(closing_line(options, validations))


def start_new_model(options: TrainOptions, vqvae: SVQVAE, images: ImageSource) -> None:
    """Makes a new model a linear autoencoder of some crops, the same on all processes."""
    device = vqvae.device
    crops = torch.cat(list(images.fresh_crops([options.resolution], START_BATCHES)))
    start_linear(vqvae.cpu(), crops.cpu())  # in float64, which Apple's GPUs do not have
    vqvae.to(device)
    for parameter in vqvae.parameters():
        broadcast(parameter.data)  # processes have different crops


class Adversary:
    """Trains the discriminator of a run.

    Args:
        run ([`Run`]): The run.
        objective ([`Objective`]): Losses of the run.
        discriminator (`nn.Module`): Network that tells reconstructions from images.

    Attributes:
        weights ([`Weights`]): Weights of the discriminator, with their optimizer. The learning rate schedule counts
            only the steps in which the discriminator is trained.
    """

    def __init__(self, run: Run[TrainOptions], objective: Objective, discriminator: nn.Module):
        self.accelerator = run.accelerator
        self.objective = objective
        self.discriminator = discriminator
        num_steps = run.options.max_steps - run.options.adversarial_start
        # `run.train` trains nothing yet. It returns the weights of the discriminator with their optimizer, which
        # `update` trains.
        self.weights = run.train(
            discriminator, DISCRIMINATOR_LEARNING_RATE, num_steps=num_steps, decayed_ndim=KERNEL_NDIM, use_ema=False
        )
        discriminator.requires_grad_(False)  # the loss of the model needs no gradients of these weights

    def backward(self, pairs: list[Pair]) -> dict[str, torch.Tensor]:
        """Computes the gradients of the discriminator's own loss for a batch, and returns numbers for the log."""
        self.discriminator.requires_grad_(True)
        with self.accelerator.autocast():
            loss, numbers = self.objective.discriminator_loss(pairs, self.weights.model)
        self.accelerator.backward(loss)
        self.discriminator.requires_grad_(False)
        return numbers

    def update(self, old_loss_scale: float) -> dict[str, torch.Tensor]:
        """Updates the discriminator after the model, and returns the norm of its gradients for the log.

        Args:
            old_loss_scale (`float`): Scale of the loss before the update of the model, which may have changed it.
        """
        rescale_gradients(self.discriminator, loss_scale(self.accelerator) / old_loss_scale)
        update = self.weights.update()
        return {"discriminator_grad_norm": update["grad_norm"]}


class Codes:
    """Updates the codes of a run without gradients: by k-means, by averages of latents, and by replacing dead codes.

    Args:
        options ([`TrainOptions`]): Options.
        vqvae ([`SVQVAE`]): Model that holds the codes.
        images ([`ImageSource`]): Images whose latents become codes.
        weights ([`Weights`]): Weights of the model.
    """

    def __init__(self, options: TrainOptions, vqvae: SVQVAE, images: ImageSource, weights: Weights):
        self.options = options
        self.vqvae = vqvae
        self.quantizer = vqvae.quantize
        self.images = images
        self.weights = weights
        self.accelerator = images.accelerator
        # `codebook_decay` is meant per step, but the average is updated after each batch of a step.
        decay_per_batch = options.codebook_decay ** (1 / options.gradient_accumulation_steps)
        self.codebook_average = CodebookAverage(vqvae.quantize, decay_per_batch).to(vqvae.device)
        self.dead_code_reset = DeadCodeReset(vqvae.quantize.size).to(vqvae.device)

    def set_by_kmeans(self, step: int) -> None:
        """Sets all codes by k-means of the latents of fresh crops, from all processes."""
        num_batches = self.options.kmeans_batches
        logger.info(f"Setting {self.quantizer.size:,} codes by k-means of {num_batches} batches of latents")
        crops = progress(self._fresh_crops(num_batches, step), "k-means: latents", num_batches)
        initialise_codebook(self.quantizer, self._latents(crops), self.options.seed)
        codebook = self.quantizer.embedding.weight
        broadcast(codebook.data)  # sums of floats may differ in their last bits between processes
        all_ids = torch.arange(len(codebook), device=codebook.device)
        self._restart_averages(all_ids)

    def follow_average(self, output: SVQVAEOutput) -> None:
        """Moves each code to the moving average of its latents, with `--codebook_decay`."""
        moves_codes = 0 < self.options.codebook_decay < 1
        if not moves_codes:
            return
        ids = ids_of_all_scales(output)  # (n,)
        latents_of_scales = []
        for scale_latents in cast(list[torch.Tensor], output.latents):  # not None, because the model has quantised
            latents_of_scales.append(flatten_latents(scale_latents.detach()))
        latents = torch.cat(latents_of_scales)  # (n, codebook_embed_dim)
        mean_over_processes = partial(self.accelerator.reduce, reduction="mean")
        self.codebook_average.update(self.quantizer, latents, ids, mean_over_processes)

    def count_uses(self, output: SVQVAEOutput) -> None:
        """Counts how often the batches of all processes use each code, with `--dead_code_reset_steps`."""
        if self.options.dead_code_reset_steps:
            uses_of_codes = count_codes(ids_of_all_scales(output), self.quantizer.size)  # (codes,)
            self.dead_code_reset.counts += self.accelerator.reduce(uses_of_codes, "sum")

    def is_replacement_due(self, step: int) -> bool:
        """Whether dead codes are replaced after the current batch, with `--dead_code_reset_steps`."""
        if not self.options.dead_code_reset_steps:
            return False
        is_last_batch_of_step = self.accelerator.sync_gradients
        is_step_of_reset = (step + 1) % self.options.dead_code_reset_steps == 0
        return is_last_batch_of_step and is_step_of_reset

    def replace_dead(self, step: int) -> dict[str, torch.Tensor]:
        """Replaces dead codes, which no batch has used since the last replacement, by latents of fresh crops.

        At most as many codes are replaced as one batch has latents. All uses are then counted from 0 again.

        Returns:
            `dict[str, torch.Tensor]`: The number of replaced codes for the log.
        """
        fresh_crops = self._fresh_crops(RESET_BATCHES, step)
        fresh_latents = self._latents(fresh_crops)  # (n, codebook_embed_dim)
        latents_per_batch = len(fresh_latents) // RESET_BATCHES
        replaced_ids = self.dead_code_reset.reset(
            self.quantizer, fresh_latents, limit=latents_per_batch, seed=self.options.seed, step=step
        )
        self._restart_averages(replaced_ids)
        num_replaced = torch.tensor(float(len(replaced_ids)), device=self.accelerator.device)
        return {"reset_codes": num_replaced}

    def _fresh_crops(self, num_batches: int, step: int) -> Iterator[torch.Tensor]:
        """Crops that the run does not train on."""
        sides = [self.options.resolution, *self.options.crop_sizes]
        return self.images.fresh_crops(sides, num_batches, step)

    def _latents(self, crops: Iterable[torch.Tensor]) -> torch.Tensor:
        """Latents of crops of all processes, `(n, codebook_embed_dim)`, in the order that one process would have.

        The processes take turns. Of two processes, the first one has the crops 0, 2 and 4, and the second one 1, 3 and
        5. Gathering joins them to 0, 2, 4, 1, 3, 5, and transposing brings them back to 0, 1, 2, 3, 4, 5.
        """
        num_processes = self.accelerator.num_processes
        all_latents = []
        self.vqvae.eval()  # without dropout
        for sample in crops:
            with torch.no_grad(), self.accelerator.autocast():
                latents = self.vqvae.encode(sample).latents.float()  # (B, C, h, w)
                gathered = self.accelerator.gather(latents)  # (processes * B, C, h, w)
            by_process = gathered.unflatten(0, (num_processes, -1))  # (processes, B, C, h, w)
            in_order = by_process.transpose(0, 1).flatten(0, 1)  # (B * processes, C, h, w)
            all_latents.append(flatten_latents(in_order))
        self.vqvae.train()
        return torch.cat(all_latents)

    def _restart_averages(self, replaced_ids: torch.Tensor) -> None:
        """Starts all averages of replaced codes anew: of their latents, of their weights, and of their gradients."""
        self.codebook_average.restart(self.quantizer, replaced_ids)
        codebook = self.quantizer.embedding.weight
        forget_codes(self.vqvae, codebook, replaced_ids, self.weights.optimizer, self.weights.ema)


def ids_of_all_scales(output: SVQVAEOutput) -> torch.Tensor:
    """Ids `(n,)` of all scales of a batch that was quantised."""
    ids_of_scales = cast(list[torch.Tensor], output.ids)  # not None, because the batch was quantised
    return torch.cat([ids.flatten() for ids in ids_of_scales])


def make_card(options: TrainOptions, result: Result, vqvae: SVQVAE, rows: dict[str, str]) -> str:
    """Card of the model."""
    hub_sets = []
    if options.dataset_name is not None and is_hub_id(options.dataset_name):
        hub_sets.append(options.dataset_name)
    return model_card(
        vqvae.config,
        repo_id=result.name,
        license=result.origin.license,
        base_model=result.origin.base_model,
        datasets=hub_sets,
        provenance=rows | result.origin.rows,
    )


if __name__ == "__main__":
    run_script(train, TrainOptions)
