"""Compares a converted next-scale transformer with the original code of FlexVAR on the same weights.

python conversion/compare_flexvar.py FLEXVAR_CHECKOUT CHECKPOINT

FLEXVAR_CHECKOUT is a checkout of jiaosiyu1999/FlexVAR. Its code runs unchanged, with random codes in float32. For
schedules of ten, twelve and fifteen scales, the script compares the logits of one pass, and the ids of the last scale:
greedy and sampled, with both forms of guidance. The exit code is 1 if the two differ by more than rounding.
"""

import argparse
import importlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from svqvae_hf import SVQVAE, NextScaleTransformer, SVQVAENextScalePipeline
from svqvae_hf.loaders.checkpoints import Checkpoint
from svqvae_hf.loaders.next_scale_checkpoints import read_next_scale_checkpoint

IMAGES = 2
SEED = 0
TOLERANCE = 1e-4  # of logits
TRAINED_SIDE = 16
SCHEDULES = (
    (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16),
    (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 23, 32),
)
SAMPLED_SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)  # FlexVAR takes the most likely ids of other sides
TOP_K = 900
TOP_P = 0.95


@dataclass(frozen=True)
class Guidance:
    """A form of guidance.

    Args:
        name (`str`): Its name.
        flexvar_options (`dict[str, Any]`): Arguments of FlexVAR.
        options (`dict[str, Any]`): Arguments of the pipeline.
    """

    name: str
    flexvar_options: dict[str, Any]
    options: dict[str, Any]


GUIDANCES = (
    Guidance("rising guidance", {"cfg": 2.5}, {"guidance_scale": 3.5}),
    Guidance(
        "constant guidance",
        {"cfg": 4.0, "used_llamagen_cfg": True},
        {"guidance_scale": 4.0, "guidance_mode": "constant"},
    ),
)


def load_original(checkout: Path, checkpoint: Checkpoint) -> nn.Module:
    """Loads a checkpoint with the original code, without its tokenizer."""
    if not (checkout / "models" / "flexvar.py").is_file():
        raise FileNotFoundError(
            f"`{checkout}` must be a checkout of jiaosiyu1999/FlexVAR, but has no models/flexvar.py."
        )
    sys.path.insert(0, str(checkout))
    flexvar = importlib.import_module("models.flexvar")
    config = checkpoint.config
    model: nn.Module = flexvar.FlexVAR(
        SimpleNamespace(Cvae=config["codebook_embed_dim"], vocab_size=config["codebook_size"]),
        num_classes=config["num_classes"],
        depth=config["num_layers"],
        embed_dim=config["num_attention_heads"] * config["attention_head_dim"],
        num_heads=config["num_attention_heads"],
        cond_drop_rate=0.0,
        attn_l2_norm=True,
    )
    model.load_state_dict({**model.state_dict(), **checkpoint.state_dict})  # the file lacks the buffers
    model.rng = torch.Generator()
    return model.eval()


def compare(original: nn.Module, pipeline: SVQVAENextScalePipeline) -> Iterator[tuple[bool, str]]:
    """Yields whether each comparison passed, and its line."""
    labels = torch.arange(IMAGES) % pipeline.transformer.config["num_classes"]
    codebook_size = pipeline.vqvae.config["codebook_size"]
    for schedule in SCHEDULES:
        title = f"{len(schedule)} scales to {schedule[-1]} x {schedule[-1]}"
        distance = logits_distance(original, pipeline, labels, schedule)
        yield distance <= TOLERANCE, f"{title}: logits of one pass up to {distance:.1e} apart"
        for guidance in GUIDANCES:
            run = f"{title}, {guidance.name}"
            equal = equal_ids(original, pipeline, labels, schedule, guidance, top_k=1, top_p=0.0)
            yield equal == 1, f"{run}, greedy: {equal:.3%} of the ids equal"
            top_k = min(TOP_K, codebook_size)
            equal = equal_ids(original, pipeline, labels, schedule, guidance, top_k, TOP_P)
            yield equal == 1, f"{run}, sampled: {equal:.3%} of the ids equal"


def equal_ids(
    original: nn.Module,
    pipeline: SVQVAENextScalePipeline,
    labels: torch.Tensor,
    schedule: Sequence[int],
    guidance: Guidance,
    top_k: int,
    top_p: float,
) -> float:
    """Fraction of the ids of the last scale that are equal. FlexVAR takes a `top_p` of 0 for 1."""
    tokenizer = SimpleNamespace(quantize=pipeline.vqvae.quantize, decode_code=lambda ids, shape: ids)
    expected = original.autoregressive_infer_cfg(
        tokenizer, IMAGES, labels, schedule, SEED, top_k=top_k, top_p=top_p, **guidance.flexvar_options
    )
    greedy_scales = []
    for step, side in enumerate(schedule):
        is_sampled = side <= TRAINED_SIDE and side in SAMPLED_SIDES
        if not is_sampled:
            greedy_scales.append(step)
    image_side = schedule[-1] * pipeline.vqvae.f
    ids = pipeline(
        labels.tolist(),
        image_side,
        image_side,
        schedule=schedule,
        top_k=top_k,
        top_p=top_p or 1.0,
        greedy_scales=greedy_scales,
        generator=torch.Generator().manual_seed(SEED),
        output_type="latent",
        **guidance.options,
    ).images
    return (ids.flatten(1) == expected).double().mean().item()


def logits_distance(
    original: nn.Module, pipeline: SVQVAENextScalePipeline, labels: torch.Tensor, schedule: Sequence[int]
) -> float:
    """Largest difference of the logits of all scales, given random codes."""
    torch.manual_seed(SEED)
    dim = pipeline.transformer.config["codebook_embed_dim"]
    codes = []  # of each scale but the last
    inputs = []  # of FlexVAR: the codes of a scale, resized to the next
    for side, next_side in pairwise(schedule):
        grid = F.normalize(torch.randn(IMAGES, dim, side, side), dim=1)
        resized = F.interpolate(grid, (next_side, next_side), mode="bicubic")
        codes.append(grid)
        inputs.append(resized.flatten(2).transpose(1, 2))  # (IMAGES, next_side ** 2, dim)
    expected = original(labels, torch.cat(inputs, dim=1), schedule)
    sizes = [(side, side) for side in schedule]
    logits = pipeline.transformer(labels, codes, sizes).logits
    return (logits - expected).abs().max().item()


@torch.no_grad()
def main() -> int:
    """Runs the script and returns its exit code."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("flexvar_checkout", type=Path, help="folder of the original code")
    parser.add_argument("checkpoint", help="file of a transformer, local or `org/repo:file` on the Hub")
    args = parser.parse_args()
    try:
        checkpoint = read_next_scale_checkpoint(args.checkpoint, NextScaleTransformer)
        original = load_original(args.flexvar_checkout, checkpoint)
        vqvae = SVQVAE(  # decodes nothing here
            base_channels=32,
            codebook_size=checkpoint.config["codebook_size"],
            codebook_embed_dim=checkpoint.config["codebook_embed_dim"],
        )
        pipeline = SVQVAENextScalePipeline(vqvae, checkpoint.model(NextScaleTransformer), schedule=[1, TRAINED_SIDE])
        pipeline.set_progress_bar_config(disable=True)
        passed = True
        for holds, line in compare(original, pipeline):
            verdict = "ok" if holds else "DIFFERS"
            print(f"{line}  {verdict}")
            passed &= holds
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
