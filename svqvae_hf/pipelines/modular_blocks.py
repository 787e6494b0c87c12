"""Parts of the blocks for diffusers' `ModularPipeline` that all generators share."""

import inspect
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoModel, ClassifierFreeGuidance, ConfigSpec, ModularPipelineBlocks, SequentialPipelineBlocks
from diffusers.configuration_utils import FrozenDict
from diffusers.image_processor import VaeImageProcessor
from diffusers.modular_pipelines import ComponentSpec, InputParam, OutputParam, PipelineState
from diffusers.utils.dynamic_modules_utils import get_relative_imports

VQVAE = ComponentSpec("vqvae", AutoModel, description="Tokenizer, whose ids are sampled.")
FROM_CONFIG = {"default_creation_method": "from_config"}
GUIDER = ComponentSpec("guider", ClassifierFreeGuidance, config=FrozenDict(guidance_scale=1.0), **FROM_CONFIG)
IMAGE_PROCESSOR = ComponentSpec(
    "image_processor", VaeImageProcessor, config=FrozenDict(do_normalize=False), **FROM_CONFIG
)
SAMPLING = [
    InputParam("temperature", default=1.0, description="Divides the logits; 0 takes the most likely id."),
    InputParam("top_k", default=0, description="Number of most likely ids to sample from; 0 means all."),
    InputParam("top_p", default=1.0, description="Total probability of the most likely ids to sample from."),
    InputParam.template("generator"),
]
IDS = {"name": "ids", "type_hint": torch.Tensor, "description": "Ids `(batch, h, w)` of the images."}
LABELS = {"name": "labels", "type_hint": torch.Tensor, "description": "One label per image."}


class Step(ModularPipelineBlocks):
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


class DecodeStep(Step):
    """Decodes ids to images."""

    description = "Decodes ids to images."
    expected_components = [VQVAE, IMAGE_PROCESSOR]
    expected_configs = [ConfigSpec("codebook_fingerprint", None)]
    inputs = [InputParam(**IDS, required=True), InputParam.template("output_type")]
    intermediate_outputs = [OutputParam.template("images")]

    def run(self, components: Any, values: Any) -> None:
        """Sets `images`."""
        vqvae = components.vqvae
        check_fingerprint(components.config["codebook_fingerprint"], vqvae)
        black, white = vqvae.config["pixel_range"]
        sample = vqvae.decode_tokens(values.ids).float()  # (batch, 3, height, width) in `pixel_range`
        unit_sample = ((sample - black) / (white - black)).clamp(0, 1)  # in [0, 1]
        values.images = components.image_processor.postprocess(unit_sample, output_type=values.output_type)


class BlockList(SequentialPipelineBlocks):
    """Blocks in a row. If a repository's code defines them, it is saved with them."""

    block_names = ["condition", "sample", "decode"]

    def save_config(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
        """Saves the config, and the code of blocks that were loaded with `trust_remote_code=True`."""
        super().save_config(save_directory, *args, **kwargs)
        # diffusers copies the code of a repository to a package named `diffusers_modules`, and imports it from there.
        was_loaded_from_repository = "diffusers_modules" in __name__
        if not was_loaded_from_repository:
            return
        file = Path(inspect.getfile(type(self)))
        shutil.copy(file, save_directory)
        for module in get_relative_imports(file):
            imported_file = file.with_name(f"{module}.py")
            shutil.copy(imported_file, save_directory)


def check_fingerprint(trained: str | None, vqvae: Any) -> None:
    """Raises unless a tokenizer has the codebook that a generator was trained on.

    Args:
        trained (`str`, *optional*): Fingerprint of the codebook in training; None if it is not known.
        vqvae ([`SVQVAE`]): Tokenizer.

    Raises:
        ValueError: The codebook of `vqvae` is another one.
    """
    if trained is None:
        return
    fingerprint = vqvae.codebook_fingerprint()
    if fingerprint != trained:
        raise ValueError(
            "`vqvae` must have the codebook whose ids the pipeline was trained on, with fingerprint "
            f"{trained}, but has one with {fingerprint}. Use the SVQVAE that the pipeline was saved with."
        )


def is_guided(guider: Any) -> bool:
    """Whether a guider needs logits without the condition at any step."""
    guider.set_state(step=0, num_inference_steps=None, timestep=None)
    return guider.num_conditions > 1


def guide_step(guider: Any, logits: torch.Tensor, step: int, steps: int) -> torch.Tensor:
    """Joins logits of a batch and of the same batch without its condition."""
    guider.set_state(step=step, num_inference_steps=steps, timestep=None)
    return guider.forward(*logits.chunk(2)).pred
