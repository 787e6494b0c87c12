"""Measures tokenizers by one protocol: the same images, the same reference, one row each. Writes table and plot."""

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from svqvae_hf.data.image_rows import ImageRow, ImageSource
from svqvae_hf.evaluation import metrics
from svqvae_hf.evaluation.measuring import (
    IDS_PER_CODE,
    Records,
    Totals,
    image_metrics,
    library_versions,
    mean,
    measure_images,
    missing_notes,
    to_image,
    to_tensor,
)
from svqvae_hf.evaluation.perceptual import LPIPS
from svqvae_hf.evaluation.report_files import (
    COLOURS,
    Metric,
    closing_lines,
    finish_axes,
    format_table,
    save_figure,
    write_texts,
)
from svqvae_hf.evaluation.tokenizers.protocol import Codes, Tokenizer, count_bits, count_tokens
from svqvae_hf.models.image_processing_svqvae import pad_to_multiple
from svqvae_hf.tokens.image_tokens import resize_image

COLUMNS = {
    "tokens": Metric("tokens", ".0f"),
    "bits_per_pixel": Metric("bits per pixel", ".4f"),
    "bits_per_pixel_stored": Metric("bits per pixel, stored", ".4f"),
    "psnr": Metric("PSNR, dB", ".2f"),
    "ssim": Metric("SSIM", ".4f"),
    "lpips": Metric("LPIPS", ".4f"),
    "rfid": Metric("rFID", ".2f"),
    "usage": Metric("codes used", ".1%"),
    "perplexity": Metric("perplexity", ".0f"),
}
GREYS = {"JPEG": ("#8a8a8a", "--"), "WebP": ("#4a4a4a", ":"), "AVIF": ("#8a8a8a", "-.")}
MARKERS = "osD^vP"


@dataclass
class Comparison:
    """Results of [`compare_tokenizers`].

    Args:
        settings (`dict[str, Any]`): Options of the comparison.
        versions (`dict[str, str]`): Versions of Python and of the libraries that affect the values.
        rows (`list[dict[str, Any]]`): Values of each tokenizer by the names of `COLUMNS`; `None` if a value could not
            be computed.
        images (`list[dict[str, Any]]`): Measured images in the order of the set: `index`, `name`, `width`, `height`
            and `results`, the values of the image for each tokenizer.
        skipped (`list[dict[str, Any]]`): Skipped images: `index`, `name`, `reason`.
        notes (`list[str]`): Sentences about values that are missing or need care.
    """

    settings: dict[str, Any]
    versions: dict[str, str]
    rows: list[dict[str, Any]]
    images: Records
    skipped: Records
    notes: list[str]


def compare_tokenizers(
    tokenizers: Sequence[Tokenizer],
    images: Iterable[ImageSource | ImageRow],
    *,
    resolution: int | None = None,
    lpips: LPIPS | None = None,
    inception: nn.Module | None = None,
    device: str | torch.device = "cpu",
) -> Comparison:
    """Codes and decodes each image of a set by each tokenizer, and compares the result with the image in 8 bits.

    An image is padded to multiples of `f` by repeating its last row and column, and the reconstruction is cropped.

    Args:
        tokenizers (`Sequence[Tokenizer]`): Tokenizers with different titles, on `device`.
        images (`Iterable`): As in [`measure_images`].
        resolution (`int`, *optional*): As in [`measure_images`].
        lpips ([`LPIPS`], *optional*): As in [`evaluate`].
        inception (`nn.Module`, *optional*): As in [`evaluate`].
        device (`str` or `torch.device`, defaults to `"cpu"`): Device to work on.

    Raises:
        ValueError: If an option is out of range, titles are equal, or all images are skipped.
    """
    device = torch.device(device)
    titles = [each.title for each in tokenizers]
    if not titles or len(set(titles)) < len(titles):
        raise ValueError(f"`tokenizers` must be one or more with different titles, got {titles}.")
    state = PartialState(cpu=device.type == "cpu")
    lpips = lpips.to(device) if lpips is not None else None
    meters = [_Meter(each, lpips, inception, device) for each in tokenizers]

    def measure(image: Image.Image, **identity: Any) -> dict[str, Any]:
        target = to_tensor(image, device)
        measured = [meter.measure(target) for meter in meters]
        for meter, (_, counts, reconstruction) in zip(meters, measured, strict=True):
            meter.totals.add(counts, reconstruction, target)  # only now, because a tokenizer may run out of memory
        return {"width": image.width, "height": image.height, "results": [values for values, _, _ in measured]}

    records, skipped = measure_images(measure, images, resolution, state)
    rows = [meter.row([record["results"][index] for record in records], records) for index, meter in enumerate(meters)]
    return Comparison(
        settings={"resolution": resolution, "device": device.type},
        versions=library_versions(),
        rows=rows,
        images=records,
        skipped=skipped,
        notes=[*missing_notes(records, lpips, inception), *_notes(meters, rows, len(records))],
    )


