"""Blocks of LlamaGen's models for diffusers' `ModularPipeline`. A repository with code holds all files named here."""

import itertools
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from diffusers import AutoModel, ComponentSpec, InputParam, OutputParam
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from .captions import encode_captions
from .id_sampler import IdSampler
from .labels import ClassStep
from .modular_blocks import GUIDER, IDS, LABELS, SAMPLING, BlockList, DecodeStep, Step, guide_step, is_guided
from .sampling import sample

LANGUAGE_MODEL = ComponentSpec("language_model", AutoModel)


def condition_inputs(
    config: Any, labels: torch.Tensor, captions: Mapping[str, torch.Tensor | None], *, guided: bool
) -> dict[str, torch.Tensor]:
    """Arguments of a model for the tokens before the ids of images.

    Args:
        config ([`LlamaGenConfig`]): Config of the model.
        labels (`torch.Tensor` of shape `(batch,)`): Classes in `[0, num_classes)`, or `num_classes` for no condition.
        captions (`Mapping[str, torch.Tensor]`): `prompt_embeds` and `prompt_attention_mask` for a model with captions.
        guided (`bool`): Whether classifier-free guidance needs each row a second time, without its condition.

    Returns:
        `dict[str, torch.Tensor]`: Tensors with `batch` rows. If guided, they have `2 * batch` rows: first those with a
        condition, then those without.
    """
    inputs = {name: values for name, values in captions.items() if values is not None}
    if "prompt_embeds" in inputs:
        num_captions = len(inputs["prompt_embeds"])
        labels = labels.new_zeros(num_captions)  # models with captions have one class
    batch = len(labels)
    # The tokens of the model are the codes, then the classes, then the token for no condition.
    condition_tokens = config.codebook_size + labels
    inputs["input_ids"] = condition_tokens[:, None]  # (batch, 1)
    if not guided:
        return inputs
    for name, values in inputs.items():
        inputs[name] = torch.cat([values, values])  # (batch, ...) -> (2 * batch, ...)
    # The second half of the rows gets the token for no condition. In these rows the model ignores `prompt_embeds`.
    inputs["input_ids"][batch:] = config.unconditional_token
    return inputs


class LanguageModelClassStep(ClassStep):
    """Converts classes to labels."""

    expected_components = [LANGUAGE_MODEL]


class CaptionStep(Step):
    """Encodes captions."""

    description = "Encodes captions to features for the language model."
    expected_components = [
        ComponentSpec("text_encoder", T5EncoderModel),
        ComponentSpec("tokenizer", PreTrainedTokenizerBase),
        LANGUAGE_MODEL,
    ]
    inputs = [InputParam.template("prompt"), InputParam.template("num_images_per_prompt")]
    intermediate_outputs = [
        OutputParam(**LABELS),
        OutputParam("prompt_embeds", torch.Tensor),
        OutputParam("prompt_attention_mask", torch.Tensor),
    ]

    def run(self, components: Any, values: Any) -> None:
        """Sets the features of the captions, their mask, and one label per image.

        Models with captions have one class, 0, for all images that have a caption.
        """
        prompts = [values.prompt] if isinstance(values.prompt, str) else values.prompt
        length = components.language_model.config.num_condition_tokens
        # Features are (captions, length, caption_dim), and their mask is (captions, length).
        features, mask = encode_captions(
            components.text_encoder, components.tokenizer, prompts, length, device=components._execution_device
        )
        features_of_images = features.repeat_interleave(values.num_images_per_prompt, dim=0)  # (images, ...)
        mask_of_images = mask.repeat_interleave(values.num_images_per_prompt, dim=0)  # (images, length)
        values.prompt_embeds = features_of_images
        values.prompt_attention_mask = mask_of_images
        num_images = len(mask_of_images)
        values.labels = mask_of_images.new_zeros(num_images)  # (images,)


class SampleIdsStep(Step):
    """Samples ids one by one."""

    description = "Samples the ids of images one by one, row by row."
    expected_components = [LANGUAGE_MODEL, GUIDER]
    inputs = [
        InputParam(**LABELS, required=True),
        InputParam("prompt_embeds"),
        InputParam("prompt_attention_mask"),
        *SAMPLING,
    ]
    intermediate_outputs = [OutputParam(**IDS)]

    def run(self, components: Any, values: Any) -> None:
        """Sets `ids`."""
        config = components.language_model.config
        guider = components.guider
        side = config.grid_size
        captions = {
            "prompt_embeds": values.prompt_embeds,
            "prompt_attention_mask": values.prompt_attention_mask,
        }
        num_ids = side * side
        steps = itertools.count()  # one per id

        def guide(logits: torch.Tensor) -> torch.Tensor:
            return guide_step(guider, logits, step=next(steps), steps=num_ids)

        guided = is_guided(guider)
        sampler = IdSampler(
            components.language_model,
            condition_inputs(config, values.labels, captions, guided=guided),
            grid=(side, side),
            codes=range(config.codebook_size),
            sample=partial(
                sample,
                temperature=values.temperature,
                top_k=values.top_k,
                top_p=values.top_p,
                generator=values.generator,
            ),
            guide=guide if guided else None,
        )
        for _ in range(side):
            values.ids = sampler.next_row()


class LlamaGenBlocks(BlockList):
    """Blocks of a LlamaGen model for classes and its tokenizer, for diffusers' `ModularPipeline`.

    Example:
        >>> pipe = ModularPipeline.from_pretrained("org/name", trust_remote_code=True)
        >>> pipe.load_components(trust_remote_code=True)
        >>> pipe.update_components(guider=pipe.guider.new(guidance_scale=4.0))
        >>> images = pipe(class_labels=207, top_k=2000, output="images")
    """

    description = "Generates images of classes id by id."
    block_classes = [LanguageModelClassStep, SampleIdsStep, DecodeStep]


class LlamaGenTextBlocks(LlamaGenBlocks):
    """Blocks of a LlamaGen model for captions, its text encoder and its tokenizer."""

    description = "Generates images of captions id by id."
    block_classes = [CaptionStep, SampleIdsStep, DecodeStep]
