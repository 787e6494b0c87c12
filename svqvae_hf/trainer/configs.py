"""Configs of new networks, checked before they are built."""

import inspect
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from svqvae_files.errors import explained
from svqvae_files.json_files import read_json_object
from svqvae_hf.hub.repositories import download_file

CONFIG_FILE = "config.json"


def read_config(source: str) -> dict[str, Any]:
    """Reads the config of a network.

    Args:
        source (`str`): A config.json, its folder or Hub id.

    Raises:
        OSError: There is no such config.
        ValueError: It is not a JSON object.
    """
    path = Path(source)
    if path.is_dir():
        path = path / CONFIG_FILE
    elif not path.exists():
        path = download_file(repo_id=source, file=CONFIG_FILE, source=source)
    with explained(path, "read"):
        return read_json_object(path)


def load_network_config(source: str, network_class: Any) -> dict[str, Any]:
    """Loads the config of a new network of diffusers.

    Args:
        source (`str`): A config.json, its folder or Hub id.
        network_class (`type`): Class of the network.

    Raises:
        OSError: There is no such config.
        ValueError: It is not a JSON object, is of another class, or has a key that the class does not know.
    """
    config = read_config(source)
    expected_class = network_class.__name__
    class_name = config.get("_class_name", expected_class)
    if class_name != expected_class:
        raise ValueError(f"The `_class_name` of `{source}` must be {expected_class}, but is {class_name}.")
    allowed_keys = list(inspect.signature(network_class.__init__).parameters)
    # Saved configs of an SVQVAE also hold values that follow from its parameters, such as `latent_channels`.
    allowed_keys += getattr(network_class, "derived_config", ())
    check_keys(source, config, allowed_keys)
    return config


def check_keys(source: str, config: Iterable[str], allowed: Collection[str]) -> None:
    """Raises if a config has unknown keys, because another network than intended would be trained."""
    unknown_keys = []
    for key in sorted(config):
        is_private = key.startswith("_")  # of diffusers
        if key not in allowed and not is_private:
            unknown_keys.append(key)
    if unknown_keys:
        listed = ", ".join(unknown_keys)
        raise ValueError(f"`{source}` must have only keys of its class, but has {listed}. Correct them.")
