"""LlamaGen's sampling loop and this package's pipeline: `python benchmarks/llamagen.py --original LLAMAGEN`.

Both sample the ids of images from a model of LlamaGen-B's size with random weights; LLAMAGEN is a checkout of
FoundationVision/LlamaGen, whose code runs unchanged. Decoding the ids to images is not included.
"""

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import Row, in_own_process, make_parser, parse_options, report, take_turns

from svqvae_hf import SVQVAE, LlamaGenConfig, LlamaGenForCausalLM, SVQVAEAutoregressivePipeline

sys.path.insert(0, str(Path(__file__).parent.parent / "conversion"))

from compare_llamagen import import_original

ORIGINAL, OURS = "the original", "svqvae-hf"
CODES, NUM_CLASSES = 16384, 1000


def prepare(name: str, batch: int, options: argparse.Namespace) -> Callable[[], torch.Tensor]:
    """Returns a run of a contestant as a function, whose result is the ids."""
    labels = torch.arange(batch, device=options.device) % NUM_CLASSES
    if name == OURS:
        pipeline = make_pipeline(options)
        call = {"guidance_scale": options.guidance_scale, "top_k": options.top_k, "output_type": "latent"}
        return lambda: pipeline(labels, **call).images.flatten(1)
    gpt, sampling = import_original(options.original)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of `sdp_kernel`, which the original calls
    model = gpt.Transformer(
        gpt.ModelArgs(
            dim=options.hidden_size,
            n_layer=options.layers,
            n_head=options.heads,
            vocab_size=CODES,
            block_size=options.side**2,
            num_classes=NUM_CLASSES,
        )
    )
    torch.nn.init.normal_(model.output.weight, std=0.02)  # zero at first
    model.to(options.device, getattr(torch, options.dtype)).eval()
    call = {"cfg_scale": options.guidance_scale, "top_k": options.top_k}
    return lambda: sampling.generate(model, labels, options.side**2, **call)


def make_pipeline(options: argparse.Namespace) -> SVQVAEAutoregressivePipeline:
    """Pipeline with random weights."""
    config = LlamaGenConfig(
        codebook_size=CODES,
        num_classes=NUM_CLASSES,
        grid_size=options.side,
        hidden_size=options.hidden_size,
        intermediate_size=256 * -(-options.hidden_size * 8 // 3 // 256),
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
    )
    model = LlamaGenForCausalLM(config).to(getattr(torch, options.dtype)).eval()
    vqvae = SVQVAE(codebook_size=CODES, base_channels=32)  # decodes nothing here
    pipeline = SVQVAEAutoregressivePipeline(vqvae, model).to(options.device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def main() -> None:
    """Reads the arguments, runs the benchmark and reports."""
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("--original", type=Path, help="checkout of LlamaGen; left out by default")
    parser.add_argument("--side", type=int, default=16, help="ids per side of the grid (default: %(default)s)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="images per batch (default: 1 8)")
    parser.add_argument("--hidden-size", type=int, default=768, help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=12, help="default: %(default)s")
    parser.add_argument("--heads", type=int, default=12, help="default: %(default)s")
    parser.add_argument("--guidance-scale", type=float, default=4.0, help="default: %(default)s")
    parser.add_argument("--top-k", type=int, default=2000, help="default: %(default)s")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32")
    options, machine = parse_options(parser)
    names = [ORIGINAL, OURS] if options.original else [OURS]
    sampling: list[Row] = []
    for batch in options.batches:
        runs = {name: prepare(name, batch, options) for name in names}
        seconds, medians = take_turns(runs, options.rounds, options.device)
        del runs
        for name in names:
            cost = in_own_process(options.device, options.threads, prepare, name, batch, options)
            sampling.append(
                {
                    "sampling": name,
                    "batch": batch,
                    "milliseconds per id": 1e3 * medians[name] / options.side**2,
                    "times as fast": medians[names[0]] / medians[name],
                    "peak memory beyond the weights, MiB": cost.peak_mib,
                    "all seconds": seconds[name],
                }
            )
    report(options, machine, {"Sampling": sampling})


if __name__ == "__main__":
    main()
