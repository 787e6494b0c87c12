"""Code in repositories: copies of the files that define a model, which load it where this package is not installed."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from svqvae_files.json_files import read_json_object
from svqvae_hf.models.image_processing_svqvae import SVQVAEImageProcessor
from svqvae_hf.models.loading import copy_code
from svqvae_hf.models.modeling_llamagen import LlamaGenForCausalLM
from svqvae_hf.models.modeling_next_scale import NextScaleTransformer
from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.models.processing_svqvae import SVQVAEProcessor

# For each class with code: the auto classes of transformers and diffusers that load from its file, and for each of
# them the name of the class that it loads
AUTO_CLASSES: Mapping[type, Mapping[str, str]] = {
    SVQVAE: {"AutoModel": "SVQVAE"},
    SVQVAEImageProcessor: {"AutoImageProcessor": "SVQVAEImageProcessor"},
    SVQVAEProcessor: {"AutoProcessor": "SVQVAEProcessor"},
    NextScaleTransformer: {"AutoModel": "NextScaleTransformer"},
    LlamaGenForCausalLM: {
        "AutoConfig": "LlamaGenConfig",
        "AutoModel": "LlamaGenForCausalLM",
        "AutoModelForCausalLM": "LlamaGenForCausalLM",
    },
}


def write_code(folder: Path) -> None:
    """Copies the code of each model in a saved repository beside its config, and names the code in the config.

    Args:
        folder (`Path`): Folder of a model, or of a pipeline with its components.
    """
    for path in sorted(folder.rglob("*config.json")):
        config = read_json_object(path)
        class_names = _class_names(config, path.name)
        for model_class, auto_classes in AUTO_CLASSES.items():
            if model_class.__name__ not in class_names:
                continue
            module = copy_code(model_class, path.parent)  # such as "modeling_svqvae"
            auto_map = {}  # such as {"AutoModel": "modeling_svqvae.SVQVAE"}
            for auto_class, loaded_class in auto_classes.items():
                auto_map[auto_class] = f"{module}.{loaded_class}"
            config["auto_map"] = auto_map
            _write_config(path, config)


@contextmanager
def kept_code(*paths: Path) -> Iterator[None]:
    """Keeps the `auto_map` of configs when the block writes the configs again.

    `auto_map` names the code in the repository that loads it, such as `{"AutoModel": "modeling_svqvae.SVQVAE"}`. The
    block would write configs without it, and the repository would no longer load.

    Args:
        *paths (`Path`): Configs, which need not exist.
    """
    auto_maps = {}
    for path in paths:
        if path.is_file():
            auto_maps[path] = read_json_object(path).get("auto_map")
    yield
    for path, auto_map in auto_maps.items():
        config = read_json_object(path)
        if auto_map is not None and "auto_map" not in config:
            config["auto_map"] = auto_map
            _write_config(path, config)


def _write_config(path: Path, config: Mapping[str, Any]) -> None:
    """Writes a config."""
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    path.write_text(text, encoding="utf-8")


def _class_names(config: Mapping[str, Any], file_name: str) -> list[Any]:
    """Names of the classes that a config of diffusers or transformers is for."""
    names = [config.get("_class_name"), config.get("image_processor_type")]
    names += config.get("architectures") or []
    if file_name == "processor_config.json":
        names.append(config.get("processor_class"))
    return names
