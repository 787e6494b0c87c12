"""The models of `models/` with what the package adds: original checkpoints, cards and code of repositories, errors."""

import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.models.modeling_utils import ModelMixin
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from svqvae_files.hub import check_may_be_on_hub
from svqvae_files.outputs import share_weights
from svqvae_hf.hub.code import kept_code, write_code
from svqvae_hf.hub.model_cards import model_card
from svqvae_hf.hub.origin import STARTED_FROM, find_origin, without_figures
from svqvae_hf.hub.publishing import CARD, CardMixin, pop_card_options
from svqvae_hf.hub.repositories import from_hub, public_name
from svqvae_hf.loaders.causal_models import damage_explained
from svqvae_hf.loaders.checkpoint_files import Checkpoint
from svqvae_hf.loaders.checkpoints import read_checkpoint
from svqvae_hf.loaders.folder_checks import check_files
from svqvae_hf.loaders.llamagen_checkpoints import read_llamagen
from svqvae_hf.loaders.next_scale_checkpoints import read_next_scale_checkpoint
from svqvae_hf.loaders.saved_parts import check_parts
from svqvae_hf.models import image_processing_svqvae, modeling_llamagen, modeling_next_scale, modeling_svqvae
from svqvae_hf.models.configuration_llamagen import LlamaGenConfig
from svqvae_hf.models.loading import WEIGHTS_NAME, check_weights
from svqvae_hf.models.processing_svqvae import HUB_OPTIONS, VQVAE_FOLDER
from svqvae_hf.models.processing_svqvae import SVQVAEProcessor as PlainProcessor


class HubMixin:
    """Loading from the Hub with errors that explain."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Loads from a folder or from the Hub.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Folder, or `org/name` on the Hub.
            **kwargs: Arguments of the base class, and config values such as `pixel_range=(-1, 1)`.

        Raises:
            OSError: If the files do not exist, or the Hub does not answer and the cache has no complete copy.
            ValueError: If the weights are not exactly what the config asks for, or the folder holds another class.
            TypeError: If an argument is unknown.
        """
        return from_hub(super().from_pretrained, pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]


class RepositoryMixin(HubMixin, ModelMixin):
    """Loading from the Hub, and saving of a model's code beside its weights."""

    @functools.wraps(ModelMixin.save_pretrained)  # diffusers looks at the names of its arguments
    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        save_function: Callable | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        *args: Any,
        standalone: bool = False,
        **kwargs: Any,
    ) -> None:
        """Saves the model.

        Args:
            save_directory (`str` or `os.PathLike`): Folder to write to.
            is_main_process (`bool`, defaults to `True`): Whether this process writes the config and deletes the files
                of an earlier save. `False` in all processes of a training run but one.
            save_function (`Callable`, *optional*): Passed on to diffusers.
            safe_serialization (`bool`, defaults to `True`): Whether to write safetensors, and not pickles.
            variant (`str`, *optional*): Variant of the weights in the names of their files, such as "fp16".
            *args: Further arguments of [`~diffusers.ModelMixin.save_pretrained`].
            standalone (`bool`, defaults to `False`): Whether to write the code of the model as well, so that it loads
                with `trust_remote_code=True` where this package is not installed, and the card of a tokenizer if the
                folder has none. `push_to_hub(..., standalone=True)` uploads both.
            **kwargs: Further arguments of [`~diffusers.ModelMixin.save_pretrained`]. For a tokenizer also arguments of
                `make_card`, such as `provenance`. They write the card, in place of a card that the folder has.

        Raises:
            ValueError: If `save_directory` is a file.
        """
        if os.path.isfile(save_directory):  # diffusers would only log it
            raise ValueError(f"`{os.fspath(save_directory)}` must be a folder, but is a file. Choose another name.")
        folder = Path(save_directory)
        card = None
        if isinstance(self, CardMixin):
            card_options = pop_card_options(kwargs)
            if standalone or card_options:
                # Made before saving, because it compares the weights with those in the folder that they came from.
                card = self.card_for(folder, folder.absolute().name, card_options, standalone=standalone)
        super().save_pretrained(
            save_directory, is_main_process, save_function, safe_serialization, variant, *args, **kwargs
        )
        if is_main_process:
            # Weights of an earlier save in this folder may have other names, and would be loaded in place of these.
            _delete_index_or_whole_file(folder, WEIGHTS_NAME)
            if not safe_serialization:
                _delete_safetensors(folder, WEIGHTS_NAME, variant)
            share_weights(folder)
        if standalone:
            write_code(folder)
        if card is not None:
            (folder / CARD).write_text(card, encoding="utf-8")


