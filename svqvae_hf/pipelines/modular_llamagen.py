"""Blocks of LlamaGen's models for diffusers' `ModularPipeline`. A repository with code holds all files named here."""

import itertools
from typing import Any

import torch
from diffusers import AutoModel
from diffusers.modular_pipelines import ComponentSpec as Component
from diffusers.modular_pipelines import ConfigSpec as Config
from diffusers.modular_pipelines import InputParam as Input
from diffusers.modular_pipelines import OutputParam as Output
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from .captions import encode_captions
from .id_sampler import IdSampler
from .labels import encode_labels
from .llamagen_inputs import condition_inputs
from .modular_blocks import GUIDER, IDS, LABELS, SAMPLING, BlockList, DecodeStep, Step, guide_step, is_guided
from .sampling import sample

LANGUAGE_MODEL = Component("language_model", AutoModel)
CAPTIONS = ("prompt_embeds", "prompt_attention_mask")


class ClassStep(Step):
    """Converts classes to labels."""

    description = "Converts classes, given by number or name, to one label per image."
    expected_components = [LANGUAGE_MODEL]
    expected_configs = [Config("class_names", [])]
    inputs = [
        Input("class_labels", description="Number or name of each image's class; no class by default."),
        Input.template("num_images_per_prompt"),
    ]
    intermediate_outputs = [Output(**LABELS)]

    def run(self, components: Any, values: Any) -> None:
        """Sets `labels`."""
        num_classes, names = components.language_model.config.num_classes, components.config["class_names"]
        labels = encode_labels(values.class_labels, num_classes, names)
        values.labels = labels.repeat_interleave(values.num_images_per_prompt).to(components._execution_device)


class CaptionStep(Step):
    """Encodes captions."""

    description = "Encodes captions to features for the language model."
    expected_components = [
        Component("text_encoder", T5EncoderModel),
        Component("tokenizer", PreTrainedTokenizerBase),
        LANGUAGE_MODEL,
    ]
    inputs = [Input.template("prompt"), Input.template("num_images_per_prompt")]
    intermediate_outputs = [Output(**LABELS), *(Output(name, type_hint=torch.Tensor) for name in CAPTIONS)]

    def run(self, components: Any, values: Any) -> None:
        """Sets features, their mask and the label of the one class, "with its caption"."""
        prompts = [values.prompt] if isinstance(values.prompt, str) else values.prompt
        length = components.language_model.config.num_condition_tokens
        models = components.text_encoder, components.tokenizer
        encoded = encode_captions(*models, prompts, length, device=components._execution_device)
        values.prompt_embeds, values.prompt_attention_mask = (
            each.repeat_interleave(values.num_images_per_prompt, dim=0) for each in encoded
        )
        values.labels = torch.zeros_like(values.prompt_attention_mask[:, 0])


class SampleIdsStep(Step):
    """Samples ids one by one."""

    description = "Samples the ids of images one by one, row by row."
    expected_components = [LANGUAGE_MODEL, GUIDER]
    inputs = [Input(**LABELS, required=True), *map(Input, CAPTIONS), *SAMPLING]
    intermediate_outputs = [Output(**IDS)]

    def run(self, components: Any, values: Any) -> None:
        """Sets `ids`."""
        config, guider = components.language_model.config, components.guider
        side, guided = config.grid_size, is_guided(guider)
        captions = {name: getattr(values, name) for name in CAPTIONS}
        sampling = values.temperature, values.top_k, values.top_p, values.generator
        steps = itertools.count()
        sampler = IdSampler(
            components.language_model,
            condition_inputs(config, values.labels, captions, guided=guided),
            grid=(side, side),
            codes=range(config.codebook_size),
            sample=lambda logits: sample(logits, *sampling),
            guide=(lambda logits: guide_step(guider, logits, next(steps), side**2)) if guided else None,
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
    block_classes = [ClassStep, SampleIdsStep, DecodeStep]


class LlamaGenTextBlocks(LlamaGenBlocks):
    """Blocks of a LlamaGen model for captions, its text encoder and its tokenizer."""

    description = "Generates images of captions id by id."
    block_classes = [CaptionStep, SampleIdsStep, DecodeStep]
