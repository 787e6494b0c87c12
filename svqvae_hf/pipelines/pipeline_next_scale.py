"""Pipeline that samples images scale by scale, each scale in one step, and edits images the same way."""

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ImagePipelineOutput
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from PIL import Image
from transformers import PreTrainedTokenizerBase

from svqvae_hf.models.checks import check_integer, check_scale_from
from svqvae_hf.models.image_files import to_grey
from svqvae_hf.models.image_processing_svqvae import ImageInput
from svqvae_hf.models.modeling_next_scale import NextScaleTransformer
from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.models.resizing import grid_shape, pad_to_multiple, resize
from svqvae_hf.pipelines.captions import pad_captions
from svqvae_hf.pipelines.generator_pipeline import Callback, GeneratorPipeline
from svqvae_hf.pipelines.labels import Labels
from svqvae_hf.pipelines.modular_next_scale import NextScaleBlocks, NextScaleTextBlocks, ScalePredictor
from svqvae_hf.pipelines.sampling import (
    Generators,
    check_finite,
    check_generators,
    check_outputs,
    check_sampling,
    guide,
    sample,
)
from svqvae_hf.pipelines.schedules import (
    Scale,
    Size,
    describe,
    fit_schedule,
    guidance_per_step,
    make_schedule,
    size_of_scale,
)

DEFAULT_STEPS = 10
SQUARE = (1, 1)  # a size with the aspect ratio of a square


