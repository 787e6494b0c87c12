"""Trains an SVQVAE: `accelerate launch training/train.py --train_data_dir PHOTOS --output_dir OUT ...`."""

import dataclasses
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, broadcast, set_seed
from checkpoints import checkpoint_step, find_checkpoint, load_checkpoint, save_checkpoint
from codebook import CodeRevival, copy_codes_to_ema, initialise_codebook, reset_code_state
from config import TrainConfig, read_config
from data import CropBatch, CropLoader, CropPolicy, centre_crops, load_images
from diffusers.training_utils import EMAModel
from discriminator import PatchDiscriminator
from huggingface_hub import HfApi
from losses import MultiScaleForward, Objective, Pair, step_scales
from model import gradient_norm, load_model, make_optimizer, training_mode, whiten_latents
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from tracking import Means, ScaleStatistics, Throughput, image_grid, log_image

from svqvae_hf import SVQVAE, __version__
from svqvae_hf.files import write_file
from svqvae_hf.metrics import count_codes
from svqvae_hf.model_cards import model_card
from svqvae_hf.modeling_svqvae import flatten_latents
from svqvae_hf.perceptual import load_lpips

JUDGED_IMAGES = 200  # read before the share of unreadable ones is judged
SHOWN_IMAGES = 4
WHITENING_BATCHES = 16
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)
PUBLISHED = ("README.md", "config.json", "diffusion_pytorch_model*", "train_config.yaml", "samples/*")

logger = get_logger(__name__, log_level="INFO")


