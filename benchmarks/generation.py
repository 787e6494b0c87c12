"""Sampling with and without a cache of keys and values: `python benchmarks/generation.py`.

A Llama with random weights samples a square grid of ids for the bundled model through the pipeline. Without the cache
it reads the whole sequence again for each token. Both draw the same random numbers and should produce the same ids.
Decoding the ids to images is not included.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from measuring import Row, describe_machine, make_parser, report, take_turns
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from svqvae_hf import DEFAULT_MODEL, SVQVAE, SVQVAEAutoregressivePipeline
from svqvae_hf.pipelines.sequences import SequenceLayout

NUM_CLASSES = 10
INITIALIZER_RANGE = 0.1  # large enough that a token depends on the previous tokens
CACHED, UNCACHED = "yes", "no"

Generate = Callable[[], torch.Tensor]


class Uncached(LlamaForCausalLM):
    """Language model whose cache holds the tokens instead of their keys and values."""

    def forward(self, input_ids: torch.Tensor, use_cache: bool, cache: torch.Tensor | None) -> CausalLMOutputWithPast:
        """Computes the logits from all tokens so far."""
        tokens = input_ids if cache is None else torch.cat([cache, input_ids], dim=1)
        output = super().forward(tokens, use_cache=False, logits_to_keep=1)
        output["cache"] = tokens
        return output


def prepare(
    cls: type[LlamaForCausalLM], vqvae: SVQVAE, side: int, batch: int, options: argparse.Namespace
) -> Generate:
    """Returns a run as a function, whose result is the ids `(batch, side, side)`."""
    height = side * vqvae.f
    layout = SequenceLayout(vqvae.config["codebook_size"], vqvae.f, height, height, num_classes=NUM_CLASSES)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=layout.vocab_size,
        max_position_embeddings=layout.length,
        hidden_size=options.hidden_size,
        intermediate_size=4 * options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden_size // 64,
        initializer_range=INITIALIZER_RANGE,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    language_model = cls(config).eval().to(getattr(torch, options.dtype))
    sizes = {"height": height, "width": height}
    pipeline = SVQVAEAutoregressivePipeline(vqvae, language_model, NUM_CLASSES, **sizes).to(options.device)
    pipeline.set_progress_bar_config(disable=True)

    def generate() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        labels = [index % NUM_CLASSES for index in range(batch)]
        settings = {"guidance_scale": options.guidance_scale, "temperature": options.temperature}
        return pipeline(labels, generator=generator, output_type="latent", **settings).images

    return generate


def time_sampling(vqvae: SVQVAE, side: int, batch: int, options: argparse.Namespace) -> list[Row]:
    """Times one grid size: a row with the cache and a row without."""
    contestants = {CACHED: LlamaForCausalLM, UNCACHED: Uncached}
    runs = {name: prepare(cls, vqvae, side, batch, options) for name, cls in contestants.items()}
    ids = {name: run() for name, run in runs.items()}  # warms up
    seconds = take_turns(runs, options.rounds, options.device)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    tokens = batch * side * side
    return [
        {
            "grid": f"{side} x {side}",
            "images": batch,
            "cache": name,
            "seconds": medians[name],
            "tokens per second": tokens / medians[name],
            "times as fast as without cache": medians[UNCACHED] / medians[name],
            "fraction of equal ids": (ids[name] == ids[UNCACHED]).float().mean().item(),
            "different ids": ids[name].unique().numel(),
            "all seconds": seconds[name],
        }
        for name in contestants
    ]


def main() -> None:
    """Reads the arguments, runs the benchmark and reports."""
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("--sides", type=int, nargs="+", default=[32], help="ids per side of the grid (default: 32)")
    parser.add_argument("--batch", type=int, default=1, help="images per batch (default: %(default)s)")
    parser.add_argument("--hidden-size", type=int, default=256, help="of the language model (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="of the language model (default: %(default)s)")
    parser.add_argument("--guidance-scale", type=float, default=1.0, help="default: 1, no guidance")
    parser.add_argument("--temperature", type=float, default=1.0, help="default: 1; 0 takes the most likely ids")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = describe_machine(options.device, options.threads)
    vqvae = SVQVAE.from_pretrained(DEFAULT_MODEL)
    rows = [row for side in options.sides for row in time_sampling(vqvae, side, options.batch, options)]
    report(options, machine, {"Sampling": rows})


if __name__ == "__main__":
    main()
