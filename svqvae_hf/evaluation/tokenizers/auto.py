"""Loads any tokenizer. The class that its config names chooses the adapter."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, VQModel

from svqvae_files.file_names import REPO_ID
from svqvae_hf.evaluation.tokenizers.diffusers_models import AutoencoderKLTokenizer, SVQVAETokenizer, VQModelTokenizer
from svqvae_hf.evaluation.tokenizers.protocol import Tokenizer
from svqvae_hf.hub.repositories import bundled_name, from_hub, is_hub_id
from svqvae_hf.models.image_files import IMAGE_SUFFIXES
from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.tokens.context_model import find_context_model

CLASSES: dict[str, Any] = {"SVQVAE": SVQVAE, "VQModel": VQModel, "AutoencoderKL": AutoencoderKL}
FAULTS = ("missing_keys", "mismatched_keys")  # of weights, as diffusers names them


@dataclass(frozen=True)
class _Location:
    """Where a tokenizer lies.

    Args:
        repository (`str`): Folder or Hub id.
        subfolder (`str`, *optional*): Folder of the repository that holds the tokenizer, by default all of it.
    """

    repository: str
    subfolder: str | None = None

    @property
    def options(self) -> dict[str, str]:
        """Options of `from_pretrained` besides the repository."""
        if self.subfolder is None:
            return {}
        return {"subfolder": self.subfolder}


def load_tokenizers(
    source: str,
    device: str | torch.device = "cpu",
    scales: Sequence[float] = (1.0,),
    scale_from: str = "image",
    tile_size: int | None = None,
    overlap: int | None = None,
    title: str | None = None,
) -> list[Tokenizer]:
    """Loads a tokenizer in float32 for [`evaluate`], an [`SVQVAE`] once per scale.

    Args:
        source (`str`): Folder, `org/repo` or `org/repo/subfolder` on the Hub. Its `config.json` must name an
            [`SVQVAE`], or diffusers' `VQModel` or `AutoencoderKL`.
        device (`str` or `torch.device`, defaults to `"cpu"`): Device to load it to.
        scales (`Sequence[float]`, defaults to `(1.0,)`): Scales of an [`SVQVAE`].
        scale_from (`str`, defaults to `"image"`): What an [`SVQVAE`] resizes to a scale.
        tile_size (`int`, *optional*): Tiles of an [`SVQVAE`], as in
            [`~svqvae_hf.tokens.image_tokens.choose_tiles`].
        overlap (`int`, *optional*): Their overlap.
        title (`str`, *optional*): Name in the tables, by default from [`tokenizer_titles`].

    Raises:
        OSError: If it cannot be loaded.
        ValueError: If its config names another class, weights are missing, or its context model is for another
            codebook.
    """
    model_class = CLASSES[class_name(source)]
    location = _locate(source)
    model = _load_model(model_class, source, location).to(device).eval()
    if title is None:
        (title,) = tokenizer_titles([source])
    if model_class is VQModel:
        return [VQModelTokenizer(title, model)]
    if model_class is AutoencoderKL:
        return [AutoencoderKLTokenizer(title, model)]
    context_model = find_context_model(location.repository, model.codebook_fingerprint(), **location.options)
    tokenizers: list[Tokenizer] = []
    for scale in scales:
        scale_title = title if scale == 1 else f"{title}, scale {scale:g}"
        tokenizer = SVQVAETokenizer(scale_title, model, scale, scale_from, tile_size, overlap, context_model)
        tokenizers.append(tokenizer)
    return tokenizers


def class_name(source: str) -> str:
    """Class that the config of a folder or Hub id names.

    Raises:
        OSError: If there is no config.
        ValueError: If it names none of `CLASSES`.
    """
    location = _locate(source)
    folder = Path(location.repository)  # does not exist if the source is on the Hub
    lacks_config = folder.is_dir() and not (folder / "config.json").is_file()
    if lacks_config:
        advice = _folder_advice(folder)
        raise ValueError(f"`{source}` must be the folder of a model, but has no config.json.{advice}")
    config = from_hub(SVQVAE.load_config, location.repository, **location.options)
    named_class = None
    if isinstance(config, dict):
        # diffusers names a class in `_class_name`. transformers names its kind of model, for the error below.
        named_class = config.get("_class_name", config.get("model_type"))
    if isinstance(named_class, str) and named_class in CLASSES:
        return named_class
    advice = _class_advice(folder)
    name = str(named_class or "no class")
    raise ValueError(f"the config.json of `{source}` must name one of {', '.join(CLASSES)}, got {name:.80}.{advice}")


def tokenizer_titles(sources: Sequence[str]) -> list[str]:
    """Names of tokenizers in a table: short, but all different, and without the folders of this machine.

    Args:
        sources (`Sequence[str]`): As in [`load_tokenizers`].

    Returns:
        `list[str]`: The name of a bundled model, the id on the Hub, or the last folders of a local path.
    """
    parts_of_titles = [_title_parts(source) for source in sources]
    titles = []
    for number, parts in enumerate(parts_of_titles):
        parts_of_others = parts_of_titles[:number] + parts_of_titles[number + 1 :]
        titles.append(_shortest_unique_end(parts, parts_of_others))
    return titles


def _title_parts(source: str) -> tuple[str, ...]:
    """Parts of the longest title of a tokenizer. The last of them are its title in a table.

    The name of a bundled model and an id on the Hub are a single part, so that they stay whole.
    """
    name_of_bundled_model = bundled_name(source)
    if name_of_bundled_model is not None:
        return (name_of_bundled_model,)  # such as ("bundled",)
    if _is_on_hub(source):
        return (source,)  # such as ("org/repo",) or ("org/repo/vqvae",)
    return Path(source).absolute().parts  # such as ("/", "home", "me", "model")


def _is_on_hub(source: str) -> bool:
    """Whether a source is `org/repo` or `org/repo/subfolder` on the Hub, and not a local folder."""
    is_subfolder_on_hub = _locate(source).subfolder is not None
    return is_hub_id(source) or is_subfolder_on_hub


def _shortest_unique_end(parts: tuple[str, ...], parts_of_others: Sequence[tuple[str, ...]]) -> str:
    """Joins the last parts of a title, as few as make it differ from the ends of all other titles.

    The end of `("/", "home", "me", "model")` beside `("/", "home", "you", "model")` is `me/model`.
    """
    for num_parts in range(1, len(parts)):
        end = parts[-num_parts:]
        ends_of_others = [parts_of_other[-num_parts:] for parts_of_other in parts_of_others]
        if end not in ends_of_others:
            return str(Path(*end))
    return str(Path(*parts))


def _load_model(model_class: Any, source: str, location: _Location) -> Any:
    """Loads a model in float32. Raises if it lacks weights, which diffusers would draw at random."""
    model, info = from_hub(
        model_class.from_pretrained,
        location.repository,
        **location.options,
        use_safetensors=True,
        output_loading_info=True,
        dtype=torch.float32,
    )
    names = []
    for fault in FAULTS:
        names += [str(key) for key in info[fault]]
    if names:
        raise ValueError(
            f"`{source}` must have all weights of {model_class.__name__}, but {len(names)} are missing or have "
            f"another shape, among them {min(names)}."
        )
    return model


def _class_advice(folder: Path) -> str:
    """Advice for a model of a class that is not supported, in a folder or on the Hub. Begins with a space."""
    advice = ""
    if folder.is_dir():
        advice = _folder_advice(folder)
    if not advice:
        advice = " Convert an original checkpoint with `svqvae convert`, or write an adapter."
    return advice


def _folder_advice(folder: Path) -> str:
    """Advice for a folder that holds no tokenizer; empty if there is none. Begins with a space."""
    if (folder / "vqvae" / "config.json").is_file():
        return f" It is a generator. Pass its tokenizer, `{folder / 'vqvae'}`."
    if any(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.iterdir()):
        return " It holds images. Pass it as --generated to compare them with the image set."
    return ""


def _locate(source: str) -> _Location:
    """Splits `org/repo/subfolder` on the Hub. Any other source is a folder or Hub id as a whole."""
    match = re.fullmatch(rf"({REPO_ID})/(.+)", source)
    if match is None or Path(source).exists():
        return _Location(source)
    return _Location(repository=match[1], subfolder=match[2])
