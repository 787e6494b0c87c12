"""Loads and publishes models, more strictly than the methods of diffusers that it extends."""

import inspect
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin

from svqvae_hf.hub.model_cards import model_card
from svqvae_hf.hub.repositories import from_hub, prepare_repo, push_folder
from svqvae_hf.loaders.checkpoints import read_checkpoint
from svqvae_hf.models.image_processing_svqvae import SVQVAEImageProcessor

DERIVED_CONFIG = ("block_out_channels", "latent_channels", "vq_embed_dim", "num_vq_embeddings", "lookup_from_codebook")


class StrictLoadingMixin(ModelMixin, ConfigMixin):
    """Strict loading."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Self:
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
        with_info = kwargs.pop("output_loading_info", False)
        kwargs.pop("low_cpu_mem_usage", None)  # diffusers keeps the codebook in float32 only with it
        source = os.fspath(pretrained_model_name_or_path)
        loaded = from_hub(super().from_pretrained, source, output_loading_info=True, **kwargs)
        faults = list_faults(loaded[1])
        if faults:
            raise ValueError(
                f"The weights of {pretrained_model_name_or_path} must be exactly what its config asks for, but are "
                f"not: {faults}. Restore the files, or correct config.json."
            )
        return loaded if with_info else loaded[0]

    @classmethod
    def from_config(cls, config: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Creates a model from a config. Unknown keyword arguments raise an error unless they are to be returned.

        Args:
            config (`dict[str, Any]`): Config, as `load_config` returns it.
            return_unused_kwargs (`bool`, defaults to `False`): Whether to return unknown keyword arguments, too.
            **kwargs: Values that replace values of `config`.

        Raises:
            ValueError: If the config is of another class.
            TypeError: If a keyword argument is unknown.
        """
        known = {*inspect.signature(cls.__init__).parameters, "trust_remote_code"}
        unknown = sorted(name for name in kwargs.keys() - known if not name.startswith("_"))
        if unknown and not return_unused_kwargs:
            raise TypeError(
                f"Unknown arguments: {', '.join(unknown)}. Expected config values of {cls.__name__} or arguments of "
                "diffusers' method."
            )
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """Splits a config into constructor arguments and the rest, without values that the constructor derives."""
        if config_dict.get("_class_name", cls.__name__) not in {base.__name__ for base in cls.__mro__}:
            raise ValueError(
                f"The config must be of class {cls.__name__}, got {config_dict['_class_name']}. Load it with that "
                "class. `from_single_file` loads original checkpoints."
            )
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k not in DERIVED_CONFIG}, **kwargs)


class SVQVAELoadingMixin(StrictLoadingMixin):
    """Strict loading, `from_single_file` for original checkpoints, and what a model's repository holds beside it."""

    def save_pretrained(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """Saves the model, and its pixel range in `preprocessor_config.json`, which [`SVQVAEImageProcessor`] loads.

        Args:
            save_directory (`str` or `os.PathLike`): Folder to write to.
            is_main_process (`bool`, defaults to `True`): Whether this process writes the configs.
            *args: Further arguments of [`~diffusers.ModelMixin.save_pretrained`].
            **kwargs: Further arguments of [`~diffusers.ModelMixin.save_pretrained`].
        """
        if is_main_process:  # before the weights, because an upload follows these at once
            SVQVAEImageProcessor(pixel_range=self.config["pixel_range"]).save_pretrained(save_directory)
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)

    @classmethod
    def from_single_file(
        cls,
        source: str | Path,
        *,
        use_ema: bool = False,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        **config: Any,
    ) -> Self:
        """Loads an original checkpoint; see [`~svqvae_hf.loaders.checkpoints.read_checkpoint`].

        Args:
            source (`str` or `Path`): Local file, or `org/repo:file` on the Hub.
            use_ema (`bool`, defaults to `False`): Load the averaged weights, which LlamaGen's files may have.
            dtype (`torch.dtype`, *optional*): Type of the weights, by default float32. The codebook stays float32.
            torch_dtype (`torch.dtype`, *optional*): The same, under its older name.
            **config: Config values that replace the values read from the file, such as `network_range`.

        Returns:
            [`SVQVAE`]: The model in evaluation mode.
        """
        model = read_checkpoint(source, cls, use_ema=use_ema, **config).model()
        dtype = dtype or torch_dtype
        return model if dtype is None else model.to(dtype)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str = "Upload SVQVAE",
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        variant: str | None = None,
        **card: Any,
    ) -> str:
        """Uploads the model with its card.

        Args:
            repo_id (`str`): `org/name`; created if it does not exist.
            commit_message (`str`, defaults to `"Upload SVQVAE"`): Title of the commit.
            private (`bool`, *optional*): Visibility of a new repository, by default the organization's.
            token (`str`, *optional*): Access token, by default the stored one.
            create_pr (`bool`, defaults to `False`): Open a pull request instead of committing.
            variant (`str`, *optional*): Suffix of the weight files, such as `fp16`. The repository keeps
                its card.
            **card: Arguments of [`~svqvae_hf.hub.model_cards.model_card`].

        Returns:
            `str`: URL of the commit or pull request.

        Raises:
            OSError: If the Hub denies it or cannot be reached.
            ValueError: If the Hub does not know the licence.
        """
        repo_id = prepare_repo(repo_id, private=private, license=card.get("license"), token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, variant=variant)
            if variant is None:
                text = model_card(self.config, repo_id=repo_id, **card)
                Path(folder, "README.md").write_text(text, encoding="utf-8")
            return push_folder(folder, repo_id, commit_message, create_pr=create_pr, token=token)


def list_faults(loading_info: Mapping[str, Any]) -> str:
    """Lists the weights that a loader found missing, unexpected or mismatched, as text."""
    faults = {kind: sorted(map(str, loading_info[f"{kind}_keys"])) for kind in ("missing", "unexpected", "mismatched")}
    return "; ".join(f"{kind}: {', '.join(keys)}" for kind, keys in faults.items() if keys)
