"""Labels of classes, given by number or name."""

import reprlib
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from diffusers import ConfigSpec, InputParam, OutputParam

from .modular_blocks import LABELS, Step

Labels = int | str | Sequence[int | str]


def encode_labels(class_labels: Labels | None, num_classes: int, class_names: Sequence[str] | None) -> torch.Tensor:
    """Converts classes to labels in int64. Without classes there is one label, `num_classes`, which means no class.

    Args:
        class_labels (`int`, `str` or a list of them, *optional*): Numbers in `[0, num_classes)`, or names. Numbers may
            also be an array or a tensor.
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
    numbers = _numbers_of_classes(class_labels, num_classes, class_names)
    labels = numbers.reshape(-1)  # (labels,), also for a single number
    is_empty = labels.numel() == 0
    if not is_empty:  # an empty list became a tensor of floats, which `to_int64` would reject for its type
        labels = to_int64("class_labels", labels)
    if is_empty or labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"`class_labels` must be in [0, {num_classes}), got {class_labels!r}.")
    return labels


def _numbers_of_classes(class_labels: Labels, num_classes: int, class_names: Sequence[str] | None) -> torch.Tensor:
    """Numbers of classes that were given by number or name, as a tensor of any type. Their range is not checked."""
    if isinstance(class_labels, str):
        class_labels = [class_labels]
    if not isinstance(class_labels, list | tuple):  # a single number, or an array or a tensor of numbers
        return torch.as_tensor(class_labels)
    names = [] if class_names is None else list(class_names)
    numbers = [_number_of_class(label, names, num_classes) for label in class_labels]
    return torch.as_tensor(numbers)


def _number_of_class(label: Any, names: list[str], num_classes: int) -> Any:
    """Number of the class with this name. A label that is a number is returned as it is."""
    if isinstance(label, str):
        if label not in names:
            raise ValueError(
                f"`class_labels` must be numbers in [0, {num_classes}) or names of classes, {reprlib.repr(names)}, "
                f"got {label!r}."
            )
        return names.index(label)
    if not isinstance(label, Real | torch.Tensor) or isinstance(label, bool):
        raise TypeError(f"`class_labels` must be numbers or names of classes, got {label!r:.80}.")
    return label


def to_int64(name: str, values: torch.Tensor) -> torch.Tensor:
    """Converts integers of any type to int64, because unsigned types lack operations.

    Args:
        name (`str`): Name of the values, for the error.
        values (`torch.Tensor`): Integers of any shape.

    Raises:
        TypeError: The values are not a tensor of integers.
    """
    if not isinstance(values, torch.Tensor):
        raise TypeError(f"`{name}` must be tensors of integers, got {type(values).__name__}. Pass int64 tensors.")
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"`{name}` must be tensors of integers, got {values.dtype}. Pass int64 tensors.")
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
        model = getattr(components, self.expected_components[0].name)
        labels = encode_labels(values.class_labels, model.config.num_classes, components.config["class_names"])
        values.labels = labels.repeat_interleave(values.num_images_per_prompt).to(components._execution_device)
