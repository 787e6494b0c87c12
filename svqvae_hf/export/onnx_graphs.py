"""Encoder and decoder as ONNX graphs, with named dimensions and what a caller needs to know about the model."""

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

from svqvae_hf.export.graphs import trace_decoder, trace_encoder
from svqvae_hf.models.modeling_svqvae import SVQVAE

Graph = Callable[[torch.Tensor], torch.Tensor]

SAMPLE_DIMS = ("batch", "channels", "height", "width")
IDS_DIMS = ("batch", "rows", "columns")


def encoder_graph(model: SVQVAE) -> onnx.ModelProto:
    """Converts the encoder: `sample` -> `ids`.

    Args:
        model ([`SVQVAE`]): Model in float32 on the CPU, in evaluation mode.
    """
    graph = to_onnx(trace_encoder(model), ["sample"], ["ids"])
    name_dims(graph.graph.input[0], SAMPLE_DIMS)
    name_dims(graph.graph.output[0], IDS_DIMS)
    add_metadata(graph, model)
    return graph


def decoder_graph(model: SVQVAE) -> onnx.ModelProto:
    """Converts the decoder: `ids` -> `sample`.

    Args:
        model ([`SVQVAE`]): Model in float32 on the CPU, in evaluation mode.
    """
    graph = to_onnx(trace_decoder(model), ["ids"], ["sample"])
    name_dims(graph.graph.input[0], IDS_DIMS)
    name_dims(graph.graph.output[0], SAMPLE_DIMS)
    add_metadata(graph, model)
    return graph


def to_onnx(program: ExportedProgram, inputs: list[str], outputs: list[str]) -> onnx.ModelProto:
    """Converts a traced program. No path and no source line of this machine is left in the result."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`isinstance\(treespec", FutureWarning)  # torch warns about its own code
        converted = torch.onnx.export(program, dynamo=True, input_names=inputs, output_names=outputs, verbose=False)
    model = cast(torch.onnx.ONNXProgram, converted).model_proto
    for node in model.graph.node:
        node.ClearField("metadata_props")  # stack traces
        node.ClearField("doc_string")
    inputs_and_outputs = list(model.graph.input) + list(model.graph.output)
    for value in inputs_and_outputs:
        value.ClearField("metadata_props")
    model.graph.ClearField("value_info")  # refers to dimensions by the exporter's numbers
    model.graph.ClearField("metadata_props")
    model.ClearField("metadata_props")
    return model


def name_dims(value: onnx.ValueInfoProto, names: tuple[str, ...]) -> None:
    """Names the dynamic dimensions of an input or output, which the exporter numbers."""
    for dim, name in zip(value.type.tensor_type.shape.dim, names, strict=True):
        if dim.dim_param:
            dim.dim_param = name


def add_metadata(graph: onnx.ModelProto, model: SVQVAE) -> None:
    """Adds what a caller needs to know, each value as JSON."""
    metadata = {
        "f": model.f,
        "pixel_range": list(model.config["pixel_range"]),
        "codebook_size": model.config["codebook_size"],
        "codebook_fingerprint": model.codebook_fingerprint(),
    }
    documents = {key: json.dumps(value) for key, value in metadata.items()}
    onnx.helper.set_model_props(graph, documents)


def load_graph(path: Path) -> Graph:
    """Loads an ONNX file with one input and one output in onnxruntime, on the CPU."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(value: torch.Tensor) -> torch.Tensor:
        (result,) = session.run(None, {name: value.numpy()})
        return torch.from_numpy(result)

    return run
