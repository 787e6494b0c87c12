"""Loads and publishes models, more strictly than the methods of diffusers that it extends."""

import inspect
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin

from svqvae_hf.hub.model_cards import model_card
from svqvae_hf.hub.publishing import CardMixin
from svqvae_hf.hub.repositories import from_hub
from svqvae_hf.hub.standalone import with_code
from svqvae_hf.loaders.checkpoints import read_checkpoint
from svqvae_hf.models.checks import check_class
from svqvae_hf.models.context_model import ContextModel
from svqvae_hf.models.image_processing_svqvae import SVQVAEImageProcessor

HUB_OPTIONS = ("subfolder", "revision", "token", "cache_dir", "force_download", "local_files_only")


class StrictLoadingMixin(ModelMixin, ConfigMixin):
    """Strict loading, and saving with `standalone=True`, which writes the code of the model as well."""

    derived_config = (
        *("block_out_channels", "latent_channels", "vq_embed_dim", "num_vq_embeddings", "lookup_from_codebook"),
        "auto_map",  # of a repository with code
    )
    _auto_class = "AutoModel" if "diffusers_modules" in __name__ else None  # only such code is saved with a model

    save_pretrained = with_code(ModelMixin.save_pretrained)

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Saves the config, and the file of code of a model that was loaded with `trust_remote_code=True`.

        Args:
            save_directory (`str` or `os.PathLike`): Folder to write to.
            push_to_hub (`bool`, defaults to `False`): Whether to upload the folder.
            **kwargs: Further arguments of [`~diffusers.ConfigMixin.save_config`].
        """
        super().save_config(save_directory, push_to_hub, **kwargs)
        if self._auto_class:
            shutil.copy(__file__, save_directory)

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
        if os.path.isfile(source):
            raise ValueError(f"a model must be a folder or a Hub id, got the file `{source}`. Use `from_single_file`.")
        loaded = from_hub(cls._load, source, output_loading_info=True, **kwargs)
        faults = list_faults(loaded[1])
        if faults:
            raise ValueError(
                f"The weights of {pretrained_model_name_or_path} must be exactly what its config asks for, but are "
                f"not: {faults}. Restore the files, or correct config.json."
            )
        return loaded if with_info else loaded[0]

    @classmethod
    def _load(cls, source: str, **kwargs: Any) -> Any:
        return super().from_pretrained(source, **kwargs)

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
        check_class(cls, config_dict)
        given = {key: value for key, value in config_dict.items() if key not in cls.derived_config}
        return super().extract_init_dict(given, **kwargs)


class SVQVAELoadingMixin(CardMixin, StrictLoadingMixin):
    """Strict loading, `from_single_file` for original checkpoints, and the other files of a model's repository."""

    codebook_fingerprint: Callable[[], str]
    _context_model: ContextModel | None = None

    @property
    def context_model(self) -> ContextModel | None:
        """Context model of the folder or repository that the model was loaded from, if it fits this codebook."""
        found = self._context_model
        return None if found is None or found.codebook_fingerprint != self.codebook_fingerprint() else found

    @classmethod
    def _load(cls, source: str, **kwargs: Any) -> Any:
        model, info = super()._load(source, **kwargs)
        model.find_context_model(source, **{name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name)})
        return model, info

    def find_context_model(self, source: str, **options: Any) -> None:
        """Loads `context_model` if there is one; see [`ContextModel.from_pretrained`]."""
        with suppress(FileNotFoundError):
            self._context_model = ContextModel.from_pretrained(source, **options)

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Saves the config, the config of the image processor, and the context model if it fits the codebook.

        diffusers' `save_pretrained` calls it before it writes the weights.

        Args:
            save_directory (`str` or `os.PathLike`): Folder to write to.
            push_to_hub (`bool`, defaults to `False`): Whether to upload the folder.
            **kwargs: Further arguments of [`~diffusers.ConfigMixin.save_config`].
        """
        SVQVAEImageProcessor(pixel_range=self.config["pixel_range"]).save_pretrained(save_directory)
        if self.context_model is not None:
            self.context_model.save_pretrained(save_directory)
        super().save_config(save_directory, push_to_hub, **kwargs)

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
            torch_dtype (`torch.dtype`, *optional*): The same, under diffusers' older name.
            **config: Config values that replace the values read from the file, such as `network_range`.

        Returns:
            [`SVQVAE`]: The model in evaluation mode.
        """
        model = read_checkpoint(source, cls, use_ema=use_ema, **config).model(cls)
        dtype = dtype or torch_dtype
        return model if dtype is None else model.to(dtype)

    def make_card(self, repo_id: str, **options: Any) -> str:
        """Text of the card; see [`~svqvae_hf.hub.model_cards.model_card`]."""
        return model_card(self.config, repo_id=repo_id, **options)


def list_faults(loading_info: Mapping[str, Any]) -> str:
    """Lists the weights that a loader found missing, unexpected or mismatched, as text."""
    faults = {kind: sorted(map(str, loading_info[f"{kind}_keys"])) for kind in ("missing", "unexpected", "mismatched")}
    return "; ".join(f"{kind}: {', '.join(keys)}" for kind, keys in faults.items() if keys)
