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

from svqvae_files.json_files import read_json_object
from svqvae_hf.hub.code import write_code
from svqvae_hf.hub.repositories import from_hub, hub_options
from svqvae_hf.loaders.pretrained_models import SVQVAE, LlamaGenForCausalLM, NextScaleTransformer
from svqvae_hf.models.loading import check_weights, copy_code

PIPELINE_OF_BLOCKS = {
    "LlamaGenBlocks": "SVQVAEAutoregressivePipeline",
    "LlamaGenTextBlocks": "SVQVAEAutoregressivePipeline",
    "NextScaleBlocks": "SVQVAENextScalePipeline",
    "NextScaleTextBlocks": "SVQVAENextScalePipeline",
}
COMPONENTS = ("vqvae", "transformer", "language_model", "text_encoder", "tokenizer")
AUTO_MODEL = ["diffusers", "AutoModel"]  # library and class of components whose code lies in the repository
MODULAR_CONFIG = "modular_config.json"  # names the code of the blocks
MODELS = {"vqvae": SVQVAE, "transformer": NextScaleTransformer, "language_model": LlamaGenForCausalLM}


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
    index = _load_index(source, **options)
    check_index(index, source)
    blocks = str(index.get("_blocks_class_name"))
    if blocks in PIPELINE_OF_BLOCKS:
        index["_class_name"] = PIPELINE_OF_BLOCKS[blocks]
    return index


def _load_index(source: str | os.PathLike, **options: Any) -> Any:
    """Content of `model_index.json`, or of the modular index if there is no such file.

    Raises OSError about `model_index.json` if there is neither.
    """
    try:
        return from_hub(PipelineIndex.load_config, source, **options)
    except OSError as error:
        error_of_model_index = error
    try:
        return from_hub(ModularIndex.load_config, source, **options)
    except OSError:
        # Both files are missing. The error names the first one, which users know.
        raise error_of_model_index from None


def check_index(index: Any, source: str | os.PathLike) -> None:
    """Raises ValueError unless an index is a JSON object that names a class."""
    if not isinstance(index, dict):
        raise ValueError(f"the index of `{source}` must be a JSON object, got a {type(index).__name__}.")
    if not isinstance(index.get("_class_name"), str):
        raise ValueError(f"the index of `{source}` must name a class in `_class_name`, but does not.")


def delete_modular_index(folder: Path) -> None:
    """Deletes the modular index of a pipeline that was saved in the folder before, with its code.

    Args:
        folder (`Path`): Folder of a pipeline that was saved without code.
    """
    for name in (MODULAR_CONFIG, ModularIndex.config_name):
        path = folder / name
        path.unlink(missing_ok=True)


def write_blocks(blocks: type, folder: Path, source: str) -> None:
    """Copies the code of a saved pipeline's models and blocks beside them, with the index of a modular pipeline.

    Args:
        blocks (`type`): Class of the blocks.
        folder (`Path`): Folder of the pipeline, whose `model_index.json` is replaced.
        source (`str`): Folder or Hub id that the repository will be loaded from.
    """
    write_code(folder)
    module = copy_code(blocks, folder)
    class_of_blocks = f"{module}.{blocks.__name__}"
    path_of_index = folder / PipelineIndex.config_name
    index = read_json_object(path_of_index)
    modular_index: dict[str, Any] = {"_blocks_class_name": blocks.__name__, "_class_name": "ModularPipeline"}
    # In `model_index.json`, the value of a component is `[library, class]`, and `[None, None]` if the pipeline has no
    # such component. Any other value belongs to the config of the pipeline.
    for name, value in index.items():
        is_private = name.startswith("_")  # such as `_class_name`
        is_missing_component = value == [None, None]
        if is_private or is_missing_component:
            continue
        is_component = isinstance(value, list) and (folder / name).is_dir()
        if is_component:
            modular_index[name] = _entry_of_component(name, value, source)
        else:
            modular_index[name] = value  # such as `schedule`
    write_json(folder / MODULAR_CONFIG, {"auto_map": {"ModularPipelineBlocks": class_of_blocks}})
    write_json(folder / ModularIndex.config_name, modular_index)
    path_of_index.unlink()


