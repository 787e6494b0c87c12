"""The report of an evaluation: rows of a table, values of each image, and notes."""

from dataclasses import dataclass
from typing import Any

from svqvae_hf.evaluation.markdown_table import MarkdownTable
from svqvae_hf.evaluation.measuring import Records

MANY_IMAGES = 10_000  # papers report FID on at least this many
NO_VALUE = "–"


@dataclass(frozen=True)
class Metric:
    """A column of the table.

    Args:
        title (`str`): Its title.
        number_format (`str`): Format of its values.
    """

    title: str
    number_format: str

    def cell(self, value: float | None) -> str:
        """A value as text."""
        if value is None:
            return NO_VALUE
        return format(value, self.number_format)


METRICS = {  # of all reports, in the order of the columns
    "tokens": Metric("tokens", ".0f"),
    "bits_per_pixel": Metric("bits per pixel", ".4f"),
    "bits_per_pixel_stored": Metric("stored", ".4f"),
    "psnr": Metric("PSNR, dB", ".2f"),
    "ssim": Metric("SSIM", ".4f"),
    "lpips": Metric("LPIPS", ".4f"),
    "rfid": Metric("rFID", ".2f"),
    "psnr_full_size": Metric("at full size, dB", ".2f"),
    "as_jpeg": Metric("as JPEG, dB", ".2f"),
    "as_webp": Metric("as WebP, dB", ".2f"),
    "as_avif": Metric("as AVIF, dB", ".2f"),
    "usage": Metric("codes used", ".1%"),
    "perplexity": Metric("perplexity", ".0f"),
    "frechet_distance": Metric("Fréchet distance", ".4g"),
    "precision": Metric("precision", ".3f"),
    "recall": Metric("recall", ".3f"),
}


@dataclass
class Report:
    """Results of [`evaluate`] or [`compare_generated`].

    Args:
        title (`str`): Heading.
        settings (`dict[str, Any]`): Options of the evaluation.
        rows (`list[dict[str, Any]]`): Rows of the table: `title` and values by the names of `METRICS`, `None` where a
            value could not be computed.
        images (`list[dict[str, Any]]`): Measured images in the order of the set: `index`, `name`, `width`, `height`
            and `results`, the values of the image for each row. Empty for generated images.
        skipped (`list[dict[str, Any]]`): Skipped images: `index`, `name`, `reason`.
        notes (`list[str]`): Sentences about values that are missing or need care.
    """

    title: str
    settings: dict[str, Any]
    rows: Records
    images: Records
    skipped: Records
    notes: list[str]

    def table(self) -> list[str]:
        """Lines of the table in Markdown: a column for each value that any row has, and rows in the order of rates."""
        names = self._metrics_with_values()
        titles = [""]  # above the titles of the rows
        for name in names:
            titles.append(METRICS[name].title)
        table = MarkdownTable(titles)
        for row in sorted(self.rows, key=_stored_rate):
            cells = [row["title"]]
            for name in names:
                value = row.get(name)
                cells.append(METRICS[name].cell(value))
            table.add_row(cells)
        return table.lines()

    def _metrics_with_values(self) -> list[str]:
        """Names of the metrics that at least one row has."""
        names = []
        for name in METRICS:
            has_value = any(row.get(name) is not None for row in self.rows)
            if has_value:
                names.append(name)
        return names


def _stored_rate(row: dict[str, Any]) -> float:
    """Stored bits per pixel of a row, by which rows are sorted; 0 for rows of generated images."""
    return row.get("bits_per_pixel_stored", 0)
