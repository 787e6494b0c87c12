"""Sampling one scale per step and one id per step: `python benchmarks/next_scale.py`.

Two transformers of equal width and depth with random weights sample a square grid of ids for the bundled model. The
second table measures each step of the first one without guidance, with the memory of its cache, and beside it the
attention and the linear layers of the step alone. Decoding the ids to images is not included.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from generation import NUM_CLASSES, prepare
from measuring import Row, describe_machine, make_parser, report, take_turns
from transformers import DynamicCache, LlamaForCausalLM

from svqvae_hf import DEFAULT_MODEL, SVQVAE, NextScaleTransformer, SVQVAENextScalePipeline
from svqvae_hf.pipelines.reserved_cache import reserve
from svqvae_hf.pipelines.schedules import Size, make_schedule

SCALES, IDS = "one scale", "one id"
WHOLE, LAYERS = "milliseconds", "milliseconds of its attention and linear layers alone"
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
            temperature=options.temperature,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images

    return generate, pipeline


def time_steps(pipeline: SVQVAENextScalePipeline, sizes: list[Size], options: argparse.Namespace) -> list[Row]:
    """Times the transformer in each step, and its attention and linear layers alone."""
    transformer, device = pipeline.transformer, options.device
    labels = torch.zeros(options.batch, dtype=torch.int64, device=device)
    cache, codes, rows = DynamicCache(), [], []
    for size in sizes:
        seen, new = cache.get_seq_length(), size[0] * size[1]

        def predict(codes: list[torch.Tensor] = codes, size: Size = size, new: int = new) -> None:
            transformer(labels, codes, [size], cache)
            cache.crop(-new)

        runs = {WHOLE: predict, LAYERS: prepare_layers(transformer, options.batch, new, seen + new)}
        for run in runs.values():
            run()  # warms up
        seconds = take_turns(runs, options.rounds, device)
        whole, layers = (1e3 * statistics.median(seconds[name]) for name in runs)
        transformer(labels, codes, [size], cache)
        if not codes:
            reserve(cache, sum(height * width for height, width in sizes[1:]))
        stored = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        rows.append(
            {
                "scale": f"{size[0]} x {size[1]}",
                "tokens of the step": new,
                "tokens so far": seen + new,
                "cache, MiB": sum(tensor.nbytes for tensor in stored) / MIB,
                WHOLE: whole,
                LAYERS: layers,
                "step over layers": whole / layers,
                "all seconds": seconds[WHOLE],
                "all seconds of its layers": seconds[LAYERS],
            }
        )
        codes = [torch.randn(options.batch, transformer.config["codebook_embed_dim"], *size, device=device)]
    return rows


def prepare_layers(transformer: NextScaleTransformer, batch: int, new: int, total: int) -> Callable[[], None]:
    """Returns the attention and the linear layers of a step as a function, on random tokens.

    Args:
        transformer ([`NextScaleTransformer`]): Transformer.
        batch (`int`): Images.
        new (`int`): Tokens of the step.
        total (`int`): Tokens of all steps so far.
    """
    width, like = transformer.word_embed.out_features, transformer.head.weight
    heads = transformer.config["num_attention_heads"]

    def tokens(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, dtype=like.dtype, device=like.device)

    condition, code = tokens(1, width), tokens(new, transformer.config["codebook_embed_dim"])
    hidden, inner = tokens(new, width), tokens(new, transformer.blocks[0].ffn.fc2.in_features)
    query, key, value = (tokens(heads, count, width // heads) for count in (new, total, total))

    def run() -> None:
        transformer.word_embed(code)
        for block in transformer.blocks:
            block.ada_lin(condition)
            block.attn.mat_qkv(hidden)
            F.scaled_dot_product_attention(query, key, value, scale=1.0)
            block.attn.proj(hidden)
            block.ffn.fc1(hidden)
            block.ffn.fc2(inner)
        transformer.head_nm.ada_lin(condition)
        transformer.head(hidden)

    return run


@torch.no_grad()
def main() -> None:
    """Reads the arguments, runs the benchmark and reports."""
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("--side", type=int, default=16, help="ids per side of the grid (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="scales of an image (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="images per batch (default: %(default)s)")
    parser.add_argument("--hidden-size", type=int, default=256, help="of both transformers (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="of both transformers (default: %(default)s)")
    parser.add_argument("--guidance-scale", type=float, default=1.0, help="default: 1, no guidance")
    parser.add_argument("--temperature", type=float, default=1.0, help="default: 1; 0 takes the most likely ids")
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
    steps = time_steps(pipeline, make_schedule((options.side,) * 2, min(options.steps, options.side)), options)
    report(options, machine, {"Sampling": rows, "Steps": steps})


if __name__ == "__main__":
    main()
