"""Writes the report of an evaluation as files: JSON, Markdown tables and pictures."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from svqvae_hf.evaluation.evaluate import Example, Report
from svqvae_hf.evaluation.pictures import Panel, stacked_sheets
from svqvae_hf.evaluation.report_files import Metric, closing_lines, format_table, write_texts
from svqvae_hf.files.outputs import save_png

METRICS = {
    "psnr": Metric("PSNR, dB", ".2f"),
    "ssim": Metric("SSIM", ".4f"),
    "lpips": Metric("LPIPS", ".4f"),
    "rfid": Metric("rFID", ".2f"),
    "psnr_full_size": Metric("PSNR at full size, dB", ".2f"),
    "ssim_full_size": Metric("SSIM at full size", ".4f"),
    "ids": Metric("ids per image", ".0f"),
    "bits_per_pixel": Metric("bits per pixel", ".4f"),
    "bits_per_pixel_stored": Metric("bits per pixel, stored", ".4f"),
    "usage": Metric("codes used", ".1%"),
    "perplexity": Metric("perplexity", ".0f"),
    "entropy": Metric("entropy, bits per id", ".2f"),
}
TABLES = {
    "Reconstructions": ("psnr", "ssim", "lpips", "rfid"),
    "Rate": ("ids", "bits_per_pixel", "bits_per_pixel_stored", "psnr_full_size", "ssim_full_size"),
    "Ids": ("usage", "perplexity", "entropy"),
}
SUMMARY = ("psnr", "ssim", "lpips", "rfid", "usage", "bits_per_pixel", "bits_per_pixel_stored")
PICTURES = {"worst.png": "Images with the lowest PSNR and their reconstructions"}


def write_report(report: Report, folder: Path) -> None:
    """Writes `report.json`, `report.md` and `worst.png`.

    Args:
        report ([`Report`]): Results. Its `settings` must also have `model` and `data`.
        folder (`Path`): Folder to write to, created if it does not exist.

    Raises:
        OSError: If a file cannot be written.
    """
    document = {
        **{field.name: getattr(report, field.name) for field in dataclasses.fields(report)},
        "results": [{"scale": each.scale, **each.values, "counts": each.counts.tolist()} for each in report.results],
    }
    del document["worst"]
    write_texts(folder, document, markdown(report))
    save_png(examples_sheet(report.worst, report.settings["scales"]), folder / "worst.png")


def markdown(report: Report) -> list[str]:
    """Lines of the report in Markdown."""
    settings, codebook = report.settings, report.codebook
    lines = [
        f"# Evaluation of `{settings['model']}`",
        "",
        f"On {len(report.images)} images of {', '.join(f'`{name}`' for name in settings['data'])}"
        + "".join(f", {key} `{settings[key]}`" for key in ("config", "split") if settings.get(key))
        + (f", resized and cropped to {settings['resolution']} pixels a side." if settings["resolution"] else "."),
        f"Scales are made from the {settings['scale_from']}. "
        f"The codebook has {codebook['size']} codes of {codebook['dim']} dimensions.",
    ]
    for title, keys in TABLES.items():
        lines += ["", f"## {title}", "", *results_table(report, keys)]
    return lines + closing_lines(report.notes, report.skipped, PICTURES, report.versions)


def results_table(report: Report, keys: Sequence[str]) -> list[str]:
    """Lines of a Markdown table: a row per scale, a column per value that was asked for."""
    rows = [[f"{each.scale:g}", *(METRICS[key].cell(each.values[key]) for key in keys)] for each in report.results]
    return format_table(["scale", *(METRICS[key].title for key in keys)], rows)


def examples_sheet(examples: Sequence[Example], scales: Sequence[float]) -> Image.Image:
    """Sheet with a row per image: the original, then its reconstructions."""
    return stacked_sheets(
        [
            Panel(example.original, example.name, "{} x {} pixels".format(*example.size)),
            *(
                Panel(image, f"scale {scale:g}", f"{psnr:.2f} dB")
                for scale, image, psnr in zip(scales, example.reconstructions, example.psnr, strict=True)
            ),
        ]
        for example in examples
    )
