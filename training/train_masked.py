"""Trains a masked image model on SVQVAE's ids (MaskGIT, arXiv 2202.04200), and saves an `AmusedPipeline`.

accelerate launch training/train_masked.py --vqvae_name_or_path SVQVAE --model_config_name_or_path CONFIG \
    --text_encoder_name_or_path CLIP --train_data_dir PHOTOS --output_dir OUT
"""

import math
import sys
from dataclasses import dataclass
from typing import Any

import datasets
import torch
import torch.nn.functional as F
from diffusers import AmusedPipeline, AmusedScheduler, UVit2DModel
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from svqvae_hf import SVQVAE
from svqvae_hf.hub.repositories import from_hub
from svqvae_hf.trainer.data.image_source import ImageSource
from svqvae_hf.trainer.optimization import make_optimizer
from svqvae_hf.trainer.options import ImageOptions, PipelineOptions, changeable, read_options, required
from svqvae_hf.trainer.pipeline_run import latent_side, load_frozen_vqvae, log_samples, pipeline_card
from svqvae_hf.trainer.run import Run, one_line_errors

PIXEL_RANGE = (0.0, 1.0)  # of the pipeline
AESTHETIC_SCORE = 6  # the pipeline conditions each image on it, on its size and on the position of its crop
NUM_MICRO_CONDITIONS = 5
IGNORED = -100  # target that the loss skips


@dataclass
class MaskedOptions(PipelineOptions, ImageOptions):
    """Options of training a masked image model."""

    text_encoder_name_or_path: str = required(
        "CLIP with its tokenizer, whose text encoder reads captions: folder or Hub id."
    )
    validation_prompts: list[str] = changeable([""], "Captions of the images of a validation, in turn.")


def main(options: MaskedOptions) -> None:
    """Trains a masked image model, and saves its pipeline with a card in the output folder."""
    with Run(options) as run:
        train(run)


def train(run: Run[MaskedOptions]) -> None:
    """Trains the model, from the start or from the checkpoint of the run."""
    options, accelerator = run.options, run.accelerator

    # Models and images
    vqvae = load_frozen_vqvae(options, PIXEL_RANGE).to(accelerator.device)
    options.check_sources("text_encoder_name_or_path")
    text_encoder = from_hub(CLIPTextModelWithProjection.from_pretrained, options.text_encoder_name_or_path)
    tokenizer = from_hub(CLIPTokenizer.from_pretrained, options.text_encoder_name_or_path)
    if len(tokenizer) != text_encoder.config.vocab_size:  # without its files, transformers makes one of two words
        raise ValueError(
            f"The tokenizer of `{options.text_encoder_name_or_path}` must have the {text_encoder.config.vocab_size} "
            f"words of its text encoder, but has {len(tokenizer)}. Save or download it again with all its files."
        )
    text_encoder.to(accelerator.device).requires_grad_(False)
    images = ImageSource(options, accelerator, PIXEL_RANGE, options.label_column)
    loader = images.loader([options.resolution], options.num_batches, options.seed)
    transformer = make_transformer(options, vqvae, text_encoder).to(accelerator.device)
    frozen = {
        "vqvae": vqvae,
        "tokenizer": tokenizer,
        "text_encoder": text_encoder,
        "scheduler": AmusedScheduler(mask_token_id=vqvae.config["codebook_size"]),
    }

    # Optimizer
    optimizer, lr_scheduler = make_optimizer(transformer, options, options.learning_rate, options.max_train_steps)
    model, optimizer = accelerator.prepare(transformer, optimizer)
    run.start(transformer, loader, lr_scheduler)

    for step, batches in run.steps():
        for batch in batches:
            with accelerator.accumulate(model):
                # Ids and captions
                sample, generator = images.to_device(batch), run.batch_generator()
                captions = make_captions(batch.labels, images.label_feature, options.label_dropout, generator)
                texts = tokenizer(captions, return_tensors="pt", padding="max_length", truncation=True)
                with torch.no_grad():
                    ids = vqvae.encode_tokens(sample)  # (batch, h, w)
                    text = text_encoder(texts.input_ids.to(ids.device), output_hidden_states=True)

                # The transformer predicts the masked ids
                masked = draw_mask(ids.shape, generator).to(ids.device)
                height, width = sample.shape[-2:]
                conditions = torch.tensor([width, height, 0, 0, AESTHETIC_SCORE], device=ids.device).float()
                logits = model(
                    torch.where(masked, vqvae.config["codebook_size"], ids),
                    encoder_hidden_states=text.hidden_states[-2],
                    pooled_text_emb=text.text_embeds,
                    micro_conds=conditions.expand(len(ids), -1),
                )
                num_masked = accelerator.reduce(masked.sum().float(), "mean")  # processes mask unequal numbers
                loss = masked_loss(logits, ids, masked, num_masked)
                accelerator.backward(loss)
                numbers = {"loss": loss}
                if accelerator.sync_gradients:  # after the last batch of a step
                    numbers |= run.update_weights(model, optimizer, lr_scheduler)
                run.add(numbers, images=len(sample), megapixels=sample[:, 0].numel() / 1e6)

        if run.logs_after(step):
            run.log_training(step)
        if run.validates_after(step):
            validate(run, AmusedPipeline(transformer=transformer, **frozen), step + 1)

    validate(run, AmusedPipeline(transformer=transformer, **frozen), options.max_train_steps)
    state_dict = run.final_weights(model)
    if accelerator.is_main_process:
        result = make_transformer(options, vqvae, text_encoder)
        result.load_state_dict(state_dict)
        pipeline = AmusedPipeline(transformer=result.eval(), **frozen)
        run.publish(pipeline.save_pretrained, make_card(run, pipeline))
    accelerator.end_training()


