"""Classes of an image set or a token set, in words."""

from collections.abc import Sequence

import datasets

SHOWN_CLASSES = 10


def describe_classes(features: datasets.Features) -> dict[str, str]:
    """Number and first names of the classes of each column that has classes.

    Args:
        features (`datasets.Features`): Columns of a set.
    """
    texts = {}
    for column, feature in features.items():
        if not isinstance(feature, datasets.ClassLabel):
            continue
        texts[column] = f"{feature.num_classes:,} ({list_classes(feature.names)})"
    return texts


def list_classes(names: Sequence[str]) -> str:
    """Names of the first classes, with dots if there are more."""
    listed = ", ".join(names[:SHOWN_CLASSES])
    if len(names) > SHOWN_CLASSES:
        listed += ", ..."
    return listed
