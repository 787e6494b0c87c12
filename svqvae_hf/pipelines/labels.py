"""Labels of classes, given by number or name."""

import reprlib
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ConfigSpec, InputParam, OutputParam

from .modular_blocks import LABELS, Step

Labels = int | str | Sequence[int | str]


def encode_labels(class_labels: Labels | None, num_classes: int, class_names: Sequence[str] | None) -> torch.Tensor:
    """Converts classes to labels in int64. Without classes there is one label, `num_classes`, which means no class.

    Args:
        class_labels (`int`, `str` or a list of them, *optional*): Numbers in `[0, num_classes)`, or names.
        num_classes (`int`): Number of classes.
        class_names (`Sequence[str]`, *optional*): Name of each class.

    Raises:
        TypeError: A label is neither an integer nor a name.
        ValueError: A class is unknown, or there are no classes.
    """
    if class_labels is None:
        return torch.tensor([num_classes])
    if not num_classes:
        raise ValueError("`class_labels` must be left out, because the model has no classes.")
    names = list(class_names or [])
    given = [class_labels] if isinstance(class_labels, str) else class_labels
    if isinstance(given, list | tuple):
        unknown = [label for label in given if isinstance(label, str) and label not in names]
        if unknown:
            raise ValueError(
                f"`class_labels` must be numbers in [0, {num_classes}) or names of classes, {reprlib.repr(names)}, "
                f"got {unknown[0]!r}."
            )
        given = [names.index(label) if isinstance(label, str) else label for label in given]
    numbers = torch.as_tensor(given).reshape(-1)
    labels = to_int64("class_labels", numbers) if numbers.numel() else numbers
    if not labels.numel() or not 0 <= labels.min() <= labels.max() < num_classes:
        raise ValueError(f"`class_labels` must be in [0, {num_classes}), got {class_labels!r}.")
    return labels


def to_int64(name: str, values: torch.Tensor) -> torch.Tensor:
    """Converts integers of any type to int64, because unsigned types lack operations.

    Args:
        name (`str`): Name of the values, for the error.
        values (`torch.Tensor`): Integers of any shape.

    Raises:
        TypeError: The values are not a tensor of integers.
    """
    found = values.dtype if isinstance(values, torch.Tensor) else type(values).__name__
    if isinstance(found, str) or found.is_floating_point or found.is_complex or found == torch.bool:
        raise TypeError(f"`{name}` must be tensors of integers, got {found}. Pass int64 tensors.")
    return values.long()


class ClassStep(Step):
    """Converts classes to labels. Its component is the model, whose config has the number of classes."""

    description = "Converts classes, given by number or name, to one label per image."
    expected_configs = [ConfigSpec("class_names", [])]
    inputs = [
        InputParam("class_labels", description="Number or name of each image's class; no class by default."),
        InputParam.template("num_images_per_prompt"),
    ]
    intermediate_outputs = [OutputParam(**LABELS)]

    def run(self, components: Any, values: Any) -> None:
        """Sets `labels`."""
        config = getattr(components, self.expected_components[0].name).config
        labels = encode_labels(values.class_labels, config.num_classes, components.config["class_names"])
        values.labels = labels.repeat_interleave(values.num_images_per_prompt).to(components._execution_device)
