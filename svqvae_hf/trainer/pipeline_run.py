"""Parts of a run that trains a generator on an SVQVAE's latents or ids, and saves a pipeline."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from svqvae_hf.hub import model_cards
from svqvae_hf.hub.repositories import public_name
from svqvae_hf.loaders.pretrained_models import SVQVAE
from svqvae_hf.models.checks import check_same_codebook
from svqvae_hf.token_sets.classes import list_classes
from svqvae_hf.trainer.data.held_out import check_held_out_tokens
from svqvae_hf.trainer.data.token_sequences import TokenSource
from svqvae_hf.trainer.log import Log
from svqvae_hf.trainer.options import PipelineOptions, check_models
from svqvae_hf.trainer.publishing import Result
from svqvae_hf.trainer.tracking import log_images
from svqvae_hf.trainer.weights import Weights

NAMED_CLASSES = 20  # on a card


def load_frozen_vqvae(options: PipelineOptions, pixel_range: tuple[float, float]) -> SVQVAE:
    """Loads the pipeline's SVQVAE, which is not trained.

    Args:
        options ([`PipelineOptions`]): Options.
        pixel_range (`tuple[float, float]`): Pixel range of the pipeline, which may differ from the SVQVAE's own.

    Raises:
        ValueError: If there is no such SVQVAE, or no such config of the network or other model.
    """
    check_models(options)
    vqvae = SVQVAE.from_pretrained(options.vqvae_name_or_path, pixel_range=pixel_range, torch_dtype=torch.float32)
    vqvae.register_to_config(_name_or_path=public_name(options.vqvae_name_or_path))
    return vqvae.requires_grad_(False)


def open_token_sets(options: Any, vqvae: SVQVAE, class_names: Any = None) -> tuple[TokenSource, TokenSource | None]:
    """Opens the token set, and the one of held-out images, if any.

    Args:
        options: Options with `token_set`, `validation_token_set`, `label_column` and `caption_column`.
        vqvae ([`SVQVAE`]): Model whose ids they hold.
        class_names (`Sequence[str]`, *optional*): Names of the classes of a model that is trained further.

    Raises:
        ValueError: If they belong to another codebook, have other classes, differ in their sequences, or share images.
    """
    if options.caption_column is not None and options.label_column is not None:
        raise ValueError("Only one of `--caption_column` and `--label_column` can be given. Leave one out.")
    source = _open_token_set(options, options.token_set, vqvae, class_names)
    has_classes_of_model = class_names is None or source.class_names == class_names
    if not has_classes_of_model:
        raise ValueError(
            f"The token set must have the model's classes, {list_classes(class_names)}, but has "
            f"{list_classes(source.class_names or [])}."
        )
    if options.validation_token_set is None:
        return source, None
    held_out = _open_token_set(options, options.validation_token_set, vqvae, class_names)
    _match_classes(held_out, source)
    _check_same_format(held_out, source)
    check_held_out_tokens(held_out.token_set, source.token_set, "--validation_token_set")
    return source, held_out


def _vqvae_option(options: Any) -> str | None:
    """Option that names the model of the ids; `None` if it comes from the pipeline that is trained further."""
    if getattr(options, "vqvae_name_or_path", None) is None:
        return None
    return "--vqvae_name_or_path"


def _match_classes(held_out: TokenSource, source: TokenSource) -> None:
    """Gives the held-out images the class numbers of the token set. They need not have all of its classes."""
    if source.class_names == held_out.class_names:
        # Labels without names are counted, and the last class may not occur.
        if held_out.num_classes < source.num_classes:
            held_out.num_classes = source.num_classes
    elif source.class_names and held_out.class_names:
        held_out.take_classes(source.class_names)


def _check_same_format(held_out: TokenSource, source: TokenSource) -> None:
    """Raises ValueError if two token sets differ in what a model must know of their sequences."""
    format_of_source = _sequence_format(source)
    for name, value in _sequence_format(held_out).items():
        if value != format_of_source[name]:
            raise ValueError(
                f"`--validation_token_set` must have the {name} of the token set, {format_of_source[name]}, but has "
                f"{value}. Tokenize both alike."
            )


def _open_token_set(options: Any, data: str, vqvae: SVQVAE, class_names: Any) -> TokenSource:
    """Opens a token set. A set without names of classes takes over the names of the model that is trained further."""
    source = TokenSource(data, options.label_column, options.caption_column)
    check_same_codebook(vqvae, source.settings, _vqvae_option(options))
    if not source.class_names:
        source.class_names = class_names
    return source


def _sequence_format(source: TokenSource) -> dict[str, Any]:
    """What a model must know of the sequences of a token set, by its name in errors."""
    kind_of_classes = "with names" if source.class_names else "without names"
    return {
        "grids of ids": source.grids,
        "number of classes": source.num_classes,
        "kind of classes": kind_of_classes,
        "`scale_from`": source.settings.scale_from,
    }


def log_samples(
    log: Log,
    weights: Weights,
    pipeline: DiffusionPipeline,
    call: Mapping[str, Any],
    labels: Sequence[str],
    steps_done: int,
) -> None:
    """Samples images with fixed noise, and writes them as one picture. All processes sample; the main one writes.

    Args:
        log ([`Log`]): Log of the run.
        weights ([`Weights`]): Weights of the network.
        pipeline (`DiffusionPipeline`): Pipeline of the trained network.
        call (`Mapping[str, Any]`): Arguments of its call.
        labels (`Sequence[str]`): What each image shows: its class, its caption, or its number.
        steps_done (`int`): Steps done before.
    """
    options: Any = log.options
    if not options.num_validation_images:
        return
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(options.seed)
    with weights.evaluating():
        output = pipeline(**call, generator=generator, output_type="np")
    images = output[0]  # (n, H, W, 3)
    if log.accelerator.is_main_process:
        num_columns = math.ceil(math.sqrt(len(images)))  # a square, as nearly as possible
        sample = torch.from_numpy(images).permute(0, 3, 1, 2)  # (n, 3, H, W)
        folder = Path(options.output_dir, "samples")
        log_images(log.accelerator, sample, labels, num_columns, folder, steps_done)


def generator_card(
    options: Any, result: Result, pipeline: DiffusionPipeline, numbers: Mapping[str, str], summary: str, call: str
) -> str:
    """Writes the card of a pipeline.

    Args:
        options: Options of its run.
        result ([`Result`]): Result of the run.
        pipeline (`DiffusionPipeline`): The pipeline.
        numbers (`Mapping[str, str]`): From [`provenance`], and numbers from the log.
        summary (`str`): A sentence about the pipeline.
        call (`str`): Arguments of the pipeline's call in the example.
    """
    rows = dict(numbers)
    for name in ("validation_token_set", "validation_data_dir"):
        source = getattr(options, name, None)
        if source is not None:
            rows[name.replace("_", " ")] = f"`{public_name(source)}`"
    class_names = _class_names(pipeline)
    if class_names:
        call = _name_first_class(call, class_names)
        rows["classes"] = _list_classes(class_names)
    network = pipeline.components.get("transformer")
    if network is None:
        network = pipeline.components["language_model"]
    return model_cards.pipeline_card(
        type(pipeline),
        repo_id=result.name,
        summary=summary,
        call=call,
        tags=["svqvae", type(network).__name__.lower()],
        provenance=rows | result.origin.rows,
        license=result.origin.license,
        base_model=result.origin.base_model,
        pipeline_tag=getattr(pipeline, "task", "unconditional-image-generation"),
    )


def _name_first_class(call: str, class_names: Sequence[str]) -> str:
    """Writes the name of the first class in place of its number into the arguments of a pipeline's call."""
    first_name = model_cards.quote(class_names[0])
    call = call.replace("class_labels=[0]", f"class_labels=[{first_name}]")  # of this package's pipelines
    return call.replace("labels=0,", f"labels={first_name},")  # of all others


def _list_classes(class_names: Sequence[str]) -> str:
    """Names of the first classes, and how many more there are."""
    listed = ", ".join(class_names[:NAMED_CLASSES])
    num_more = len(class_names) - NAMED_CLASSES
    if num_more > 0:
        listed += f" and {num_more} more"
    return listed


def _class_names(pipeline: DiffusionPipeline) -> list[str]:
    """Names of the classes of a pipeline, in the words of this package or of diffusers; empty without names."""
    class_names = pipeline.config.get("class_names")
    if class_names:
        return list(class_names)
    return list(pipeline.config.get("id2label", {}).values())
