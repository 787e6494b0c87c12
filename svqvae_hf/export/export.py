"""Exports a model as two graphs, image to ids and ids to image, for programs without this package or Python."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import cast

import onnx
import onnxruntime
import onnxscript  # noqa: F401 # `torch.onnx.export` needs it
import torch
from torch.export import ExportedProgram

from svqvae_files.outputs import check_new_folder, new_folder
from svqvae_hf.export.graphs import example_images, trace_graphs
from svqvae_hf.models.modeling_svqvae import SVQVAE

Graph = Callable[[torch.Tensor], torch.Tensor]

# Batch, rows and columns of ids. No grid equals the traced one. They include a single id, a single row and column,
# unequal sides, and more ids than the model searches at once.
CHECKED_GRIDS = (
    *((1, 1, 1), (2, 1, 3), (3, 5, 1), (1, 4, 4), (3, 2, 5), (2, 8, 8), (1, 7, 13), (1, 16, 16), (1, 11, 24)),
    (1, 20, 32),
)
PIXEL_TOLERANCE = 2 / 255  # where black and white differ by 1
# Another library adds the same products in another order, so two nearly equal codes may change places.
MAX_CHANGED = 1e-3  # fraction of all ids
ADVICE = "Nothing was written. Try other versions of torch, onnx and onnxruntime."


def export_graphs(model: SVQVAE, out: str | Path) -> str:
    """Writes `encoder.onnx` and `decoder.onnx`, and checks them.

    Batch, height and width are dynamic. The encoder takes images of any size in `pixel_range` and pads them as
    [`SVQVAE.encode`] does. It reads an image as a whole, without tiles. Each file holds metadata as JSON: `f`,
    `pixel_range`, `codebook_size`, `codebook_fingerprint`.

    The files are written to a temporary folder beside `out`, loaded again and compared with the model on ten sizes.
    After that the folder is renamed to `out`. One id in a thousand may differ, and pixels by 2/255.

    Args:
        model ([`SVQVAE`]): Model to export. A copy in evaluation mode is traced, so the model is not changed.
        out (`str` or `Path`): Folder to create. It may exist if it is empty.

    Returns:
        `str`: How close the graphs are to the model, in two lines.

    Raises:
        OSError: If `out` cannot be written.
        ValueError: If the folder has files, or a graph differs from the model.
    """
    out = check_new_folder(Path(out))
    plain = SVQVAE.from_config(model.config).eval()  # in float32 on the CPU, without tiles or hooks
    plain.load_state_dict(model.state_dict())
    with new_folder(out) as folder, torch.no_grad():
        paths = [folder / f"{name}.onnx" for name in ("encoder", "decoder")]
        for path, program in zip(paths, trace_graphs(plain), strict=True):
            save_graph(program, path, plain)
        checked = compare_graphs(plain, *map(load_graph, paths))
    return f"checked  {checked}\nwritten  {out}: encoder.onnx, decoder.onnx"


def save_graph(program: ExportedProgram, path: Path, model: SVQVAE) -> None:
    """Writes an ONNX file. Its name tells encoder from decoder."""
    names = ["sample", "ids"] if path.stem == "encoder" else ["ids", "sample"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`isinstance\(treespec", FutureWarning)  # torch warns about its own code
        graph = torch.onnx.export(program, dynamo=True, input_names=names[:1], output_names=names[1:], verbose=False)
    proto = cast(torch.onnx.ONNXProgram, graph).model_proto
    dims = {"sample": ("batch", "channels", "height", "width"), "ids": ("batch", "rows", "columns")}
    for value, name in zip((*proto.graph.input, *proto.graph.output), names, strict=True):
        for dim, label in zip(value.type.tensor_type.shape.dim, dims[name], strict=True):
            if dim.dim_param:  # the exporter numbers them
                dim.dim_param = label
    proto.graph.ClearField("value_info")  # refers to the numbers
    metadata = {
        "f": model.f,
        "pixel_range": list(model.config["pixel_range"]),
        "codebook_size": model.config["codebook_size"],
        "codebook_fingerprint": model.codebook_fingerprint(),
    }
    onnx.helper.set_model_props(proto, {key: json.dumps(value) for key, value in metadata.items()})
    onnx.save(proto, path)


def load_graph(path: Path) -> Graph:
    """Loads an ONNX file in onnxruntime on the CPU."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda value: torch.from_numpy(session.run(None, {name: value.numpy()})[0])


def compare_graphs(model: SVQVAE, encode: Graph, decode: Graph) -> str:
    """Runs both graphs on all sizes, and compares them with the model.

    Args:
        model ([`SVQVAE`]): Model in float32.
        encode (`Callable`): Encoder graph.
        decode (`Callable`): Decoder graph.

    Returns:
        `str`: How many ids differ, and by how much pixels differ.

    Raises:
        ValueError: If a graph fails to run, returns a wrong shape, or differs by more than `MAX_CHANGED` of all ids or
            by `PIXEL_TOLERANCE`.
    """
    changed, total, largest = 0, 0, 0.0
    low, high = model.config["pixel_range"]
    for number, grid in enumerate(CHECKED_GRIDS):
        top, left = number % model.f, 3 * number % model.f  # so that many sides are not multiples of f
        sample = example_images(model, grid)[..., top:, left:]
        expected = model.encode_tokens(sample)
        name = f"at {sample.shape[3]} x {sample.shape[2]} pixels (width x height), batch {len(sample)}"
        changed += int((_run(encode, sample, expected, f"encoder {name}") != expected).sum())
        total += expected.numel()
        decoded = model.decode_tokens(expected)
        difference = _run(decode, expected, decoded, f"decoder {name}") - decoded
        largest = max(largest, float(difference.abs().nan_to_num(torch.inf).max() / (high - low)))
        if largest > PIXEL_TOLERANCE:
            raise ValueError(
                f"the decoder {name}: pixels must be within {PIXEL_TOLERANCE * 255:g}/255 of the model's, but differ "
                f"by {largest * 255:.3g}/255. {ADVICE}"
            )
    if changed > MAX_CHANGED * total:
        raise ValueError(f"the encoder: ids must equal the model's, but {changed} of {total} differ. {ADVICE}")
    sizes = f"{len(CHECKED_GRIDS)} sizes against the model"
    return f"{sizes}: {changed} of {total} ids differ; pixels differ by at most {largest * 255:.2g}/255"


def _run(graph: Graph, value: torch.Tensor, expected: torch.Tensor, name: str) -> torch.Tensor:
    try:
        result = graph(value)
    except Exception as error:  # each runtime raises its own errors
        raise ValueError(f"the {name} must run, but fails: {error} {ADVICE}") from error
    if result.shape != expected.shape:
        raise ValueError(f"the {name} must return shape {tuple(expected.shape)}, got {tuple(result.shape)}. {ADVICE}")
    return result
