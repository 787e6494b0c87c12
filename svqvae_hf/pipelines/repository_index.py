"""The index of a pipeline's repository: `model_index.json`, or the modular one of a repository with code.

A repository with code has no `model_index.json`, because diffusers' `AutoModel` would look there for the code of all
components.
"""

import inspect
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import transformers
from diffusers.configuration_utils import ConfigMixin

from svqvae_hf.hub.code import write_code
from svqvae_hf.hub.repositories import from_hub
from svqvae_hf.loaders.pretrained_models import SVQVAE, LlamaGenForCausalLM, NextScaleTransformer
from svqvae_hf.models.loading import check_weights, copy_code

PIPELINE_OF_BLOCKS = {"LlamaGen": "SVQVAEAutoregressivePipeline", "NextScale": "SVQVAENextScalePipeline"}
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
MODELS = {"vqvae": SVQVAE, "transformer": NextScaleTransformer, "language_model": LlamaGenForCausalLM}


def hub_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options of a `from_pretrained` that say how the Hub is read."""
    return {name: value for name, value in options.items() if name in HUB_OPTIONS}


class PipelineIndex(ConfigMixin):
    """Index of a pipeline."""

    config_name = "model_index.json"


class ModularIndex(ConfigMixin):
    """Index of a modular pipeline."""

    config_name = "modular_model_index.json"


def read_index(source: str | os.PathLike, **options: Any) -> dict[str, Any]:
    """Reads the index of a pipeline in a folder or on the Hub. Its `_class_name` is the class in this package.

    Args:
        source (`str` or `os.PathLike`): Folder, or `org/name` on the Hub.
        **options: Options of the Hub, such as `revision`.

    Raises:
        OSError: There is no index, or the Hub does not answer and the cache has none.
        ValueError: The index is not a JSON object.
    """
    try:
        return from_hub(PipelineIndex.load_config, source, **options)
    except OSError as error:
        try:
            index = from_hub(ModularIndex.load_config, source, **options)
        except OSError:
            raise error from None
    if not isinstance(index, dict):
        raise ValueError(f"the index of `{source}` must be a JSON object, got a {type(index).__name__}.")
    kind = str(index.get("_blocks_class_name")).removesuffix("TextBlocks").removesuffix("Blocks")
    return index | {"_class_name": PIPELINE_OF_BLOCKS.get(kind, index.get("_class_name"))}


def write_blocks(blocks: type, folder: Path, source: str) -> None:
    """Copies the code of a saved pipeline's models and blocks beside them, with the index of a modular pipeline.

    Args:
        blocks (`type`): Class of the blocks.
        folder (`Path`): Folder of the pipeline, whose `model_index.json` is replaced.
        source (`str`): Folder or Hub id that the repository will be loaded from.
    """
    write_code(folder)
    reference = f"{copy_code(blocks, folder)}.{blocks.__name__}"
    modular: dict[str, Any] = {"_blocks_class_name": blocks.__name__, "_class_name": "ModularPipeline"}
    for name, value in json.loads((folder / PipelineIndex.config_name).read_text(encoding="utf-8")).items():
        if isinstance(value, list) and (folder / name).is_dir():
            hint = ["diffusers", "AutoModel"] if name in MODELS else value
            place = {"pretrained_model_name_or_path": source, "subfolder": name, "variant": None, "revision": None}
            modular[name] = [None, None, {"type_hint": hint, **place}]
        elif name[0] != "_" and value != [None, None]:
            modular[name] = value
    write_json(folder / "modular_config.json", {"auto_map": {"ModularPipelineBlocks": reference}})
    write_json(folder / ModularIndex.config_name, modular)
    (folder / PipelineIndex.config_name).unlink()


def load_arguments(cls: Callable[..., Any], source: str, index: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Loads the arguments of a pipeline from a repository with code, without that code.

    Args:
        cls (`type`): Class of the pipeline.
        source (`str`): Folder, or `org/name` on the Hub.
        index (`dict`): Its index.
        **options: Arguments of the class, which are not loaded, and arguments of `from_pretrained`.

    Raises:
        ValueError: Weights are missing or unexpected.
    """
    places = {name: index[name][-1] for name in (*MODELS, "text_encoder", "tokenizer") if name in index}
    parameters = inspect.signature(cls).parameters.keys()
    passed = {name: options.pop(name) for name in parameters & options.keys()}
    arguments = {name: index[name] for name in parameters & index.keys() - places.keys()} | passed
    for name in [name for name in places if name not in passed]:
        component_class = MODELS.get(name) or getattr(transformers, places[name]["type_hint"][1])
        is_model = hasattr(component_class, "forward")
        extra = options | {"output_loading_info": True} if is_model else hub_options(options)
        arguments[name] = component_class.from_pretrained(source, subfolder=name, **extra)
        if is_model:
            arguments[name], info = arguments[name]
            check_weights(f"{source}/{name}", info)
    return arguments


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a config or index as transformers and diffusers do."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