def _entry_of_component(name: str, library_and_class: list[str], source: str) -> list[Any]:
    """Entry of a component in a modular index, `[library, class, loading spec]`, as diffusers reads it.

    Library and class are those of a loaded component. They are None in an index, where nothing is loaded yet. The
    loading spec says what will be loaded. The entry of the text encoder in `org/name` is:

        [null, null, {
            "type_hint": ["transformers", "T5EncoderModel"],
            "pretrained_model_name_or_path": "org/name",
            "subfolder": "text_encoder",
            "variant": null,
            "revision": null
        }]
    """
    loading_spec = {
        "type_hint": _loader_of_component(name, library_and_class),
        "pretrained_model_name_or_path": source,
        "subfolder": name,
        "variant": None,
        "revision": None,
    }
    library = None
    class_name = None
    return [library, class_name, loading_spec]


def _loader_of_component(name: str, library_and_class: list[str]) -> list[str]:
    """Library and class by which diffusers loads a component, such as `["transformers", "T5EncoderModel"]`."""
    has_code_in_repository = name in MODELS
    if has_code_in_repository:
        return AUTO_MODEL  # it finds the class by the code in the repository
    return library_and_class


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
    arguments = {}
    components_to_load = []
    for name in inspect.signature(cls).parameters:
        if name in options:
            arguments[name] = options.pop(name)  # passed by the caller
        elif name in COMPONENTS and name in index:
            components_to_load.append(name)
        elif name in index:
            arguments[name] = index[name]
    # `options` now holds only the arguments of `from_pretrained`.
    for name in components_to_load:
        arguments[name] = _load_component(source, name, index[name], options)
    return arguments


def _load_component(source: str, name: str, entry: Any, options: Mapping[str, Any]) -> Any:
    """Loads a component of a repository with code, by its entry in the index of the modular pipeline.

    Args:
        source (`str`): Folder, or `org/name` on the Hub.
        name (`str`): Name of the component and of its folder in the source, such as `tokenizer`.
        entry: Entry, as [`_entry_of_component`] makes it.
        options (`Mapping[str, Any]`): Arguments of `from_pretrained`.

    Raises:
        ValueError: The entry is broken, or weights are missing or unexpected.
    """
    type_hint = _type_hint(entry)
    if type_hint is None:
        raise ValueError(f"the index of `{source}` must say where `{name}` lies, got {entry!r:.80}.")
    component_class = _class_of_component(name, type_hint)
    if component_class is None:
        raise ValueError(f"the index of `{source}` names an unknown class of `{name}`, {type_hint!r:.80}.")
    is_model = hasattr(component_class, "forward")
    if not is_model:
        # A tokenizer takes the options of the Hub, but no options of a model, such as `dtype`.
        return component_class.from_pretrained(source, subfolder=name, **hub_options(options))
    model, info = component_class.from_pretrained(source, subfolder=name, output_loading_info=True, **options)
    check_weights(f"{source}/{name}", info)
    return model


def _class_of_component(name: str, type_hint: list[Any]) -> Any:
    """Class that loads a component: of this package, or of transformers by its name; None for an unknown name."""
    if name in MODELS:
        return MODELS[name]
    class_name = str(type_hint[-1])  # the library and the class, such as `["transformers", "T5EncoderModel"]`
    return getattr(transformers, class_name, None)


def _type_hint(entry: Any) -> list[Any] | None:
    """Library and class in an entry of a modular index, such as `["transformers", "T5EncoderModel"]`.

    The entry is `[library, class, loading spec]`, see [`_entry_of_component`]. The loading spec has the hint. None for
    a broken entry.
    """
    if not isinstance(entry, list) or not entry:
        return None
    loading_spec = entry[-1]
    if not isinstance(loading_spec, dict):
        return None
    type_hint = loading_spec.get("type_hint")
    if not isinstance(type_hint, list) or not type_hint:
        return None
    return type_hint


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a config or index as transformers and diffusers do."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
