"""SVQVAE, a multi-scale vector-quantized image tokenizer, as a library of the Hugging Face ecosystem."""

import importlib
from typing import TYPE_CHECKING, Any

# diffusers looks for the base class of a pipeline's component among the names of the component's package.
from diffusers.models.modeling_utils import ModelMixin as ModelMixin
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from transformers import AutoImageProcessor, AutoProcessor
from transformers import PreTrainedModel as PreTrainedModel
from transformers.image_processing_utils import ImageProcessingMixin as ImageProcessingMixin

from svqvae_files.file_names import DEFAULT_GENERATOR, DEFAULT_MODEL
from svqvae_files.version import __version__ as __version__
from svqvae_hf.loaders.pretrained_models import (
    SVQVAE,
    LlamaGenForCausalLM,
    NextScaleTransformer,
    SVQVAEImageProcessor,
    SVQVAEProcessor,
)
from svqvae_hf.models.configuration_llamagen import LlamaGenConfig
from svqvae_hf.models.image_files import load_image
from svqvae_hf.models.image_vocabulary import ImageVocabulary
from svqvae_hf.models.modeling_next_scale import NextScaleTransformerOutput
from svqvae_hf.models.modeling_svqvae import SVQVAEDecoderOutput, SVQVAEEncoderOutput, SVQVAEOutput
from svqvae_hf.models.quantizer import VQLosses
from svqvae_hf.tokens.context_model import ContextModel
from svqvae_hf.tokens.image_tokens import decode_image, encode_image, image_tokens
from svqvae_hf.tokens.token_files import ImageTokens, load_tokens, save_tokens

if TYPE_CHECKING:
    from svqvae_hf.pipelines.pipeline_autoregressive import SVQVAEAutoregressivePipeline
    from svqvae_hf.pipelines.pipeline_next_scale import SVQVAENextScalePipeline

__all__ = [
    "DEFAULT_GENERATOR",
    "DEFAULT_MODEL",
    "SVQVAE",
    "ContextModel",
    "ImageTokens",
    "LlamaGenConfig",
    "LlamaGenForCausalLM",
    "NextScaleTransformer",
    "NextScaleTransformerOutput",
    "SVQVAEAutoregressivePipeline",
    "SVQVAEDecoderOutput",
    "SVQVAEEncoderOutput",
    "SVQVAEImageProcessor",
    "SVQVAENextScalePipeline",
    "SVQVAEOutput",
    "SVQVAEProcessor",
    "VQLosses",
    "decode_image",
    "encode_image",
    "image_tokens",
    "load_image",
    "load_tokens",
    "save_tokens",
]

PIPELINES = {  # imported when they are first used: diffusers' pipelines take longer to import than all else
    "SVQVAEAutoregressivePipeline": "svqvae_hf.pipelines.pipeline_autoregressive",
    "SVQVAENextScalePipeline": "svqvae_hf.pipelines.pipeline_next_scale",
}


def __getattr__(name: str) -> Any:
    if name not in PIPELINES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(PIPELINES[name]), name)


# A pipeline that holds an SVQVAE stores `["svqvae_hf", "SVQVAE"]`. diffusers loads it, by folder or by Hub id, if this
# package is in its table.
LOADABLE_CLASSES["svqvae_hf"] = {
    "ModelMixin": ["save_pretrained", "from_pretrained"],
    "ImageProcessingMixin": ["save_pretrained", "from_pretrained"],
    "PreTrainedModel": ["save_pretrained", "from_pretrained"],
}

# `AutoProcessor` and `AutoImageProcessor` look for the class that a folder names among the registered ones. The key is
# what the configs of the language models have in common.
AutoImageProcessor.register(ImageVocabulary, slow_image_processor_class=SVQVAEImageProcessor, exist_ok=True)
AutoProcessor.register(ImageVocabulary, SVQVAEProcessor, exist_ok=True)
