"""Sampling one scale per step and one id per step: `python benchmarks/next_scale.py`.

Two transformers of equal width and depth with random weights sample a square grid of ids for the bundled model. The
second table measures each step of the first one, with the memory of its cache. Decoding the ids to images is not
included.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from generation import NUM_CLASSES, prepare
from measuring import Row, describe_machine, make_parser, report, take_turns
from transformers import DynamicCache, LlamaForCausalLM

from svqvae_hf import DEFAULT_MODEL, SVQVAE, NextScaleTransformer, SVQVAENextScalePipeline

SCALES, IDS = "one scale", "one id"
MIB = 1 << 20


def prepare_scales(
    vqvae: SVQVAE, side: int, batch: int, options: argparse.Namespace
) -> tuple[Callable[[], torch.Tensor], SVQVAENextScalePipeline]:
    """Returns a run as a function, whose result is the ids `(batch, side, side)`, and its pipeline."""
    torch.manual_seed(0)
    transformer = NextScaleTransformer(
        num_layers=options.layers,
        num_attention_heads=options.hidden_size // 64,
        num_classes=NUM_CLASSES,
        codebook_size=vqvae.config["codebook_size"],
        codebook_embed_dim=vqvae.config["codebook_embed_dim"],
    ).to(getattr(torch, options.dtype))
    pipeline = SVQVAENextScalePipeline(vqvae, transformer, schedule=[1, side]).to(options.device)
    pipeline.set_progress_bar_config(disable=True)

    def generate() -> torch.Tensor:
        return pipeline(
            [index % NUM_CLASSES for index in range(batch)],
            num_inference_steps=min(options.steps, side),
            guidance_scale=options.guidance_scale,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images

    return generate, pipeline


def time_steps(pipeline: SVQVAENextScalePipeline, generate: Callable[[], torch.Tensor]) -> list[Row]:
    """Times the transformer in each step of one run."""
    rows: list[Row] = []
    forward = pipeline.transformer.forward

    def timed(
        labels: torch.Tensor, codes: list[torch.Tensor], sizes: list[tuple[int, int]], cache: DynamicCache
    ) -> Any:
        start = time.perf_counter()
        output = forward(labels, codes, sizes, cache)
        stored = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        rows.append(
            {
                "scale": f"{sizes[0][0]} x {sizes[0][1]}",
                "tokens of the step": sizes[0][0] * sizes[0][1],
                "tokens so far": cache.get_seq_length(),
                "milliseconds": 1e3 * (time.perf_counter() - start),
                "cache, MiB": sum(tensor.nbytes for tensor in stored) / MIB,
            }
        )
        return output

    pipeline.transformer.forward = timed
    generate()
    pipeline.transformer.forward = forward
    return rows


def main() -> None:
    """Reads the arguments, runs the benchmark and reports."""
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("--side", type=int, default=16, help="ids per side of the grid (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="scales of an image (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="images per batch (default: %(default)s)")
    parser.add_argument("--hidden-size", type=int, default=256, help="of both transformers (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="of both transformers (default: %(default)s)")
    parser.add_argument("--guidance-scale", type=float, default=1.0, help="default: 1, no guidance")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = describe_machine(options.device, options.threads)
    vqvae = SVQVAE.from_pretrained(DEFAULT_MODEL)
    by_scales, pipeline = prepare_scales(vqvae, options.side, options.batch, options)
    runs = {SCALES: by_scales, IDS: prepare(LlamaForCausalLM, vqvae, options.side, options.batch, options)}
    for run in runs.values():
        run()  # warms up
    seconds = take_turns(runs, options.rounds, options.device)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    rows = [
        {
            "step": name,
            "steps": min(options.steps, options.side) if name == SCALES else options.side**2,
            "seconds": medians[name],
            "times as fast as one id per step": medians[IDS] / medians[name],
            "all seconds": seconds[name],
        }
        for name in runs
    ]
    report(options, machine, {"Sampling": rows, "Steps": time_steps(pipeline, by_scales)})


if __name__ == "__main__":
    main()
