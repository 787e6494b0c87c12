"""Writes the report of an evaluation as files: JSON, Markdown tables, plots, examples and metadata of a model card."""

import io
import itertools
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from huggingface_hub import EvalResult, ModelCardData
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from PIL import Image

from svqvae_hf.data.image_sets import is_hub_set
from svqvae_hf.evaluation.pictures import Panel, contact_sheet
from svqvae_hf.evaluation.results import Example, Report, ScaleResult
from svqvae_hf.files.outputs import save_png, write_file

# Okabe and Ito, safe for colour blindness.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
GREYS = {"JPEG": ("#8a8a8a", "--"), "WebP": ("#4a4a4a", ":"), "AVIF": ("#8a8a8a", "-.")}
TARGETS_COLOUR = COLOURS[5]
BASELINE_MARKERS = "s^D"
DPI = 150
BACKGROUND = "#ffffff"


class Metric(NamedTuple):
    """Title and number format of a value of a [`ScaleResult`]."""

    title: str
    format: str


METRICS = {
    "psnr": Metric("PSNR, dB", ".2f"),
    "ssim": Metric("SSIM", ".4f"),
    "ms_ssim": Metric("MS-SSIM", ".4f"),
    "lpips": Metric("LPIPS", ".4f"),
    "rfid": Metric("rFID", ".2f"),
    "psnr_full_size": Metric("PSNR at full size, dB", ".2f"),
    "ssim_full_size": Metric("SSIM at full size", ".4f"),
    "ids": Metric("ids per image", ".0f"),
    "bits_per_pixel": Metric("bits per pixel", ".4f"),
    "bits_per_pixel_entropy": Metric("bits per pixel, entropy-coded", ".4f"),
    "usage": Metric("codes used", ".1%"),
    "perplexity": Metric("perplexity", ".0f"),
    "entropy": Metric("entropy, bits per id", ".2f"),
    "latent_cosine": Metric("mean cosine of latents", ".3f"),
    "ids_changed_bfloat16": Metric("ids changed in bfloat16", ".1%"),
    "ids_changed_float16": Metric("ids changed in float16", ".1%"),
}
TABLES = {
    "Reconstructions": ("psnr", "ssim", "ms_ssim", "lpips", "rfid"),
    "Rate": ("ids", "bits_per_pixel", "bits_per_pixel_entropy", "psnr_full_size", "ssim_full_size"),
    "Ids": ("usage", "perplexity", "entropy", "latent_cosine", "ids_changed_bfloat16", "ids_changed_float16"),
}
BASELINE_METRICS = ("bits_per_pixel", "psnr", "ssim", "ms_ssim", "lpips")
CARD_METRICS = ("psnr", "ssim", "ms_ssim", "lpips", "rfid", "usage", "perplexity", "bits_per_pixel")
PICTURES = (
    "![Bits per pixel against PSNR and SSIM](rate_distortion.png)",
    "![Frequencies of codes](codebook.png)",
    "![Images with the lowest PSNR and their reconstructions](worst.png)",
    "![Images with the highest PSNR and their reconstructions](best.png)",
    "![Images with the lowest PSNR by the model and by the baselines](baselines.png)",
)
MODE_NAMES = {"plain": "whole image", "tiled": "tiles of {tile_size} pixels"}


