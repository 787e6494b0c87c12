"""Runtimes on the CPU: `python benchmarks/runtimes.py`.

Encodes images to ids and decodes them, whole, with a network of the released size (68 M parameters, f = 8) and random
weights: eager, with `torch.compile`, and the graphs of `svqvae export` in ONNX Runtime and OpenVINO. Parity is against
eager in float32: equal ids, and the largest difference of a pixel when each decodes the same ids. `start, seconds` is
what the first run takes longer, or loading a graph and its first run.
"""

import argparse
import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import onnxruntime
import openvino
import torch
from contestants import make_checkpoint
from measuring import DTYPES, Row, add_dtypes, make_parser, parse_options, report, take_turns

from svqvae_hf import SVQVAE
from svqvae_hf.export.export import export_graphs

EAGER, COMPILED, ONNX, OPENVINO = "eager", "torch.compile", "ONNX Runtime", "OpenVINO"
RUNTIMES = {  # precisions of each: an ONNX graph of `svqvae export` is in float32
    EAGER: ("float32", "bfloat16"),
    COMPILED: ("float32", "bfloat16"),
    ONNX: ("float32",),
    OPENVINO: ("float32", "bfloat16"),
}
OPENVINO_PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}
Graph = Callable[[torch.Tensor], torch.Tensor]


class Tokenizer(NamedTuple):
    """A model in a runtime.

    Args:
        encode (`Callable`): Sample `(1, 3, height, width)` in float32 to ids `(1, h, w)`.
        decode (`Callable`): Ids to a sample in float32.
    """

    encode: Graph
    decode: Graph

    @torch.inference_mode()
    def reconstruct(self, sample: torch.Tensor) -> torch.Tensor:
        """Encodes and decodes."""
        return self.decode(self.encode(sample))


def load(runtime: str, dtype: str, checkpoint: Path, graphs: Path, threads: int) -> Tokenizer:
    """Loads the model in a runtime."""
    encoder = graphs / "encoder.onnx"
    decoder = graphs / "decoder.onnx"
    if runtime == ONNX:
        return Tokenizer(load_onnx(encoder, threads), load_onnx(decoder, threads))
    if runtime == OPENVINO:
        return Tokenizer(load_openvino(encoder, dtype, threads), load_openvino(decoder, dtype, threads))
    model = SVQVAE.from_single_file(checkpoint).to(DTYPES[dtype])
    encode = model.encode_tokens
    decode = model.decode_tokens
    if runtime == COMPILED:
        encode = torch.compile(encode)
        decode = torch.compile(decode)
    return Tokenizer(lambda sample: encode(sample.to(model.dtype)), lambda ids: decode(ids).float())


def load_onnx(path: Path, threads: int) -> Graph:
    """Loads a graph in ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda value: torch.from_numpy(session.run(None, {name: value.numpy()})[0])


def load_openvino(path: Path, dtype: str, threads: int) -> Graph:
    """Loads a graph in OpenVINO."""
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": OPENVINO_PRECISIONS[dtype]}
    compiled = openvino_core().compile_model(path, "CPU", settings)
    return lambda value: torch.from_numpy(compiled([value.numpy()])[0])


@functools.cache
def openvino_core() -> openvino.Core:
    """Returns the one core of the process. Two leave it with a freed signal stack: the next signal kills it."""
    return openvino.Core()


class Parity(NamedTuple):
    """Fraction of ids that equal eager's, and the largest difference of a pixel in grey levels."""

    ids_equal: float
    largest_difference: float


@torch.inference_mode()
def parity_with(reference: Tokenizer, tokenizer: Tokenizer, sample: torch.Tensor) -> Parity:
    """Compares a runtime with another one on an image."""
    ids = reference.encode(sample)
    ids_equal = (tokenizer.encode(sample) == ids).float().mean().item()
    difference = tokenizer.decode(ids) - reference.decode(ids)
    return Parity(ids_equal, 255 * difference.abs().max().item())


def compare(side: int, checkpoint: Path, graphs: Path, options: argparse.Namespace) -> list[Row]:
    """Compares the runtimes at one image size, with a row per runtime and precision."""
    sample = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    tokenizers = {}
    first_runs = {}
    for runtime in options.runtimes:
        for dtype in RUNTIMES[runtime]:
            if dtype not in options.dtypes:
                continue
            label = f"{runtime}, {dtype}"
            begun = time.perf_counter()
            tokenizer = load(runtime, dtype, checkpoint, graphs, options.threads)
            tokenizer.reconstruct(sample)
            first_runs[label] = time.perf_counter() - begun
            tokenizers[label] = tokenizer
    runs = {label: functools.partial(tokenizer.reconstruct, sample) for label, tokenizer in tokenizers.items()}
    seconds, medians = take_turns(runs, options.rounds, "cpu")
    first = next(iter(tokenizers))
    rows = []
    for label, tokenizer in tokenizers.items():
        parity = parity_with(tokenizers[first], tokenizer, sample)
        row = {
            "runtime": label,
            "seconds": medians[label],
            f"times as fast as {first}": medians[first] / medians[label],
            "ids equal": f"{parity.ids_equal:.3%}",
            "largest difference of a pixel, grey levels": parity.largest_difference,
            "start, seconds": first_runs[label] - medians[label],
            "rounds": seconds[label],
        }
        rows.append(row)
    return rows


def main() -> None:
    """Reads the arguments, runs the benchmark and reports."""
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 512], metavar="PIXELS", help="default: 256 512")
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES), help="default: all")
    add_dtypes(parser)
    parser.add_argument("--base-channels", type=int, default=128, help="a multiple of 32 (default: 128, as released)")
    options, machine = parse_options(parser, "cpu")
    versions = {"onnxruntime": onnxruntime.__version__, "openvino": openvino.__version__}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder, "svqvae.safetensors")
        graphs = Path(folder, "graphs")
        make_checkpoint(checkpoint, options.base_channels)
        export_graphs(SVQVAE.from_single_file(checkpoint), graphs)
        tables = {}
        for side in options.sides:
            tables[f"{side} x {side}, encoded and decoded"] = compare(side, checkpoint, graphs, options)
    report(options, {**machine, **versions}, tables)


if __name__ == "__main__":
    main()
