"""Parts of a run that trains a generator on an SVQVAE's latents or ids, and saves a pipeline."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline

from svqvae_hf.hub import model_cards
from svqvae_hf.hub.repositories import public_name
from svqvae_hf.loaders.pretrained_models import SVQVAE
from svqvae_hf.tokens.image_tokens import check_same_codebook
from svqvae_hf.trainer.data.token_sequences import TokenBatch, TokenSource
from svqvae_hf.trainer.options import PipelineOptions, option, required
from svqvae_hf.trainer.run import Run
from svqvae_hf.trainer.tracking import log_images

NAMED_CLASSES = 20  # on a card

Options = TypeVar("Options", bound=PipelineOptions)


@dataclass
class TokenOptions(PipelineOptions):
    """Options of training a generator on a token set."""

    token_set: str = required("Token set of `svqvae tokenize`, all rows of one size: folder, URL or Hub id.")
    validation_token_set: str | None = option(
        None, "Token set of other images, whose loss, accuracy and bits per id are logged at each validation."
    )
    train_batch_size: int = option(8, "Images per batch of one process.")
    guidance_scale: float = option(1.0, "Guidance scale of the images of a validation.")
    caption_column: str | None = option(None, "Column of captions. From a row with several, each batch draws one.")

    def __post_init__(self) -> None:
        """Checks the options of token sets as well."""
        super().__post_init__()
        if self.caption_column is not None and self.label_column is not None:
            raise ValueError("Only one of `--caption_column` and `--label_column` can be given. Leave one out.")


def load_frozen_vqvae(options: PipelineOptions, pixel_range: tuple[float, float]) -> SVQVAE:
    """Loads the pipeline's SVQVAE, which is not trained.

    Args:
        options ([`PipelineOptions`]): Options.
        pixel_range (`tuple[float, float]`): Pixel range of the pipeline, which may differ from the SVQVAE's own.

    Raises:
        ValueError: If there is no such SVQVAE, or no such config of the network.
    """
    options.check_sources("vqvae_name_or_path", "model_config_name_or_path")
    vqvae = SVQVAE.from_pretrained(options.vqvae_name_or_path, pixel_range=pixel_range, torch_dtype=torch.float32)
    vqvae.register_to_config(_name_or_path=public_name(options.vqvae_name_or_path))
    return vqvae.requires_grad_(False)


def open_token_sets(options: TokenOptions, vqvae: SVQVAE) -> tuple[TokenSource, TokenSource | None]:
    """Opens the token set, and the one of held-out images, if any.

    Raises:
        ValueError: If they belong to another codebook, differ in their sequences, or share images.
    """
    source = TokenSource(options.token_set, options.label_column, options.caption_column)
    check_same_codebook(vqvae, source.settings)
    if options.validation_token_set is None:
        return source, None
    held_out = TokenSource(options.validation_token_set, options.label_column, options.caption_column)
    check_same_codebook(vqvae, held_out.settings)
    if held_out.layout != source.layout:
        raise ValueError(
            f"`--validation_token_set` must have the sequences of the token set, {source.layout}, but has "
            f"{held_out.layout}. Tokenize both alike."
        )
    if shared := source.shared_key(held_out):
        raise ValueError(
            f"`--validation_token_set` must hold images that are not trained on, but `{shared}` is in both sets. "
            "Tokenize other images."
        )
    return source, held_out


def validate_tokens(
    run: Run[Any],
    held_out: TokenSource | None,
    loss_of: Callable[[TokenBatch], tuple[torch.Tensor, torch.Tensor]],
    steps_done: int,
) -> None:
    """Logs the mean loss, accuracy and bits per id of the held-out images, which processes share.

    Args:
        run ([`Run`]): The run.
        held_out ([`TokenSource`], *optional*): Held-out images.
        loss_of (`Callable`): Returns the loss of a batch in nats per id, and its accuracy.
        steps_done (`int`): Steps done before.
    """
    if held_out is None:
        return
    process, size = run.accelerator.process_index, run.options.train_batch_size
    rows = range(process, len(held_out.rows), run.accelerator.num_processes)
    totals = torch.zeros(2, device=run.accelerator.device)
    with run.evaluating():
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            totals += len(batch) * torch.stack(loss_of(held_out.batch(batch)))
    loss, accuracy = (run.accelerator.reduce(totals, "sum") / len(held_out.rows)).tolist()
    numbers = {"loss": loss, "accuracy": accuracy, "bits_per_id": loss / math.log(2)}
    run.log(steps_done, {f"validation/{name}": value for name, value in numbers.items()})


def class_labels(count: int, num_classes: int) -> list[int]:
    """Labels of the images of a validation: each class in turn."""
    return [index % num_classes for index in range(count)]


def sample_call(
    options: TokenOptions, source: TokenSource, condition_on: Callable[[list[str]], dict[str, Any]]
) -> dict[str, Any]:
    """Arguments of the pipeline's call for the images of a validation: each class, or the first captions of the set.

    Args:
        options ([`TokenOptions`]): Options.
        source ([`TokenSource`]): Token set.
        condition_on (`Callable`): Returns the arguments for captions.
    """
    count, num_classes = options.num_validation_images, source.layout.num_classes
    if not count or not num_classes:
        return {"num_images_per_prompt": count}
    if options.caption_column is None:
        return {"class_labels": class_labels(count, num_classes), "guidance_scale": options.guidance_scale}
    return {**condition_on(source.first_captions(count)), "guidance_scale": options.guidance_scale}


def log_samples(run: Run[Any], pipeline: DiffusionPipeline, call: Mapping[str, Any], steps_done: int) -> None:
    """Samples images with fixed noise, and writes them as one picture. All processes sample; the main one writes.

    Args:
        run ([`Run`]): The run.
        pipeline (`DiffusionPipeline`): Pipeline of the trained network.
        call (`Mapping[str, Any]`): Arguments of its call.
        steps_done (`int`): Steps done before.
    """
    if not run.options.num_validation_images:
        return
    pipeline.set_progress_bar_config(disable=True)
    with run.evaluating():
        images = pipeline(**call, generator=torch.Generator().manual_seed(run.options.seed), output_type="np")[0]
    if run.accelerator.is_main_process:
        columns, tensor = math.ceil(len(images) ** 0.5), torch.from_numpy(images).permute(0, 3, 1, 2)
        log_images(run.accelerator, tensor, columns, run.output_dir / "samples", steps_done)


def pipeline_card(
    run: Run[Options],
    pipeline: DiffusionPipeline,
    script: str,
    summary: str,
    call: str,
    class_names: Sequence[str] | None = None,
) -> str:
    """Writes the card of a pipeline.

    Args:
        run ([`Run`]): The run that trained it.
        pipeline (`DiffusionPipeline`): The pipeline.
        script (`str`): The script that trained it, such as `training/train_next_scale.py`.
        summary (`str`): A sentence about the pipeline.
        call (`str`): Arguments of the pipeline's call in the example.
        class_names (`Sequence[str]`, *optional*): Names of the classes.
    """
    options = run.options
    rows = {"SVQVAE": f"`{public_name(options.vqvae_name_or_path)}`"} | run.provenance(script, "images")
    for name in ("token_set", "validation_token_set", "dataset_name", "train_data_dir", "validation_data_dir"):
        if (source := getattr(options, name, None)) is not None:
            rows[name.replace("_", " ")] = f"`{public_name(source)}`"
    if class_names:
        name = model_cards.quote(class_names[0])
        call = call.replace("class_labels=[0]", f"class_labels=[{name}]").replace("labels=0,", f"labels={name},")
        more = f" and {len(class_names) - NAMED_CLASSES} more" if len(class_names) > NAMED_CLASSES else ""
        rows["classes"] = ", ".join(class_names[:NAMED_CLASSES]) + more
    rows |= {name.replace("_", " "): f"{value:.4g}" for name, value in run.quality.items()}
    return model_cards.pipeline_card(
        type(pipeline),
        repo_id=run.name,
        summary=summary,
        call=call,
        tags=["svqvae", type(run.network).__name__.lower()],
        provenance=rows,
        license=options.license,
        pipeline_tag=getattr(pipeline, "task", "unconditional-image-generation"),
    )
