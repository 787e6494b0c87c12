"""Trains a next-scale transformer on the ids of a token set, as FlexVAR does, and saves a pipeline.

accelerate launch training/train_next_scale.py --vqvae_name_or_path SVQVAE --model_config_name_or_path CONFIG \
    --token_set TOKENS --output_dir OUT
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from svqvae_hf import SVQVAE, NextScaleTransformer, SVQVAENextScalePipeline
from svqvae_hf.hub.repositories import from_hub
from svqvae_hf.pipelines.captions import pad_captions
from svqvae_hf.pipelines.schedules import Size, describe, make_schedule
from svqvae_hf.pipelines.sequences import SequenceLayout
from svqvae_hf.trainer.configs import load_network_config
from svqvae_hf.trainer.data.token_sequences import SequenceLoader, TokenBatch, TokenSource
from svqvae_hf.trainer.optimization import make_optimizer
from svqvae_hf.trainer.options import option
from svqvae_hf.trainer.pipeline_run import (
    TokenOptions,
    load_frozen_vqvae,
    log_samples,
    open_token_sets,
    pipeline_card,
    sample_call,
    validate_tokens,
)
from svqvae_hf.trainer.run import Run, run_script

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
class NextScaleOptions(TokenOptions):
    """Options of training a next-scale transformer."""

    num_inference_steps: int = option(10, "Scales of the pipeline's schedule, at most one per id of the longer side.")
    tokenizer_name_or_path: str | None = option(None, "Tokenizer of the captions: folder or Hub id.")
    max_text_length: int = option(32, "Largest number of tokens of a caption; shorter ones are padded.")
    schedule_share: float = option(0.05, "Fraction of batches with the pipeline's schedule; others are random.")

    def __post_init__(self) -> None:
        """Checks the options of next-scale training as well."""
        super().__post_init__()
        if self.num_inference_steps < 2:
            raise ValueError(f"`--num_inference_steps` must be at least 2, but is {self.num_inference_steps}.")
        self.check_fractions("schedule_share")
        if (self.caption_column is None) != (self.tokenizer_name_or_path is None):
            raise ValueError(
                "`--caption_column` and `--tokenizer_name_or_path` need each other. Give both or neither."
            )


def train(run: Run[NextScaleOptions]) -> None:
    """Trains a next-scale transformer, from the start or from a checkpoint, and saves its pipeline with a card."""
    options, accelerator = run.options, run.accelerator

    # Tokens and model
    vqvae = load_frozen_vqvae(options, PIXEL_RANGE).to(accelerator.device)
    source, held_out = open_token_sets(options, vqvae)
    layout = source.layout
    tokenizer = load_tokenizer(options)
    schedule = trained_schedule(layout, options.num_inference_steps)
    process = accelerator.process_index, accelerator.num_processes
    loader = SequenceLoader(source, options.train_batch_size, options.num_batches, options.seed, *process)
    transformer = make_transformer(options, vqvae, source, tokenizer).to(accelerator.device)

    # Optimizer
    optimizer, lr_scheduler = make_optimizer(
        transformer, options, options.learning_rate, options.max_train_steps, undecayed=UNDECAYED
    )
    model, optimizer = accelerator.prepare(transformer, optimizer)
    run.start(transformer, loader, lr_scheduler)

    def predict(
        batch: TokenBatch, sizes: Sequence[Size], generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Loss, accuracy and number of ids of a batch. The transformer predicts each scale from the previous ones.

        With a generator, it draws one caption of each row, and drops the label or caption of random rows.
        """
        grids, labels = layout.decode(batch.sequences.to(accelerator.device))
        ids = [grids[layout.grids.index(size)] for size in sizes]
        dropped = torch.zeros(len(labels), dtype=torch.bool)
        if generator is not None:
            dropped = torch.rand(len(labels), generator=generator) < options.label_dropout
        text = None
        if tokenizer is None:
            labels = labels.masked_fill(dropped.to(labels.device), layout.num_classes)
        else:
            text = pad_captions(tokenizer, batch.draw_captions(generator), options.max_text_length)
            text[dropped] = tokenizer.pad_token_id
            text = text.to(labels.device)
        codes = [vqvae.quantize.get_codebook_entry(grid).permute(0, 3, 1, 2) for grid in ids[:-1]]
        (logits,) = model(labels, codes, sizes, text=text, return_dict=False)
        targets = torch.cat([grid.flatten(1) for grid in ids], dim=1)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return loss, (logits.argmax(-1) == targets).float().mean(), targets.numel()

    def validate(steps_done: int) -> None:
        validate_tokens(run, held_out, lambda batch: predict(batch, schedule)[:2], steps_done)
        pipeline = make_pipeline(vqvae, transformer, tokenizer, source, schedule)
        log_samples(run, pipeline, sample_call(options, source, lambda captions: {"prompt": captions}), steps_done)

    for step, batches in run.steps():
        for batch in batches:
            with accelerator.accumulate(model):
                random = run.batch_generator(shared=True)  # all processes predict equally many ids
                is_fixed = torch.rand((), generator=random) < options.schedule_share
                sizes = schedule if is_fixed else draw_schedule(layout.grids, schedule, random)
                loss, accuracy, num_ids = predict(batch, sizes, run.batch_generator())
                accelerator.backward(loss)
                numbers = {"loss": loss, "accuracy": accuracy}
                if accelerator.sync_gradients:  # after the last batch of a step
                    numbers |= run.update_weights(model, optimizer, lr_scheduler)
                run.add(numbers, images=len(batch.sequences), tokens=num_ids)

        run.report(step, validate)

    validate(options.max_train_steps)
    state_dict = run.final_weights(model)
    if accelerator.is_main_process:
        result = make_transformer(options, vqvae, source, tokenizer)
        result.load_state_dict(state_dict)
        pipeline = make_pipeline(vqvae, result.eval(), tokenizer, source, schedule)
        card = pipeline_card(run, pipeline, SCRIPT, *pipeline.describe(), source.class_names)
        run.publish(pipeline.save_pretrained, card)


