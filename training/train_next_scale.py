"""Trains a next-scale transformer on the ids of a token set, as FlexVAR does, and saves a pipeline.

python training/train_next_scale.py --vqvae_name_or_path SVQVAE --model_config_name_or_path CONFIG \
    --token_set TOKENS --output_dir OUT

With several GPUs, `accelerate launch` in place of `python`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from svqvae_hf import SVQVAE, NextScaleTransformer, SVQVAENextScalePipeline
from svqvae_hf.hub.repositories import from_hub
from svqvae_hf.loaders.folder_checks import check_vocabulary_file
from svqvae_hf.pipelines.captions import pad_captions
from svqvae_hf.pipelines.schedules import Size, describe, make_schedule
from svqvae_hf.trainer.configs import load_network_config
from svqvae_hf.trainer.data.sample_order import Share, batch_generator
from svqvae_hf.trainer.data.token_sequences import SequenceLoader, TokenBatch, TokenSource
from svqvae_hf.trainer.options import FRACTION, PipelineOptions, option, range_faults, required
from svqvae_hf.trainer.pipeline_run import generator_card, load_frozen_vqvae, log_samples, open_token_sets
from svqvae_hf.trainer.publishing import provenance
from svqvae_hf.trainer.run import Run, run_script

SCRIPT = "training/train_next_scale.py"
PIXEL_RANGE = (0.0, 1.0)  # of the pipeline
CHECKED_CAPTIONS = 1000  # at a time
UNDECAYED = ("pos_start", "pos_1LC", "scale_mul_1H11")

# FlexVAR's random schedules have scales of 1 to 16 ids a side: the first two, five of the coarse ones from 3 to 10,
# two of the fine ones from 11 to 15, and the last.
NUM_FIRST = 2
COARSE_UP_TO = 10 / 16  # side of the largest coarse scale, relative to the last scale
COARSE_SHARE = 5 / 7  # fraction of coarse scales among the drawn scales between the first two and the last
DROP_PROBABILITIES = (0.1, 0.05, 0.02, 0.01)  # of dropping at least one, two, three or four scales
NUM_DROPPABLE = 4  # a schedule with too many ids drops one of this many finest scales


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
        """Yields an error message for each fault, also in the options of next-scale training."""
        yield from super().faults()
        if self.num_inference_steps < 2:
            yield f"`--num_inference_steps` must be at least 2, but is {self.num_inference_steps}."
        yield from range_faults(self, FRACTION, "schedule_share")
        has_captions = self.caption_column is not None
        has_tokenizer = self.tokenizer_name_or_path is not None
        if has_captions != has_tokenizer:
            yield "`--caption_column` and `--tokenizer_name_or_path` need each other. Give both or neither."


def train(run: Run[NextScaleOptions]) -> None:
    """Trains a next-scale transformer, from the start or from a checkpoint, and saves its pipeline with a card."""
    options = run.options
    accelerator = run.accelerator

    # Tokens and model
    vqvae = load_frozen_vqvae(options, PIXEL_RANGE).to(accelerator.device)
    source, held_out = open_token_sets(options, vqvae)
    run.identify(digests_of(source, held_out))
    tokenizer = load_tokenizer(options)
    if tokenizer is not None:
        check_captions(options, source, tokenizer)
        check_captions(options, held_out, tokenizer)
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
    weights = run.train(transformer, options.learning_rate, undecayed=UNDECAYED)
    model = weights.model
    checkpoints = run.begin(transformer, {"weights": weights, "loader": loader}, loader.contents)
    predict = Predictor(options, model, vqvae, source, tokenizer)
    batches = iter(loader)

    def validate(steps_done: int) -> None:
        if held_out is not None:
            with weights.evaluating():
                numbers = measure(run, predict, held_out, schedule)
            run.log.write(steps_done, numbers)
        arguments = sampling_arguments(options, source)
        labels = sample_labels(options, source)
        log_samples(run.log, weights, pipeline, arguments, labels, steps_done)

    if run.is_new:
        validate(0)
    for step in checkpoints.steps():
        for batch in islice(batches, options.gradient_accumulation_steps):
            with accelerator.accumulate(model):
                # All processes draw the same schedule, and the random numbers of all samples of the step.
                random = batch_generator(options.seed, step)
                has_pipeline_schedule = torch.rand((), generator=random) < options.schedule_share
                sizes = schedule
                if not has_pipeline_schedule:
                    sizes = draw_schedule(source.grids, schedule, random)
                draws_of_step = torch.rand((loader.share.step_size, 2), generator=random)  # (samples, 2)
                numbers_of_batch = loader.share.numbers(loader.batch - 1)  # its samples within the step
                dropout_draws, caption_draws = draws_of_step[numbers_of_batch].unbind(dim=1)  # (B,), (B,)
                prediction = predict(batch, sizes, dropout_draws, caption_draws)
                accelerator.backward(prediction.loss)
                numbers = {"loss": prediction.loss, "accuracy": prediction.accuracy}
                if accelerator.sync_gradients:  # after the last batch of a step
                    numbers |= weights.update()
                run.log.add(numbers, images=len(batch.labels), tokens=prediction.num_ids)

        if options.logs_after(step):
            run.log.write_training(step + 1, {"lr": weights.lr})
        if options.validates_after(step):
            validate(step + 1)
        checkpoints.after(step)

    validate(options.max_steps)
    transformer.load_state_dict(weights.final())
    if accelerator.is_main_process:
        rows = provenance(SCRIPT, options.max_steps, loader.share.step_size, "images") | run.log.card_rows
        card = generator_card(options, run.result, pipeline, rows, *pipeline.describe())
        run.result.publish(pipeline.save_pretrained, card)


@dataclass
class Prediction:
    """What the transformer predicts for a batch.

    Args:
        loss (`torch.Tensor`): Cross-entropy of the ids, a scalar.
        accuracy (`torch.Tensor`): Fraction of the ids that are most probable, a scalar.
        num_ids (`int`): Number of predicted ids.
    """

    loss: torch.Tensor
    accuracy: torch.Tensor
    num_ids: int


@dataclass
class Predictor:
    """Predicts the ids of each scale from the codes of the previous ones.

    Args:
        options ([`NextScaleOptions`]): Options.
        model (`nn.Module`): The transformer as the run has prepared it.
        vqvae ([`SVQVAE`]): Model that holds the codes.
        source ([`TokenSource`]): Token set of the run, whose classes the transformer knows.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Tokenizer of the captions.
    """

    options: NextScaleOptions
    model: nn.Module
    vqvae: SVQVAE
    source: TokenSource
    tokenizer: PreTrainedTokenizerBase | None

    def __call__(
        self, batch: TokenBatch, sizes: Sequence[Size], dropout_draws: torch.Tensor, caption_draws: torch.Tensor
    ) -> Prediction:
        """Predicts a batch.

        Args:
            batch (`TokenBatch`): Ids of all scales, with classes or captions.
            sizes (list of `(height, width)`): Scales to predict, from coarse to fine.
            dropout_draws (`torch.Tensor` of shape `(batch,)`): Numbers in [0, 1]. The class or caption of a row is
                dropped if its number is below `--condition_dropout`.
            caption_draws (`torch.Tensor` of shape `(batch,)`): Numbers in [0, 1] that choose one of the captions of
                each row, the first one for 0.
        """
        ids = self._ids_of_scales(batch, sizes)  # (B, h, w) of each scale
        # Each scale is predicted from the codes of the scale before it, and the first one from the condition alone.
        codes = [self._codes(scale_ids) for scale_ids in ids[:-1]]  # (B, C, h, w) of each scale but the last
        is_dropped = dropout_draws < self.options.condition_dropout  # (B,)
        labels = batch.labels
        text = None
        if self.tokenizer is None:
            labels = labels.masked_fill(is_dropped, self.source.num_classes)  # the number after the last class
        else:
            text = self._text(self.tokenizer, batch.draw_captions(caption_draws), is_dropped)
        labels = labels.to(self.vqvae.device)
        (logits,) = self.model(labels, codes, sizes, text=text, return_dict=False)  # (B, n, codes)
        targets = torch.cat([scale_ids.flatten(1) for scale_ids in ids], dim=1)  # (B, n), the ids of all scales
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        accuracy = (logits.argmax(-1) == targets).float().mean()
        return Prediction(loss, accuracy, targets.numel())

    def _ids_of_scales(self, batch: TokenBatch, sizes: Sequence[Size]) -> list[torch.Tensor]:
        """Ids `(B, h, w)` of each scale of these sizes, on the device of the model."""
        ids = []
        for size in sizes:
            scale_index = self.source.grids.index(size)
            ids.append(batch.ids[scale_index].to(self.vqvae.device))
        return ids

    def _text(self, tokenizer: PreTrainedTokenizerBase, captions: list[str], is_dropped: torch.Tensor) -> torch.Tensor:
        """Tokens `(B, length)` of captions, on the device of the model. A dropped caption is only padding."""
        text = pad_captions(tokenizer, captions, self.options.max_text_length)
        text[is_dropped] = tokenizer.pad_token_id
        return text.to(self.vqvae.device)

    def _codes(self, ids: torch.Tensor) -> torch.Tensor:
        """Codes `(B, C, h, w)` of the ids `(B, h, w)` of a scale."""
        codes = self.vqvae.quantize.get_codebook_entry(ids)  # (B, h, w, C)
        return codes.permute(0, 3, 1, 2)


def measure(
    run: Run[NextScaleOptions], predict: Predictor, held_out: TokenSource, schedule: Sequence[Size]
) -> dict[str, float]:
    """Means over all held-out images, with the pipeline's schedule, all labels, and first captions."""
    accelerator = run.accelerator
    batch_size = run.options.per_device_train_batch_size
    num_rows = len(held_out.rows)
    rows = range(accelerator.process_index, num_rows, accelerator.num_processes)
    totals = torch.zeros(2, device=accelerator.device)  # loss and accuracy, summed over images
    for start in range(0, len(rows), batch_size):
        batch = held_out.batch(rows[start : start + batch_size])
        count = len(batch.labels)
        prediction = predict(
            batch,
            schedule,
            dropout_draws=torch.ones(count),  # nothing is dropped
            caption_draws=torch.zeros(count),  # the first caption is chosen
        )
        totals += count * torch.stack([prediction.loss, prediction.accuracy])
    loss, accuracy = (accelerator.reduce(totals, "sum") / num_rows).tolist()
    return {
        "validation/loss": loss,
        "validation/accuracy": accuracy,
        "validation/bits_per_id": loss / math.log(2),
    }


