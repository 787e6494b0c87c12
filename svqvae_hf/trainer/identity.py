"""What a run is: its options, and the identities of the models and sets that it is made from."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from svqvae_files.hub import model_folder
from svqvae_files.identity import NOTES, model_digest, output_identity, value_digest
from svqvae_files.json_files import read_json_object
from svqvae_hf.hub.repositories import from_hub
from svqvae_hf.token_sets.manifest import TokenSet
from svqvae_hf.trainer.configs import read_config
from svqvae_hf.trainer.data.image_source import ImageSource
from svqvae_hf.trainer.options import MODEL_SUFFIX

IMAGE_SET_OPTIONS = ("dataset_name", "train_data_dir", "mix_data_dir", "validation_data_dir")
TOKEN_SET_OPTIONS = ("token_set", "validation_token_set")
UNIMPORTANT = ("output_dir", "resume_from_checkpoint")  # options that do not change the result


@dataclass(frozen=True)
class RunIdentity:
    """What a run is, as its checkpoints and its result record it.

    Args:
        options (`dict[str, Any]`): Options by name, as they may be published.
        models (`dict[str, str]`): Digests of the models that it starts from, by the option that names each.
        sets (`dict[str, str]`): Digests of the image or token sets that it reads, by the option that names each.
        order (`dict[str, int]`): Settings that decide, with the sets, which examples each step has. Scripts whose
            loader records them in its own state leave them out.
    """

    options: dict[str, Any]
    models: dict[str, str] = field(default_factory=dict)
    sets: dict[str, str] = field(default_factory=dict)
    order: dict[str, int] = field(default_factory=dict)

    def to_record(self) -> dict[str, Any]:
        """Returns the identity as JSON holds it, without options that do not change the result."""
        record = asdict(self)
        for name in UNIMPORTANT:
            record["options"].pop(name, None)
        return json.loads(json.dumps(record))

    @classmethod
    def from_file(cls, path: Path) -> "RunIdentity":
        """Reads an identity.

        Raises:
            OSError: The file does not exist or cannot be read.
            ValueError: The file is damaged.
        """
        return cls.from_record(read_json_object(path), path)

    @classmethod
    def from_record(cls, record: Mapping[str, Any], path: Path) -> "RunIdentity":
        """Reads an identity from the content of a file.

        Raises:
            ValueError: The content is damaged.
        """
        for name in ("options", "models", "sets", "order"):
            if not isinstance(record.get(name), dict):
                raise ValueError(f"`{path}` must hold the record of a run, but has no `{name}`.")
        return cls(record["options"], record["models"], record["sets"], record["order"])


def changed_names(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Names, in order, whose values differ in two mappings, or that only one of them has."""
    names = sorted({*recorded, *current})
    return [name for name in names if recorded.get(name) != current.get(name)]


def check_sources(location: Path, recorded: Mapping[str, str], current: Mapping[str, str]) -> None:
    """Raises unless the models or sets of a run are those that its folder or checkpoint was made from.

    Args:
        location (`Path`): Folder of the run, or its checkpoint.
        recorded (`Mapping[str, str]`): Digests that are recorded there, by option.
        current (`Mapping[str, str]`): Digests of this run, by option.

    Raises:
        ValueError: Digests differ.
    """
    changed = changed_names(recorded, current)
    if not changed:
        return
    name = changed[0]
    remedy = "Restore it"
    if name in IMAGE_SET_OPTIONS:
        remedy = (
            "Restore its split and columns, and the names, sizes and times of change of its files (`cp -p` and "
            "`rsync -t` keep times)"
        )
    raise ValueError(
        f"`--{name}` must name what `{location}` was made from, but names something else, or it has changed since. "
        f"{remedy}, or start a new run in another `--output_dir`."
    )


def model_digests(options: Any) -> dict[str, str]:
    """Digests of all models, tokenizers and configs that options name, by the option.

    Such options are `model_config_name_or_path`, `tokenizer_name_or_path` and `pretrained_model_name_or_path`.

    Raises:
        OSError: There is no such model.
        ValueError: A file of it is damaged.
    """
    digests = {}
    for name, source in vars(options).items():
        names_model = name.endswith(MODEL_SUFFIX)
        if source is None or not names_model:
            continue
        if name.startswith("model_config"):
            digests[name] = config_digest(source)
        elif name.startswith("tokenizer"):
            digests[name] = tokenizer_digest(source)
        else:
            digests[name] = model_digest(model_folder(source))
    return digests


def config_digest(source: str) -> str:
    """Digest of the config of a new network.

    Args:
        source (`str`): A config.json, its folder or Hub id.
    """
    config = read_config(source)
    return value_digest({key: value for key, value in config.items() if key not in NOTES})


def tokenizer_digest(source: str) -> str:
    """Digest of a tokenizer, without the weights of a model that lies beside it."""
    tokenizer = from_hub(AutoTokenizer.from_pretrained, source)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return model_digest(folder)


def token_set_digests(options: Any) -> dict[str, str]:
    """Digests of the token sets and text files that a run reads, by the option that names them.

    Args:
        options: Options that may have `token_set`, `validation_token_set` and `text_files`.

    Raises:
        OSError: There is no such set or file.
        ValueError: A set is damaged.
    """
    sources = vars(options)
    digests = {}
    for name in TOKEN_SET_OPTIONS:
        if sources.get(name) is not None:
            digests[name] = TokenSet(sources[name]).digest
    text_files = sources.get("text_files", ())
    if text_files:
        checksums = [output_identity(file).checksum for file in text_files]
        digests["text_files"] = value_digest(checksums)
    return digests


def image_set_digests(images: ImageSource) -> dict[str, str]:
    """Digests of the image sets that a run trains on, by the option that names each."""
    name = "dataset_name" if images.options.train_data_dir is None else "train_data_dir"
    digests = {name: images.images.fingerprint}
    if images.mixed is not None:
        digests["mix_data_dir"] = images.mixed.fingerprint
    return digests
