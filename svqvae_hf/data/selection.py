"""Selection from an image set."""

from collections.abc import Sequence
from dataclasses import dataclass

from svqvae_hf.data.image_rows import LABEL_COLUMNS, check_columns

IMAGE_COLUMN = "image"  # name of the images in a set of image files, which has no columns of its own


@dataclass(frozen=True)
class Selection:
    """Selection from an image set.

    Args:
        config (`str`, *optional*): Configuration of the set.
        split (`str`, *optional*): Split of the set.
        image_column (`str`, *optional*): Column of the images, or their suffix in tar files.
        columns (`Sequence[str]`): Columns that are asked for by name.
        keeps_labels (`bool`): Whether to keep the columns of [`LABEL_COLUMNS`] as well, if the set has them.
    """

    config: str | None
    split: str | None
    image_column: str | None
    columns: Sequence[str]
    keeps_labels: bool

    def keeps(self, column: str) -> bool:
        """Whether a column is kept, if the set has it."""
        return column in self.columns or (self.keeps_labels and column in LABEL_COLUMNS)

    def check_columns(self, names: Sequence[str]) -> None:
        """Raises ValueError unless a set with these columns has all that are asked for."""
        check_columns(self.columns, names)

    def check_image_column(self, set_name: str) -> None:
        """Raises ValueError if a column of images is named for a set of image files, which has no other."""
        if self.image_column not in (None, IMAGE_COLUMN):
            raise ValueError(f"--image-column is for sets that have columns, but `{set_name}` holds images.")