def write_report(report: Report, folder: Path) -> None:
    """Writes `report.json`, `report.md`, `model-index.yaml` and five pictures.

    Args:
        report ([`Report`]): Results. Its `settings` must also have `model` and `data`.
        folder (`Path`): Folder to write to, created if it does not exist.

    Raises:
        OSError: If a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "report.json", (json.dumps(_document(report), allow_nan=False) + "\n").encode())
    write_file(folder / "report.md", markdown(report).encode())
    card = ModelCardData(model_name=_last_part(report.settings["model"]), eval_results=eval_results(report))
    write_file(folder / "model-index.yaml", (card.to_yaml() + "\n").encode())
    save_figure(codebook_figure(report), folder / "codebook.png")
    save_figure(rate_figure(report), folder / "rate_distortion.png")
    for name, examples in (("worst", report.worst), ("best", report.best)):
        save_png(examples_sheet(examples, report.settings["scales"]), folder / f"{name}.png")
    save_png(baselines_sheet(report.worst, report.settings["scales"][0]), folder / "baselines.png")


def markdown(report: Report) -> str:
    """Formats the report as Markdown."""
    settings, codebook = report.settings, report.codebook
    lines = [
        f"# Evaluation of `{settings['model']}`",
        "",
        f"On {len(report.images)} images of {', '.join(f'`{name}`' for name in settings['data'])}"
        + "".join(f", {key} `{settings[key]}`" for key in ("config", "split") if settings.get(key))
        + (f", resized and cropped to {settings['resolution']} pixels a side." if settings["resolution"] else "."),
        f"Scales are made from the {settings['scale_from']}. "
        f"The codebook has {codebook['size']} codes of {codebook['dim']} dimensions; "
        + f"the mean cosine between a code and its nearest neighbour is {format_cell(codebook['redundancy'], '.3f')}.",
    ]
    for title, keys in TABLES.items():
        lines += ["", f"## {title}", "", *results_table(report, keys)]
    if report.targets:
        lines += ["", "## The smallest scale that reaches a PSNR, image by image", "", *_targets_table(report)]
    if report.baselines:
        lines += ["", "## Baselines at the bits of the model", "", *baselines_table(report)]
    if report.codecs:
        lines += ["", "## Image files", "", *_codec_table(report)]
    if report.notes:
        lines += ["", "## Notes", "", *(f"- {note}" for note in report.notes)]
    if report.skipped:
        lines += ["", f"## Skipped: {len(report.skipped)}", ""]
        lines += [f"- `{each['name']}` (index {each['index']}): {each['reason']}" for each in report.skipped]
    libraries = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    lines += ["", "## Pictures", "", *PICTURES, "", f"Made with {libraries}."]
    return "\n".join(lines) + "\n"


def summary(report: Report) -> str:
    """Formats the main values and the notes for a terminal."""
    lines = results_table(report, ("psnr", "ssim", "lpips", "rfid", "usage", "bits_per_pixel"))
    lines += ["", *(_baselines_by_scale(report) if report.baselines else []), ""]
    if len(report.skipped) == 1:
        lines.append("1 image was skipped; the report names it.")
    elif report.skipped:
        lines.append(f"{len(report.skipped)} images were skipped; the report names them.")
    return "\n".join([*lines, *report.notes])


def results_table(report: Report, keys: Sequence[str]) -> list[str]:
    """Lines of a Markdown table: a row per mode and scale, a column per value that was asked for."""
    shown = [key for key in keys if key in report.results[0].values]
    rows = [
        [
            MODE_NAMES[result.mode].format(**report.settings),
            f"{result.scale:g}",
            *(format_cell(result.values[key], METRICS[key].format) for key in shown),
        ]
        for result in report.results
    ]
    return format_table(["images", "scale", *(METRICS[key].title for key in shown)], rows)


def baselines_table(report: Report) -> list[str]:
    """Lines of a Markdown table: at each scale a row for the model in the first mode, and a row per baseline."""
    rows = []
    for result in _first_mode(report):
        beside = [each for each in report.baselines if each["scale"] == result.scale]
        for title, values in (("the model", result.values), *((each["baseline"], each) for each in beside)):
            cells = (format_cell(values[key], METRICS[key].format) for key in BASELINE_METRICS)
            rows.append([title, f"{result.scale:g}", *cells])
    return format_table(["coded by", "scale", *(METRICS[key].title for key in BASELINE_METRICS)], rows)


def _baselines_by_scale(report: Report) -> list[str]:
    """Lines of a Markdown table of PSNR: a row for the model and for each baseline, a column per scale."""
    psnr = {("the model", each.scale): each.values["psnr"] for each in _first_mode(report)}
    psnr |= {(each["baseline"], each["scale"]): each["psnr"] for each in report.baselines}
    scales, titles = report.settings["scales"], dict.fromkeys(title for title, _ in psnr)
    rows = [[title, *(format_cell(psnr.get((title, scale)), ".2f") for scale in scales)] for title in titles]
    return format_table(["PSNR, dB, at the same bits", *(f"scale {scale:g}" for scale in scales)], rows)


def eval_results(report: Report) -> list[EvalResult]:
    """Values of the first mode as metadata for [`~svqvae_hf.hub.model_cards.model_card`]."""
    settings = report.settings
    data = settings["data"][0]
    return [
        EvalResult(
            task_type="image-to-image",
            dataset_type=data if is_hub_set(data) else "imagefolder",
            dataset_name=_last_part(data),
            dataset_config=settings.get("config"),
            dataset_split=settings.get("split"),
            metric_type=key,
            metric_name=f"{METRICS[key].title.partition(',')[0]} at scale {result.scale:g}",
            metric_value=round(value, 4),
            metric_args={
                "scale": result.scale,
                "scale_from": settings["scale_from"],
                "mode": result.mode,
                "images": len(report.images),
            },
        )
        for result in _first_mode(report)
        for key in CARD_METRICS
        if (value := result.values[key]) is not None and math.isfinite(value)
    ]


def codebook_figure(report: Report) -> Figure:
    """Plots how often each code occurs, most frequent first, with a line per scale of the first mode."""
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    size = report.codebook["size"]
    for colour, result in zip(itertools.cycle(COLOURS), _first_mode(report), strict=False):
        counts = np.sort(result.counts[result.counts > 0])[::-1]
        label = (
            f"scale {result.scale:g}: {result.values['usage']:.1%} used, perplexity {result.values['perplexity']:,.0f}"
        )
        axes.step(np.arange(1, len(counts) + 1), counts, where="mid", color=colour, linewidth=1.8, label=label)
        axes.plot([len(counts)] * 2, [counts[-1], 0.8], color=colour, linewidth=1, linestyle=":")
    axes.set(
        xlim=(0, size * 1.02),
        yscale="log",
        xlabel=f"codes, most frequent first (of {size:,})",
        ylabel="ids in the set",
    )
    axes.set_ylim(bottom=0.8)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_title(f"Codes by frequency, {len(report.images)} images", loc="left")
    finish_axes(axes)
    axes.legend(frameon=False, fontsize=9)
    return figure


def rate_figure(report: Report) -> Figure:
    """Plots PSNR and SSIM at full size against bits per pixel, with the baselines for comparison."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    for axes, key, label in zip(figure.subplots(1, 2), ("psnr", "ssim"), ("PSNR, dB", "SSIM"), strict=True):
        _plot_codecs(axes, report, key)
        _plot_block_baselines(axes, report, key)
        _plot_scales(axes, report, f"{key}_full_size")
        targets = [each for each in report.targets if is_finite(getattr(each, key))]
        if targets:
            rates, values = ([getattr(each, name) for each in targets] for name in ("bits_per_pixel", key))
            name = "smallest scale that reaches a PSNR"
            axes.plot(rates, values, color=TARGETS_COLOUR, marker="x", linewidth=1.2, label=name)
        axes.set(xscale="log", xlabel="bits per pixel of the image", ylabel=f"{label}, at the image's size")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        finish_axes(axes)
        axes.legend(frameon=False, fontsize=9)
    figure.suptitle(f"Rate and distortion, means over {len(report.images)} images", x=0.01, ha="left")
    return figure