def digests_of(source: TokenSource, held_out: TokenSource | None) -> dict[str, str]:
    """Digests of the token sets, by the option that names each."""
    digests = {"token_set": source.digest}
    if held_out is not None:
        digests["validation_token_set"] = held_out.digest
    return digests


def check_captions(options: NextScaleOptions, source: TokenSource | None, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError for a caption that the tokenizer cannot read, so that none ends the run later."""
    if source is None:
        return
    captions: list[str] = []
    for captions_of_row in source.captions():
        captions += captions_of_row
    for start in range(0, len(captions), CHECKED_CAPTIONS):
        # Only its error matters here.
        pad_captions(tokenizer, captions[start : start + CHECKED_CAPTIONS], options.max_text_length)


def load_tokenizer(options: NextScaleOptions) -> PreTrainedTokenizerBase | None:
    """Tokenizer of the captions, or None without captions.

    Raises:
        ValueError: If it has no words, or no token for padding.
    """
    if options.tokenizer_name_or_path is None:
        return None
    tokenizer = from_hub(AutoTokenizer.from_pretrained, options.tokenizer_name_or_path)
    check_vocabulary_file(options.tokenizer_name_or_path, tokenizer)
    if tokenizer.pad_token is None:
        raise ValueError("`--tokenizer_name_or_path` must have a padding token, but has none. Set its `pad_token`.")
    return tokenizer


def make_transformer(
    options: NextScaleOptions, vqvae: SVQVAE, source: TokenSource, tokenizer: PreTrainedTokenizerBase | None
) -> NextScaleTransformer:
    """Transformer of the config, for this codebook, these classes or captions and this size."""
    config = load_network_config(options.model_config_name_or_path, NextScaleTransformer)
    if tokenizer is None:
        condition = {"num_classes": source.num_classes, "vocab_size": 0, "max_text_length": 0}
    else:
        condition = {"num_classes": 0, "vocab_size": len(tokenizer), "max_text_length": options.max_text_length}
    sizes = {
        "codebook_size": vqvae.config["codebook_size"],
        "codebook_embed_dim": vqvae.config["codebook_embed_dim"],
        "position_size": 2 * max(source.grids[-1]),  # as in FlexVAR, for images twice as large
    }
    return NextScaleTransformer.from_config(config | condition | sizes).train()


def trained_schedule(grids: Sequence[Size], steps: int) -> list[Size]:
    """Schedule of the pipeline.

    Args:
        grids (list of `(height, width)`): Grids of ids in the token set, from coarse to fine.
        steps (`int`): Number of scales.

    Returns:
        list of `(height, width)`: Scales from coarse to fine.

    Raises:
        ValueError: If the token set lacks one of the scales.
    """
    finest = grids[-1]
    longer_side = max(finest)
    num_scales = min(steps, longer_side)  # the longer side grows by at least one id from scale to scale
    schedule = make_schedule(finest, num_scales)
    missing = [size for size in schedule if size not in grids]
    if missing:
        raise ValueError(
            f"The token set must hold the scales of the schedule, {describe(schedule)}, but lacks "
            f"{describe(missing)}. Make it again with `svqvae tokenize --sides` and each side up to "
            f"{longer_side}, or change `--num_inference_steps`."
        )
    return schedule


def draw_schedule(sizes: Sequence[Size], schedule: Sequence[Size], generator: torch.Generator) -> list[Size]:
    """Draws scales as FlexVAR does, with at most as many ids as the pipeline's schedule.

    1. As many scales are drawn as the pipeline's schedule has. The first ones and the last are always among them.
    2. Some of the scales between them are dropped.
    3. Scales are dropped from the finest ones, often the last one, until there are few enough ids.

    Args:
        sizes (list of `(height, width)`): All scales, from coarse to fine.
        schedule (list of `(height, width)`): Schedule of the pipeline.
        generator (`torch.Generator`): Source of randomness.
    """
    sizes = list(dict.fromkeys(sizes))  # without repetition
    first_sizes = sizes[:NUM_FIRST]
    last_size = sizes[-1]
    inner_sizes = _draw_inner(sizes, len(schedule), generator)
    chosen = [*first_sizes, *inner_sizes, last_size]
    drawn = [size for size in sizes if size in chosen]  # from coarse to fine
    num_dropped = _draw_num_dropped(generator)
    for _ in range(num_dropped):
        inner_positions = range(NUM_FIRST, len(drawn) - 1)  # without the first ones and the last
        if inner_positions:
            _drop_one(drawn, inner_positions, generator)
    max_ids = count_ids(schedule)
    while count_ids(drawn) > max_ids:
        # The last one may be dropped here, because it has the most ids. Only the very first one always stays.
        finest_positions = range(max(1, len(drawn) - NUM_DROPPABLE), len(drawn))
        _drop_one(drawn, finest_positions, generator)
    return drawn


def _draw_inner(sizes: Sequence[Size], schedule_length: int, generator: torch.Generator) -> list[Size]:
    """Draws scales between the first ones and the last, so that a schedule gets the stated length."""
    inner = sizes[NUM_FIRST:-1]
    largest_coarse_side = COARSE_UP_TO * max(sizes[-1])
    coarse = [size for size in inner if max(size) <= largest_coarse_side]
    fine = [size for size in inner if max(size) > largest_coarse_side]
    num_outer = NUM_FIRST + 1  # the first ones and the last
    num_inner = max(0, schedule_length - num_outer)
    num_coarse = round(COARSE_SHARE * num_inner)
    drawn_coarse = _draw(coarse, num_coarse, generator)
    drawn_fine = _draw(fine, num_inner - num_coarse, generator)
    return drawn_coarse + drawn_fine


def _draw_num_dropped(generator: torch.Generator) -> int:
    """Draws how many scales are dropped, see `DROP_PROBABILITIES`."""
    draw = float(torch.rand((), generator=generator))
    num_dropped = 0
    for probability in DROP_PROBABILITIES:
        if draw < probability:
            num_dropped += 1
    return num_dropped


def _draw(sizes: Sequence[Size], count: int, generator: torch.Generator) -> list[Size]:
    """Draws some sizes without repetition, or all if there are fewer."""
    order = torch.randperm(len(sizes), generator=generator)
    return [sizes[index] for index in order[:count].tolist()]


def _drop_one(sizes: list[Size], positions: range, generator: torch.Generator) -> None:
    """Removes a random size from a list, at one of some positions."""
    position = int(torch.randint(positions.start, positions.stop, (), generator=generator))
    del sizes[position]


def count_ids(sizes: Sequence[Size]) -> int:
    """Number of ids of all scales."""
    return sum(height * width for height, width in sizes)


def sampling_arguments(options: NextScaleOptions, source: TokenSource) -> dict[str, Any]:
    """Arguments of the pipeline that samples images for a validation: each class in turn, or the first captions."""
    count = options.num_validation_images
    if options.caption_column is not None:
        return {"prompt": first_captions(source, count), "guidance_scale": options.guidance_scale}
    if source.num_classes:
        labels = [index % source.num_classes for index in range(count)]
        return {"class_labels": labels, "guidance_scale": options.guidance_scale}
    return {"num_images_per_prompt": count}


def sample_labels(options: NextScaleOptions, source: TokenSource) -> list[str]:
    """Labels of the images of a validation: captions, names or numbers of classes, or numbers of images."""
    count = options.num_validation_images
    if options.caption_column is not None:
        return first_captions(source, count)
    if not source.num_classes:
        return [f"sample {index}" for index in range(count)]
    labels = []
    for index in range(count):
        label = index % source.num_classes
        if source.class_names:
            labels.append(source.class_names[label])
        else:
            labels.append(f"class {label}")
    return labels


def first_captions(source: TokenSource, count: int) -> list[str]:
    """First caption of each of the first rows."""
    return [captions[0] for captions in source.captions(count)]


if __name__ == "__main__":
    run_script(train, NextScaleOptions)