class _Meter:
    """One tokenizer, and its sums over the images of this process."""

    def __init__(self, tokenizer: Tokenizer, lpips: LPIPS | None, inception: nn.Module | None, device: torch.device):
        self.tokenizer = tokenizer
        self.lpips = lpips
        self.device = device
        self.totals = Totals(tokenizer.codebook_size or 0, inception, device)

    @torch.no_grad()
    def measure(self, target: torch.Tensor) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
        """Values, counts of codes, and reconstruction of an image `(1, 3, height, width)` in uint8."""
        tokenizer, (height, width) = self.tokenizer, target.shape[-2:]
        sample = pad_to_multiple(target / 127.5 - 1, tokenizer.f)
        codes = tokenizer.encode(sample)
        counts = self._count_codes(codes)
        bits = count_bits(codes, tokenizer.codebook_size)
        stored_bits = getattr(tokenizer, "stored_bits", lambda *_: None)(codes, height, width) or bits
        values: dict[str, Any] = {
            "tokens": count_tokens(codes, tokenizer.codebook_size),
            "bits": bits,
            "stored_bits": stored_bits,
        }
        image = resize_image(to_image(tokenizer.decode(codes)), (sample.shape[-1], sample.shape[-2]))
        reconstruction = to_tensor(image.crop((0, 0, width, height)), self.device)
        return values | image_metrics(reconstruction, target, self.lpips), counts, reconstruction

    def row(self, results: Records, records: Records) -> dict[str, Any]:
        """Means and sums over the images of all processes."""
        tokens = mean(each["tokens"] for each in results)
        return {"title": self.tokenizer.title, "tokens": tokens} | self.totals.values(results, records)

    def _count_codes(self, codes: Codes) -> torch.Tensor:
        size = len(self.totals.counts)
        if isinstance(codes, bytes) or not size:
            return torch.zeros(size, dtype=torch.int64)
        counts = metrics.count_codes(codes, size)
        if len(counts) > size:
            raise ValueError(
                f"`encode` of {self.tokenizer.title} must return ids under {size}, its `codebook_size`, got "
                f"{len(counts) - 1}."
            )
        return counts


def _notes(meters: Sequence[_Meter], rows: Sequence[dict[str, Any]], images: int) -> list[str]:
    notes = []
    latents = [row["title"] for row in rows if row["tokens"] is not None and row["usage"] is None]
    if latents:
        notes.append(f"Codes used and perplexity need ids. {', '.join(latents)} code latents.")
    few = [
        meter.tokenizer.title
        for meter, row in zip(meters, rows, strict=True)
        if meter.tokenizer.codebook_size and row["tokens"] * images < IDS_PER_CODE * meter.tokenizer.codebook_size
    ]
    if few:
        notes.append(
            f"The set has fewer than {IDS_PER_CODE} ids per code for {', '.join(few)}. Codes used and perplexity "
            "would be higher on a larger set."
        )
    return notes


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """Writes `report.json`, `report.md` and `rate_distortion.png`.

    Args:
        comparison ([`Comparison`]): Results. Its `settings` must also have `data`.
        folder (`Path`): Folder to write to, created if it does not exist.

    Raises:
        OSError: If a file cannot be written.
    """
    settings = comparison.settings
    size = f", resized and cropped to {settings['resolution']} pixels a side" if settings["resolution"] else ""
    lines = [
        "# Comparison of tokenizers",
        "",
        f"On {len(comparison.images)} images of {', '.join(f'`{name}`' for name in settings['data'])}{size}, by bits "
        f"per pixel. The device is {settings['device']}.",
        "",
        *comparison_table(comparison.rows),
        *("", "PSNR of image files of as many stored bits, interpolated between qualities:", ""),
        *equal_bits_table(comparison.rows),
    ]
    pictures = {"rate_distortion.png": "Bits per pixel against PSNR and SSIM"}
    lines += closing_lines(comparison.notes, comparison.skipped, pictures, comparison.versions)
    write_texts(folder, dataclasses.asdict(comparison), lines)
    save_figure(comparison_figure(comparison), folder / "rate_distortion.png")


