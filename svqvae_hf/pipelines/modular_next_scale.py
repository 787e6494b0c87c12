"""Blocks of next-scale models for diffusers' `ModularPipeline`. A repository with code holds all files named here."""

from typing import Any

import torch
from diffusers import AutoModel
from diffusers.modular_pipelines import ComponentSpec as Component
from diffusers.modular_pipelines import ConfigSpec as Config
from diffusers.modular_pipelines import InputParam as Input
from diffusers.modular_pipelines import OutputParam as Output
from transformers import PreTrainedTokenizerBase

from .captions import pad_captions
from .labels import encode_labels
from .modular_blocks import GUIDER, IDS, LABELS, SAMPLING, VQVAE, BlockList, DecodeStep, Step, guide_step, is_guided
from .sampling import check_finite, sample
from .scale_predictor import ScalePredictor
from .schedules import fit_schedule

TRANSFORMER = Component("transformer", AutoModel)


class ClassStep(Step):
    """Converts classes to labels."""

    description = "Converts classes, given by number or name, to one label per image."
    expected_components = [TRANSFORMER]
    expected_configs = [Config("class_names", [])]
    inputs = [
        Input("class_labels", description="Number or name of each image's class; no class by default."),
        Input.template("num_images_per_prompt"),
    ]
    intermediate_outputs = [Output(**LABELS)]

    def run(self, components: Any, values: Any) -> None:
        """Sets `labels`."""
        num_classes, names = components.transformer.config["num_classes"], components.config["class_names"]
        labels = encode_labels(values.class_labels, num_classes, names)
        values.labels = labels.repeat_interleave(values.num_images_per_prompt).to(components._execution_device)


class TokenizeCaptionStep(Step):
    """Tokenizes captions."""

    description = "Tokenizes captions for the transformer, which reads them before the first scale."
    expected_components = [Component("tokenizer", PreTrainedTokenizerBase), TRANSFORMER]
    inputs = [Input.template("prompt"), Input.template("num_images_per_prompt")]
    intermediate_outputs = [Output(**LABELS), Output("text", type_hint=torch.Tensor), Output("pad_token")]

    def run(self, components: Any, values: Any) -> None:
        """Sets `text`, the label "no class" of each caption, and `pad_token`."""
        prompts = [values.prompt] if isinstance(values.prompt, str) else values.prompt
        config = components.transformer.config
        text = pad_captions(components.tokenizer, prompts, config["max_text_length"])
        values.text = text.repeat_interleave(values.num_images_per_prompt, dim=0).to(components._execution_device)
        values.labels = torch.full_like(values.text[:, 0], config["num_classes"])
        values.pad_token = components.tokenizer.pad_token_id


class SampleScalesStep(Step):
    """Samples ids scale by scale."""

    description = "Samples all ids of a scale in one step, from coarse to fine."
    expected_components = [VQVAE, TRANSFORMER, GUIDER]
    expected_configs = [Config("schedule", [])]
    inputs = [
        Input(**LABELS, required=True),
        Input("text", description="Tokens of captions; none by default."),
        Input("pad_token", default=0, description="Token of an empty caption."),
        Input("schedule", description="Pairs (height, width) in ids, from coarse to fine; as in training by default."),
        *SAMPLING,
    ]
    intermediate_outputs = [Output(**IDS)]

    def run(self, components: Any, values: Any) -> None:
        """Sets `ids`."""
        schedule = values.schedule or components.config["schedule"]
        sizes = fit_schedule(schedule, tuple(schedule[-1]))
        guided = is_guided(components.guider)
        condition = values.labels, values.text, values.pad_token
        predictor = ScalePredictor(components.transformer, components.vqvae, *condition, guided=guided)
        for step, size in enumerate(sizes):
            logits = predictor.next_logits(size)
            if guided:
                logits = guide_step(components.guider, logits, step, len(sizes))
            check_finite(logits.amax(-1), components.transformer, "transformer")
            ids = sample(logits, values.temperature, values.top_k, values.top_p, values.generator)
            values.ids = ids.unflatten(1, size)
            predictor.add(values.ids)


class NextScaleBlocks(BlockList):
    """Blocks of a next-scale model and its tokenizer, for diffusers' `ModularPipeline`.

    Example:
        >>> pipe = ModularPipeline.from_pretrained("org/name", trust_remote_code=True)
        >>> pipe.load_components(trust_remote_code=True)
        >>> pipe.update_components(guider=pipe.guider.new(guidance_scale=3.5))
        >>> images = pipe(class_labels=[3, 7], top_k=900, top_p=0.95, output="images")
    """

    description = "Generates images scale by scale."
    block_classes = [ClassStep, SampleScalesStep, DecodeStep]


class NextScaleTextBlocks(NextScaleBlocks):
    """Blocks of a next-scale model that reads captions, and of its tokenizers."""

    description = "Generates images of captions scale by scale."
    block_classes = [TokenizeCaptionStep, SampleScalesStep, DecodeStep]
