"""JSON files that hold one object."""

import json
import os
from pathlib import Path
from typing import Any


def parse_json_object(content: bytes | str, name: str | os.PathLike) -> dict[str, Any]:
    """Parses the content of a JSON file that must hold one object.

    Args:
        content (`bytes` or `str`): Content of the file.
        name (`str` or `os.PathLike`): Path or URL of the file, for the error.

    Raises:
        ValueError: The content is not JSON, or it is another value than an object.
    """
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`{name}` must hold a JSON object, but is damaged: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"`{name}` must hold a JSON object, but holds a {type(value).__name__}.")
    return value


def read_json_object(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a JSON file that must hold one object.

    Raises:
        OSError: The file does not exist or cannot be read.
        ValueError: The content is not JSON, or it is another value than an object.
    """
    return parse_json_object(Path(path).read_bytes(), path)