def _plot_codecs(axes: Axes, report: Report, key: str) -> None:
    for codec, (colour, style) in GREYS.items():
        points = [each for each in report.codecs if each["codec"] == codec and is_finite(each[key])]
        if not points:
            continue
        rates, values = ([each[name] for each in points] for name in ("bits_per_pixel", key))
        axes.plot(rates, values, color=colour, linestyle=style, marker=".", label=codec)


def _plot_block_baselines(axes: Axes, report: Report, key: str) -> None:
    """Draws baselines of blocks at scale 1: points, or a line if they are not quantised."""
    blocks = [each for each in report.baselines if each["scale"] == 1 and each["baseline"] not in GREYS]
    shown = [each for each in blocks if is_finite(each[key])]
    for each, colour, marker in zip(shown, COLOURS[1:], BASELINE_MARKERS, strict=False):
        if each["bits_per_pixel"] is None:
            axes.axhline(each[key], color=colour, linewidth=1, linestyle="--", label=each["baseline"])
        else:
            axes.plot(each["bits_per_pixel"], each[key], color=colour, marker=marker, ls="", label=each["baseline"])


def _plot_scales(axes: Axes, report: Report, key: str) -> None:
    results = sorted(_first_mode(report), key=lambda result: result.values["bits_per_pixel"] or 0)
    shown = [result for result in results if is_finite(result.values[key])]
    values = np.array([result.values[key] for result in shown], float)
    for rate, fill, name in (
        ("bits_per_pixel", "white", "ids, plain"),
        ("bits_per_pixel_entropy", COLOURS[0], "ids, entropy-coded"),
    ):
        rates = np.array([result.values[rate] for result in shown], float)
        axes.plot(rates, values, color=COLOURS[0], marker="o", markerfacecolor=fill, linewidth=1.2, label=name)
    for result, value in zip(shown, values, strict=True):
        axes.annotate(
            f"scale {result.scale:g}",
            (result.values["bits_per_pixel"], value),
            xytext=(4, -12),
            textcoords="offset points",
            fontsize=8,
            color=COLOURS[0],
        )