def load_tokenizer(options: NextScaleOptions) -> PreTrainedTokenizerBase | None:
    """Tokenizer of the captions, or None without captions.

    Raises:
        ValueError: If it has no token for padding.
    """
    if options.tokenizer_name_or_path is None:
        return None
    tokenizer = from_hub(AutoTokenizer.from_pretrained, options.tokenizer_name_or_path)
    if tokenizer.pad_token is None:
        raise ValueError(
            "`--tokenizer_name_or_path` must have a token for padding, but has none. Set its `pad_token` and save it."
        )
    return tokenizer


def make_transformer(
    options: NextScaleOptions, vqvae: SVQVAE, source: TokenSource, tokenizer: PreTrainedTokenizerBase | None
) -> NextScaleTransformer:
    """Transformer of the config, for this codebook, these classes or captions and this size."""
    description = load_network_config(options.model_config_name_or_path, NextScaleTransformer)
    derived = {
        "num_classes": source.layout.num_classes if tokenizer is None else 0,
        "vocab_size": 0 if tokenizer is None else len(tokenizer),
        "max_text_length": 0 if tokenizer is None else options.max_text_length,
        "codebook_size": vqvae.config["codebook_size"],
        "codebook_embed_dim": vqvae.config["codebook_embed_dim"],
        "position_size": 2 * max(source.layout.grids[-1]),  # as in FlexVAR, for images twice as large
    }
    return NextScaleTransformer.from_config({**description, **derived}).train()


def trained_schedule(layout: SequenceLayout, steps: int) -> list[Size]:
    """Schedule of the pipeline.

    Raises:
        ValueError: If the token set lacks one of its scales.
    """
    schedule = make_schedule(layout.grids[-1], min(steps, max(layout.grids[-1])))
    if missing := [size for size in schedule if size not in layout.grids]:
        raise ValueError(
            f"The token set must hold the scales of the schedule, {describe(schedule)}, but lacks "
            f"{describe(missing)}. Make it again with `svqvae tokenize --sides` and each side up to "
            f"{max(layout.grids[-1])}, or change `--num_inference_steps`."
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


def make_pipeline(
    vqvae: SVQVAE,
    transformer: NextScaleTransformer,
    tokenizer: PreTrainedTokenizerBase | None,
    source: TokenSource,
    schedule: Sequence[Size],
) -> SVQVAENextScalePipeline:
    """Pipeline with this transformer, for the schedule, the classes and the kind of scales of a token set."""
    return SVQVAENextScalePipeline(
        vqvae,
        transformer,
        schedule=[list(size) for size in schedule],
        class_names=source.class_names,
        scale_from=source.layout.scale_from,
        tokenizer=tokenizer,
    )


if __name__ == "__main__":
    run_script(train, NextScaleOptions)
