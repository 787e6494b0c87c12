"""Names of the images that are decoded from the rows of a token set."""

import os
import re
from collections.abc import Mapping
from typing import Any

from svqvae_hf.models.image_files import IMAGE_SUFFIXES

MAX_COMPONENT_BYTES = 200  # of the name of a file or folder, which may have 255 with its ending
ROW_NUMBER = re.compile(r"\d{8}")
UNSAFE_CHARACTERS = re.compile(r"[\x00-\x1f\x7f\\:]")


class RowNames:
    """Names the rows of a set one after the other.

    A row has the name of its image, without the suffix, and the name of the crop if an image has several. It has its
    number instead, such as `00000012`, if a row before it has the same name, or if the name cannot be a path below a
    folder. So the name of a row depends on the rows before it alone.
    """

    def __init__(self) -> None:
        self._names: set[str] = set()

    def next_name(self, number: int, row: Mapping[str, Any]) -> str:
        """Names the next row.

        Args:
            number (`int`): Number of the row.
            row (`Mapping[str, Any]`): The row, with its `key` and perhaps its `crop`.
        """
        name = _name_of_image(row)
        if name is None or name in self._names:
            return f"{number:08}"
        self._names.add(name)
        return name


def _name_of_image(row: Mapping[str, Any]) -> str | None:
    """Name of the image of a row; `None` if the row has no name that is safe as a path, since it may come from anyone.

    Then the row is named after its own number.
    """
    key = row.get("key")
    if not isinstance(key, str) or UNSAFE_CHARACTERS.search(key):
        return None
    name, suffix = os.path.splitext(key)
    if suffix.lower() not in IMAGE_SUFFIXES:
        name = key
    crop = row.get("crop")
    if isinstance(crop, str):
        name = f"{name}_{crop}"
    for component in name.split("/"):
        is_hidden = component.startswith(".")
        is_long = len(component.encode(errors="surrogateescape")) > MAX_COMPONENT_BYTES
        if not component or is_hidden or is_long:
            return None
    looks_like_row_number = ROW_NUMBER.fullmatch(name) is not None  # perhaps the number of another row
    if looks_like_row_number:
        return None
    return name
