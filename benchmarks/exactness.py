"""How many ids rounding changes: `python benchmarks/exactness.py IMAGES [--model MODEL] [--side PIXELS]`.

The reference is the model in float64. The table counts the ids that differ from it for three encoders: the model in
float32 with 1, 2 and 4 CPU threads, the graph of `svqvae export`, and a graph whose normalisation layers add up each
group in one sum.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import torch
from measuring import Row, make_parser, parse_options, report
from tqdm import tqdm

from svqvae_cli.files import find_inputs
from svqvae_files.file_names import IMAGE_SUFFIXES
from svqvae_hf import DEFAULT_MODEL, SVQVAE, SVQVAEImageProcessor
from svqvae_hf.export.graphs import TRACED_GRID, EncoderGraph, coarse_noise, trace_graph
from svqvae_hf.export.onnx_graphs import encoder_graph, to_onnx

THREADS = (1, 2, 4)
Encode = Callable[[torch.Tensor], torch.Tensor]


def encode_with_threads(model: SVQVAE, threads: int) -> Encode:
    """Encodes in float32 with a number of CPU threads."""

    def encode(sample: torch.Tensor) -> torch.Tensor:
        torch.set_num_threads(threads)
        return model.encode_tokens(sample)

    return encode


def single_sum_graph(model: SVQVAE) -> onnx.ModelProto:
    """The exported encoder, with the normalisation layers of the model."""
    graph = EncoderGraph(model)
    graph.encoder = model.encoder
    program = trace_graph(graph, coarse_noise(model, TRACED_GRID), (0, 2, 3))
    return to_onnx(program, ["sample"], ["ids"])


def encode_by_graph(graph: onnx.ModelProto) -> Encode:
    """Encodes by onnxruntime on the CPU."""
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])

    def encode(sample: torch.Tensor) -> torch.Tensor:
        (ids,) = session.run(None, {"sample": sample.numpy()})
        return torch.from_numpy(ids)

    return encode


def cut_centre(sample: torch.Tensor, side: int | None) -> torch.Tensor:
    """Cuts the centre out of an image `(1, channels, height, width)`. Without a side, returns the whole image."""
    if side is None:
        return sample
    height, width = sample.shape[-2:]
    top = (height - side) // 2
    left = (width - side) // 2
    return sample[..., top : top + side, left : left + side]


@torch.inference_mode()
def main() -> None:
    """Reads the arguments, runs the benchmark and reports."""
    parser = make_parser(__doc__, rounds=1)
    parser.add_argument("images", type=Path, help="folder of images")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="folder or Hub id (default: the bundled model)")
    parser.add_argument("--side", type=int, metavar="PIXELS", help="side of a crop of the centre (default: no crop)")
    options, machine = parse_options(parser, "cpu")
    paths = [file.path for file in find_inputs([str(options.images)], IMAGE_SUFFIXES)]
    model = SVQVAE.from_pretrained(options.model).eval()
    exact_model = copy.deepcopy(model).double()
    contestants: dict[str, Encode] = {}
    for threads in THREADS:
        contestants[f"PyTorch, threads: {threads}"] = encode_with_threads(model, threads)
    contestants["exported graph"] = encode_by_graph(encoder_graph(model))
    contestants["graph with single sums"] = encode_by_graph(single_sum_graph(model))
    processor = SVQVAEImageProcessor.from_model(model)
    changed = dict.fromkeys(contestants, 0)
    total = 0
    for path in tqdm(paths):
        sample = cut_centre(processor(path)["pixel_values"], options.side)
        exact_ids = exact_model.encode_tokens(sample.double())
        total += exact_ids.numel()
        for name, encode in contestants.items():
            changed[name] += int((encode(sample) != exact_ids).sum())
    rows: list[Row] = [{"encoder": name, "ids": total, "changed": count} for name, count in changed.items()]
    report(options, machine, {f"Ids that differ from float64, {len(paths)} images": rows})


if __name__ == "__main__":
    main()