def comparison_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of a Markdown table: a row per tokenizer by bits per pixel, and the columns that any of them has."""
    shown = [key for key in COLUMNS if any(row[key] is not None for row in rows)]
    cells = [
        [row["title"], *(COLUMNS[key].cell(row[key]) for key in shown)]
        for row in sorted(rows, key=lambda row: row["bits_per_pixel_stored"])
    ]
    return format_table(["tokenizer", *(COLUMNS[key].title for key in shown)], cells)


def equal_bits_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of a Markdown table: PSNR of each model, and of image files of as many stored bits."""
    lines, cell = _curves(rows, "psnr"), COLUMNS["psnr"].cell
    codecs = {name: np.array(sorted(lines[name])).T for name in GREYS if name in lines}
    cells = []
    for row in rows:
        rate = row["bits_per_pixel_stored"]
        if not row["title"].startswith(tuple(GREYS)):
            at_rate = [
                np.interp(math.log(rate), np.log(bits), psnr, math.nan, math.nan) for bits, psnr in codecs.values()
            ]
            psnr = [cell(None if math.isnan(value) else value) for value in at_rate]
            cells.append([row["title"], COLUMNS["bits_per_pixel_stored"].cell(rate), cell(row["psnr"]), *psnr])
    return format_table(["tokenizer", COLUMNS["bits_per_pixel_stored"].title, COLUMNS["psnr"].title, *codecs], cells)


def comparison_figure(comparison: Comparison) -> Figure:
    """Plots PSNR and SSIM against bits per pixel: a line per image codec, per model's scales."""
    figure = Figure(figsize=(12, 6 + 0.2 * len(comparison.rows)), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, key, label in zip(panels, ("psnr", "ssim"), ("PSNR, dB", "SSIM"), strict=True):
        _plot(axes, [row for row in comparison.rows if row[key] not in (None, float("inf"))], key)
        axes.set(xscale="log", xlabel="bits per pixel, stored", ylabel=label)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        finish_axes(axes)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", frameon=False, fontsize=9)
    figure.suptitle(f"Rate and distortion, means over {len(comparison.images)} images", x=0.01, ha="left")
    return figure


def _curves(rows: Sequence[dict[str, Any]], key: str) -> dict[str, list[tuple[float, float]]]:
    """Points of stored bits per pixel and a value: by codec, and by model for its scales and for its targets."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        name = re.sub(r", (scale|quality) [\d.e+-]+$", "", row["title"])
        lines.setdefault(name, []).append((row["bits_per_pixel_stored"], row[key]))
    return lines


def _plot(axes: Axes, rows: Sequence[dict[str, Any]], key: str) -> None:
    lines = _curves(rows, key)
    others = [name for name in lines if name not in GREYS]
    for name, points in lines.items():
        if name in GREYS:
            colour, style = GREYS[name]
            marker = "."
        else:
            number = others.index(name)
            colour, style, marker = COLOURS[number % len(COLOURS)], "-", MARKERS[number // len(COLOURS) % len(MARKERS)]
        axes.plot(*zip(*sorted(points), strict=True), color=colour, ls=style, marker=marker, linewidth=1.2, label=name)
