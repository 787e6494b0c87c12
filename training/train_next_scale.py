"""Trains a next-scale transformer on the ids of a token set, as FlexVAR does, and saves a pipeline.

accelerate launch training/train_next_scale.py --vqvae_name_or_path SVQVAE --model_config_name_or_path CONFIG \
    --token_set TOKENS --output_dir OUT
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from svqvae_hf import SVQVAE, NextScaleTransformer, SVQVAENextScalePipeline
from svqvae_hf.hub.repositories import from_hub
from svqvae_hf.pipelines.captions import pad_captions
from svqvae_hf.pipelines.schedules import Size, describe, make_schedule
from svqvae_hf.trainer.checkpoints import Checkpoints, find_checkpoint
from svqvae_hf.trainer.configs import load_network_config
from svqvae_hf.trainer.data.sample_order import Share, batch_generator
from svqvae_hf.trainer.data.token_sequences import SequenceLoader, TokenBatch, TokenSource
from svqvae_hf.trainer.log import Log
from svqvae_hf.trainer.optimization import make_optimizer
from svqvae_hf.trainer.options import FRACTION, PipelineOptions, option, required, wrong
from svqvae_hf.trainer.pipeline_run import generator_card, load_frozen_vqvae, log_samples, open_token_sets
from svqvae_hf.trainer.publishing import Result, provenance
from svqvae_hf.trainer.run import run_script
from svqvae_hf.trainer.weights import Weights

SCRIPT = "training/train_next_scale.py"
PIXEL_RANGE = (0.0, 1.0)  # of the pipeline
UNDECAYED = ("pos_start", "pos_1LC", "scale_mul_1H11")

# FlexVAR's random schedules: of 16 sides the first two, 5 of 3 to 10, 2 of 11 to 15, and the last
NUM_FIRST = 2
COARSE_UP_TO = 10 / 16  # of the last side
COARSE_SHARE = 5 / 7  # of the scales between the first two and the last
DROP_PROBABILITIES = (0.1, 0.05, 0.02, 0.01)  # of at least one, two, three or four scales less
NUM_DROPPABLE = 4  # of the last scales, while a schedule has too many ids


@dataclass
class NextScaleOptions(PipelineOptions):
    """Options of training a next-scale transformer."""

    token_set: str = required("Token set of `svqvae tokenize`, all rows of one size: folder, URL or Hub id.")
    validation_token_set: str | None = option(None, "Token set of other images, to measure at each validation.")
    guidance_scale: float = option(1.0, "Guidance scale of the images of a validation.")
    caption_column: str | None = option(None, "Column of captions. From a row with several, each batch draws one.")
    num_inference_steps: int = option(10, "Scales of the pipeline's schedule, at most one per id of the longer side.")
    tokenizer_name_or_path: str | None = option(None, "Tokenizer of the captions: folder or Hub id.")
    max_text_length: int = option(32, "Largest number of tokens of a caption; shorter ones are padded.")
    schedule_share: float = option(0.05, "Fraction of batches with the pipeline's schedule; others are random.")

    def faults(self) -> Iterator[str]:
        """Yields what is wrong with the options of next-scale training as well."""
        yield from super().faults()
        if self.num_inference_steps < 2:
            yield f"`--num_inference_steps` must be at least 2, but is {self.num_inference_steps}."
        yield from wrong(self, FRACTION, "schedule_share")
        if (self.caption_column is None) != (self.tokenizer_name_or_path is None):
            yield "`--caption_column` and `--tokenizer_name_or_path` need each other. Give both or neither."


def train(options: NextScaleOptions, accelerator: Accelerator) -> None:
    """Trains a next-scale transformer, from the start or from a checkpoint, and saves its pipeline with a card."""
    checkpoint = find_checkpoint(options.output_dir, options.resume_from_checkpoint, options.max_steps)

    # Tokens and model
    vqvae = load_frozen_vqvae(options, PIXEL_RANGE).to(accelerator.device)
    source, held_out = open_token_sets(options, vqvae)
    tokenizer = load_tokenizer(options)
    for each in (source, held_out) if tokenizer is not None else ():
        texts = [] if each is None else [*chain(*each.captions())]
        for start in range(0, len(texts), 1000):  # so that no caption ends the run later
            pad_captions(tokenizer, texts[start : start + 1000], options.max_text_length)
    schedule = trained_schedule(source.grids, options.num_inference_steps)
    loader = SequenceLoader(source, Share.of(options, accelerator), options.max_steps, options.seed)
    transformer = make_transformer(options, vqvae, source, tokenizer).to(accelerator.device)
    pipeline = SVQVAENextScalePipeline(
        vqvae,
        transformer,
        schedule=[list(size) for size in schedule],
        class_names=source.class_names,
        scale_from=source.settings.scale_from,
        tokenizer=tokenizer,
    )

    # Optimizer
    optimizer, lr_scheduler = make_optimizer(
        transformer, options, options.learning_rate, options.max_steps, undecayed=UNDECAYED
    )
    model, optimizer = accelerator.prepare(transformer, optimizer)
    weights = Weights(options, accelerator, transformer, model, optimizer, lr_scheduler, options.use_ema)
    checkpoints = Checkpoints(options, accelerator, checkpoint, {"weights": weights, "loader": loader})
    result = Result.of(options, accelerator)
    log = Log(options, accelerator, transformer, loader.contents, checkpoints.first_step)
    batches = iter(loader)

    def predict(
        batch: TokenBatch, sizes: Sequence[Size], draws: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Loss, accuracy and number of ids of a batch. The transformer predicts each scale from the previous ones.

        `draws` are two numbers in [0, 1] per row, `(batch, 2)`: they decide whether its label or caption is dropped,
        and which of its captions it has.
        """
        ids = [batch.ids[source.grids.index(size)].to(accelerator.device) for size in sizes]
        labels = batch.labels.to(accelerator.device)
        dropped = draws[:, 0] < options.condition_dropout
        text = None
        if tokenizer is None:
            labels = labels.masked_fill(dropped.to(labels.device), source.num_classes)
        else:
            text = pad_captions(tokenizer, batch.draw_captions(draws[:, 1]), options.max_text_length)
            text[dropped] = tokenizer.pad_token_id
            text = text.to(labels.device)
        codes = [vqvae.quantize.get_codebook_entry(grid).permute(0, 3, 1, 2) for grid in ids[:-1]]
        (logits,) = model(labels, codes, sizes, text=text, return_dict=False)
        targets = torch.cat([grid.flatten(1) for grid in ids], dim=1)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return loss, (logits.argmax(-1) == targets).float().mean(), targets.numel()

    def validate(steps_done: int) -> None:
        if held_out is not None:
            rows = range(accelerator.process_index, len(held_out.rows), accelerator.num_processes)
            totals = torch.zeros(2, device=accelerator.device)
            with weights.evaluating():
                for start in range(0, len(rows), options.per_device_train_batch_size):
                    batch = rows[start : start + options.per_device_train_batch_size]
                    draws = torch.tensor([[1.0, 0.0]]).expand(len(batch), 2)  # nothing dropped, the first caption
                    totals += len(batch) * torch.stack(predict(held_out.batch(batch), schedule, draws)[:2])
            loss, accuracy = (accelerator.reduce(totals, "sum") / len(held_out.rows)).tolist()
            numbers = {"loss": loss, "accuracy": accuracy, "bits_per_id": loss / math.log(2)}
            log.write(steps_done, {f"validation/{name}": value for name, value in numbers.items()})
        log_samples(log, weights, pipeline, sample_call(options, source), steps_done)

    if checkpoint is None:
        validate(0)
    for step in checkpoints.steps():
        for batch in islice(batches, options.gradient_accumulation_steps):
            with accelerator.accumulate(model):
                random = batch_generator(options.seed, step)  # all processes predict equally many ids
                is_fixed = torch.rand((), generator=random) < options.schedule_share
                sizes = schedule if is_fixed else draw_schedule(source.grids, schedule, random)
                draws = torch.rand((loader.share.step_size, 2), generator=random)  # of all samples of the step
                loss, accuracy, num_ids = predict(batch, sizes, draws[loader.share.numbers(loader.batch - 1)])
                accelerator.backward(loss)
                numbers = {"loss": loss, "accuracy": accuracy}
                if accelerator.sync_gradients:  # after the last batch of a step
                    numbers |= weights.update()
                log.add(numbers, images=len(batch.labels), tokens=num_ids)

        if options.logs_after(step):
            log.write_training(step + 1, {"lr": weights.lr})
        if options.validates_after(step):
            validate(step + 1)

    validate(options.max_steps)
    transformer.load_state_dict(weights.final())
    if accelerator.is_main_process:
        origin = provenance(SCRIPT, options.max_steps, loader.share.step_size, "images") | log.card_rows
        card = generator_card(options, result, pipeline, origin, *pipeline.describe())
        result.publish(pipeline.save_pretrained, card)


