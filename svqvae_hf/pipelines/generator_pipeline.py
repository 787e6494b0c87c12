"""The common half of the pipelines that sample ids: components, labels, callbacks, decoding, saving and loading."""

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput

from svqvae_hf.hub.model_cards import pipeline_card
from svqvae_hf.hub.origin import STARTED_FROM, find_origin
from svqvae_hf.hub.publishing import CARD, CardMixin, pop_card_options
from svqvae_hf.hub.repositories import from_hub, hub_options
from svqvae_hf.loaders.pretrained_models import SVQVAEImageProcessor
from svqvae_hf.models.loading import check_merged
from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.pipelines.labels import Labels, encode_labels, to_int64
from svqvae_hf.pipelines.modular_blocks import check_fingerprint
from svqvae_hf.pipelines.repository_index import delete_modular_index, load_arguments, read_index, write_blocks

# A note in `model_index.json`, which no code reads
LOAD_WITH = "`pip install svqvae-hf`, then `from_pretrained` of its class in `svqvae_hf`"

# Pipeline, step, size in ids, tensors -> tensors that replace them
Callback = Callable[[Any, int, tuple[int, int], dict[str, torch.Tensor]], dict[str, torch.Tensor] | None]


class GeneratorPipeline(CardMixin, DiffusionPipeline):
    """Pipeline of a model that generates ids, and of the SVQVAE that decodes them."""

    vqvae: SVQVAE
    _callback_tensor_inputs = ["ids"]

    def _register(
        self,
        components: dict[str, Any],
        *,
        num_classes: int,
        fingerprints: Sequence[str | None],
        class_names: Sequence[str] | None,
        **config: Any,
    ) -> None:
        """Registers components and config, after the checks that all pipelines share.

        Args:
            components (`dict[str, Any]`): Components, among them `vqvae`.
            num_classes (`int`): Number of classes in training.
            fingerprints (`Sequence[str]`): Digests of the codebook in training, as far as they are known. Ids mean
                nothing to another codebook, so `vqvae` must have this one.
            class_names (`list[str]`, *optional*): Name of each class.
            **config: Further values for `model_index.json`.

        Raises:
            ValueError: The codebook of `vqvae` is another one, or the number of names is not `num_classes`.
        """
        if class_names is not None:
            check_class_names(class_names, num_classes)
            class_names = list(class_names)
        vqvae = components["vqvae"]
        for fingerprint in fingerprints:
            check_fingerprint(fingerprint, vqvae)
        self.register_modules(**components)
        self.register_to_config(  # saved in `model_index.json`
            codebook_fingerprint=vqvae.codebook_fingerprint(),  # checked when the pipeline is loaded
            class_names=class_names,
            _load_with=LOAD_WITH,  # tells people who open the file which package to load it with
            **config,
        )
        self.num_classes = num_classes
        self._interrupt = False  # a callback sets it to `True` to end the sampling
        self.image_processor = SVQVAEImageProcessor(pixel_range=vqvae.config["pixel_range"])

    @classmethod
    def _dict_from_json_file(cls, json_file: str) -> dict[str, Any]:
        """Reads `model_index.json` for diffusers."""
        index = super()._dict_from_json_file(json_file)  # content of `model_index.json`
        class_names = index.get("class_names")
        if class_names:
            index["class_names"] = tuple(class_names)  # diffusers takes any list for a component
        return index

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Self:
        """Loads a pipeline from a folder or from the Hub, with strict checks, from safetensors files only.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Folder, or `org/name` on the Hub.
            **kwargs: Arguments of [`~diffusers.DiffusionPipeline.from_pretrained`]; `use_safetensors` is always
                `True`.

        Raises:
            OSError: The pipeline does not exist or has no safetensors files.
            ValueError: It has another class, weights are missing or unexpected, or a `vqvae` that was passed has
                another codebook.
        """
        kwargs["use_safetensors"] = True
        source = os.fspath(pretrained_model_name_or_path)
        index = read_index(source, **hub_options(kwargs))
        if index["_class_name"] != cls.__name__:
            raise ValueError(
                f"the pipeline of `{source}` must be an {cls.__name__}, but is {index['_class_name']}. Load it with "
                "that class."
            )
        holds_code_of_models = "_blocks_class_name" in index  # written by `save_pretrained(..., standalone=True)`
        if holds_code_of_models:
            # diffusers would run that code. Here the classes of this package load the components instead.
            arguments = load_arguments(cls, source, index, **kwargs)
            pipeline = cls(**arguments)
        elif os.path.isdir(source):
            pipeline = super().from_pretrained(source, **kwargs)
        else:
            folder = from_hub(cls.download, source, **kwargs)
            pipeline = super().from_pretrained(folder, **kwargs)
        pipeline.register_to_config(_name_or_path=source)
        return pipeline

    @functools.wraps(DiffusionPipeline.save_pretrained)  # diffusers looks at the names of its arguments
    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike, *args: Any, standalone: bool | str = False, **kwargs: Any
    ) -> None:
        """Saves the pipeline, with a card unless the folder has one.

        Args:
            save_directory (`str` or `os.PathLike`): Folder to write to.
            *args: Further arguments of [`~diffusers.DiffusionPipeline.save_pretrained`].
            standalone (`bool` or `str`, defaults to `False`): Also write the code of the models, so that diffusers'
                `ModularPipeline` loads the folder where this package is not installed. The index of the folder then
                says from where the components are loaded. With `True`, they are loaded from this folder. If you will
                upload the folder yourself, pass `"org/name"`, its name on the Hub. `push_to_hub(..., standalone=True)`
                does both.
            **kwargs: Further arguments of [`~diffusers.DiffusionPipeline.save_pretrained`]. Also arguments of
                `make_card`, such as `license`. They write the card, in place of a card that the folder has.

        Raises:
            ValueError: A component has an adapter of peft that is not merged.
        """
        for name, component in self.components.items():
            check_merged(name, component)
        card_options = pop_card_options(kwargs)
        super().save_pretrained(os.fspath(save_directory), *args, **kwargs)
        folder = Path(save_directory)
        title = folder.absolute().name
        place_of_components = str(folder)
        is_standalone = bool(standalone)
        names_repository = is_standalone and isinstance(standalone, str)
        if names_repository:
            title = str(standalone)  # `org/name` on the Hub
            place_of_components = title
        if is_standalone:
            write_blocks(self.blocks(), folder, place_of_components)
        else:
            delete_modular_index(folder)
        card = self.card_for(folder, title, card_options, standalone=is_standalone)
        if card is not None:
            (folder / CARD).write_text(card, encoding="utf-8")

    def make_card(self, repo_id: str, **options: Any) -> str:
        """Text of the card; see [`~svqvae_hf.hub.model_cards.pipeline_card`].

        It inherits the licence and the rows about the origin from the card of the folder that the pipeline was loaded
        from.
        """
        summary, arguments_of_example = self.describe()
        origin = find_origin({STARTED_FROM: self.config.get("_name_or_path")}, license=options.get("license"))
        options["license"] = origin.license
        options.setdefault("base_model", origin.base_model)
        options.setdefault("tags", ["svqvae"])
        options.setdefault("provenance", origin.rows)
        options.setdefault("pipeline_tag", self.task)
        return pipeline_card(type(self), repo_id=repo_id, summary=summary, call=arguments_of_example, **options)

    def blocks(self) -> type:
        """Class of the blocks that diffusers' `ModularPipeline` runs in place of this pipeline."""
        raise NotImplementedError

    def describe(self) -> tuple[str, str]:
        """Texts of the card: a sentence about the pipeline, and the arguments of an example's call."""
        raise NotImplementedError

    @property
    def task(self) -> str:
        """Task of the Hub."""
        if self.components.get("tokenizer") is None:
            return "unconditional-image-generation"
        return "text-to-image"

    @property
    def interrupt(self) -> bool:
        """Whether a callback has ended the sampling, by `pipe._interrupt = True`."""
        return self._interrupt

    def _encode_labels(self, class_labels: Labels | None, num_images: int, guidance_scale: float) -> torch.Tensor:
        """One label per image in int64; `num_classes` means no class.

        Args:
            class_labels (`int`, `str` or a list of them, *optional*): Classes; by default the images have none.
            num_images (`int`): Number of images to edit; 1 if images are not edited.
            guidance_scale (`float`): Scale of classifier-free guidance, which needs classes.

        Raises:
            TypeError: A label is neither an integer nor a name.
            ValueError: A class is unknown, guidance has no class, or the images are neither one nor one per label.
        """
        if class_labels is None and guidance_scale != 1:
            raise ValueError(f"`guidance_scale` = {guidance_scale} needs `class_labels`. Pass them, or leave it at 1.")
        return self._labels_of_images(class_labels, num_images)

    def _labels_of_images(self, class_labels: Labels | None, num_images: int) -> torch.Tensor:
        """One label per image, as [`_encode_labels`] returns them, without a check of guidance."""
        labels = encode_labels(class_labels, self.num_classes, self.config["class_names"])  # (labels,)
        if class_labels is None:
            labels = labels.expand(num_images)  # "no class" for each image
        elif num_images not in (1, len(labels)):
            raise ValueError(f"`image` must be one image or one per label, got {num_images} for {len(labels)} labels.")
        return labels.to(self._execution_device)

    def _call_back(
        self, callback: Callback | None, tensor_inputs: Sequence[str], step: int, size: Any, ids: torch.Tensor
    ) -> torch.Tensor:
        """Calls `callback_on_step_end`. Returns the ids that it returns, or the sampled ones if it returns none.

        Where diffusers passes a timestep, the callback gets the size `(height, width)` in ids.
        """
        if callback is None:
            return ids
        tensors = {}
        if tensor_inputs:
            tensors["ids"] = ids.clone()
        returned_tensors = callback(self, step, size, tensors)
        if not returned_tensors or "ids" not in returned_tensors:
            return ids
        new_ids = to_int64("ids", returned_tensors["ids"]).to(ids.device)
        codebook_size = self.vqvae.config["codebook_size"]
        has_same_shape = new_ids.shape == ids.shape
        is_valid = has_same_shape and new_ids.min() >= 0 and new_ids.max() < codebook_size
        if not is_valid:
            raise ValueError(
                f"`ids` that `callback_on_step_end` returns must have shape {tuple(ids.shape)} and lie in "
                f"[0, {codebook_size}), got shape {tuple(new_ids.shape)} in [{new_ids.min()}, {new_ids.max()}]."
            )
        return new_ids

    def _output(self, ids: torch.Tensor, size: tuple[int, int], output_type: str, return_dict: bool) -> Any:
        """Output of a call, from ids `(batch, h, w)` of images with this height and width in pixels."""
        images: Any
        if output_type == "latent":
            images = ids
        else:
            decoded = self.vqvae.decode(ids).sample  # (batch, 3, h * f, w * f)
            sample = self.vqvae.resize_to_image(decoded, size, scale=1.0)
            images = self.image_processor.postprocess(sample, output_type=output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images,)
        return ImagePipelineOutput(images=images)


def check_class_names(class_names: Sequence[str], num_classes: int) -> None:
    """Raises ValueError unless there is a different name for each class."""
    has_duplicates = len(set(class_names)) < len(class_names)
    if has_duplicates or len(class_names) != num_classes:
        raise ValueError(f"`class_names` must be {num_classes} different names, one per class, got {class_names}.")
