"""Classes of an image set or a token set, in words."""

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
        listed = ", ".join(feature.names[:SHOWN_CLASSES])
        if feature.num_classes > SHOWN_CLASSES:
            listed += ", ..."
        texts[column] = f"{feature.num_classes:,} ({listed})"
    return texts
