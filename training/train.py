"""Trains an SVQVAE: `accelerate launch training/train.py --train_data_dir PHOTOS --output_dir OUT ...`."""

from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast
from torch.distributed.checkpoint.stateful import Stateful

from svqvae_hf import SVQVAE
from svqvae_hf.data.image_sets import open_images
from svqvae_hf.evaluation.metrics import count_codes
from svqvae_hf.hub.model_cards import model_card
from svqvae_hf.hub.repositories import is_hub_id
from svqvae_hf.models.modeling_svqvae import SVQVAEOutput
from svqvae_hf.models.quantizer import flatten_latents
from svqvae_hf.trainer.checkpoints import Checkpoints, find_checkpoint
from svqvae_hf.trainer.codebook import CodebookAverage, DeadCodeReset, forget_codes, initialise_codebook
from svqvae_hf.trainer.data.crops import centre_crops
from svqvae_hf.trainer.data.held_out import check_held_out
from svqvae_hf.trainer.data.image_source import ImageSource
from svqvae_hf.trainer.linear_start import start_linear
from svqvae_hf.trainer.log import Log
from svqvae_hf.trainer.losses.objective import Objective, Pair
from svqvae_hf.trainer.model import load_model, save_model, step_scales
from svqvae_hf.trainer.optimization import loss_scale, make_optimizer, rescale_gradients
from svqvae_hf.trainer.publishing import Result, provenance
from svqvae_hf.trainer.run import run_script
from svqvae_hf.trainer.tracking import ScaleStatistics, log_images, progress, rows_of_images
from svqvae_hf.trainer.train_options import TrainOptions
from svqvae_hf.trainer.validations import Validations
from svqvae_hf.trainer.weights import Weights

SCRIPT = "training/train.py"
SHOWN_IMAGES = 4
START_BATCHES = 16
RESET_BATCHES = 16  # batches whose latents replace dead codes, because the crops of one step are too similar
KERNEL_NDIM = 4  # only weights of convolutions decay, so no code does
DISCRIMINATOR_LEARNING_RATE = 1e-4

ValidationSets = dict[str, Sequence[torch.Tensor]]  # batches of images by the name of their set

logger = get_logger(__name__, log_level="INFO")