def load_tokenizer(options: NextScaleOptions) -> PreTrainedTokenizerBase | None:
    """Tokenizer of the captions, or None without captions.

    Raises:
        ValueError: If it has no token for padding.
    """
    if options.tokenizer_name_or_path is None:
        return None
    tokenizer = from_hub(AutoTokenizer.from_pretrained, options.tokenizer_name_or_path)
    if tokenizer.pad_token is None:
        raise ValueError("`--tokenizer_name_or_path` must have a padding token, but has none. Set its `pad_token`.")
    return tokenizer


def make_transformer(
    options: NextScaleOptions, vqvae: SVQVAE, source: TokenSource, tokenizer: PreTrainedTokenizerBase | None
) -> NextScaleTransformer:
    """Transformer of the config, for this codebook, these classes or captions and this size."""
    description = load_network_config(options.model_config_name_or_path, NextScaleTransformer)
    derived = {
        "num_classes": source.num_classes if tokenizer is None else 0,
        "vocab_size": 0 if tokenizer is None else len(tokenizer),
        "max_text_length": 0 if tokenizer is None else options.max_text_length,
        "codebook_size": vqvae.config["codebook_size"],
        "codebook_embed_dim": vqvae.config["codebook_embed_dim"],
        "position_size": 2 * max(source.grids[-1]),  # as in FlexVAR, for images twice as large
    }
    return NextScaleTransformer.from_config({**description, **derived}).train()