def make_transformer(options: MaskedOptions, vqvae: SVQVAE, text_encoder: CLIPTextModelWithProjection) -> UVit2DModel:
    """Transformer of the config, for this codebook, this size and this text encoder."""
    description = from_hub(UVit2DModel.load_config, options.model_config_name_or_path)
    codebook_size = vqvae.config["codebook_size"]
    derived = {
        "codebook_size": codebook_size,
        "vocab_size": codebook_size + 1,  # the mask
        "sample_size": latent_side(vqvae, options.resolution),
        "micro_cond_embed_dim": NUM_MICRO_CONDITIONS * description["micro_cond_encode_dim"],
        "cond_embed_dim": text_encoder.config.projection_dim,
        "encoder_hidden_size": text_encoder.config.hidden_size,
    }
    return UVit2DModel.from_config({**description, **derived}).train()


def make_captions(labels: list[Any], feature: Any, label_dropout: float, generator: torch.Generator) -> list[str]:
    """Captions of a batch, or names of its classes, a random fraction of them empty; all empty without labels."""
    if feature is None:
        return [""] * len(labels)
    named = isinstance(feature, datasets.ClassLabel)
    captions = [feature.int2str(label) if named else label for label in labels]
    for caption in captions:
        if not isinstance(caption, str):
            raise ValueError(f"`--label_column` must hold captions or classes with names, but has {caption!r}.")
    kept = torch.rand(len(captions), generator=generator) >= label_dropout
    return [caption if keep else "" for caption, keep in zip(captions, kept.tolist(), strict=True)]


def draw_mask(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Masks ids at random positions: per image a fraction cos(pi u / 2), u uniform in [0, 1), but at least one id.

    Args:
        shape (`torch.Size`): `(batch, h, w)`.
        generator (`torch.Generator`): Source of randomness.
    """
    batch, height, width = shape
    fractions = torch.cos(math.pi / 2 * torch.rand(batch, 1, generator=generator))
    order = torch.rand(batch, height * width, generator=generator).argsort(dim=1)
    return (order < (fractions * height * width).round().clamp(min=1)).view(shape)


def masked_loss(
    logits: torch.Tensor, ids: torch.Tensor, masked: torch.Tensor, num_masked: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy of the masked ids: their mean over all processes, once DDP has averaged the gradients.

    Args:
        logits (`torch.Tensor` of shape `(batch, codebook_size, h, w)`): Output of the transformer.
        ids (`torch.Tensor` of shape `(batch, h, w)`): True ids.
        masked (`torch.Tensor` of shape `(batch, h, w)`): Whether an id is masked.
        num_masked (`torch.Tensor`): Mean number of masked ids per process.
    """
    targets = ids.masked_fill(~masked, IGNORED)
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum") / num_masked


def validate(run: Run[MaskedOptions], pipeline: AmusedPipeline, steps_done: int) -> None:
    """Samples images of the validation prompts with fixed noise. All processes sample; the main process logs them."""
    options = run.options
    if not options.num_validation_images:
        return
    pipeline.set_progress_bar_config(disable=True)
    prompts = options.validation_prompts
    prompts = [prompts[index % len(prompts)] for index in range(options.num_validation_images)]
    with run.evaluating():
        images = pipeline(prompts, generator=torch.Generator().manual_seed(options.seed), output_type="np").images
    log_samples(run, images, steps_done)


def make_card(run: Run[MaskedOptions], pipeline: AmusedPipeline) -> str:
    """Card of the pipeline."""
    side = run.options.resolution
    return pipeline_card(
        run,
        pipeline,
        script="training/train_masked.py",
        summary=f"Images of {side} x {side} pixels by a masked model of SVQVAE's ids.",
        call='prompt="a caption like those it was trained on"',
        pipeline_tag="text-to-image",
    )


if __name__ == "__main__":
    with one_line_errors():
        main(read_options(MaskedOptions, sys.argv[1:]))
