"""Strict loading of models, and code that stays with models that were loaded with `trust_remote_code=True`."""

import inspect
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.dynamic_modules_utils import get_relative_import_files

WEIGHTS_NAME = "diffusion_pytorch_model"  # start of the names of diffusers' files of weights


class StrictLoadingMixin(ModelMixin, ConfigMixin):
    """Loads models of diffusers only if the weights are exactly what the config asks for."""

    # Keys of configs that the constructor does not take, because it computes their values or they are not its own
    derived_config = (
        "block_out_channels",
        "latent_channels",
        "vq_embed_dim",
        "num_vq_embeddings",
        "lookup_from_codebook",
        "auto_map",  # names the code in a repository that has code
    )
    component_name: str  # subfolder of the model in a pipeline or beside a language model
    # Code that came from a repository is saved with its model.
    _auto_class = "AutoModel" if "diffusers_modules" in __name__ else None

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Saves the config, and the code of a model that was loaded with `trust_remote_code=True`.

        Args:
            save_directory (`str` or `os.PathLike`): Folder to write to.
            push_to_hub (`bool`, defaults to `False`): Whether to upload the folder.
            **kwargs: Further arguments of [`~diffusers.ConfigMixin.save_config`].
        """
        super().save_config(save_directory, push_to_hub, **kwargs)
        if self._auto_class:
            copy_code(type(self), save_directory)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Loads a model from a folder or from the Hub, strictly.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Folder, or `org/name` on the Hub.
            **kwargs: Arguments of [`~diffusers.ModelMixin.from_pretrained`], and config values that replace the stored
                ones, such as `pixel_range=(-1, 1)`. `low_cpu_mem_usage` is always `True`.

        Raises:
            OSError: If the model does not exist, or the Hub does not answer and the cache has no complete copy.
            ValueError: If weights are missing, unexpected or of another shape, or the folder holds another class.
            TypeError: If an argument is unknown.
        """
        returns_info = kwargs.pop("output_loading_info", False)
        # diffusers keeps the codebook in float32 only if this option is `True`, its default. The caller's value is
        # dropped.
        kwargs.pop("low_cpu_mem_usage", None)
        source = os.fspath(pretrained_model_name_or_path)
        cls._check_source(source, kwargs.get("subfolder"))
        check_dtypes(kwargs)
        try:
            model, info = super().from_pretrained(source, output_loading_info=True, **kwargs)
        except ValueError as error:
            raise ValueError(f"`{source}` cannot be loaded: {error}") from error
        check_weights(source, info)
        if cls._auto_class:
            # A pipeline of diffusers stores the module of its tokenizer, and looks for the code under this name in the
            # folder of the tokenizer. So the name must be "modeling_svqvae", without "diffusers_modules.local.".
            model.__module__ = Path(inspect.getfile(cls)).stem
        if returns_info:
            return model, info
        return model

    @classmethod
    def _check_source(cls, source: str, subfolder: str | None) -> None:
        """Raises if a source is a file, lacks the subfolder, or holds the model in a subfolder that was not passed."""
        if os.path.isfile(source):
            raise ValueError(f"a model must be a folder or a Hub id, got the file `{source}`. Use `from_single_file`.")
        if not os.path.isdir(source):
            return  # on the Hub
        if subfolder:
            folder = os.path.join(source, subfolder)
            if not os.path.isdir(folder):  # diffusers would load `source`
                raise OSError(f"there is no folder `{folder}`. Correct `subfolder`, or leave it out.")
            return
        has_weights = any(name.startswith(WEIGHTS_NAME) for name in os.listdir(source))
        config_in_subfolder = os.path.join(source, cls.component_name, "config.json")
        if not has_weights and os.path.isfile(config_in_subfolder):
            raise OSError(
                f"`{source}` holds its {cls.__name__} in a folder of its own. Load it with "
                f"`from_pretrained(..., subfolder={cls.component_name!r})`."
            )

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict[str, Any]:
        """Reads a config for diffusers. Raises ValueError unless it is a JSON object."""
        config = super()._dict_from_json_file(json_file)
        if not isinstance(config, dict):  # diffusers would take it for a config, or for a name on the Hub
            raise ValueError(f"`{json_file}` must hold a JSON object, but holds a {type(config).__name__}.")
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Creates a model from a config. Unknown keyword arguments raise an error, unless the call returns them.

        Args:
            config (`dict[str, Any]`): Config, as `load_config` returns it.
            return_unused_kwargs (`bool`, defaults to `False`): Whether to return unknown keyword arguments, too.
            **kwargs: Values that replace values of `config`.

        Raises:
            ValueError: If the config is of another class.
            TypeError: If a keyword argument is unknown.
        """
        parameters = inspect.signature(cls.__init__).parameters
        unknown = []
        for name in sorted(kwargs):
            is_option_of_diffusers = name == "trust_remote_code" or name.startswith("_")
            if name not in parameters and not is_option_of_diffusers:
                unknown.append(name)
        if unknown and not return_unused_kwargs:
            raise TypeError(
                f"Unknown arguments: {', '.join(unknown)}. Expected config values of {cls.__name__} or arguments of "
                "diffusers' method."
            )
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """Splits a config into constructor arguments and the rest, without values that the constructor derives."""
        class_name = config_dict.get("_class_name", cls.__name__)
        names_of_class_and_bases = [base.__name__ for base in cls.__mro__]
        if class_name not in names_of_class_and_bases:
            raise ValueError(
                f"The config must be of class {cls.__name__}, got {class_name}. Load it with that class. "
                "`from_single_file` loads original checkpoints."
            )
        config = dict(config_dict)
        for key in cls.derived_config:
            config.pop(key, None)
        return super().extract_init_dict(config, **kwargs)


def check_dtypes(arguments: Mapping[str, Any]) -> None:
    """Raises TypeError for the name of a type of numbers, such as "float16". diffusers would load float32 instead."""
    for name in ("dtype", "torch_dtype"):
        dtype = arguments.get(name)
        if isinstance(dtype, str):
            raise TypeError(f"`{name}` must be a torch.dtype such as torch.float16, got {dtype!r}.")


def check_weights(source: str, loading_info: Mapping[str, Any]) -> None:
    """Raises unless the weights of a folder or Hub id were exactly what its config asks for."""
    faults = []
    for kind in ("missing", "unexpected", "mismatched"):
        keys = sorted(str(key) for key in loading_info[f"{kind}_keys"])
        if keys:
            faults.append(f"{kind}: {', '.join(keys)}")
    if faults:
        raise ValueError(
            f"The weights of {source} must be exactly what its config asks for, but are not: {'; '.join(faults)}. "
            "Restore the files, or correct config.json."
        )


def check_merged(name: str, model: Any) -> None:
    """Raises if a model has an adapter of peft beside its weights, which would be saved under names of its own."""
    if not isinstance(model, torch.nn.Module):
        return
    # A layer of peft keeps the layer that it adapts in its attribute `base_layer`.
    has_adapter = any(hasattr(module, "base_layer") for module in model.modules())
    if has_adapter:
        raise ValueError(
            f"`{name}` must be saved with its adapter merged, but has one beside its weights. Merge it with "
            "`adapter.merge_and_unload()`, where `adapter` is what `PeftModel.from_pretrained` returned, and "
            f"set `{name}` to the result."
        )


def copy_code(model_class: type, folder: str | os.PathLike) -> str:
    """Copies the file that defines a class, and all files that it imports relatively, to a folder.

    Returns:
        `str`: Name of the module of the class in the folder.
    """
    source = Path(inspect.getfile(model_class))
    shutil.copy(source, folder)
    for file in get_relative_import_files(source):
        shutil.copy(file, folder)
    return source.stem


def execution_device(model: ModelMixin) -> torch.device:
    """Device on which a model computes. With offloading, its weights are elsewhere between calls."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return model.device  # diffusers knows its own offloading
