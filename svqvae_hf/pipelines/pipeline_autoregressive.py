"""New images from a causal language model over the ids of an SVQVAE."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from svqvae_hf.models.image_processing_svqvae import ImageInput, SVQVAEImageProcessor
from svqvae_hf.models.loading import list_faults
from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.pipelines.sequences import LayoutLogitsProcessor, SequenceLayout, to_int64

CACHE_NAMES = ("cache", "past_key_values")  # of transformers from 5.24 or so, and before
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
LARGEST_FACTOR = 1e6  # of logits, which stay finite in float32

Generators = torch.Generator | list[torch.Generator] | None


class SVQVAEAutoregressivePipeline(DiffusionPipeline):
    """Samples images token by token: a causal language model gives ids, scale by scale, and SVQVAE decodes them.

    Args:
        vqvae ([`SVQVAE`]): The model whose ids the language model was trained on.
        language_model ([`~transformers.PreTrainedModel`]): A causal language model of transformers, with a vocabulary
            of `layout.vocab_size` tokens.
        num_classes (`int`, defaults to 0): Number of labels that it was trained with.
        height (`int`, *optional*): Height in pixels of the images that it was trained on; the `sample_size` of `vqvae`
            if not given.
        width (`int`, *optional*): Their width; likewise.
        scales (`list[float]`, defaults to `(1.0,)`): Scales that it was trained on, from coarse to fine.
        codebook_fingerprint (`str`, *optional*): [`SVQVAE.codebook_fingerprint`] of the codebook whose ids it was
            trained on; that of `vqvae` if not given. It is stored with the pipeline.

    `layout`, a [`SequenceLayout`], says what stands where in the sequences. While it samples,
    both models are in evaluation mode.

    Raises:
        ValueError: If the vocabulary or the context of the language model does not fit the layout, or `vqvae` has
            another codebook.

    Example:
        >>> pipe = SVQVAEAutoregressivePipeline.from_pretrained("org/name")
        >>> images = pipe(class_labels=[3, 7], guidance_scale=2.0, top_k=200).images
    """

    model_cpu_offload_seq = "language_model->vqvae"

    def __init__(
        self,
        vqvae: SVQVAE,
        language_model: PreTrainedModel,
        num_classes: int = 0,
        height: int | None = None,
        width: int | None = None,
        scales: list[float] | tuple[float, ...] = (1.0,),
        codebook_fingerprint: str | None = None,
    ):
        super().__init__()
        side = vqvae.config["sample_size"]
        self.layout = SequenceLayout(
            codebook_size=vqvae.config["codebook_size"],
            f=vqvae.f,
            height=side if height is None else height,
            width=side if width is None else width,
            scales=scales,
            num_classes=num_classes,
        )
        _check_language_model(language_model, self.layout)
        found = vqvae.codebook_fingerprint()
        if codebook_fingerprint not in (None, found):
            raise ValueError(
                "`vqvae` must have the codebook whose ids the language model was trained on, with fingerprint "
                f"{codebook_fingerprint}, but has one with {found}. Use the SVQVAE that the pipeline was saved with."
            )
        self.register_modules(vqvae=vqvae, language_model=language_model)
        self.register_to_config(
            num_classes=num_classes,
            height=self.layout.height,
            width=self.layout.width,
            scales=list(self.layout.scales),
            codebook_fingerprint=found,
        )
        self.image_processor = SVQVAEImageProcessor(pixel_range=vqvae.config["pixel_range"])

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> "SVQVAEAutoregressivePipeline":
        """Loads a pipeline from a folder or from the Hub, strictly, its weights from safetensors files only.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Folder, or `org/name` on the Hub.
            **kwargs: Those of [`~diffusers.DiffusionPipeline.from_pretrained`].

        Raises:
            OSError: If there is no such pipeline, or it has no safetensors files.
            ValueError: If it is of another class, weights of the language model are missing or not expected, a
                `vqvae` given has another codebook, or `use_safetensors` is `False`.
        """
        _check_safetensors("use_safetensors", kwargs.get("use_safetensors"))
        kwargs["use_safetensors"] = True
        folder = pretrained_model_name_or_path
        if not os.path.isdir(folder):
            folder = cls.download(folder, **kwargs)
        found = cls.load_config(folder)["_class_name"]
        if found != cls.__name__:
            raise ValueError(
                f"the pipeline of `{pretrained_model_name_or_path}` must be a {cls.__name__}, but is a {found}. "
                "Load it with `DiffusionPipeline`."
            )
        if "language_model" not in kwargs:
            _check_weights(pretrained_model_name_or_path, Path(folder, "language_model"), kwargs.get("variant"))
        pipeline = super().from_pretrained(folder, **kwargs)
        pipeline.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        return pipeline

    def save_pretrained(
        self, save_directory: str | os.PathLike, safe_serialization: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """Saves the pipeline, its weights to safetensors files.

        Args:
            save_directory (`str` or `os.PathLike`): Folder to write to.
            safe_serialization (`bool`, defaults to `True`): Only `True` is taken.
            *args: The others of [`~diffusers.DiffusionPipeline.save_pretrained`].
            **kwargs: Likewise.

        Raises:
            ValueError: If `safe_serialization` is `False`.
        """
        _check_safetensors("safe_serialization", safe_serialization)
        super().save_pretrained(save_directory, True, *args, **kwargs)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | None = None,
        height: int | None = None,
        width: int | None = None,
        scales: Sequence[float] | None = None,
        image: ImageInput | list[ImageInput] | None = None,
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: Generators = None,
        num_images_per_prompt: int = 1,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, float, dict[str, torch.Tensor]], object] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Samples images.

        Args:
            class_labels (`int` or `Sequence[int]`, *optional*): A label for each image, in `[0, num_classes)`; images
                of no class if not given.
            height (`int`, *optional*): Height in pixels at scale 1. Only the trained size, or one that needs as many
                ids, can be made. The trained one if not given.
            width (`int`, *optional*): Width in pixels; likewise.
            scales (`Sequence[float]`, *optional*): Which of the trained scales to give, each once; sampling ends with
                the finest of them. The finest of all if not given.
            image (`ImageInput` or a list of them, *optional*): Top part of images to complete, one for all or one for
                each label, as [`SVQVAEImageProcessor`] takes them: as wide as the image, and a whole number of rows of
                ids high at each scale. At each scale its ids stay as they are, and the rows below are sampled.
            guidance_scale (`float`, defaults to 1.0): Classifier-free guidance: logits are `unconditional +
                guidance_scale * (conditional - unconditional)`. At 1 there is none. In [-1e6, 1e6].
            temperature (`float`, defaults to 1.0): Divides the logits, in [1e-6, 1e6]; 0 takes the most likely token.
            top_k (`int`, defaults to 0): Sample from so many of the most likely tokens; 0 means all.
            top_p (`float`, defaults to 1.0): Sample from the most likely tokens that together have this probability.
            generator (`torch.Generator` or a list of them, *optional*): Source of randomness, one for all images or
                one for each, on any device.
            num_images_per_prompt (`int`, defaults to 1): Images for each label.
            output_type (`str`, defaults to `"pil"`): `"pil"` for Pillow images, `"np"` for arrays `(batch, height,
                width, 3)`, `"pt"` for tensors `(batch, 3, height, width)`, both in [0, 1], or `"latent"` for ids
                `(batch, h, w)`.
            return_dict (`bool`, defaults to `True`): Whether to give an output object or a tuple.
            callback_on_step_end (`Callable`, *optional*): Called after each row of ids with the pipeline, the number
                of rows sampled before it, the scale at work and a dictionary whose `ids` `(batch, rows so far, w)` are
                those of this scale: `pipe.vqvae.decode_tokens(ids)` is a preview. What it returns is not read.

        Returns:
            [`~diffusers.ImagePipelineOutput`] or `tuple`: `images`; a list of such, one per scale in their order, if
            `scales` is given.

        Raises:
            ValueError: If a value does not fit, or the language model gives logits that cannot be sampled from.
        """
        layout = self._layout(height, width)
        asked = layout.scales[-1:] if scales is None else _check_scales(scales, layout)
        last = max(layout.scales.index(scale) for scale in asked)
        _check_sampling(guidance_scale, temperature, top_k, top_p, generator, num_images_per_prompt, output_type)
        with _evaluating(self.vqvae, self.language_model):
            top = [] if image is None else self._encode_top(image, layout)
            labels = self._labels(class_labels, len(top[0]) if top else 1)
            if guidance_scale != 1 and class_labels is None:
                raise ValueError(
                    f"`guidance_scale` = {guidance_scale} needs `class_labels`. Give them, or leave it at 1."
                )
            sequences = _prompt(layout, labels, top).repeat_interleave(num_images_per_prompt, dim=0)
            count = len(sequences)
            if isinstance(generator, list) and len(generator) != count:
                raise ValueError(f"there must be one generator for each of {count} images, but are {len(generator)}.")
            if guidance_scale != 1:
                sequences = sequences.repeat(2, 1)  # the second half without the label
                sequences[count:, 0] = layout.unconditional_token

            processors = _processors(layout, temperature, top_k, top_p)
            model = _CachedModel(self.language_model)
            rows = _free_rows(layout, top, last)
            for step, (index, row) in enumerate(self.progress_bar(rows)):
                highest = []
                for position in range(row.start, row.stop):
                    logits = _guide(model.next_logits(sequences[:, :position]), guidance_scale)
                    scores = processors(sequences[:count, :position], logits)
                    highest.append(scores.amax(-1))
                    tokens = scores.argmax(-1) if temperature == 0 else _draw(scores, generator)
                    sequences[:, position] = tokens.repeat(len(sequences) // count)
                _check_scores(torch.stack(highest), self.language_model)
                if callback_on_step_end is not None:
                    ids = sequences[:count, layout.spans[index].start : row.stop].unflatten(1, (-1, len(row)))
                    callback_on_step_end(self, step, layout.scales[index], {"ids": ids})

            grids, _ = layout.decode(sequences[:count, : layout.spans[last].stop])
            results = [self._images(grids[layout.scales.index(scale)], layout, scale, output_type) for scale in asked]
        images = results[0] if scales is None else results
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _layout(self, height: int | None, width: int | None) -> SequenceLayout:
        trained = self.layout
        layout = dataclasses.replace(
            trained,
            height=trained.height if height is None else height,
            width=trained.width if width is None else width,
        )
        if layout.grids != trained.grids:
            raise ValueError(
                f"`height` and `width` must be {trained.height} and {trained.width}, those that the language model "
                f"was trained on, but are {layout.height} and {layout.width}. Leave them out, and resize the images."
            )
        return layout

    def _labels(self, class_labels: int | Sequence[int] | None, images: int) -> torch.Tensor:
        """One label for each image, `num_classes` for none."""
        num_classes = self.layout.num_classes
        device = self._execution_device
        if class_labels is None:
            return torch.full((images,), num_classes, device=device)
        try:
            labels = to_int64("labels", torch.as_tensor(class_labels, device=device)).reshape(-1)
        except (TypeError, ValueError, RuntimeError):  # of text, of lists of several lengths, of large numbers
            labels = torch.empty(0)
        if not labels.numel() or not 0 <= labels.min() <= labels.max() < num_classes:
            raise ValueError(
                f"`class_labels` must be whole numbers in [0, {num_classes}), the classes that the language model was "
                f"trained on, but are {class_labels!r}."
            )
        if images not in (1, len(labels)):
            raise ValueError(f"there must be one `image`, or one for each of {len(labels)} labels, but are {images}.")
        return labels

    def _encode_top(self, image: ImageInput | list[ImageInput], layout: SequenceLayout) -> list[torch.Tensor]:
        """Ids of the top parts of images, one grid per scale."""
        batch = self.image_processor(image)
        height, width = batch["image_sizes"][0]
        for size in batch["image_sizes"]:
            whole = all((scale * size[0] / layout.f).is_integer() for scale in layout.scales)
            if size != (height, layout.width) or height > layout.height or not whole:
                raise ValueError(
                    f"`image` must be {layout.width} pixels wide, at most {layout.height} high, and a whole number of "
                    f"rows of ids high at each of the scales {list(layout.scales)}, where f = {layout.f}; several "
                    f"must have one size. But one is {size[1]} x {size[0]} (width x height). Crop it."
                )
        sample = batch["pixel_values"].to(self._execution_device, self.vqvae.dtype)
        return self.vqvae.encode_tokens(sample, layout.scales)

    def _images(self, ids: torch.Tensor, layout: SequenceLayout, scale: float, output_type: str) -> Any:
        """Ids `(batch, h, w)` of a scale as images."""
        if output_type == "latent":
            return ids
        sample = self.vqvae.resize_to_image(self.vqvae.decode(ids).sample, (layout.height, layout.width), scale)
        images = self.image_processor.postprocess(sample, output_type=output_type)
        if output_type == "pil":
            return images
        return np.stack(images) if output_type == "np" else torch.stack(images)


@contextmanager
def _evaluating(*models: torch.nn.Module) -> Iterator[None]:
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


class _CachedModel:
    """A language model with the keys and values of what it has read."""

    def __init__(self, language_model: PreTrainedModel):
        self.language_model = language_model
        self.cache: dict[str, Any] = {}  # under the name that the model gives it
        self.read = 0

    def next_logits(self, sequences: torch.Tensor) -> torch.Tensor:
        """Float32 logits `(batch, vocab_size)` of the token after these sequences, which go on from the last call."""
        output = self.language_model(input_ids=sequences[:, self.read :], use_cache=True, **self.cache)
        self.cache = {name: output[name] for name in CACHE_NAMES if name in output.keys()}
        if not self.cache:
            raise ValueError(
                f"`language_model` must give its keys and values, but {type(self.language_model).__name__} does not. "
                "Use a causal language model with attention."
            )
        self.read = sequences.shape[1]
        return output.logits[:, -1].float()


def _check_weights(name: str | os.PathLike, folder: Path, variant: str | None) -> None:
    """Refuses what transformers only warns of."""
    _, info = AutoModelForCausalLM.from_pretrained(
        folder, device_map="meta", use_safetensors=True, variant=variant, output_loading_info=True
    )
    faults = list_faults(info)
    if faults:
        raise ValueError(
            f"The language model of {name} must have exactly the weights that its config asks for, but {faults}. "
            "Restore its files."
        )


def _check_safetensors(name: str, value: bool | None) -> None:
    if value is False:
        raise ValueError(
            f"`{name}` must be True, since weights are in safetensors files only, but is False. Leave it out."
        )


def _check_language_model(language_model: PreTrainedModel, layout: SequenceLayout) -> None:
    config = language_model.config
    if config.vocab_size != layout.vocab_size:
        raise ValueError(
            f"the vocabulary of the language model must have {layout.vocab_size} tokens, {layout.codebook_size} "
            f"codes, {layout.num_classes} classes, one for no class and {len(layout.scales) - 1} separators of "
            f"scales, but has {config.vocab_size}. Use the model that was trained on these ids."
        )
    context = getattr(config, "max_position_embeddings", layout.length)  # some have no limit
    if context < layout.length:
        raise ValueError(
            f"the language model must take {layout.length} tokens, the length of a sequence, but takes {context} "
            "(`max_position_embeddings`). Use smaller images or scales, or another model."
        )


def _check_scales(scales: Sequence[float], layout: SequenceLayout) -> Sequence[float]:
    known = isinstance(scales, Sequence) and len(scales) > 0 and all(scale in layout.scales for scale in scales)
    if not known or len(set(scales)) < len(scales):
        raise ValueError(
            f"`scales` must be among {list(layout.scales)}, those that the language model was trained on, each once, "
            f"but are {scales!r}. Give a list of such."
        )
    return scales


def _check_sampling(
    guidance_scale: float,
    temperature: float,
    top_k: int,
    top_p: float,
    generator: Generators,
    count: int,
    output_type: str,
) -> None:
    limit = LARGEST_FACTOR
    sources = generator if isinstance(generator, list) else [generator]
    known = generator is None or all(isinstance(each, torch.Generator) for each in sources)
    rules = {
        "guidance_scale": (guidance_scale, _is_number(guidance_scale, -limit, limit), f"in [-{limit:g}, {limit:g}]"),
        "temperature": (
            temperature,
            _is_number(temperature, 1 / limit, limit) or _is_number(temperature, 0, 0),
            f"0 or in [{1 / limit:g}, {limit:g}]",
        ),
        "top_k": (top_k, type(top_k) is int and top_k >= 0, "a whole number of at least 0"),
        "top_p": (top_p, _is_number(top_p, 0, 1) and top_p > 0, "above 0 and at most 1"),
        "generator": (generator, known, "a `torch.Generator`, or a list of them, one for each image"),
        "num_images_per_prompt": (count, type(count) is int and count > 0, "a whole number above 0"),
        "output_type": (output_type, output_type in OUTPUT_TYPES, f"one of {', '.join(OUTPUT_TYPES)}"),
    }
    for name, (value, holds, rule) in rules.items():
        if not holds:
            raise ValueError(f"`{name}` must be {rule}, but is {value!r}.")


def _is_number(value: object, least: float, most: float) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and least <= float(value) <= most


def _check_scores(highest: torch.Tensor, language_model: PreTrainedModel) -> None:
    """Refuses those that cannot be drawn from, by the highest score of each draw: NaN if one is, or infinite."""
    if not highest.isfinite().all():
        raise ValueError(
            "the language model must give finite logits, without NaN, but those of "
            f"{type(language_model).__name__} in {language_model.dtype} are not. Load it in another `dtype`, such as "
            "torch.float32, or use one whose weights are finite."
        )


def _prompt(layout: SequenceLayout, labels: torch.Tensor, top: list[torch.Tensor]) -> torch.Tensor:
    """Sequences with all that is known, and 0 elsewhere."""
    grids = [labels.new_zeros((len(labels), *size)) for size in layout.grids]
    for grid, ids in zip(grids, top, strict=False):
        grid[:, : ids.shape[1]] = ids
    return layout.encode(grids, labels)


def _free_rows(layout: SequenceLayout, top: list[torch.Tensor], last: int) -> list[tuple[int, range]]:
    """Rows to sample, scale by scale: number of the scale, positions of the row."""
    free = []
    for index, (span, (rows, columns)) in enumerate(zip(layout.spans[: last + 1], layout.grids, strict=False)):
        given = top[index].shape[1] if top else 0
        starts = [span.start + row * columns for row in range(given, rows)]
        free += [(index, range(start, start + columns)) for start in starts]
    return free


def _processors(layout: SequenceLayout, temperature: float, top_k: int, top_p: float) -> LogitsProcessorList:
    processors = LogitsProcessorList([LayoutLogitsProcessor(layout)])
    if temperature not in (0, 1):
        processors.append(TemperatureLogitsWarper(float(temperature)))
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    return processors


def _guide(logits: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    if guidance_scale == 1:
        return logits
    conditional, unconditional = logits.chunk(2)
    return unconditional + guidance_scale * (conditional - unconditional)


def _draw(scores: torch.Tensor, generator: Generators) -> torch.Tensor:
    """One token for each row of scores, by its probability: the first of exponential clocks to ring."""
    return (scores.softmax(-1) / _exponential(scores.shape, generator, scores.device)).argmax(-1)


def _exponential(shape: torch.Size, generator: Generators, device: torch.device) -> torch.Tensor:
    if isinstance(generator, list):
        return torch.cat([_exponential(torch.Size((1, *shape[1:])), each, device) for each in generator])
    source = device if generator is None else generator.device
    return torch.empty(shape, device=source).exponential_(generator=generator).to(device)
