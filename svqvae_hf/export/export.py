"""Exports a model as two graphs, image to ids and ids to image, for programs without this package or Python."""

from pathlib import Path

import onnx
import torch

from svqvae_files.outputs import check_new_folder, new_folder
from svqvae_hf.export.comparison import compare_graphs
from svqvae_hf.export.onnx_graphs import decoder_graph, encoder_graph, load_graph
from svqvae_hf.models.modeling_svqvae import SVQVAE


def export_graphs(model: SVQVAE, out: str | Path) -> str:
    """Writes `encoder.onnx` and `decoder.onnx`, and checks them.

    Batch, height and width are dynamic. The encoder takes images of any size in `pixel_range` and pads them as
    [`SVQVAE.encode`] does. It reads an image as a whole, without tiles. Each file holds metadata as JSON: `f`,
    `pixel_range`, `codebook_size`, `codebook_fingerprint`.

    The files are written to a temporary folder beside `out`, loaded again and compared with the model on photographs,
    noise and flat colours of several sizes. After that the folder is renamed to `out`. Of each kind of image one id
    in a thousand may differ, and pixels by 2/255.

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
    model = plain_copy(model)
    with new_folder(out) as folder, torch.no_grad():  # becomes `out` if all is right
        onnx.save(encoder_graph(model), folder / "encoder.onnx")
        onnx.save(decoder_graph(model), folder / "decoder.onnx")
        encode = load_graph(folder / "encoder.onnx")
        decode = load_graph(folder / "decoder.onnx")
        checked = compare_graphs(model, encode, decode)
    return f"checked  {checked}\nwritten  {out}: encoder.onnx, decoder.onnx"


def plain_copy(model: SVQVAE) -> SVQVAE:
    """Copies a model to float32 on the CPU, in evaluation mode, without tiles or hooks."""
    copy = SVQVAE.from_config(model.config).eval()
    copy.load_state_dict(model.state_dict())
    return copy
