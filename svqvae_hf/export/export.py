"""Exports a model as two graphs, image to ids and ids to image, for programs without this package or Python."""

import json
import tempfile
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch

from svqvae_hf.export import graph_files
from svqvae_hf.export.graph_check import CHECKED_GRIDS, compare_graphs
from svqvae_hf.export.graphs import trace_graphs
from svqvae_hf.files.outputs import check_new_folder
from svqvae_hf.models.modeling_svqvae import SVQVAE

PACKAGES = ("onnx", "onnxruntime", "onnxscript")  # of the extra `export`
DTYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class ExportReport:
    """Result of [`export_graphs`]. `str(report)` formats it for a terminal.

    Args:
        out (`Path`): Folder of the two graphs.
        sizes (`dict[str, int]`): Bytes of each file in it.
        dtype (`str`): Type of images and weights.
        ids (`int`): Number of ids that were compared.
        changed (`int`): Number of ids that differ from the ids of the model in float32.
        pixels (`float`): Largest difference of a pixel, where black and white differ by 1.
    """

    out: Path
    sizes: dict[str, int]
    dtype: str
    ids: int
    changed: int
    pixels: float

    def __str__(self) -> str:
        files = ", ".join(f"{name} ({size / 1e6:.1f} MB)" for name, size in self.sizes.items())
        return (
            f"checked  {len(CHECKED_GRIDS)} sizes against the model in float32: {self.changed} of {self.ids} ids "
            f"differ, {self.changed / self.ids:.2%}; pixels differ by at most {self.pixels * 255:.2g}/255\n"
            f"written  {self.out}: {files}"
        )


def export_graphs(model: SVQVAE, out: str | Path, *, dtype: str = "float32") -> ExportReport:
    """Writes `encoder.onnx` and `decoder.onnx`, and checks them.

    Batch, height and width are dynamic. The encoder takes images of any size in `pixel_range` and pads them as
    [`SVQVAE.encode`] does. It reads an image as a whole, without tiles. Each file holds metadata as JSON: `f`,
    `pixel_range`, `codebook_size`, `codebook_fingerprint`.

    The files are written to a temporary folder beside `out`, loaded again and compared with the model on ten sizes.
    After that the folder is renamed to `out`. In float32, one id in a thousand may differ, and pixels by 2/255. In
    float16 more ids change; the report says how many.

    Args:
        model ([`SVQVAE`]): Model to export. A copy in evaluation mode is traced, so it is not changed.
        out (`str` or `Path`): Folder to create. It may exist if it is empty.
        dtype (`str`, defaults to `"float32"`): `"float32"` or `"float16"`, the type of weights and images. The
            codebook is searched in float32 in both cases.

    Returns:
        [`ExportReport`]: Files written, and their difference from the model.

    Raises:
        ModuleNotFoundError: If a package of the extra `export` is missing.
        OSError: If `out` cannot be written.
        ValueError: If an argument is wrong, weights are out of the range of float16, or a graph differs from the
            model.
    """
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    for package in PACKAGES:
        import_module(package)  # fail before the export, not after it
    out = check_new_folder(Path(out))
    plain = SVQVAE.from_config(model.config).eval()  # in float32 on the CPU, without tiles or hooks
    plain.load_state_dict(model.state_dict())
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as beside, torch.no_grad():
            folder = Path(beside, out.name)
            folder.mkdir()
            changed, pixels = _write(plain, folder, DTYPES[dtype])
            folder.replace(out)
    except OSError as error:
        raise OSError(f"`{out}` cannot be written: {error}") from error
    return ExportReport(
        out=out,
        sizes={path.name: path.stat().st_size for path in sorted(out.iterdir(), reverse=True)},  # the encoder first
        dtype=dtype,
        ids=sum(batch * rows * columns for batch, rows, columns in CHECKED_GRIDS),
        changed=changed,
        pixels=pixels,
    )


def _write(model: SVQVAE, folder: Path, dtype: torch.dtype) -> tuple[int, float]:
    """Writes both graphs and compares them with the model, as [`compare_graphs`] does."""
    metadata = {
        "f": model.f,
        "pixel_range": list(model.config["pixel_range"]),
        "codebook_size": model.config["codebook_size"],
        "codebook_fingerprint": model.codebook_fingerprint(),
    }
    texts = {key: json.dumps(value) for key, value in metadata.items()}
    paths = [folder / f"{name}.onnx" for name in ("encoder", "decoder")]
    for path, program in zip(paths, trace_graphs(model, dtype), strict=True):
        graph_files.save_graph(program, path, texts)
    return compare_graphs(model, graph_files.load_graph(paths[0]), graph_files.load_graph(paths[1]), dtype)
