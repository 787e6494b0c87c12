"""Parts that all reports share: tables and lists in Markdown, JSON, and plots."""

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from svqvae_hf.files.outputs import write_file

COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#e69f00",
)  # Okabe and Ito: safe for colour blindness
DPI = 150


class Metric(NamedTuple):
    """Title and number format of a value in a table."""

    title: str
    format: str

    def cell(self, value: float | None) -> str:
        """Text of a value; a dash if it could not be computed."""
        return "–" if value is None else format(value, self.format)


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * (width - 1) + ":" for width in widths], *rows]
    return [
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]


def closing_lines(
    notes: Sequence[str],
    skipped: Sequence[Mapping[str, Any]],
    pictures: Mapping[str, str],
    versions: Mapping[str, str],
) -> list[str]:
    """Lines at the end of a report: notes, skipped images, pictures by their file names, and versions."""
    lines = []
    if notes:
        lines += ["", "## Notes", "", *(f"- {note}" for note in notes)]
    if skipped:
        lines += ["", f"## Skipped: {len(skipped)}", ""]
        lines += [f"- `{each['name']}` (index {each['index']}): {each['reason']}" for each in skipped]
    lines += ["", *(f"![{title}]({name})\n" for name, title in pictures.items())]
    return [*lines, f"Made with {', '.join(f'{name} {number}' for name, number in versions.items())}."]


def write_texts(folder: Path, document: Any, lines: Sequence[str]) -> None:
    """Writes `report.json` and `report.md`. Creates the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "report.json", (json.dumps(_finite(document), allow_nan=False) + "\n").encode())
    write_file(folder / "report.md", ("\n".join(lines) + "\n").encode())


def _finite(value: Any) -> Any:
    """Replaces infinite values in a tree of dictionaries and lists by text, because JSON has none."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


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