def trained_schedule(grids: Sequence[Size], steps: int) -> list[Size]:
    """Schedule of the pipeline.

    Raises:
        ValueError: If the token set lacks one of its scales.
    """
    schedule = make_schedule(grids[-1], min(steps, max(grids[-1])))
    if missing := [size for size in schedule if size not in grids]:
        raise ValueError(
            f"The token set must hold the scales of the schedule, {describe(schedule)}, but lacks "
            f"{describe(missing)}. Make it again with `svqvae tokenize --sides` and each side up to "
            f"{max(grids[-1])}, or change `--num_inference_steps`."
        )
    return schedule


def draw_schedule(sizes: Sequence[Size], schedule: Sequence[Size], generator: torch.Generator) -> list[Size]:
    """Draws scales as FlexVAR does, with at most as many ids as the pipeline's schedule, often without the last.

    Args:
        sizes (list of `(height, width)`): All scales, from coarse to fine.
        schedule (list of `(height, width)`): Schedule of the pipeline.
        generator (`torch.Generator`): Source of randomness.
    """

    def draw(among: Sequence[Size], count: int) -> list[Size]:
        return [among[index] for index in torch.randperm(len(among), generator=generator)[:count].tolist()]

    def drop(drawn: list[Size], first: int, last: int) -> None:
        drawn.pop(int(torch.randint(first, last, (), generator=generator)))

    sizes = list(dict.fromkeys(sizes))
    inner = sizes[NUM_FIRST:-1]
    coarse = [size for size in inner if max(size) <= COARSE_UP_TO * max(sizes[-1])]
    count = max(0, len(schedule) - NUM_FIRST - 1)
    num_coarse = round(COARSE_SHARE * count)
    drawn = draw(coarse, num_coarse) + draw(inner[len(coarse) :], count - num_coarse)
    drawn = [size for size in sizes if size in drawn or size in sizes[:NUM_FIRST] or size == sizes[-1]]
    chance = float(torch.rand((), generator=generator))
    for _ in range(sum(chance < probability for probability in DROP_PROBABILITIES)):
        if len(drawn) > NUM_FIRST + 1:
            drop(drawn, NUM_FIRST, len(drawn) - 1)
    while count_ids(drawn) > count_ids(schedule):
        drop(drawn, max(1, len(drawn) - NUM_DROPPABLE), len(drawn))
    return drawn


def count_ids(sizes: Sequence[Size]) -> int:
    """Number of ids of all scales."""
    return sum(height * width for height, width in sizes)


def sample_call(options: NextScaleOptions, source: TokenSource) -> dict[str, Any]:
    """Arguments of the pipeline's call for the images of a validation: each class in turn, or the first captions."""
    count, guidance = options.num_validation_images, {"guidance_scale": options.guidance_scale}
    if options.caption_column is not None:
        return {"prompt": [captions[0] for captions in source.captions(count)]} | guidance
    if source.num_classes:
        return {"class_labels": [index % source.num_classes for index in range(count)]} | guidance
    return {"num_images_per_prompt": count}


if __name__ == "__main__":
    run_script(train, NextScaleOptions)
