"""The report of an evaluation: rows of a table, values of each image, and notes."""

from dataclasses import dataclass, field
from typing import Any

from svqvae_hf.evaluation.markdown_table import MarkdownTable
from svqvae_hf.evaluation.measuring import Records

MANY_IMAGES = 10_000  # papers report FID on at least this many
NO_VALUE = "–"
SAME_BITS_TITLE = "Image files at the same bits per pixel"
ALL_ROWS_TITLE = "All measurements, by stored bits per pixel"


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
        same_bits (`list[dict[str, Any]]`): Models beside image files that take as many bits, from
            [`~svqvae_hf.evaluation.same_bits.compare_with_codecs`].
    """

    title: str
    settings: dict[str, Any]
    rows: Records
    images: Records
    skipped: Records
    notes: list[str]
    same_bits: Records = field(default_factory=list)

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

    def table_at_same_bits(self) -> list[str]:
        """Lines of the table in Markdown of models beside image files that take as many bits; none without codecs."""
        if not self.same_bits:
            return []
        rate_metric = METRICS["bits_per_pixel"]
        psnr_metric = METRICS["psnr"]
        codecs = list(self.same_bits[0]["image_files"])
        titles = ["", rate_metric.title, psnr_metric.title]
        for codec in codecs:
            titles.append(f"{codec}, dB")
        table = MarkdownTable(titles)
        for comparison in self.same_bits:
            rate = comparison["bits_per_pixel"]
            cells = [comparison["title"], rate_metric.cell(rate), psnr_metric.cell(comparison["psnr"])]
            for codec in codecs:
                cells.append(_codec_cell(comparison["image_files"][codec], rate))
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


def _codec_cell(files: dict[str, float], rate: float) -> str:
    """PSNR of image files as text, with their bits per pixel if no files have this rate."""
    psnr = METRICS["psnr"].cell(files["psnr"])
    if files["bits_per_pixel"] == rate:
        return psnr
    rate_of_files = METRICS["bits_per_pixel"].cell(files["bits_per_pixel"])
    return f"{psnr} at {rate_of_files}"
