"""The report of an evaluation: a table and notes, which are written as JSON and Markdown."""

import json
import math
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from svqvae_files.outputs import write_file
from svqvae_hf.evaluation.measuring import Records

LIBRARIES = ("svqvae-hf", "torch", "diffusers", "torchmetrics", "lpips", "torch-fidelity", "pillow", "numpy")
MANY_IMAGES = 10_000  # papers report FID on at least this many
METRICS = {  # title and number format of each value in the table
    "tokens": ("tokens", ".0f"),
    "bits_per_pixel": ("bits per pixel", ".4f"),
    "bits_per_pixel_stored": ("stored", ".4f"),
    "psnr": ("PSNR, dB", ".2f"),
    "ssim": ("SSIM", ".4f"),
    "lpips": ("LPIPS", ".4f"),
    "rfid": ("rFID", ".2f"),
    "psnr_full_size": ("at full size, dB", ".2f"),
    "as_jpeg": ("as JPEG, dB", ".2f"),
    "as_webp": ("as WebP, dB", ".2f"),
    "as_avif": ("as AVIF, dB", ".2f"),
    "usage": ("codes used", ".1%"),
    "perplexity": ("perplexity", ".0f"),
    "frechet_distance": ("Fréchet distance", ".4g"),
    "precision": ("precision", ".3f"),
    "recall": ("recall", ".3f"),
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
        """Lines of the table in Markdown: a column for each value that any row has."""
        shown = {key: each for key, each in METRICS.items() if any(row.get(key) is not None for row in self.rows)}
        lines = [["", *(title for title, _ in shown.values())]]
        for row in sorted(self.rows, key=lambda row: row.get("bits_per_pixel_stored", 0)):
            values = ((row.get(key), form) for key, (_, form) in shown.items())
            lines.append([row["title"], *("–" if value is None else format(value, form) for value, form in values)])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, ["-" * (width - 1) + ":" for width in widths])
        padded = ([cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
        return [f"| {' | '.join(line)} |" for line in padded]

    def write(self, folder: Path) -> None:
        """Writes `report.json` and `report.md` to a folder, created if it does not exist.

        Raises:
            OSError: If a file cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        versions = {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}
        document = vars(self) | {"versions": versions}
        write_file(folder / "report.json", (json.dumps(_finite(document), allow_nan=False) + "\n").encode())
        settings = {key.replace("_", " "): value for key, value in self.settings.items() if value not in (None, [])}
        skipped = [f"`{each['name']}` (index {each['index']}): {each['reason']}" for each in self.skipped]
        lists = {
            "Notes": self.notes,
            f"Skipped: {len(skipped)}": skipped,
            "Settings": [f"{key}: {_words(value)}" for key, value in settings.items()],
            "Versions": [f"{name}: {number}" for name, number in versions.items()],
        }
        lines = [f"# {self.title}", "", *self.table(), ""]
        for heading, items in lists.items():
            lines += [f"## {heading}", "", *(f"- {item}" for item in items), ""] if items else []
        write_file(folder / "report.md", ("\n".join(lines) + "\n").encode())


def _words(value: Any) -> str:
    return ", ".join(f"`{each}`" for each in (value if isinstance(value, list) else [value]))


def _finite(value: Any) -> Any:
    """Replaces infinite values in a tree of dictionaries and lists by text, because JSON has none."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