def train(options: TrainOptions, accelerator: Accelerator) -> None:
    """Trains an SVQVAE, from the start or from a checkpoint, and saves it with its card in the output folder."""
    checkpoint = find_checkpoint(options.output_dir, options.resume_from_checkpoint, options.max_steps)

    # Model and images
    vqvae = load_model(options).to(accelerator.device)
    codebook_size, pixel_range = vqvae.config["codebook_size"], vqvae.config["pixel_range"]
    images = ImageSource(options, accelerator, pixel_range, synthetic_fraction=options.synthetic_fraction)
    sides = [options.resolution, *options.crop_sizes]
    loader = images.loader(sides, options.max_steps, options.seed, options.gradient_accumulation_steps)
    validation_sets = load_validation_sets(options, images)
    objective = Objective(options, vqvae, mean=partial(accelerator.reduce, reduction="mean"))
    discriminator = objective.discriminator
    statistics = ScaleStatistics(codebook_size, by_octave=not options.scales)

    # Optimizers
    if options.model_config_name_or_path is not None and options.start == "linear" and checkpoint is None:
        start_new_model(options, vqvae, images)
    optimizer, lr_scheduler = make_optimizer(vqvae, options, options.learning_rate, options.max_steps, KERNEL_NDIM)
    model, optimizer = accelerator.prepare(vqvae, optimizer)
    models = [model]
    weights = Weights(options, accelerator, vqvae, model, optimizer, lr_scheduler, options.use_ema)
    codes = Codes(options, vqvae, images, weights)
    measured = [*((name, sum(map(len, each))) for name, each in validation_sets.items()), options.validation_scales]
    validations = Validations(vqvae, options.load_best_model_at_end, measured)
    states: dict[str, Stateful] = {"weights": weights, "codebook_average": codes.average, "dead_codes": codes.dead}
    states["validations"] = validations
    if discriminator is not None:
        discriminator_steps = options.max_steps - options.adversarial_start
        discriminator_optimizer, discriminator_lr_scheduler = make_optimizer(
            discriminator, options, DISCRIMINATOR_LEARNING_RATE, discriminator_steps, KERNEL_NDIM
        )
        discriminator_model, discriminator_optimizer = accelerator.prepare(discriminator, discriminator_optimizer)
        discriminator.requires_grad_(False)  # in the model's loss, gradients only pass through it
        models.append(discriminator_model)
        discriminator_weights = states["discriminator"] = Weights(
            options,
            accelerator,
            discriminator,
            discriminator_model,
            discriminator_optimizer,
            discriminator_lr_scheduler,
            use_ema=False,
        )
    checkpoints = Checkpoints(options, accelerator, checkpoint, states | {"loader": loader})
    result = Result.of(options, accelerator)
    log = Log(options, accelerator, vqvae, loader.contents, checkpoints.first_step)
    batches = iter(loader)

    def validate_after(steps_done: int) -> None:
        if validation_sets:
            validate(log, weights, objective, validation_sets, validations, steps_done)

    if checkpoint is None:
        validate_after(0)
    for step in checkpoints.steps():
        quantize = step >= options.quantize_from
        adversarial = objective.is_adversarial(step)
        if step in options.kmeans_steps:
            codes.set_by_kmeans(step)

        for batch in islice(batches, options.gradient_accumulation_steps):
            with accelerator.accumulate(*models):
                # Forward pass and gradients, of the model and then of the discriminator
                sample = images.to_device(batch)
                scales = step_scales(options, sample.shape[-1] // vqvae.f, step)
                output = model(sample, scales, scale_from="latents", force_not_quantize=not quantize)
                pairs = objective.pairs(sample, output)
                with accelerator.autocast():
                    loss, numbers = objective(pairs, output, step)
                accelerator.backward(loss)
                if adversarial and discriminator is not None:
                    discriminator.requires_grad_(True)
                    with accelerator.autocast():
                        discriminator_loss, more_numbers = objective.discriminator_loss(pairs, discriminator_model)
                    accelerator.backward(discriminator_loss)
                    discriminator.requires_grad_(False)
                    numbers |= more_numbers

                # Updates, after the last batch of a step
                if accelerator.sync_gradients:
                    scale_before = loss_scale(accelerator)
                    numbers |= weights.update()
                    if adversarial and discriminator is not None:
                        rescale_gradients(discriminator, loss_scale(accelerator) / scale_before)
                        numbers["discriminator_grad_norm"] = discriminator_weights.update()["grad_norm"]

                # Codes, outside gradient descent
                if quantize:
                    numbers |= codes.move(output, step)
                log.add(numbers | {"loss": loss}, images=len(sample), megapixels=sample[:, 0].numel() / 1e6)
                statistics.add(scales, pairs, output.ids or [])

        if options.logs_after(step):
            log.write_training(step + 1, statistics.summary(accelerator.reduce) | {"lr": weights.lr})
        if options.validates_after(step):
            validate_after(step + 1)

    validate_after(options.max_steps)
    vqvae.load_state_dict(validations.weights or weights.final())
    if accelerator.is_main_process:
        examples = f"crops of {options.resolution}² pixels"
        rows = provenance(SCRIPT, options.max_steps, loader.share.step_size, examples)
        for name, validated in validation_sets.items():
            both = validations.chosen[name], validations.first[name]
            chosen, first = (", ".join(f"{key} {value:.4g}" for key, value in each.items()) for each in both)
            rows[name] = f"{sum(map(len, validated))} images, centre crops: {chosen} after step {validations.step:,}"
            rows[name] += f"; {first} in the first validation"
        result.publish(partial(save_model, options, vqvae), make_card(options, result, vqvae, rows))


def start_new_model(options: TrainOptions, vqvae: SVQVAE, images: ImageSource) -> None:
    """Makes a new model a linear autoencoder of some crops, the same on all processes."""
    crops, device = images.fresh_crops([options.resolution], START_BATCHES), vqvae.device
    start_linear(vqvae.cpu(), torch.cat([*crops]).cpu())  # in float64, which Apple's GPUs do not have
    vqvae.to(device)
    for parameter in vqvae.parameters():
        broadcast(parameter.data)  # processes have different crops


class Codes:
    """Updates the codes of a run without gradients: by k-means, by averages of latents, and by replacing dead codes.

    Args:
        options ([`TrainOptions`]): Options.
        vqvae ([`SVQVAE`]): Model that holds the codes.
        images ([`ImageSource`]): Images whose latents become codes.
        weights ([`Weights`]): Weights of the model.
    """

    def __init__(self, options: TrainOptions, vqvae: SVQVAE, images: ImageSource, weights: Weights):
        self.options, self.vqvae, self.images, self.weights = options, vqvae, images, weights
        self.accelerator = images.accelerator
        decay = options.codebook_decay ** (1 / options.gradient_accumulation_steps)  # per batch
        self.average = CodebookAverage(vqvae.quantize, decay).to(vqvae.device)
        self.dead = DeadCodeReset(vqvae.quantize.size).to(vqvae.device)

    def set_by_kmeans(self, step: int) -> None:
        """Sets all codes by k-means of the latents of fresh crops, from all processes."""
        quantizer, options = self.vqvae.quantize, self.options
        logger.info(f"Setting {quantizer.size:,} codes by k-means of {options.kmeans_batches} batches of latents")
        initialise_codebook(quantizer, self._fresh_latents(options.kmeans_batches, step), options.seed)
        weight = quantizer.embedding.weight
        broadcast(weight.data)  # sums of floats may differ in their last bits between processes
        self._forget(torch.arange(len(weight), device=weight.device))

    def move(self, output: SVQVAEOutput, step: int) -> dict[str, torch.Tensor]:
        """Moves codes to the average of their latents, and replaces dead codes by latents, if asked for."""
        options, accelerator, quantizer = self.options, self.accelerator, self.vqvae.quantize
        ids = torch.cat([each.flatten() for each in output.ids or []])
        if 0 < options.codebook_decay < 1:
            latents = torch.cat([flatten_latents(each.detach()) for each in output.latents or []])
            self.average.update(quantizer, latents, ids, partial(accelerator.reduce, reduction="mean"))
        if not options.dead_code_reset_steps:
            return {}
        self.dead.counts += accelerator.reduce(count_codes(ids, quantizer.size), "sum")
        if not accelerator.sync_gradients or (step + 1) % options.dead_code_reset_steps:
            return {}
        fresh = self._fresh_latents(RESET_BATCHES, step)
        replaced = self.dead.reset(quantizer, fresh, len(fresh) // RESET_BATCHES, options.seed, step)
        self._forget(replaced)
        return {"reset_codes": torch.tensor(float(len(replaced)), device=accelerator.device)}

    def _fresh_latents(self, num_batches: int, step: int) -> torch.Tensor:
        """Latents of crops that the run does not train on, from all processes."""
        options, accelerator, latents = self.options, self.accelerator, []
        self.vqvae.eval()  # without dropout
        crops = self.images.fresh_crops([options.resolution, *options.crop_sizes], num_batches, step)
        for sample in progress(crops, "k-means: latents", num_batches) if num_batches > RESET_BATCHES else crops:
            with torch.no_grad(), accelerator.autocast():
                gathered = accelerator.gather(self.vqvae.encode(sample).latents.float())
            by_process = gathered.unflatten(0, (accelerator.num_processes, -1))
            latents.append(flatten_latents(by_process.transpose(0, 1).flatten(0, 1)))  # as one process has them
        self.vqvae.train()
        return torch.cat(latents)

    def _forget(self, replaced: torch.Tensor) -> None:
        """Starts averages and optimizer of replaced codes anew."""
        quantizer = self.vqvae.quantize
        self.average.restart(quantizer, replaced)
        forget_codes(self.vqvae, quantizer.embedding.weight, replaced, self.weights.optimizer, self.weights.ema)


def load_validation_sets(options: TrainOptions, images: ImageSource) -> ValidationSets:
    """Centre crops of the images of each `--validation_data_dir`, in batches: `validation`, `validation_2`, ..."""
    sets = {}
    for number, folder in enumerate(options.validation_data_dir, 1):
        held_out = open_images([folder], keep_labels=False)
        for trained in (images.images, images.mixed):
            check_held_out(held_out, trained)
        crops = centre_crops(held_out, options.num_validation_images, options.resolution, images.pixel_range)
        sets[f"validation_{number}" if number > 1 else "validation"] = crops.split(options.per_device_train_batch_size)
    return sets


def validate(
    log: Log, weights: Weights, objective: Objective, sets: ValidationSets, validations: Validations, steps_done: int
) -> None:
    """Logs statistics of each scale on each set, and a picture of the first set."""
    accelerator, options = log.accelerator, objective.options
    scales = options.validation_scales
    shown: list[Pair] = []
    statistics = ScaleStatistics(objective.codebook.weight.shape[0], by_octave=False)
    quantize = steps_done > options.quantize_from or options.quantize_from == 0
    numbers, ids = {}, {}
    with weights.evaluating():
        for name, batches in sets.items():
            found = [torch.empty(0, dtype=torch.int64)]
            for batch in batches:
                sample = batch.to(accelerator.device)
                output = weights.model(sample, scales, scale_from="latents", force_not_quantize=not quantize)
                pairs = [pair._replace(output=pair.output.clamp(0, 1)) for pair in objective.pairs(sample, output)]
                statistics.add(scales, pairs, output.ids or [])
                found += [each.flatten().cpu() for each in output.ids or []]
                shown = shown or [pair.first(SHOWN_IMAGES) for pair in pairs]
            numbers[name], ids[name] = statistics.summary(accelerator.reduce), torch.cat(found)
        validations.add(steps_done, numbers, ids)
    for name, value in numbers.items():
        log.write(steps_done, {f"{name}/{key}": each for key, each in value.items()})
    if accelerator.is_main_process:
        log_images(accelerator, rows_of_images(shown), len(shown) + 1, Path(options.output_dir, "samples"), steps_done)


def make_card(options: TrainOptions, result: Result, vqvae: SVQVAE, rows: dict[str, str]) -> str:
    """Card of the model."""
    is_on_hub = options.dataset_name is not None and is_hub_id(options.dataset_name)
    return model_card(
        vqvae.config,
        repo_id=result.name,
        license=result.origin.license,
        base_model=result.origin.base_model,
        datasets=[str(options.dataset_name)] if is_on_hub else [],
        provenance=rows | result.origin.rows,
    )


if __name__ == "__main__":
    run_script(train, TrainOptions)