class SVQVAE(CardMixin, RepositoryMixin, modeling_svqvae.SVQVAE):  # type: ignore[misc] # mypy: `wraps` hides a signature
    """Scalable vector-quantized VAE: tokenizes images of any size, at several scales, with one codebook.

    The base class, [`~svqvae_hf.models.modeling_svqvae.SVQVAE`], documents the constructor, encoding and decoding.
    This class adds `from_single_file`, model cards, and clearer errors of the Hub.

    Example:
        >>> vqvae = SVQVAE.from_pretrained("org/svqvae")
        >>> ids = vqvae.encode_tokens(images)
        >>> images = vqvae.decode_tokens(ids)
    """

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Saves the config, and the config of the image processor.

        diffusers' `save_pretrained` calls it before it writes the weights.

        Args:
            save_directory (`str` or `os.PathLike`): Folder to write to.
            push_to_hub (`bool`, defaults to `False`): Whether to upload the folder.
            **kwargs: Further arguments of [`~diffusers.ConfigMixin.save_config`].
        """
        SVQVAEImageProcessor(pixel_range=self.config["pixel_range"]).save_pretrained(save_directory)
        super().save_config(save_directory, push_to_hub, **kwargs)

    def to_json_string(self) -> str:
        """Content of `config.json`, without folders of this machine."""
        config = json.loads(super().to_json_string())
        if "_name_or_path" in config:
            config["_name_or_path"] = public_name(config["_name_or_path"])
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

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
        checkpoint = read_checkpoint(source, cls, use_ema=use_ema, **config)
        return checkpoint.model(cls, dtype or torch_dtype)

    def make_card(self, repo_id: str, **options: Any) -> str:
        """Text of the card; see [`~svqvae_hf.hub.model_cards.model_card`].

        It inherits the licence and the rows about the origin from the card beside the weights that were loaded. If
        the weights are not equal to the loaded ones any more, the card says so, and leaves out figures of validations.

        Args:
            repo_id (`str`): Repository or folder that the card's example loads.
            **options: Further arguments of the card, such as `license`. The rows of `provenance` are added to the
                inherited rows.
        """
        source = self.config.get("_name_or_path")
        origin = find_origin({STARTED_FROM: source}, license=options.get("license"))
        rows = origin.rows
        if source is not None:
            rows = self._rows_that_hold(source, rows)
        options["license"] = origin.license
        options.setdefault("base_model", origin.base_model)
        options["provenance"] = rows | dict(options.get("provenance", {}))
        return model_card(self.config, repo_id=repo_id, **options)

    def _rows_that_hold(self, source: str, rows: Mapping[str, str]) -> dict[str, str]:
        """Rows about the origin that hold for the weights as they are now.

        Args:
            source (`str`): Folder or repository that the model was loaded from.
            rows (`dict[str, str]`): Rows that hold for the weights of `source`.
        """
        try:
            loaded = type(self).from_pretrained(source)
        except (OSError, ValueError):  # such as a model that lies in a subfolder of `source`
            return without_figures(rows)
        if self._has_weights_of(loaded):
            return dict(rows)
        changed = {"weights": f"differ from the weights of `{public_name(source)}`; not measured"}
        return changed | without_figures(rows)

    def _has_weights_of(self, other: Self) -> bool:
        """Whether the weights equal those of another model, apart from their precision and device."""
        weights = self.state_dict()
        other_weights = other.state_dict()
        if weights.keys() != other_weights.keys():
            return False
        for name, weight in weights.items():
            other_weight = other_weights[name].to(weight.dtype)
            if not torch.equal(weight.cpu(), other_weight):
                return False
        return True


class NextScaleTransformer(RepositoryMixin, modeling_next_scale.NextScaleTransformer):
    """[`~svqvae_hf.models.modeling_next_scale.NextScaleTransformer`] with original checkpoints and Hub errors."""

    @classmethod
    def from_single_file(cls, source: str | Path, *, dtype: torch.dtype | None = None) -> Self:
        """Loads an original checkpoint of FlexVAR: a released file, or one of its trainer.

        Args:
            source (`str` or `Path`): Local file, or `org/repo:file` on the Hub.
            dtype (`torch.dtype`, *optional*): Type of the weights, by default float32.

        Returns:
            [`NextScaleTransformer`]: The model in evaluation mode.

        Raises:
            OSError: If the file is missing or cannot be downloaded.
            ValueError: If the file is broken, or does not hold exactly the weights of such a transformer.
        """
        checkpoint = read_next_scale_checkpoint(source, cls)
        return checkpoint.model(cls, dtype)


class LlamaGenForCausalLM(modeling_llamagen.LlamaGenForCausalLM):
    """[`~svqvae_hf.models.modeling_llamagen.LlamaGenForCausalLM`] with original checkpoints.

    Example:
        >>> model = LlamaGenForCausalLM.from_single_file("c2i_B_256.pt", grid_size=16)
        >>> prompt = torch.tensor([[model.config.codebook_size + 207]])  # class 207
        >>> ids = model.generate(prompt, max_new_tokens=16 * 16, do_sample=True, top_k=2000)[:, 1:]
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """Loads a model. Weights that do not match the config are errors, where transformers only warns.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Folder, or `org/name` on the Hub.
            *args: Further arguments of transformers' method.
            **kwargs: Further arguments of transformers' method.

        Raises:
            OSError: The files do not exist.
            ValueError: The weights are not exactly what the config asks for, or a file is damaged.
        """
        source = os.fspath(pretrained_model_name_or_path)
        check_may_be_on_hub(source)
        check_files(os.path.join(source, kwargs.get("subfolder") or ""))
        wants_info = kwargs.pop("output_loading_info", False)
        # transformers must not raise for wrong shapes, because `check_weights` below raises one error of one line that
        # lists missing, unexpected and misshapen weights.
        kwargs["ignore_mismatched_sizes"] = True
        with damage_explained(source):
            model, info = super().from_pretrained(source, *args, output_loading_info=True, **kwargs)
        check_weights(source, info)
        if wants_info:
            return model, info
        return model

    @functools.wraps(PreTrainedModel.save_pretrained)
    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        *args: Any,
        standalone: bool = False,
        **kwargs: Any,
    ) -> None:
        """Saves the model. `standalone=True` also writes its code.

        Takes the arguments of transformers' `save_pretrained`, too, and forwards them.
        """
        # `auto_map` names the code in the repository that the model was loaded from. That code is not copied, so the
        # saved config must not name it.
        self.config.__dict__.pop("auto_map", None)
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        folder = Path(save_directory)
        if is_main_process:
            # Weights of an earlier save in this folder may have other names, and would be loaded in place of these.
            _delete_index_or_whole_file(folder, "model")
            share_weights(folder)
        if standalone:
            write_code(folder)

    @classmethod
    def from_single_file(
        cls,
        source: str | Path,
        *,
        grid_size: int | None = None,
        num_attention_heads: int | None = None,
        use_ema: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Loads a checkpoint of LlamaGen.

        Args:
            source (`str` or `Path`): Local file, or `org/repo:file` on the Hub.
            grid_size (`int`, *optional*): Number of rows and of columns of the ids of an image, its side in pixels
                over f. Required unless the file holds `freqs_cis`.
            num_attention_heads (`int`, *optional*): Number of heads. Required for sizes that LlamaGen does not define.
            use_ema (`bool`, defaults to `False`): Load the averaged weights, which checkpoints of training may have.
            dtype (`torch.dtype`, *optional*): Type of the weights, by default float32.

        Returns:
            [`LlamaGenForCausalLM`]: The model in evaluation mode.

        Raises:
            OSError: The file is missing or cannot be downloaded.
            ValueError: The file is broken, its weights do not fit this class exactly, or a required argument
                is missing.
        """
        checkpoint = read_llamagen(source, grid_size, num_attention_heads=num_attention_heads, use_ema=use_ema)
        model = cls.from_checkpoint(checkpoint)
        if dtype is None:
            return model
        return model.to(dtype)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Self:
        """Builds a model that takes over the tensors of a checkpoint.

        Args:
            checkpoint ([`~svqvae_hf.loaders.checkpoint_files.Checkpoint`]): Checked checkpoint.

        Returns:
            [`LlamaGenForCausalLM`]: The model in evaluation mode.
        """
        config = LlamaGenConfig(**checkpoint.config)
        with torch.device("meta"):
            model = cls(config)
        model.load_state_dict(checkpoint.state_dict, assign=True)
        return model.eval()


class SVQVAEImageProcessor(HubMixin, image_processing_svqvae.SVQVAEImageProcessor):
    """[`~svqvae_hf.models.image_processing_svqvae.SVQVAEImageProcessor`] with errors of the Hub.

    Example:
        >>> processor = SVQVAEImageProcessor.from_pretrained("org/svqvae")
        >>> batch = processor(["first.jpg", "second.png"])  # of one size
        >>> images = processor.postprocess(batch["pixel_values"], batch["image_sizes"])
    """

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """Saves the config. The folder of a standalone repository keeps its code."""
        # `auto_map` names the code in the repository that the processor was loaded from. That code is not copied, so
        # the saved config must not name it.
        self.__dict__.pop("auto_map", None)
        with kept_code(Path(save_directory, "preprocessor_config.json")):
            return super().save_pretrained(save_directory, *args, **kwargs)


class SVQVAEProcessor(HubMixin, PlainProcessor):
    """[`~svqvae_hf.models.processing_svqvae.SVQVAEProcessor`] that checks its files and explains errors of the Hub."""

    vqvae_class = SVQVAE

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Loads a processor from a folder or from the Hub.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Folder, or `org/name` on the Hub.
            **kwargs: Arguments of transformers' method.

        Raises:
            OSError: If the files do not exist, or the Hub does not answer and the cache has no complete copy.
            ValueError: If a file is damaged, or the tokenizer, the chat template or the generation config is not the
                one that was saved with the processor.
        """
        source = os.fspath(pretrained_model_name_or_path)
        subfolder = kwargs.get("subfolder") or ""
        folder = os.path.join(source, subfolder)
        # Damaged files raise an error. This checks a local folder, and nothing if the source is on the Hub.
        check_files(folder)
        check_files(os.path.join(folder, VQVAE_FOLDER))
        hub_options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        # Whole files of another model raise an error, too: `check_parts` compares the tokenizer, the chat template and
        # other parts with their digests in the config of the processor. It may load them from the Hub, so it is called
        # by `from_hub`, which explains errors of the Hub.
        from_hub(check_parts, source, subfolder=subfolder, **hub_options)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Saves the processor. The folder of a standalone repository keeps its code.

        Args:
            save_directory (`str` or `os.PathLike`): Folder to write to.
            push_to_hub (`bool`, defaults to `False`): Whether to upload the folder.
            **kwargs: Further arguments of transformers' method.
        """
        configs = [Path(save_directory, "processor_config.json"), Path(save_directory, VQVAE_FOLDER, "config.json")]
        with kept_code(*configs):
            return super().save_pretrained(save_directory, push_to_hub, **kwargs)


def _delete_index_or_whole_file(folder: Path, name: str) -> None:
    """Deletes the index of earlier shards if a model was saved whole, or the earlier whole file if it has shards now.

    diffusers and transformers delete only earlier shards. The other files would be loaded in place of the weights just
    saved, or beside them.

    Args:
        folder (`Path`): Folder of the model.
        name (`str`): Start of the names of its files of weights, such as "model".
    """
    start_of_index = f"{name}.safetensors.index"
    for index in folder.glob(f"{start_of_index}*.json"):
        variant = index.name.removeprefix(start_of_index).removesuffix(".json")  # such as ".fp16", or empty
        has_shards = any(folder.glob(f"{name}{variant}-*-of-*.safetensors"))
        if has_shards:
            whole_file = folder / f"{name}{variant}.safetensors"
            whole_file.unlink(missing_ok=True)
        else:
            index.unlink()


def _delete_safetensors(folder: Path, name: str, variant: str | None) -> None:
    """Deletes the safetensors of an earlier save, which would be loaded in place of the pickle just saved.

    Args:
        folder (`Path`): Folder of the model.
        name (`str`): Start of the names of its files of weights.
        variant (`str`, *optional*): Variant that was saved, such as "fp16". Files of other variants stay.
    """
    suffix = f".{variant}" if variant else ""
    whole_file = f"{name}{suffix}.safetensors"
    shards = f"{name}{suffix}-*-of-*.safetensors"
    index = f"{name}.safetensors.index{suffix}.json"
    for pattern in (whole_file, shards, index):
        for path in folder.glob(pattern):
            path.unlink()


AutoConfig.register(LlamaGenConfig.model_type, LlamaGenConfig)
AutoModelForCausalLM.register(LlamaGenConfig, LlamaGenForCausalLM)