def examples_sheet(examples: Sequence[Example], scales: Sequence[float]) -> Image.Image:
    """Sheet with a row per image: the original, then its reconstructions."""
    return _stack(
        [
            _original_panel(example),
            *(
                Panel(image, f"scale {scale:g}", f"{psnr:.2f} dB")
                for scale, image, psnr in zip(scales, example.reconstructions, example.psnr, strict=True)
            ),
        ]
        for example in examples
    )


def baselines_sheet(examples: Sequence[Example], scale: float) -> Image.Image:
    """Sheet with a row per image: the original, then its reconstructions by the model and each baseline."""
    return _stack(
        [
            _original_panel(example),
            Panel(example.reconstructions[0], f"the model, scale {scale:g}", f"{example.psnr[0]:.2f} dB"),
            *(Panel(image, title, f"{psnr:.2f} dB") for title, image, psnr in example.baselines),
        ]
        for example in examples
    )


def _original_panel(example: Example) -> Panel:
    return Panel(example.original, example.name, "{} x {} pixels".format(*example.size))


def _stack(panels: Iterable[Sequence[Panel]]) -> Image.Image:
    rows = [contact_sheet(row) for row in panels]
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), BACKGROUND)
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet


def _document(report: Report) -> dict[str, Any]:
    """Content of `report.json`. JSON has no infinity, so infinite values become the text "inf"."""
    return to_json(
        {
            "settings": report.settings,
            "versions": report.versions,
            "codebook": report.codebook,
            "targets": [each._asdict() for each in report.targets],
            "results": [
                {"mode": each.mode, "scale": each.scale, **each.values, "counts": each.counts.tolist()}
                for each in report.results
            ],
            "codecs": report.codecs,
            "baselines": report.baselines,
            "notes": report.notes,
            "skipped": report.skipped,
            "images": report.images,
        }
    )


def to_json(value: Any) -> Any:
    """Replaces infinite values in a tree of dictionaries and lists by text, because JSON has none."""
    if isinstance(value, dict):
        return {key: to_json(each) for key, each in value.items()}
    if isinstance(value, list):
        return [to_json(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _last_part(source: str) -> str:
    """Last part of a path or Hub id. `.` and `..` are resolved first."""
    return Path(source).resolve().name


def _targets_table(report: Report) -> list[str]:
    rows = [
        [
            f"{each.min_psnr:g}",
            f"{each.reached} of {len(report.images)}",
            f"{each.psnr:.2f}",
            format_cell(each.ssim, ".4f"),
            f"{each.ids:.0f}",
            f"{each.bits_per_pixel:.4f}",
            f"{each.fixed_ids:.0f} (scale {each.fixed_scale:g})",
        ]
        for each in report.targets
    ]
    header = ["at least, dB", "images that reach it", "PSNR at full size, dB", "SSIM at full size"]
    return format_table([*header, "ids per image", "bits per pixel", "ids at one scale for all"], rows)


def _codec_table(report: Report) -> list[str]:
    formats = {"quality": "d", "bits_per_pixel": ".4f", "psnr": ".2f", "ssim": ".4f", "exact": "d"}
    rows = [
        [each["codec"], *(format_cell(each[key], format_spec) for key, format_spec in formats.items())]
        for each in report.codecs
    ]
    return format_table(["codec", "quality", "bits per pixel", "PSNR, dB", "SSIM", "exact images"], rows)


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * (width - 1) + ":" for width in widths], *rows]
    return [
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]


def format_cell(value: float | None, format_spec: str) -> str:
    """Text of a value in a table; a dash if it could not be computed."""
    return "–" if value is None else format(value, format_spec)


def _first_mode(report: Report) -> list[ScaleResult]:
    return [result for result in report.results if result.mode == report.results[0].mode]


def is_finite(value: float | None) -> bool:
    """Whether a value can be plotted."""
    return value is not None and math.isfinite(value)


def finish_axes(axes: Axes) -> None:
    """Adds the grid of a plot and removes its frame."""
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a plot as PNG."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI)
    write_file(path, content.getvalue())
