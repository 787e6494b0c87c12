"""Blocks of LlamaGen's and of next-scale models for diffusers' `ModularPipeline`: condition, sampling, decoding."""

import itertools
import shutil
from typing import Any

import diffusers
import torch
from diffusers import AutoModel, ClassifierFreeGuidance
from diffusers.configuration_utils import FrozenDict
from diffusers.image_processor import VaeImageProcessor
from diffusers.modular_pipelines import ComponentSpec as Component
from diffusers.modular_pipelines import ConfigSpec as Config
from diffusers.modular_pipelines import InputParam as Input
from diffusers.modular_pipelines import ModularPipelineBlocks as Blocks
from diffusers.modular_pipelines import OutputParam as Output
from diffusers.modular_pipelines import PipelineState, SequentialPipelineBlocks
from transformers import LogitsProcessorList, PreTrainedTokenizerBase, T5EncoderModel

from svqvae_hf.pipelines.captions import encode_captions, pad_captions
from svqvae_hf.pipelines.labels import encode_labels
from svqvae_hf.pipelines.sampling import make_warpers, sample_ids
from svqvae_hf.pipelines.scale_predictor import ScalePredictor
from svqvae_hf.pipelines.schedules import fit_schedule
from svqvae_hf.pipelines.sequences import SequenceLayout
from svqvae_hf.pipelines.token_sampler import TokenSampler

VQVAE = Component("vqvae", AutoModel, description="Tokenizer, whose ids are sampled.")
FROM_CONFIG = {"default_creation_method": "from_config"}
GUIDER = Component("guider", ClassifierFreeGuidance, config=FrozenDict(guidance_scale=1.0), **FROM_CONFIG)
IMAGE_PROCESSOR = Component("image_processor", VaeImageProcessor, config=FrozenDict(do_normalize=False), **FROM_CONFIG)
SAMPLING = [
    Input("temperature", default=1.0, description="Divides the logits; 0 takes the most likely id."),
    Input("top_k", default=0, description="Number of most likely ids to sample from; 0 means all."),
    Input("top_p", default=1.0, description="Total probability of the most likely ids to sample from."),
    Input.template("generator"),
]
IDS = {"name": "ids", "type_hint": torch.Tensor, "description": "Ids `(batch, h, w)` of the images."}
LABELS = {"name": "labels", "type_hint": torch.Tensor, "description": "One label per image."}
TRANSFORMER = Component("transformer", AutoModel)
LANGUAGE_MODEL = Component("language_model", AutoModel)
CAPTIONS = ("prompt_embeds", "prompt_attention_mask")


class Step(Blocks):
    """Block that computes its outputs from its inputs, which lie in one namespace."""

    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        """Runs the block on the state of the pipeline."""
        values = self.get_block_state(state)
        self.run(components, values)
        self.set_block_state(state, values)
        return components, state

    def run(self, components: Any, values: Any) -> None:
        """Sets the outputs."""
        raise NotImplementedError


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
        config = getattr(components, self.expected_components[0].name).config
        labels = encode_labels(values.class_labels, config.num_classes, components.config["class_names"])
        values.labels = labels.repeat_interleave(values.num_images_per_prompt).to(components._execution_device)


class DecodeStep(Step):
    """Decodes ids to images."""

    description = "Decodes ids to images."
    expected_components = [VQVAE, IMAGE_PROCESSOR]
    inputs = [Input(**IDS, required=True), Input.template("output_type")]
    intermediate_outputs = [Output.template("images")]

    def run(self, components: Any, values: Any) -> None:
        """Sets `images`."""
        black, white = components.vqvae.config["pixel_range"]
        sample = (components.vqvae.decode_tokens(values.ids).float() - black) / (white - black)
        values.images = components.image_processor.postprocess(sample.clamp(0, 1), output_type=values.output_type)


