"""Writes and loads graphs as ONNX files."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch.export import ExportedProgram

if TYPE_CHECKING:
    import onnx

Graph = Callable[[torch.Tensor], torch.Tensor]


def save_graph(program: ExportedProgram, path: Path, metadata: dict[str, str]) -> None:
    """Writes an ONNX file. Its name tells encoder from decoder."""
    import onnx

    names = ["sample", "ids"] if path.stem == "encoder" else ["ids", "sample"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`isinstance\(treespec", FutureWarning)  # torch warns about its own code
        exported = torch.onnx.export(
            program, dynamo=True, input_names=names[:1], output_names=names[1:], verbose=False
        )
    proto = cast(torch.onnx.ONNXProgram, exported).model_proto
    _name_dims(proto, names)
    onnx.helper.set_model_props(proto, metadata)
    onnx.save(proto, path)


def load_graph(path: Path) -> Graph:
    """Loads an ONNX file in onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda value: torch.from_numpy(session.run(None, {name: value.numpy()})[0])


def _name_dims(proto: "onnx.ModelProto", names: list[str]) -> None:
    """Names the dynamic dimensions, which the exporter numbers."""
    dims = {"sample": ("batch", "channels", "height", "width"), "ids": ("batch", "rows", "columns")}
    for value, name in zip((*proto.graph.input, *proto.graph.output), names, strict=True):
        for dim, label in zip(value.type.tensor_type.shape.dim, dims[name], strict=True):
            if dim.dim_param:
                dim.dim_param = label
    proto.graph.ClearField("value_info")  # refers to the numbers
