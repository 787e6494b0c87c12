"""Configs of new networks, checked before they are built."""

import inspect
from collections.abc import Iterable
from typing import Any

from svqvae_hf.hub.repositories import from_hub


def load_network_config(source: str, network_class: Any) -> dict[str, Any]:
    """Loads the config of a new network of diffusers.

    Args:
        source (`str`): A config.json, its folder or Hub id.
        network_class (`type`): Class of the network.

    Raises:
        OSError: If there is no such config.
        ValueError: If it is of another class, or has a key that the class does not know.
    """
    config = from_hub(network_class.load_config, source)
    name = config.get("_class_name", network_class.__name__)
    if name != network_class.__name__:
        raise ValueError(f"The `_class_name` of `{source}` must be {network_class.__name__}, but is {name}.")
    known = inspect.signature(network_class.__init__).parameters
    check_keys(source, config, [*known, *getattr(network_class, "derived_config", ())])
    return config


def check_keys(source: str, config: Iterable[str], known: Iterable[str]) -> None:
    """Raises if a config has unknown keys, because another network than intended would be trained."""
    unknown = sorted(key for key in set(config) - set(known) if not key.startswith("_"))
    if unknown:
        raise ValueError(f"`{source}` must have only keys of its class, but has {', '.join(unknown)}. Correct them.")
