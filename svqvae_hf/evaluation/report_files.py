"""Writes the report of an evaluation as JSON, for programs, and as Markdown, for readers."""

import json
import math
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from svqvae_files.inputs import printable
from svqvae_files.outputs import write_file
from svqvae_files.version import __version__
from svqvae_hf.evaluation.report import ALL_ROWS_TITLE, SAME_BITS_TITLE, Report

LIBRARIES = ("torch", "diffusers", "torchmetrics", "lpips", "torch-fidelity", "pillow", "numpy")


def write_report(report: Report, folder: Path) -> None:
    """Writes `report.json` and `report.md` to a folder, which is created if it does not exist.

    Args:
        report ([`Report`]): Report to write.
        folder (`Path`): Folder to write to. Existing reports in it are replaced.

    Raises:
        OSError: A file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    versions = library_versions()
    write_file(folder / "report.json", report_json(report, versions).encode())
    write_file(folder / "report.md", report_markdown(report, versions).encode())


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that figures may depend on."""
    versions = {"python": platform.python_version(), "svqvae-hf": __version__}
    for library in LIBRARIES:
        versions[library] = version(library)
    return versions


def report_json(report: Report, versions: dict[str, str]) -> str:
    """All values of a report, with the values of each image. Infinite numbers become text, because JSON has none."""
    document = vars(report) | {"versions": versions}
    return json.dumps(_finite(document), allow_nan=False) + "\n"


def report_markdown(report: Report, versions: dict[str, str]) -> str:
    """The tables of a report, its notes, its skipped images, its settings and the versions of libraries."""
    lines = [f"# {report.title}", ""]
    if report.same_bits:
        lines += [f"## {SAME_BITS_TITLE}", "", *report.table_at_same_bits(), ""]
        lines += [f"## {ALL_ROWS_TITLE}", ""]
    lines += [*report.table(), ""]
    version_items = [f"{library}: {number}" for library, number in versions.items()]
    lines += _section("Notes", report.notes)
    lines += _section(f"Skipped: {len(report.skipped)}", _skipped_items(report))
    lines += _section("Settings", _setting_items(report))
    lines += _section("Versions", version_items)
    return "\n".join(lines) + "\n"


def _section(heading: str, items: Sequence[str]) -> list[str]:
    """Lines of a heading with a list; none if the list is empty."""
    if not items:
        return []
    lines = [f"## {heading}", ""]
    for item in items:
        lines.append(f"- {item}")
    lines.append("")
    return lines


def _skipped_items(report: Report) -> list[str]:
    """An item for each skipped image, with the reason."""
    items = []
    for image in report.skipped:
        name = printable(image["name"])
        items.append(f"`{name}` (index {image['index']}): {image['reason']}")
    return items


def _setting_items(report: Report) -> list[str]:
    """An item for each setting that has a value."""
    items = []
    for name, value in report.settings.items():
        if value is None or value == []:
            continue
        title = name.replace("_", " ")
        values = value if isinstance(value, list) else [value]
        quoted_values = [f"`{single_value}`" for single_value in values]
        items.append(f"{title}: {', '.join(quoted_values)}")
    return items


def _finite(value: Any) -> Any:
    """A tree of dictionaries and lists, with texts in place of numbers that are not finite."""
    if isinstance(value, dict):
        return {key: _finite(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_finite(child) for child in value]
    is_infinite_or_nan = isinstance(value, float) and not math.isfinite(value)
    if is_infinite_or_nan:
        return str(value)
    return value
