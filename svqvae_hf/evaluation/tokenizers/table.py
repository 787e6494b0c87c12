"""Writes a comparison of tokenizers as files: JSON, a Markdown table and a plot."""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from svqvae_hf.evaluation.report import (
    COLOURS,
    GREYS,
    Metric,
    finish_axes,
    format_cell,
    format_table,
    is_finite,
    save_figure,
    to_json,
)
from svqvae_hf.evaluation.tokenizers.compare import Comparison
from svqvae_hf.files.outputs import write_file

COLUMNS = {
    "tokens": Metric("tokens", ".0f"),
    "bits_per_pixel": Metric("bits per pixel", ".4f"),
    "psnr": Metric("PSNR, dB", ".2f"),
    "ssim": Metric("SSIM", ".4f"),
    "ms_ssim": Metric("MS-SSIM", ".4f"),
    "lpips": Metric("LPIPS", ".4f"),
    "rfid": Metric("rFID", ".2f"),
    "usage": Metric("codes used", ".1%"),
    "perplexity": Metric("perplexity", ".0f"),
    "encode_speed": Metric("encode, megapixels/s", ".3f"),
    "decode_speed": Metric("decode, megapixels/s", ".3f"),
    "memory": Metric("memory, MiB", ".0f"),
}
MARKERS = "osD^vP"


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """Writes `report.json`, `report.md` and `rate_distortion.png`.

    Args:
        comparison ([`Comparison`]): Results. Its `settings` must also have `data`.
        folder (`Path`): Folder to write to, created if it does not exist.

    Raises:
        OSError: If a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    document = to_json(dataclasses.asdict(comparison))
    write_file(folder / "report.json", (json.dumps(document, allow_nan=False) + "\n").encode())
    write_file(folder / "report.md", comparison_markdown(comparison).encode())
    save_figure(comparison_figure(comparison), folder / "rate_distortion.png")


def comparison_markdown(comparison: Comparison) -> str:
    """Formats a comparison as Markdown."""
    settings, first = comparison.settings, comparison.images[0]
    sets = ", ".join(f"`{name}`" for name in settings["data"])
    size = f", resized and cropped to {settings['resolution']} pixels a side" if settings["resolution"] else ""
    lines = [
        "# Comparison of tokenizers",
        "",
        f"On {len(comparison.images)} images of {sets}{size}, by bits per pixel. The memory is the peak of weights "
        f"and tensors at {first['width']} x {first['height']} pixels. The device is {settings['device']}.",
        "",
        *comparison_table(comparison.rows),
    ]
    if comparison.notes:
        lines += ["", "## Notes", "", *(f"- {note}" for note in comparison.notes)]
    if comparison.skipped:
        lines += ["", f"## Skipped: {len(comparison.skipped)}", ""]
        lines += [f"- `{each['name']}` (index {each['index']}): {each['reason']}" for each in comparison.skipped]
    libraries = ", ".join(f"{name} {number}" for name, number in comparison.versions.items())
    lines += ["", "![Bits per pixel against PSNR and SSIM](rate_distortion.png)", "", f"Made with {libraries}."]
    return "\n".join(lines) + "\n"


def comparison_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of a Markdown table: a row per tokenizer by bits per pixel, and the columns that any of them has."""
    shown = [key for key in COLUMNS if any(row[key] is not None for row in rows)]
    cells = [
        [row["title"], *(format_cell(row[key], COLUMNS[key].format) for key in shown)]
        for row in sorted(rows, key=lambda row: row["bits_per_pixel"])
    ]
    return format_table(["tokenizer", *(COLUMNS[key].title for key in shown)], cells)


def comparison_figure(comparison: Comparison) -> Figure:
    """Plots PSNR and SSIM against bits per pixel: a line per image codec, per model's scales, and per its targets."""
    figure = Figure(figsize=(12, 6 + 0.2 * len(comparison.rows)), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, key, label in zip(panels, ("psnr", "ssim"), ("PSNR, dB", "SSIM"), strict=True):
        _plot(axes, [row for row in comparison.rows if is_finite(row[key])], key)
        axes.set(xscale="log", xlabel="bits per pixel", ylabel=label)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        finish_axes(axes)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", frameon=False, fontsize=9)
    figure.suptitle(f"Rate and distortion, means over {len(comparison.images)} images", x=0.01, ha="left")
    return figure


def _plot(axes: Axes, rows: Sequence[dict[str, Any]], key: str) -> None:
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        name = re.sub(r", (scale|quality) [\d.e+-]+$", "", row["title"])
        name = re.sub(r", at least [\d.e+-]+ dB$", ", smallest scale that reaches a PSNR", name)
        lines.setdefault(name, []).append((row["bits_per_pixel"], row[key]))
    others = [name for name in lines if name not in GREYS]
    for name, points in lines.items():
        if name in GREYS:
            colour, style = GREYS[name]
            marker = "."
        else:
            number = others.index(name)
            colour, style, marker = COLOURS[number % len(COLOURS)], "-", MARKERS[number // len(COLOURS) % len(MARKERS)]
        axes.plot(*zip(*sorted(points), strict=True), color=colour, ls=style, marker=marker, linewidth=1.2, label=name)