class BlockSequence(SequentialPipelineBlocks):
    """Blocks in a row. If a repository's code defines them, it is saved with them."""

    block_names = ["condition", "sample", "decode"]

    def save_config(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
        """Saves the config, and the file of code of blocks that were loaded with `trust_remote_code=True`."""
        super().save_config(save_directory, *args, **kwargs)
        if "diffusers_modules" in __name__:
            shutil.copy(__file__, save_directory)


def is_guided(guider: Any) -> bool:
    """Whether a guider needs logits without the condition at any step."""
    guider.set_state(step=0, num_inference_steps=None, timestep=None)
    return guider.num_conditions > 1


def guide_step(guider: Any, logits: torch.Tensor, step: int, steps: int) -> torch.Tensor:
    """Joins logits of a batch and of the same batch without its condition."""
    guider.set_state(step=step, num_inference_steps=steps, timestep=None)
    return guider.forward(*logits.chunk(2)).pred


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
        condition = values.labels, sizes, values.text, values.pad_token
        predictor = ScalePredictor(components.transformer, components.vqvae, *condition, guided=guided)
        warpers = LogitsProcessorList(make_warpers(values.temperature, values.top_k, values.top_p))
        for step, size in enumerate(sizes):
            logits = predictor.next_logits(size)
            if guided:
                logits = guide_step(components.guider, logits, step, len(sizes))
            ids = sample_ids(logits, warpers, values.generator, greedy=values.temperature == 0)
            values.ids = ids.unflatten(1, size)
            predictor.add(values.ids)


class NextScaleBlocks(BlockSequence):
    """Blocks of a next-scale model and its tokenizer, for diffusers' `ModularPipeline`.

    Example:
        >>> pipe = ModularPipeline.from_pretrained("org/name", trust_remote_code=True)
        >>> pipe.load_components(trust_remote_code=True)
        >>> pipe.update_components(guider=pipe.guider.new(guidance_scale=3.5))
        >>> images = pipe(class_labels=[3, 7], top_k=900, top_p=0.95, output="images")
    """

    description = "Generates images scale by scale."
    block_classes = [ClassStep, SampleScalesStep, DecodeStep]


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


class NextScaleTextBlocks(BlockSequence):
    """Blocks of a next-scale model that reads captions, and of its tokenizers."""

    description = "Generates images of captions scale by scale."
    block_classes = [TokenizeCaptionStep, SampleScalesStep, DecodeStep]


class LlamaGenClassStep(ClassStep):
    """Converts classes to labels of a language model."""

    expected_components = [LANGUAGE_MODEL]


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
        encoded = encode_captions(components.text_encoder, components.tokenizer, prompts, length)
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
        config, steps = components.language_model.config, itertools.count()
        layout = SequenceLayout(
            config.codebook_size, 1, config.grid_size, config.grid_size, (1.0,), config.num_classes
        )
        captions = {name: getattr(values, name) for name in CAPTIONS}
        sampler = TokenSampler(
            components.language_model,
            layout,
            {name: each for name, each in captions.items() if each is not None},
            guide=lambda logits: guide_step(components.guider, logits, next(steps), layout.length - 1),
            guided_ids=layout.length if is_guided(components.guider) else 0,
            warpers=make_warpers(values.temperature, values.top_k, values.top_p),
            greedy=values.temperature == 0,
            generator=values.generator,
        )
        unknown = values.labels.new_zeros((len(values.labels), config.grid_size, config.grid_size))
        sequences = layout.encode([unknown], values.labels)
        sampler.sample(sequences, range(1, layout.length))
        (values.ids,), _ = layout.decode(sequences)


class LlamaGenBlocks(BlockSequence):
    """Blocks of a LlamaGen model for classes and its tokenizer, for diffusers' `ModularPipeline`.

    Example:
        >>> pipe = ModularPipeline.from_pretrained("org/name", trust_remote_code=True)
        >>> pipe.load_components(trust_remote_code=True)
        >>> pipe.update_components(guider=pipe.guider.new(guidance_scale=4.0))
        >>> images = pipe(class_labels=207, top_k=2000, output="images")
    """

    description = "Generates images of classes id by id."
    block_classes = [LlamaGenClassStep, SampleIdsStep, DecodeStep]


class LlamaGenTextBlocks(BlockSequence):
    """Blocks of a LlamaGen model for captions, its text encoder and its tokenizer."""

    description = "Generates images of captions id by id."
    block_classes = [CaptionStep, SampleIdsStep, DecodeStep]


# `ModularPipeline.from_pretrained` looks for the blocks of a saved pipeline among the names of diffusers.
for blocks in (NextScaleBlocks, NextScaleTextBlocks, LlamaGenBlocks, LlamaGenTextBlocks):
    setattr(diffusers, blocks.__name__, blocks)