class SVQVAENextScalePipeline(GeneratorPipeline):
    """Samples images scale by scale: a transformer predicts all ids of a scale at once, and SVQVAE decodes the last.

    Args:
        vqvae ([`SVQVAE`]): Model whose ids the transformer was trained on.
        transformer ([`NextScaleTransformer`]): Transformer with the codebook size and dimension of `vqvae`.
        schedule (list of `int` or `[height, width]`, *optional*): Scales in ids from coarse to fine, which end with
            the size of the training images; a single number is the side of a square. By default ten scales, of which
            the last has the size of an image with the side `sample_size` of `vqvae`.
        codebook_fingerprint (`str`, *optional*): [`SVQVAE.codebook_fingerprint`] in training, which is saved with the
            pipeline; the fingerprint of `vqvae` by default.
        class_names (`list[str]`, *optional*): Name of each class.
        scale_from (`str`, defaults to `"image"`): What was resized to the scales in training, see
            [`SVQVAE.encode_scales`]. Images to edit are encoded the same way.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): Tokenizer of the captions, for a transformer
            that reads them.

    The attribute `trained_schedule` lists the scales as pairs `(height, width)`.

    Raises:
        ValueError: The models do not fit each other, `vqvae` does not have the codebook with this fingerprint, the
            schedule does not rise, or the number of names is not `num_classes` of the transformer.

    Example:
        >>> pipe = SVQVAENextScalePipeline.from_pretrained("org/name")
        >>> images = pipe(class_labels=[3, 7], guidance_scale=3.5, top_k=900, top_p=0.95).images

        A checkpoint of FlexVAR, for images of `vqvae.config["sample_size"]`:

        >>> transformer = NextScaleTransformer.from_single_file("FlexVARd24-epo349.pth")
        >>> pipe = SVQVAENextScalePipeline(vqvae, transformer, scale_from="latents")
    """

    model_cpu_offload_seq = "transformer->vqvae"
    _optional_components = ["tokenizer"]

    def __init__(
        self,
        vqvae: SVQVAE,
        transformer: NextScaleTransformer,
        schedule: list[int] | list[list[int]] | None = None,
        codebook_fingerprint: str | None = None,
        class_names: list[str] | tuple[str, ...] | None = None,
        scale_from: str = "image",
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        super().__init__()
        check_scale_from(scale_from)
        check_same_codebook(vqvae, transformer)
        self.trained_schedule = schedule_of_training(schedule, vqvae)  # ten sizes by default
        schedule_in_json = [list(size) for size in self.trained_schedule]  # JSON has no tuples
        # Registers the models, and the values that are saved with the pipeline.
        self._register(
            {"vqvae": vqvae, "transformer": transformer, "tokenizer": tokenizer},
            num_classes=transformer.config["num_classes"],
            fingerprints=[codebook_fingerprint],  # of the codebook in training, which `vqvae` must have
            class_names=class_names,
            schedule=schedule_in_json,
            scale_from=scale_from,  # "image" or "latents": which of them training resized to each scale
        )
        # Converts masks to tensors of zeros and ones, of one channel and as large as the mask.
        self.mask_processor = VaeImageProcessor(
            do_resize=False, do_normalize=False, do_binarize=True, do_convert_grayscale=True
        )

    def blocks(self) -> type:
        """Class of the blocks that diffusers' `ModularPipeline` runs in place of this pipeline."""
        if self.tokenizer is None:
            return NextScaleBlocks
        return NextScaleTextBlocks

    def describe(self) -> tuple[str, str]:
        """Texts of the card: a sentence about the pipeline, and the arguments of an example's call."""
        summary = "Images scale by scale: a transformer predicts all ids of a scale at once, and SVQVAE decodes them."
        if self.tokenizer is not None:
            condition = "prompt='a pear above a sailboat', guidance_scale=3.5"
        elif self.transformer.config["num_classes"]:
            condition = "class_labels=0, guidance_scale=3.5"
        else:
            condition = "num_images_per_prompt=4"
        return summary, f"{condition}, top_k=900, top_p=0.95"

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Labels | None = None,
        height: int | None = None,
        width: int | None = None,
        prompt: str | list[str] | None = None,
        num_inference_steps: int | None = None,
        schedule: Sequence[Scale] | None = None,
        image: ImageInput | list[ImageInput] | None = None,
        mask_image: PipelineImageInput | None = None,
        guidance_scale: float = 1.0,
        guidance_mode: str = "rising",
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        greedy_scales: Sequence[int] = (),
        generator: Generators = None,
        num_images_per_prompt: int = 1,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("ids",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Samples images.

        Args:
            class_labels (`int`, `str` or a list of them, *optional*): Class of each image, by its number in
                `[0, num_classes)` or its name in `class_names`; by default the images have no class.
            height (`int`, *optional*): Height in pixels, by default as in training.
            width (`int`, *optional*): Width in pixels, by default as in training.
            prompt (`str` or `list[str]`, *optional*): Caption of each image, for a transformer that reads captions; by
                default the images have none.
            num_inference_steps (`int`, *optional*): Number of scales, see
                [`~svqvae_hf.pipelines.schedules.make_schedule`]. By default as many as in training.
            schedule (list of `int` or `(height, width)`, *optional*): Scales in ids from coarse to fine, which end
                with the size of the image. A single number is the longer side.
            image (`ImageInput` or a list of them, *optional*): Image to edit, one for all or one per label or
                prompt, with the aspect ratio of the result. Needs `mask_image`.
            mask_image (`PipelineImageInput`, *optional*): Mask as large as `image`, one for all or one per image. At
                every scale, an id is sampled if its part of the mask has any white, and kept otherwise.
            guidance_scale (`float`, defaults to 1.0): Classifier-free guidance: logits are `unconditional + scale *
                (conditional - unconditional)`. Off at 1. In [-1e6, 1e6].
            guidance_mode (`str`, defaults to `"rising"`): `"constant"` guides each step by `guidance_scale`,
                `"rising"` guides the first by 1 and later ones by more: by `guidance_scale` at the last, or at the
                tenth if there are more, see [`~svqvae_hf.pipelines.schedules.guidance_per_step`].
            temperature (`float`, defaults to 1.0): Divides the logits, in [1e-6, 1e6]; 0 takes the most likely id.
            top_k (`int`, defaults to 0): Number of most likely ids to sample from; 0 means all.
            top_p (`float`, defaults to 1.0): Total probability of the most likely ids to sample from.
            greedy_scales (`Sequence[int]`, defaults to `()`): Steps, counted from 0, that take the most likely id.
            generator (`torch.Generator` or a list of them, *optional*): Source of randomness, one for all images or
                one per image, on any device.
            num_images_per_prompt (`int`, defaults to 1): Images per label.
            output_type (`str`, defaults to `"pil"`): `"pil"` for Pillow images, `"np"` for arrays `(batch, height,
                width, 3)`, `"pt"` for tensors `(batch, 3, height, width)`, both in [0, 1], or `"latent"` for ids
                `(batch, h, w)`.
            return_dict (`bool`, defaults to `True`): Whether to return an output object instead of a tuple.
            callback_on_step_end (`Callable`, *optional*): Called after each scale with the pipeline, the step, the
                size of the scale in ids and a dictionary of tensors. `ids` `(batch, h, w)` are the ids of this scale:
                `pipe.vqvae.decode_tokens(ids)` is a preview. If it returns a dictionary, its `ids` replace them. If it
                sets `pipe._interrupt = True`, sampling ends, and the images are decoded from this scale.
            callback_on_step_end_tensor_inputs (`Sequence[str]`, defaults to `("ids",)`): Tensors in the dictionary.

        Returns:
            [`~diffusers.ImagePipelineOutput`] or `tuple`: The images.

        Raises:
            TypeError: Labels are neither integers nor names.
            ValueError: A value is out of range or does not fit the others, or logits are NaN or infinite.
        """
        check_sampling(guidance_scale, temperature, top_k, top_p)
        check_outputs(num_images_per_prompt, output_type, callback_on_step_end_tensor_inputs)
        height, width = self._image_size(height, width)
        sizes = self._plan(height, width, num_inference_steps, schedule)
        guidance_scales = guidance_per_step(guidance_scale, guidance_mode, sizes, self.trained_schedule[-1])
        check_greedy_scales(greedy_scales, sizes)
        self._interrupt = False
        scales_to_edit: list[ScaleToEdit] = []  # one per size if images are edited
        num_images_to_edit = 1  # also if none is edited, because one image may have no class and no caption
        if image is not None or mask_image is not None:
            scales_to_edit = self._encode_images_to_edit(image, mask_image, sizes, height, width)
            num_images_to_edit = len(scales_to_edit[0].ids)
        labels, text = self._encode_conditions(class_labels, prompt, num_images_to_edit, guidance_scale)
        num_images = len(labels) * num_images_per_prompt
        check_generators(generator, num_images)
        is_guided = guidance_scale != 1
        predictor = self._predictor(labels, text, num_images_per_prompt, guided=is_guided)
        for step, size in enumerate(self.progress_bar(sizes)):
            logits = predictor.next_logits(size)  # (images, tokens, codes), with guidance (2 * images, ...)
            if is_guided:
                logits = guide(logits, guidance_scales[step])  # (images, tokens, codes)
            check_finite(logits.amax(-1), self.transformer, "transformer")
            if step in greedy_scales:
                flat_ids = sample(logits, temperature, top_k=1, top_p=1.0, generator=generator)
            else:
                flat_ids = sample(logits, temperature, top_k, top_p, generator)
            ids = flat_ids.unflatten(1, size)  # (images, tokens) -> (images, h, w)
            if scales_to_edit:
                ids = scales_to_edit[step].restore_kept(ids)
            ids = self._call_back(callback_on_step_end, callback_on_step_end_tensor_inputs, step, size, ids)
            if self.interrupt:
                break
            predictor.add(ids)
        return self._output(ids, (height, width), output_type, return_dict)

    def _predictor(
        self, labels: torch.Tensor, text: torch.Tensor | None, num_images_per_prompt: int, *, guided: bool
    ) -> ScalePredictor:
        """Makes a predictor for `num_images_per_prompt` images of each condition.

        A condition is a class and, if the transformer reads captions, a caption.

        Args:
            labels (`torch.Tensor` of shape `(conditions,)`): Class of each condition.
            text (`torch.Tensor` of shape `(conditions, max_text_length)`, *optional*): Tokens of its caption.
            num_images_per_prompt (`int`): Number of images of each condition.
            guided (`bool`): Whether the predictor also predicts each image without its condition, for guidance.
        """
        # The images of a condition follow each other, so its class and its caption are repeated.
        labels_of_images = labels.repeat_interleave(num_images_per_prompt)  # (images,)
        text_of_images = None
        if text is not None:
            text_of_images = text.repeat_interleave(num_images_per_prompt, dim=0)  # (images, max_text_length)
        pad_token = 0  # not read without a tokenizer
        if self.tokenizer is not None:
            pad_token = self.tokenizer.pad_token_id
        return ScalePredictor(self.transformer, self.vqvae, labels_of_images, text_of_images, pad_token, guided=guided)

    def _encode_conditions(
        self,
        class_labels: Labels | None,
        prompt: str | list[str] | None,
        num_images_to_edit: int,
        guidance_scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Labels `(conditions,)`, and tokens of captions `(conditions, max_text_length)` if the transformer reads any.

        There is one condition per label or prompt; without both, one per image to edit.
        """
        if self.tokenizer is None:
            if prompt is not None:
                raise ValueError("`prompt` needs a transformer that reads captions. Leave it out.")
            return self._encode_labels(class_labels, num_images_to_edit, guidance_scale), None
        if prompt is None and guidance_scale != 1:
            raise ValueError(f"`guidance_scale` = {guidance_scale} needs `prompt`. Pass it, or leave it at 1.")
        prompts = prompts_of_images(prompt, num_images_to_edit)
        length = self.transformer.config["max_text_length"]
        text = pad_captions(self.tokenizer, prompts, length).to(self._execution_device)
        labels = self._labels_of_images(class_labels, num_images=len(text))
        return labels, text

    def _image_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width of the images in pixels, by default as in training."""
        trained_height, trained_width = self.trained_schedule[-1]
        if height is None:
            height = trained_height * self.vqvae.f
        if width is None:
            width = trained_width * self.vqvae.f
        check_integer("height", height)
        check_integer("width", width)
        return height, width

    def _plan(
        self, height: int, width: int, num_inference_steps: int | None, schedule: Sequence[Scale] | None
    ) -> list[Size]:
        """Sizes of the scales in ids, for images of this height and width in pixels."""
        size = grid_shape(height, width, self.vqvae.f, scale=1.0)
        if schedule is not None:
            if num_inference_steps is not None:
                raise ValueError("Only one of `schedule` and `num_inference_steps` can be given, got both.")
            return fit_schedule(schedule, size)
        if num_inference_steps is not None:
            return make_schedule(size, num_inference_steps)
        if size == self.trained_schedule[-1]:
            return self.trained_schedule
        most_steps = max(size)  # one per id along the longer side
        num_steps = min(len(self.trained_schedule), most_steps)
        return make_schedule(size, num_steps)

    def _encode_images_to_edit(
        self,
        image: ImageInput | list[ImageInput] | None,
        mask_image: PipelineImageInput | None,
        sizes: list[Size],
        height: int,
        width: int,
    ) -> list["ScaleToEdit"]:
        """Encodes the images to edit and their masks at each scale.

        `height` and `width` are the sides of the result in pixels.
        """
        if image is None or mask_image is None:
            raise ValueError("`image` and `mask_image` must be passed together: the mask says what is kept.")
        batch = self.image_processor(image)
        masks = self._prepare_masks(mask_image)  # (masks, 1, height, width)
        image_height, image_width = batch["image_sizes"][0]
        num_images = len(batch["image_sizes"])
        check_images_to_edit((image_height, image_width), num_images, masks, (height, width))
        sample = batch["pixel_values"].to(self._execution_device, self.vqvae.dtype)
        # As in training, an image is encoded at about the size of a scale, and its latents are resized to exactly
        # that size. They may differ by a row or a column, because the encoder keeps the aspect ratio of the image.
        image_grid = grid_shape(image_height, image_width, self.vqvae.f, scale=1.0)
        scales = [max(size) / max(image_grid) for size in sizes]
        latents = self.vqvae.encode_scales(sample, scales, self.config["scale_from"])
        padded_masks = pad_to_multiple(masks, self.vqvae.f)  # (masks, 1, padded height, padded width)
        scales_to_edit = []
        for latents_of_scale, size in zip(latents, sizes, strict=True):
            resized = resize(latents_of_scale.float(), size, "area")  # (images, codebook_embed_dim, h, w)
            ids = self.vqvae.quantize.nearest_ids(resized)  # (images, h, w)
            whitest_pixels = F.adaptive_max_pool2d(padded_masks, size)[:, 0]  # of the place of each id, (masks, h, w)
            has_white = whitest_pixels > 0
            is_kept = has_white.logical_not().to(ids.device)
            scales_to_edit.append(ScaleToEdit(ids, is_kept))
        return scales_to_edit

    def _prepare_masks(self, mask_image: PipelineImageInput) -> torch.Tensor:
        """Masks `(masks, 1, height, width)` of zeros and ones."""
        if isinstance(mask_image, Image.Image):
            return self.mask_processor.preprocess([to_grey(mask_image)]).float()
        if not isinstance(mask_image, list | tuple):
            return self.mask_processor.preprocess(mask_image).float()
        masks: list[Any] = []
        for mask in mask_image:
            # `to_grey` scales masks of floats and of 16 bits. Pillow, which the processor uses, would clip them.
            grey = to_grey(mask) if isinstance(mask, Image.Image) else mask
            masks.append(grey)
        return self.mask_processor.preprocess(masks).float()


@dataclass(frozen=True)
class ScaleToEdit:
    """Images to edit, encoded at one scale.

    Args:
        ids (`torch.Tensor` of shape `(images, h, w)`): Ids of the images.
        is_kept (`torch.Tensor` of shape `(masks, h, w)`): Where ids are kept, because their part of the mask is black.
    """

    ids: torch.Tensor
    is_kept: torch.Tensor

    def restore_kept(self, sampled_ids: torch.Tensor) -> torch.Tensor:
        """Sampled ids `(batch, h, w)`, with the ids of the images where these are kept."""
        batch = len(sampled_ids)
        samples_per_image = batch // len(self.ids)
        samples_per_mask = batch // len(self.is_kept)
        image_ids = self.ids.repeat_interleave(samples_per_image, dim=0)  # (batch, h, w)
        is_kept = self.is_kept.repeat_interleave(samples_per_mask, dim=0)  # (batch, h, w)
        return torch.where(is_kept, image_ids, sampled_ids)


def check_images_to_edit(image_size: Size, num_images: int, masks: torch.Tensor, size: Size) -> None:
    """Raises unless images to edit fit the result and their masks.

    Args:
        image_size (`tuple[int, int]`): Height and width of the images in pixels.
        num_images (`int`): Number of images.
        masks (`torch.Tensor` of shape `(masks, 1, height, width)`): Masks.
        size (`tuple[int, int]`): Height and width of the result in pixels.

    Raises:
        ValueError: The aspect ratio of the images is not the one of the result, the masks have another size, or they
            are neither one nor one per image.
    """
    image_height, image_width = image_size
    height, width = size
    has_same_aspect_ratio = image_height * width == image_width * height
    if not has_same_aspect_ratio:
        raise ValueError(
            f"`image` must have the aspect ratio of the result, {width} x {height} (width x height), got "
            f"{image_width} x {image_height}. Crop it, or pass other sides."
        )
    mask_height, mask_width = masks.shape[-2:]
    if (mask_height, mask_width) != (image_height, image_width):
        raise ValueError(
            f"`mask_image` must be as large as `image`, {image_width} x {image_height} (width x height), got "
            f"{mask_width} x {mask_height}."
        )
    if len(masks) not in (1, num_images):
        raise ValueError(f"`mask_image` must be one mask or one per image, {num_images}, got {len(masks)}.")


def schedule_of_training(schedule: Sequence[Scale] | None, vqvae: SVQVAE) -> list[Size]:
    """Sizes of the scales in training.

    Args:
        schedule (list of `int` or `(height, width)`, *optional*): Scales in ids; a single number is the side of a
            square. By default ten scales, the last for images with the side `sample_size` of `vqvae`.
        vqvae ([`SVQVAE`]): Tokenizer of the images.
    """
    if schedule is None:
        side = vqvae.config["sample_size"] // vqvae.f  # in ids
        return default_schedule(max(1, side))
    if not schedule:
        raise ValueError("`schedule` must have at least one scale, got none. Leave it out for ten scales.")
    last_size = size_of_scale(schedule[-1], size=SQUARE)  # a single number is the side of a square
    return fit_schedule(schedule, last_size)


def check_greedy_scales(greedy_scales: Sequence[int], sizes: Sequence[Size]) -> None:
    """Raises ValueError for numbers of steps that the schedule does not have."""
    all_steps = set(range(len(sizes)))
    if not all_steps.issuperset(greedy_scales):
        raise ValueError(
            f"`greedy_scales` must be steps in [0, {len(sizes)}) of {describe(sizes)}, got {list(greedy_scales)}."
        )


def prompts_of_images(prompt: str | list[str] | None, num_images_to_edit: int) -> list[str]:
    """Captions of the images as a list. By default they are empty, one for each image to edit.

    Raises:
        ValueError: The captions are not texts, or the images to edit are neither one nor one per caption.
    """
    if prompt is None:
        return [""] * num_images_to_edit
    prompts = [prompt] if isinstance(prompt, str) else check_prompts(prompt)
    if num_images_to_edit not in (1, len(prompts)):
        raise ValueError(
            f"`image` must be one image or one per prompt, got {num_images_to_edit} for {len(prompts)} prompts."
        )
    return prompts


def check_prompts(prompts: Any) -> list[str]:
    """Captions as a list. Raises ValueError unless there is at least one, and all are texts."""
    is_filled_list = isinstance(prompts, list | tuple) and len(prompts) > 0
    if not is_filled_list or not all(isinstance(caption, str) for caption in prompts):
        raise ValueError(f"`prompt` must be a caption or a list of captions, got {reprlib.repr(prompts)}.")
    return list(prompts)


def default_schedule(side: int) -> list[Size]:
    """Schedule to a square of ids in ten steps, or in one per id of a smaller side."""
    return make_schedule((side, side), min(DEFAULT_STEPS, side))


def check_same_codebook(vqvae: SVQVAE, transformer: NextScaleTransformer) -> None:
    """Raises ValueError unless the codebooks of both models have the same size and dimension."""
    expected = _codebook_shape(vqvae)
    shape = _codebook_shape(transformer)
    if shape != expected:
        raise ValueError(
            f"`transformer` must have the codebook of `vqvae`, {expected}, but has {shape}. Use its SVQVAE."
        )


def _codebook_shape(model: SVQVAE | NextScaleTransformer) -> str:
    """Size and dimension of the codebook of a model, in words."""
    return f"{model.config['codebook_size']} x {model.config['codebook_embed_dim']}"
