"""Texts and images to the tokens of a language model, and back."""

import hashlib
import io
import json
import os
import urllib.request
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import httpx
import torch
from PIL import Image, ImageOps
from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerBase
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import ImagesKwargs, ProcessingKwargs, ProcessorMixin

from .checks import check_same_codebook
from .image_files import load_image, to_rgb
from .image_processing_svqvae import SVQVAEImageProcessor
from .image_vocabulary import CONFIG_KEY, NO_CONDITION, PLACEHOLDER, ImageVocabulary
from .loading import execution_device
from .modeling_svqvae import SVQVAE

VQVAE_FOLDER = "vqvae"  # beside the language model
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of what the tokens of a tokenizer mean, that is, of its vocabulary.

    Returns:
        `str`: SHA-256 in hexadecimal.
    """
    vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(vocabulary.encode()).hexdigest()


class SVQVAEImagesKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Arguments for images: `grid`, rows and columns of codes, by default the grid of the closest aspect ratio."""

    grid: Any


class SVQVAEProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """Arguments of [`SVQVAEProcessor`]."""

    images_kwargs: SVQVAEImagesKwargs


class SVQVAEProcessor(ProcessorMixin):
    """Prepares texts and images for a language model with image tokens, and converts what it generates back.

    In a text, `<|image|>` stands for an image. The language model sees codes between begin and end tokens, and no
    pixels.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer with the image tokens.
        vqvae ([`SVQVAE`]): Image tokenizer. Move it to the device on which it should run.
        image_vocabulary (`ImageVocabulary` or `dict`): Image tokens of the language model.
        chat_template (`str`, *optional*): Chat template, by default the tokenizer's.

    Raises:
        ValueError: If the vqvae has another codebook, or the tokenizer lacks image tokens.

    Example:
        >>> processor = AutoProcessor.from_pretrained("lm-with-images")  # after `import svqvae_hf`
        >>> inputs = processor(text="<|image|> shows", images="photo.jpg", return_tensors="pt")
        >>> tokens = model.generate(**inputs, logits_processor=[ImageGrammar(model.config)])
        >>> parts = processor.post_process_multimodal_output(tokens, generation_mode="mixed")[0]  # texts, images
    """

    valid_processor_kwargs = SVQVAEProcessorKwargs
    vqvae_class: type[SVQVAE] = SVQVAE
    image_token = PLACEHOLDER
    no_condition = NO_CONDITION

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vqvae: SVQVAE,
        image_vocabulary: ImageVocabulary | dict[str, Any],
        chat_template: str | dict[str, str] | None = None,
    ):
        super().__init__(tokenizer, chat_template=chat_template or tokenizer.chat_template)
        if not isinstance(image_vocabulary, ImageVocabulary):
            image_vocabulary = ImageVocabulary.from_entries(image_vocabulary)
        check_same_codebook(vqvae, image_vocabulary)
        self.vocabulary = image_vocabulary
        self.image_token_ids = list(range(image_vocabulary.first_token, image_vocabulary.stop))
        self._check_tokenizer(tokenizer)
        self.vqvae = vqvae
        self.image_processor = SVQVAEImageProcessor(pixel_range=vqvae.config["pixel_range"])

    def _check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises unless a tokenizer has the image tokens and the words that the language model was made for."""
        if tokenizer.convert_tokens_to_ids(self.vocabulary.names) != self.image_token_ids:
            raise ValueError(
                f"the tokenizer must have the image tokens {self.image_token_ids[0]} to {self.image_token_ids[-1]} of "
                "the processor, but has others. Use the tokenizer that `svqvae extend-lm` saved."
            )
        digest = self.vocabulary.tokenizer_digest
        if digest is not None and tokenizer_digest(tokenizer) != digest:
            raise ValueError(
                "the tokenizer must be the one that the language model was made for, but has other words or ids. Use "
                "the tokenizer that `svqvae extend-lm` saved."
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Self:
        """Loads the config, the tokenizer, and the vqvae in a subfolder.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Folder, or `org/name` on the Hub.
            **kwargs: Arguments of [`~transformers.AutoTokenizer.from_pretrained`], such as `subfolder` and `revision`.
                `chat_template` replaces the saved chat template.

        Raises:
            OSError: If a file does not exist, or the Hub does not answer.
            ValueError: If the config has no image tokens, or the parts do not belong together.
        """
        source = os.fspath(pretrained_model_name_or_path)
        config, _ = cls.get_processor_dict(source, **kwargs)
        vocabulary = ImageVocabulary.from_config(config)  # raises if the config has no image tokens
        tokenizer = AutoTokenizer.from_pretrained(source, **kwargs)
        subfolder = kwargs.get("subfolder") or ""
        vqvae_folder = os.path.join(subfolder, VQVAE_FOLDER)
        hub_options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        vqvae = cls.vqvae_class.from_pretrained(source, subfolder=vqvae_folder, **hub_options)
        chat_template = kwargs.get("chat_template", config.get("chat_template"))
        return cls(tokenizer, vqvae, vocabulary, chat_template)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Saves the config, the tokenizer with the chat template, and the vqvae in a subfolder.

        Args:
            save_directory (`str` or `os.PathLike`): Folder to write to.
            push_to_hub (`bool`, defaults to `False`): Whether to upload the folder.
            **kwargs: Further arguments of transformers' method.
        """
        self.vqvae.save_pretrained(Path(save_directory, VQVAE_FOLDER))
        saved = super().save_pretrained(save_directory, **kwargs)
        if push_to_hub:  # transformers' method would leave out the subfolder
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        return saved

    def to_dict(self) -> dict[str, Any]:
        """Content of `processor_config.json`."""
        config = {"processor_class": type(self).__name__, CONFIG_KEY: self.vocabulary.to_config()}
        if hasattr(self, "auto_map"):  # of a repository with code
            config["auto_map"] = self.auto_map
        return config

    def __call__(self, images: Any = None, text: str | list[str] | None = None, **kwargs: Any) -> BatchFeature:
        """Converts texts with images to tokens.

        Args:
            images: Images in the order of the placeholders of all texts, in one list or in several, which are joined:
                Pillow images, paths, URLs, arrays and tensors. Each is resized and cropped to a grid.
            text (`str` or `list[str]`): Texts, with `<|image|>` for each image.
            **kwargs: `grid` for images, and arguments of the tokenizer such as `return_tensors` and `padding`. If
                the first text starts with the begin-of-sequence token, as chat templates write it, no such token is
                added to any text.

        Returns:
            `BatchFeature`: `input_ids` and `attention_mask`.

        Raises:
            ValueError: If a text is not a string, the number of images differs from the number of placeholders,
                the model does not know the grid, or a text contains malformed images.
        """
        if text is None:
            raise ValueError(f"`text` must be given. For images alone, pass one `{PLACEHOLDER}` per image.")
        _check_texts(text)
        # transformers takes arguments of the tokenizer in `text_kwargs`, or beside it. The caller may use either.
        is_in_text_kwargs = "add_special_tokens" in kwargs.get("text_kwargs", {})
        if self._starts_with_bos(text) and not is_in_text_kwargs:
            kwargs.setdefault("add_special_tokens", False)
        features = super().__call__(images=images, text=text, **kwargs)
        for tokens in features["input_ids"]:
            self.vocabulary.split(torch.as_tensor(tokens))  # raises for malformed images
        return features

    def _starts_with_bos(self, text: str | list[str]) -> bool:
        """Whether a text, or the first of several, starts with the begin of sequence."""
        bos = self.tokenizer.bos_token
        texts = [text] if isinstance(text, str) else text
        if bos is None:
            return False
        return texts[0].startswith(bos)

    def prepare_inputs_layout(self, images: Any = None, text: Any = None, **kwargs: Any) -> tuple[Any, ...]:
        """Opens the images as Pillow images, in one list."""
        _, *other_inputs = super().prepare_inputs_layout(text=text, **kwargs)  # images, text, ...
        if images is not None:
            images = [self._open(image) for image in _flatten(images)]
        return (images, *other_inputs)

    def _process_images(self, images: Any, grid: Any = None, **_: Any) -> tuple[dict[str, Any], list[str]]:
        """Returns no features of the images, and the texts that replace their placeholders."""
        grids = self.encode_images(make_flat_list_of_images(images), grid)
        return {}, [self.image_text(ids) for ids in grids]

    def encode_images(self, images: Sequence[Image.Image], grid: tuple[int, int] | None = None) -> list[torch.Tensor]:
        """Encodes images to ids `(h, w)`.

        Args:
            images (`Sequence[PIL.Image.Image]`): Images of any size.
            grid (`tuple[int, int]`, *optional*): Rows and columns of codes of all images, by default the known grid
                whose aspect ratio is closest to the image's.

        Raises:
            ValueError: If the model does not know the grid.
        """
        if grid is None:
            return [self._encode(image, self._closest_grid(image)) for image in images]
        self.vocabulary.size_token(grid)  # raises for an unknown grid
        return [self._encode(image, grid) for image in images]

    @torch.inference_mode()
    def _encode(self, image: Image.Image, grid: tuple[int, int]) -> torch.Tensor:
        """Ids `(h, w)` of an image, which is resized and cropped to a grid."""
        rows, columns = grid
        size = (columns * self.vqvae.f, rows * self.vqvae.f)
        cropped = ImageOps.fit(to_rgb(image), size, Image.Resampling.BICUBIC)
        sample = self.image_processor(cropped)["pixel_values"]  # (1, 3, height, width)
        sample = sample.to(execution_device(self.vqvae), self.vqvae.dtype)
        return self.vqvae.encode_tokens(sample)[0].cpu()

    def _closest_grid(self, image: Image.Image) -> tuple[int, int]:
        """Grid of the closest aspect ratio. Among equally close grids, the one with the most rows."""
        aspect = image.width / image.height

        def order(grid: tuple[int, int]) -> tuple[float, int]:
            """Factor between the aspect ratios of the grid and the image, at least 1; then the most rows."""
            rows, columns = grid
            factor_if_wider = columns / rows / aspect
            factor_if_taller = aspect * rows / columns
            factor = max(factor_if_wider, factor_if_taller)
            return factor, -rows  # negative, so that `min` prefers more rows

        return min(self.vocabulary.grids, key=order)

    @torch.inference_mode()
    def decode_images(self, grids: Sequence[torch.Tensor]) -> list[Image.Image]:
        """Decodes ids, one grid `(h, w)` per image, to Pillow images."""
        device = execution_device(self.vqvae)
        images = []
        for ids in grids:
            batch = ids.unsqueeze(0).to(device)  # (1, h, w)
            sample = self.vqvae.decode_tokens(batch)
            images += self.image_processor.postprocess(sample)
        return images

    def image_text(self, ids: torch.Tensor) -> str:
        """Text whose tokens are an image with ids `(h, w)`, such as ids of a token set."""
        return "".join(self.tokenizer.convert_ids_to_tokens(self.vocabulary.encode(ids)))

    def begin_image(self, grid: tuple[int, int]) -> str:
        """Text after which the language model generates the codes of an image with this grid.

        Raises:
            ValueError: If the model does not know the grid.
        """
        return "".join(self.tokenizer.convert_ids_to_tokens(self.vocabulary.begin_image(grid)))

    def post_process_multimodal_output(
        self,
        generated_outputs: torch.Tensor | Sequence[Any],
        skip_special_tokens: bool = True,
        generation_mode: str | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """Converts sequences back to texts and images. An image that is cut off is left out, with a warning.

        Args:
            generated_outputs (`torch.Tensor` of shape `(batch, length)` or a list of sequences): Tokens. Include the
                prompt if the prompt begins an image.
            skip_special_tokens (`bool`, defaults to `True`): Whether to leave out special tokens of texts.
            generation_mode (`str`, *optional*): `"text"`, the default, for the text of each sequence, `"image"` for a
                list of its images, `"mixed"` for a list of both in order.
            **kwargs: Further arguments of the tokenizer's `decode`.

        Raises:
            ValueError: If a sequence has a malformed image, unless only texts are asked for.
        """
        if generation_mode not in (None, "text", "image", "mixed"):
            raise ValueError(f'`generation_mode` must be "text", "image", "mixed" or None, got {generation_mode!r}.')
        if generation_mode in (None, "text"):
            return self.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)
        results: list[Any] = []
        for number, tokens in enumerate(generated_outputs):
            sequence = torch.as_tensor(tokens).cpu()
            parts = self.vocabulary.split(sequence)  # tokens of a text, ids of an image, tokens of a text, ...
            tokens_of_texts = parts[::2]
            ids_of_images = parts[1::2]
            images = self.decode_images(ids_of_images)
            num_begins = int((sequence == self.vocabulary.begin).sum())
            is_cut_off = num_begins > len(images)
            if is_cut_off:
                warnings.warn(
                    f"sequence {number} ends inside an image, which is left out. Raise `max_new_tokens`.", stacklevel=2
                )
            if generation_mode == "image":
                results.append(images)
            else:
                texts = [self.tokenizer.decode(text, skip_special_tokens, **kwargs) for text in tokens_of_texts]
                results.append(_interleave(texts, images))
        return results

    def _open(self, image: Any) -> Image.Image:
        """An image of any kind as an RGB image of Pillow."""
        is_data_url = isinstance(image, str) and image.startswith("data:")
        is_web_url = isinstance(image, str) and image.startswith(("http://", "https://"))
        if is_data_url:
            return load_image(urllib.request.urlopen(image))
        if is_web_url:
            answer = httpx.get(image, timeout=60, follow_redirects=True).raise_for_status()
            return load_image(io.BytesIO(answer.content))
        if isinstance(image, str | os.PathLike):
            return load_image(image)
        if isinstance(image, Image.Image):
            return to_rgb(image)
        # Any other image is an array or a tensor, which only the image processor can read.
        pixels = self.image_processor(image)["pixel_values"]  # (1, 3, height, width)
        return self.image_processor.postprocess(pixels)[0]


def _check_texts(text: Any) -> None:
    """Raises unless `text` is a text, or a list of at least one."""
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, list | tuple) or not texts:
        raise ValueError(f"`text` must be a text or a list of texts, got {text!r:.80}.")
    for element in texts:
        if not isinstance(element, str):
            raise ValueError(f"`text` must be a text or a list of texts, got {element!r:.80} among them.")


def _flatten(images: Any) -> list[Any]:
    """Images of nested lists and batches in one list."""
    is_batch = isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4
    if not is_batch:
        return [images]
    flat = []
    for image in images:
        flat += _flatten(image)
    return flat


def _interleave(texts: Sequence[str], images: Sequence[Image.Image]) -> list[str | Image.Image]:
    """Texts and the images between them in their order, without empty texts."""
    parts: list[str | Image.Image] = []
    for number, text in enumerate(texts):
        if text:
            parts.append(text)
        if number < len(images):
            parts.append(images[number])
    return parts