class Interruption:
    """Turns SIGTERM and Ctrl-C into a request that all processes see at the end of a step.

    A second signal ends the process at once.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.exit_code = 128 + signal.SIGTERM

    def __enter__(self) -> "Interruption":
        self.handlers = {number: signal.signal(number, self._request) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.__exit__()
        self.exit_code = 128 + number
        self.accelerator.set_trigger()


class Trainer:
    """A run: what it holds, and its steps.

    Args:
        config ([`TrainConfig`]): Options.
    """

    def __init__(self, config: TrainConfig):
        self.config = config
        self.output_dir = Path(config.output_dir)
        self.checkpoint = find_checkpoint(config.output_dir, config.resume_from_checkpoint)
        self.accelerator = accelerator = make_accelerator(config)
        set_seed(config.seed)
        self.vqvae = load_model(config).to(accelerator.device)

        self.images = load_images(
            config.dataset_name,
            config.dataset_config_name,
            config.data_files,
            config.train_data_dir,
            config.image_column,
            config.split,
            config.streaming,
        )
        self.loader = self._loader(
            [config.resolution, *config.crop_sizes],
            config.max_train_steps * config.gradient_accumulation_steps,
            config.seed,
        )
        if config.model_config_name_or_path is not None and self.checkpoint is None:
            whiten_latents(self.vqvae, self._samples(WHITENING_BATCHES))

        optimizer, self.lr_scheduler = make_optimizer(config, self.vqvae, config.learning_rate, config.max_train_steps)
        self.model, self.optimizer = accelerator.prepare(MultiScaleForward(self.vqvae), optimizer)
        lpips = judge = None
        if config.lpips_weight:
            lpips = load_lpips(config.lpips_net, config.lpips_weights).to(accelerator.device)
        if config.adversarial_weight:
            judge = PatchDiscriminator()
            optimizer, self.discriminator_lr_scheduler = make_optimizer(
                config, judge, config.discriminator_learning_rate, config.max_train_steps - config.adversarial_start
            )
            self.discriminator, self.discriminator_optimizer = accelerator.prepare(judge, optimizer)
            judge.requires_grad_(False)
        self.trained = [self.model] if judge is None else [self.model, self.discriminator]
        self.objective = Objective(config, self.vqvae, lpips, judge, partial(accelerator.reduce, reduction="mean"))
        self.ema = EMAModel(self.vqvae.parameters(), decay=config.ema_decay) if config.use_ema else None
        self.revival = CodeRevival(self.vqvae.config["codebook_size"]).to(accelerator.device)

        self.validation_batches = self._validation_batches()
        self.validation: dict[str, float] = {}
        self.repo_id = self._repo_id()
        self.skipped = self.num_read = self.num_unreadable = 0
        self.unreadable: set[str] = set()
        self.means, self.scales, self.throughput = Means(), ScaleStatistics(self.revival.counts.numel()), Throughput()

    def run(self) -> None:
        """Trains, and leaves the model with its card in the output folder.

        Raises:
            ValueError: If images or gradients are beyond what the options allow.
            SystemExit: After a signal, once a checkpoint is saved.
        """
        config, accelerator = self.config, self.accelerator
        first_step = self._resume()
        ids = self._validation_ids() if config.train == "decoder" else []
        steps = range(first_step, config.max_train_steps)
        on_terminal = accelerator.is_local_main_process and sys.stderr.isatty()
        bar = tqdm(steps, initial=first_step, total=config.max_train_steps, unit="step", disable=not on_terminal)
        batches = iter(self.loader)
        with logging_redirect_tqdm(), Interruption(accelerator) as interruption:
            for step in bar:
                if step in config.kmeans_steps:
                    self._start_codebook()
                self._train_step(step, batches)
                done = step + 1
                if done % config.logging_steps == 0:
                    self._report(done)
                if self.validation_batches and (done % config.validation_steps == 0 or done == config.max_train_steps):
                    self._validate(done)
                interrupted = accelerator.check_trigger()
                if interrupted or done % config.checkpointing_steps == 0 or done == config.max_train_steps:
                    self._save_checkpoint(done)
                if interrupted:
                    logger.info(f"Stopped by a signal at step {done}. Go on with `--resume_from_checkpoint latest`.")
                    sys.exit(interruption.exit_code)
        self._finish(ids)

    # A step

    def _train_step(self, step: int, batches: Iterator[CropBatch]) -> None:
        config, accelerator, objective = self.config, self.accelerator, self.objective
        quantize = step >= config.quantize_from
        self.vqvae.quantize.entropy_loss_ratio = float(objective.weight("entropy", step) > 0)
        for _ in range(config.gradient_accumulation_steps):
            batch = next(batches)
            self._watch_unreadable(batch)
            sample = batch.sample.to(accelerator.device, non_blocking=True)
            scales = step_scales(config, sample.shape[-1] // self.vqvae.f, step)
            with accelerator.accumulate(*self.trained):
                output = self.model(sample, scales, quantize)
                pairs = objective.pairs(sample, output)
                with accelerator.autocast():
                    loss, numbers = objective(pairs, output, step)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    numbers |= self._update_model()
                if objective.weight("adversarial", step):
                    numbers |= self._train_discriminator(pairs)
            self.means.add(numbers | {"loss": loss})
            self.scales.add(scales, pairs, output.ids)
            self.throughput.add(sample)
            if config.revival_steps and quantize:
                counts = sum(count_codes(ids, self.vqvae.config["codebook_size"]) for ids in output.ids)
                self.revival.observe(accelerator.reduce(counts, "sum"))
        if config.revival_steps and quantize and (step + 1) % config.revival_steps == 0:
            self._revive(output.latents, step)

    def _update_model(self) -> dict[str, torch.Tensor]:
        scaler = self.accelerator.scaler
        loss_scale = 1.0 if scaler is None else scaler.get_scale()  # still in the gradients
        norms = {
            f"{name}_grad_norm": gradient_norm(part.parameters()) / loss_scale
            for name, part in (("encoder", self.vqvae.encoder), ("decoder", self.vqvae.decoder))
            if self.accelerator.distributed_type not in SHARDED and next(part.parameters()).requires_grad
        }
        norm = self._update(self.model, self.optimizer, self.lr_scheduler)
        if scaler is not None and self.config.adversarial_weight:
            # The update may change the scale, which the discriminator's gradients of earlier batches still have.
            for each in self.discriminator.parameters():
                if each.grad is not None:
                    each.grad *= scaler.get_scale() / loss_scale
        self.skipped = 0 if norm.isfinite() else self.skipped + 1
        if self.skipped > self.config.max_skipped_steps:
            raise ValueError(
                f"Gradients must be finite, but were not for {self.skipped} steps in a row. Lower `--learning_rate` "
                "and resume from an earlier checkpoint."
            )
        if self.ema is not None:
            self.ema.step(self.vqvae.parameters())
        return norms | {"grad_norm": norm, "skipped": (~norm.isfinite()).float()}

    def _update(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, lr_scheduler: LambdaLR
    ) -> torch.Tensor:
        """Clips the gradients and, if they are finite, updates the weights. Gives the norm before it."""
        if self.accelerator.distributed_type in SHARDED:
            norm = self.accelerator.clip_grad_norm_(model.parameters(), self.config.max_grad_norm)
        else:
            # Not by accelerate's function, which with fp16 takes the scale off the other network's gradients, too.
            self.accelerator.unscale_gradients(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), self.config.max_grad_norm)
        norm = torch.as_tensor(norm)
        if norm.isfinite() or self.accelerator.scaler is not None:  # the scaler skips the step itself, and adapts
            optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        return norm

    def _train_discriminator(self, pairs: list[Pair]) -> dict[str, torch.Tensor]:
        self.discriminator.requires_grad_(True)
        with self.accelerator.autocast():
            loss, parts = self.objective.discriminator_loss(pairs, self.discriminator)
        self.accelerator.backward(loss)
        if self.accelerator.sync_gradients:
            parts["discriminator_grad_norm"] = self._update(
                self.discriminator, self.discriminator_optimizer, self.discriminator_lr_scheduler
            )
        self.discriminator.requires_grad_(False)  # in the model's step gradients only pass through it
        return parts

    def _watch_unreadable(self, batch: CropBatch) -> None:
        """Names the images that could not be read, and stops the run if there are too many."""
        self.num_read += batch.num_read
        self.num_unreadable += len(batch.unreadable)
        for name in batch.unreadable:
            if name not in self.unreadable:
                self.unreadable.add(name)
                logger.warning(f"Left out, since it cannot be read as an image: {name}", main_process_only=False)
        share = self.num_unreadable / self.num_read
        if self.num_read >= JUDGED_IMAGES and share > self.config.max_unreadable_share:
            raise ValueError(
                f"At most {self.config.max_unreadable_share:.1%} of the images may be unreadable, but {share:.1%} of "
                f"the {self.num_read:,} read so far are, {min(self.unreadable)} among them. Mend or remove them, or "
                "raise `--max_unreadable_share`."
            )

    # Codebook

    def _start_codebook(self) -> None:
        """Sets the codebook by k-means of the latents of fresh crops, from all processes."""
        config, accelerator = self.config, self.accelerator
        latents = []
        for sample in self._samples(config.kmeans_batches):
            with torch.no_grad(), accelerator.autocast():
                latents.append(flatten_latents(self.vqvae.encode(sample).latents.float()))
        initialise_codebook(self.vqvae.quantize, accelerator.gather(torch.cat(latents)), config.seed)
        codes = self.vqvae.quantize.embedding.weight
        broadcast(codes.data)  # sums of floats may differ in their last bits between processes
        self._forget_codes(torch.arange(len(codes), device=codes.device))

    def _revive(self, latents: torch.Tensor, step: int) -> None:
        gathered = self.accelerator.gather(flatten_latents(latents.detach().float()))
        replaced = self.revival.revive(self.vqvae.quantize, gathered, self.config.seed, step)
        self._forget_codes(replaced)
        self.means.add({"revived": torch.tensor(float(len(replaced)), device=self.accelerator.device)})

    def _forget_codes(self, replaced: torch.Tensor) -> None:
        """Clears what optimizer and average remember of codes that were replaced."""
        codes = self.vqvae.quantize.embedding.weight
        reset_code_state(self.optimizer, codes, replaced)
        if self.ema is not None:
            copy_codes_to_ema(self.ema, self.vqvae, codes, replaced)

    # Data

    def _loader(self, sides: list[int], num_batches: int, seed: int) -> CropLoader:
        config, accelerator = self.config, self.accelerator
        policy = CropPolicy(
            sides=sides,
            batch_size=config.train_batch_size,
            center_crop=config.center_crop,
            random_flip=config.random_flip,
            resize_range=tuple(config.resize_range),
        )
        return CropLoader(
            self.images,
            policy,
            self.vqvae.config["pixel_range"],
            seed=seed,
            num_workers=config.dataloader_num_workers,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
            num_batches=num_batches,
            shuffle_buffer=config.shuffle_buffer,
        )

    def _samples(self, num_batches: int) -> Iterator[torch.Tensor]:
        """Batches of the largest crops, other ones than those that are trained on."""
        for batch in self._loader([self.config.resolution], num_batches, self.config.seed + 1):
            yield batch.sample.to(self.accelerator.device)

    def _validation_batches(self) -> list[torch.Tensor]:
        config = self.config
        if config.validation_data_dir is None:
            return []
        images = load_images(None, None, [], config.validation_data_dir, "image", "train", streaming=False)
        crops = centre_crops(images, config.num_validation_images, config.resolution, self.vqvae.config["pixel_range"])
        return list(crops.split(config.train_batch_size))

    # Validation, log and checkpoints

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Evaluation mode, with the averaged weights if there are any."""
        self.vqvae.eval()
        if self.ema is not None:
            self.ema.store(self.vqvae.parameters())
            self.ema.copy_to(self.vqvae.parameters())
        with torch.no_grad():
            yield
        if self.ema is not None:
            self.ema.restore(self.vqvae.parameters())
        training_mode(self.config, self.vqvae)

    def _validation_ids(self) -> list[torch.Tensor]:
        """Ids of the validation images, batch by batch, scale by scale."""
        with self._evaluating():
            batches = [batch.to(self.accelerator.device) for batch in self.validation_batches]
            return [ids for batch in batches for ids in self.vqvae.encode_tokens(batch, self.config.validation_scales)]

    def _validate(self, done: int) -> None:
        """Every process passes over all validation images, so that any engine can; the main one reports."""
        config = self.config
        statistics = ScaleStatistics(self.vqvae.config["codebook_size"])
        shown: list[Pair] = []
        with self._evaluating():
            for batch in self.validation_batches:
                sample = batch.to(self.accelerator.device)
                output = self.model(sample, config.validation_scales, done > config.quantize_from)
                pairs = [pair.clamped() for pair in self.objective.pairs(sample, output)]
                statistics.add(config.validation_scales, pairs, output.ids)
                shown = shown or pairs
        self.validation = statistics.summary(self.accelerator.reduce)
        self._log(done, {f"validation/{name}": value for name, value in self.validation.items()})
        if self.accelerator.is_main_process:
            grid = image_grid([pair.first(SHOWN_IMAGES) for pair in shown])
            log_image(self.accelerator, grid, self.output_dir / "samples", done)

    def _report(self, done: int) -> None:
        reduce = self.accelerator.reduce
        numbers = self.means.summary(reduce) | self.scales.summary(reduce)
        if self.config.spread_weight:
            numbers["mean_cosine"] = self.objective.spread.mean_cosine.item()
        numbers["lr"] = self.lr_scheduler.get_last_lr()[0]
        numbers |= self.throughput.summary(self.accelerator.num_processes)
        self._log(done, {f"train/{name}": value for name, value in numbers.items()})

    def _log(self, done: int, numbers: dict[str, float]) -> None:
        self.accelerator.log(numbers, step=done)
        logger.info(f"step {done}: " + ", ".join(f"{name} {value:.4g}" for name, value in numbers.items()))

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds beside what accelerate saves."""
        holders = {"lr_scheduler": self.lr_scheduler, "ema": self.ema, "revival": self.revival}
        holders |= {"spread": self.objective.spread, "lecam": self.objective.lecam}
        if self.config.adversarial_weight:
            holders["discriminator_lr_scheduler"] = self.discriminator_lr_scheduler
        return {name: holder for name, holder in holders.items() if holder is not None}

    def _save_checkpoint(self, done: int) -> None:
        save_checkpoint(
            self.accelerator,
            self.output_dir,
            done,
            {name: holder.state_dict() for name, holder in self._state().items()},
            {"loader": self.loader.state_dict(), "skipped": self.skipped},
            self.config.checkpoints_total_limit,
        )

    def _resume(self) -> int:
        """Goes on from the checkpoint, if there is one. Gives the first step to do."""
        if self.checkpoint is None:
            return 0
        holders, done = self._state(), checkpoint_step(self.checkpoint)
        run_state, rank_state = load_checkpoint(self.accelerator, self.checkpoint, holders)
        for name, holder in holders.items():
            holder.load_state_dict(run_state[name])
        if self.ema is not None:
            self.ema.to(self.accelerator.device)  # its state is loaded to the CPU
        self.loader.load_state_dict(rank_state["loader"])
        if self.loader.batch != done * self.config.gradient_accumulation_steps:
            raise ValueError(
                f"`--gradient_accumulation_steps` must be {self.loader.batch // done} as in the run that wrote "
                f"`{self.checkpoint}`, but is {self.config.gradient_accumulation_steps}."
            )
        self.skipped = rank_state["skipped"]
        logger.info(f"Resumed from {self.checkpoint}")
        return done

    # The end

    def _repo_id(self) -> str | None:
        """The repository on the Hub for the model, made before the run, so that an error comes before it."""
        if not self.config.push_to_hub or not self.accelerator.is_main_process:
            return None
        return HfApi().create_repo(self.config.hub_model_id or self.output_dir.name, exist_ok=True).repo_id

    def _finish(self, ids_before: list[torch.Tensor]) -> None:
        config, accelerator = self.config, self.accelerator
        if self.validation_batches and not self.validation:  # a run that went on after its last step
            self._validate(config.max_train_steps)
        if self.ema is not None:
            self.ema.copy_to(self.vqvae.parameters())
        if config.train == "decoder":
            same = map(torch.equal, ids_before, self._validation_ids())
            if not all(same):
                raise RuntimeError("Training the decoder must keep all ids, but ids of validation images changed.")
            logger.info("All ids of the validation images are as before.")
        state_dict = accelerator.get_state_dict(self.model)
        if accelerator.is_main_process:
            vqvae = SVQVAE.from_config(self.vqvae.config)
            vqvae.load_state_dict({name.removeprefix("vqvae."): weight for name, weight in state_dict.items()})
            with TemporaryDirectory(dir=self.output_dir) as folder:
                vqvae.save_pretrained(folder)
                for path in sorted(Path(folder).iterdir(), reverse=True):  # weights before their config
                    path.replace(self.output_dir / path.name)
            card = model_card(
                vqvae.config,
                repo_id=self.repo_id or str(self.output_dir),
                base_model=config.pretrained_model_name_or_path,
                datasets=[config.dataset_name] if config.dataset_name else [],
                provenance=self._provenance(),
            )
            write_file(self.output_dir / "README.md", card.encode())
            if self.repo_id is not None:
                HfApi().upload_folder(
                    repo_id=self.repo_id,
                    folder_path=self.output_dir,
                    allow_patterns=list(PUBLISHED),
                    commit_message="Upload SVQVAE",
                )
        accelerator.end_training()

    def _provenance(self) -> dict[str, str]:
        config = self.config
        crops = config.train_batch_size * config.gradient_accumulation_steps * self.accelerator.num_processes
        rows = {
            "trained by": f"`training/train.py` of svqvae-hf {__version__}, options in `train_config.yaml`",
            "steps": f"{config.max_train_steps:,} of {crops} x {config.resolution}² pixels",
        }
        if self.validation_batches:
            count = sum(map(len, self.validation_batches))
            numbers = ", ".join(f"{name} {value:.4g}" for name, value in self.validation.items())
            rows["validation"] = f"{count} images, centre crops: {numbers}"
        return rows


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Accelerator, log and trackers; the options of the run as `train_config.yaml` in its folder.

    Raises:
        ValueError: If the engine cannot do what the options ask for.
    """
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=config.report_to,
        project_dir=config.output_dir,
        kwargs_handlers=[
            # Codes get no gradient before they are used, nor without their loss; each process counts its own use.
            DistributedDataParallelKwargs(
                find_unused_parameters=bool(config.quantize_from or config.vq_start or not config.vq_weight),
                broadcast_buffers=False,
            )
        ],
    )
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != accelerator.num_processes:
        raise ValueError(
            f"The launcher started {started} processes, but accelerate would let each of them train for itself. On "
            "CPUs set ACCELERATE_USE_CPU=true and start them with torchrun."
        )
    if accelerator.distributed_type in SHARDED:
        for name in ("kmeans_steps", "revival_steps", "use_ema", "adversarial_weight"):
            if getattr(config, name):
                raise ValueError(
                    f"`--{name}` needs whole weights on each process, but {accelerator.distributed_type.value} shards "
                    "them. Use DDP, or leave it out."
                )
    if config.report_to is not None and not accelerator.log_with:
        raise ValueError(
            f"`--report_to {config.report_to}` needs the package of that tracker. Install it, or choose another."
        )
    if accelerator.is_main_process:
        output_dir = Path(config.output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        options = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
        write_file(output_dir / "train_config.yaml", options.encode())
    if config.report_to is not None:
        accelerator.init_trackers("svqvae")
    return accelerator


def main() -> None:
    """Reads the options and trains; a user's mistake is one line."""
    try:
        Trainer(read_config(sys.argv[1:])).run()
    except (ValueError, OSError) as error:
        message = str(error).splitlines()[-1]  # a loader's process puts its traceback before it
        sys.stderr.write(f"train.py: error: {message}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
