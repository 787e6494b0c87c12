"""Trains an SVQVAE: `accelerate launch training/train.py --train_data_dir PHOTOS --output_dir OUT ...`."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast

from svqvae_hf import SVQVAE
from svqvae_hf.evaluation.metrics import count_codes
from svqvae_hf.evaluation.perceptual import load_lpips
from svqvae_hf.hub.model_cards import model_card
from svqvae_hf.models.quantizer import flatten_latents
from svqvae_hf.trainer.codebook import CodeRevival, copy_codes_to_ema, initialise_codebook, reset_code_state
from svqvae_hf.trainer.data.crops import CropBatch, centre_crops, load_images
from svqvae_hf.trainer.data.image_source import ImageSource
from svqvae_hf.trainer.losses.adversarial import PatchDiscriminator
from svqvae_hf.trainer.losses.objective import MultiScaleForward, Objective, Pair, step_scales
from svqvae_hf.trainer.model import gradient_norm, load_model, training_mode, whiten_latents
from svqvae_hf.trainer.options import is_hub_id, public_name
from svqvae_hf.trainer.run import SHARDED, Session, make_optimizer, parameter_groups, run_script
from svqvae_hf.trainer.tracking import ScaleStatistics, image_grid, log_image
from svqvae_hf.trainer.train_options import TrainConfig

SHOWN_IMAGES = 4
WHITENING_BATCHES = 16
CONVOLUTION_NDIM = 4  # only these weights decay, so no code does

logger = get_logger(__name__, log_level="INFO")


class Trainer(Session):
    """Training of an SVQVAE: what it holds, and its steps.

    Args:
        config ([`TrainConfig`]): Options.
    """

    def __init__(self, config: TrainConfig):
        super().__init__(config)
        accelerator = self.accelerator
        self.vqvae = load_model(config).to(accelerator.device)

        self.source = ImageSource(config, accelerator, self.vqvae.config["pixel_range"])
        self.loader = self.source.loader(
            [config.resolution, *config.crop_sizes],
            config.max_train_steps * config.gradient_accumulation_steps,
            config.seed,
        )
        if config.model_config_name_or_path is not None and self.checkpoint is None:
            whiten_latents(self.vqvae, self._samples(WHITENING_BATCHES))
            for each in self.vqvae.quant_conv.parameters():
                broadcast(each.data)  # each process has crops of its own

        self.prepare(self.vqvae, MultiScaleForward(self.vqvae), CONVOLUTION_NDIM)
        lpips = judge = None
        if config.lpips_weight:
            lpips = load_lpips(config.lpips_net, config.lpips_weights).to(accelerator.device)
        if config.adversarial_weight:
            judge = PatchDiscriminator()
            optimizer, self.discriminator_lr_scheduler = make_optimizer(
                config,
                parameter_groups(judge, config.adam_weight_decay, CONVOLUTION_NDIM),
                config.discriminator_learning_rate,
                config.max_train_steps - config.adversarial_start,
            )
            self.discriminator, self.discriminator_optimizer = accelerator.prepare(judge, optimizer)
            self.trained.append(self.discriminator)
            judge.requires_grad_(False)
        self.objective = Objective(config, self.vqvae, lpips, judge, partial(accelerator.reduce, reduction="mean"))
        self.revival = CodeRevival(self.vqvae.config["codebook_size"]).to(accelerator.device)
        self.scales = ScaleStatistics(self.revival.counts.numel(), by_octave=not config.scales)
        self.validation_batches = self._validation_batches()
        self.ids = self._validation_ids() if config.train == "decoder" else []

    # A step

    def train_step(self, step: int) -> None:
        """As in the base class; first sets the codebook by k-means at the steps that ask for it."""
        if step in self.config.kmeans_steps:
            self._start_codebook()
        self.vqvae.quantize.entropy_loss_ratio = float(self.objective.weight("entropy", step) > 0)
        super().train_step(step)

    def train_on(self, batch: CropBatch, step: int) -> dict[str, torch.Tensor]:
        """Reconstructs the crops at the scales of the step; trains the model, and the discriminator if it is on."""
        config, accelerator, objective = self.config, self.accelerator, self.objective
        quantize = step >= config.quantize_from
        sample = self.source.receive(batch)
        scales = step_scales(config, sample.shape[-1] // self.vqvae.f, step)
        output = self.model(sample, scales, quantize)
        pairs = objective.pairs(sample, output)
        with accelerator.autocast():
            loss, numbers = objective(pairs, output, step)
        numbers |= self.descend(loss)
        if objective.weight("adversarial", step):
            numbers |= self._train_discriminator(pairs)
        self.scales.add(scales, pairs, output.ids)
        self.throughput.add(images=len(sample), megapixels=sample[:, 0].numel() / 1e6)
        if config.revival_steps and quantize:
            counts = sum(count_codes(ids, self.vqvae.config["codebook_size"]) for ids in output.ids)
            self.revival.observe(accelerator.reduce(counts, "sum"))
            if accelerator.sync_gradients and (step + 1) % config.revival_steps == 0:
                numbers |= self._revive(output.latents, step)
        return numbers

    def update_network(self) -> dict[str, torch.Tensor]:
        """As in the base class; norms of encoder and decoder, too."""
        scaler = self.accelerator.scaler
        loss_scale = 1.0 if scaler is None else scaler.get_scale()  # still in the gradients
        norms = {
            f"{name}_grad_norm": gradient_norm(part.parameters()) / loss_scale
            for name, part in (("encoder", self.vqvae.encoder), ("decoder", self.vqvae.decoder))
            if self.accelerator.distributed_type not in SHARDED and next(part.parameters()).requires_grad
        }
        norms |= super().update_network()
        if scaler is not None and self.config.adversarial_weight:
            # The update may change the scale, which the discriminator's gradients of earlier batches still have.
            for each in self.discriminator.parameters():
                if each.grad is not None:
                    each.grad *= scaler.get_scale() / loss_scale
        return norms

    def _train_discriminator(self, pairs: list[Pair]) -> dict[str, torch.Tensor]:
        self.discriminator.requires_grad_(True)
        with self.accelerator.autocast():
            loss, parts = self.objective.discriminator_loss(pairs, self.discriminator)
        self.accelerator.backward(loss)
        if self.accelerator.sync_gradients:
            parts["discriminator_grad_norm"] = self.update(
                self.discriminator, self.discriminator_optimizer, self.discriminator_lr_scheduler
            )
        self.discriminator.requires_grad_(False)  # in the model's step gradients only pass through it
        return parts

    # Codebook

    def _start_codebook(self) -> None:
        """Sets the codebook by k-means of the latents of fresh crops, from all processes."""
        config, accelerator = self.config, self.accelerator
        latents = []
        self.vqvae.eval()  # without dropout
        for sample in self._samples(config.kmeans_batches):
            with torch.no_grad(), accelerator.autocast():
                latents.append(flatten_latents(self.vqvae.encode(sample).latents.float()))
        self.training_mode()
        initialise_codebook(self.vqvae.quantize, accelerator.gather(torch.cat(latents)), config.seed)
        codes = self.vqvae.quantize.embedding.weight
        broadcast(codes.data)  # sums of floats may differ in their last bits between processes
        self._forget_codes(torch.arange(len(codes), device=codes.device))

    def _revive(self, latents: torch.Tensor, step: int) -> dict[str, torch.Tensor]:
        gathered = self.accelerator.gather(flatten_latents(latents.detach().float()))
        replaced = self.revival.revive(self.vqvae.quantize, gathered, self.config.seed, step)
        self._forget_codes(replaced)
        return {"revived": torch.tensor(float(len(replaced)), device=self.accelerator.device)}

    def _forget_codes(self, replaced: torch.Tensor) -> None:
        """Clears what optimizer and average remember of codes that were replaced."""
        codes = self.vqvae.quantize.embedding.weight
        reset_code_state(self.optimizer, codes, replaced)
        if self.ema is not None:
            copy_codes_to_ema(self.ema, self.vqvae, codes, replaced)

    # Data, validation and log

    def _samples(self, num_batches: int) -> Iterator[torch.Tensor]:
        """Batches of the largest crops, other ones than those that are trained on."""
        for batch in self.source.loader([self.config.resolution], num_batches, self.config.seed + 1):
            yield batch.sample.to(self.accelerator.device)

    def _validation_batches(self) -> list[torch.Tensor]:
        config = self.config
        if config.validation_data_dir is None:
            return []
        images = load_images(None, None, [], config.validation_data_dir, "image", "train", streaming=False)
        crops = centre_crops(images, config.num_validation_images, config.resolution, self.vqvae.config["pixel_range"])
        return list(crops.split(config.train_batch_size))

    def _validation_ids(self) -> list[torch.Tensor]:
        """Ids of the validation images, batch by batch, scale by scale."""
        with self.evaluating():
            batches = [batch.to(self.accelerator.device) for batch in self.validation_batches]
            return [ids for batch in batches for ids in self.vqvae.encode_tokens(batch, self.config.validation_scales)]

    def validate(self, done: int) -> None:
        """Every process passes over all validation images, so that any engine can; the main one reports."""
        if not self.validation_batches:
            return
        config = self.config
        statistics = ScaleStatistics(self.vqvae.config["codebook_size"], by_octave=False)
        shown: list[Pair] = []
        with self.evaluating():
            for batch in self.validation_batches:
                sample = batch.to(self.accelerator.device)
                output = self.model(sample, config.validation_scales, done > config.quantize_from)
                pairs = [pair.clamped() for pair in self.objective.pairs(sample, output)]
                statistics.add(config.validation_scales, pairs, output.ids)
                shown = shown or pairs
        self.validation = statistics.summary(self.accelerator.reduce)
        self.log(done, {f"validation/{name}": value for name, value in self.validation.items()})
        if self.accelerator.is_main_process:
            grid = image_grid([pair.first(SHOWN_IMAGES) for pair in shown])
            log_image(self.accelerator, grid, self.output_dir / "samples", done)

    def numbers(self) -> dict[str, float]:
        """As in the base class, and those of each scale."""
        numbers = super().numbers() | self.scales.summary(self.accelerator.reduce)
        if self.config.spread_weight:
            numbers["mean_cosine"] = self.objective.spread.mean_cosine.item()
        return numbers

    def state(self) -> dict[str, Any]:
        """As in the base class, and that of objective, codebook and discriminator."""
        holders = {"revival": self.revival, "spread": self.objective.spread, "lecam": self.objective.lecam}
        if self.config.adversarial_weight:
            holders["discriminator_lr_scheduler"] = self.discriminator_lr_scheduler
        return super().state() | {name: holder for name, holder in holders.items() if holder is not None}

    def training_mode(self) -> None:
        """Training mode for what is trained."""
        training_mode(self.config, self.vqvae)

    # The end

    def finish(self, repo_id: str | None) -> None:
        """As in the base class; first, ids that were to stay are compared with those before."""
        if self.config.train == "decoder":
            if not all(map(torch.equal, self.ids, self._validation_ids())):
                raise RuntimeError("Training the decoder must keep all ids, but ids of validation images changed.")
            logger.info("All ids of the validation images are as before.")
        super().finish(repo_id)

    def save(self, folder: Path, state_dict: dict[str, torch.Tensor]) -> None:
        """Writes the model."""
        vqvae = SVQVAE.from_config(self.vqvae.config)
        vqvae.load_state_dict({name.removeprefix("vqvae."): weight for name, weight in state_dict.items()})
        vqvae.save_pretrained(folder)

    def card(self, repo_id: str) -> str:
        """The model's card, with the numbers of the last validation."""
        config = self.config
        provenance = self.provenance(f"crops of {config.resolution}² pixels")
        model, images = config.pretrained_model_name_or_path, config.dataset_name or config.train_data_dir
        if model is not None:
            provenance["started from"] = f"`{public_name(model)}`"
        provenance["images"] = f"`{public_name(images)}`"
        if self.validation_batches:
            count = sum(map(len, self.validation_batches))
            numbers = ", ".join(f"{name} {value:.4g}" for name, value in self.validation.items())
            provenance["validation"] = f"{count} images, centre crops: {numbers}"
        return model_card(
            self.vqvae.config,
            repo_id=repo_id,
            base_model=model if model is not None and is_hub_id(model) else None,
            datasets=[images] if config.dataset_name is not None and is_hub_id(images) else [],
            provenance=provenance,
        )


if __name__ == "__main__":
    run_script(Trainer, TrainConfig)
