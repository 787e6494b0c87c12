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
TOP_K, TOP_P = 900, 0.95
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # arguments of FlexVAR, and of the pipeline
    "rising guidance": ({"cfg": 2.5}, {"guidance_scale": 3.5}),
    "constant guidance": (
        {"cfg": 4.0, "used_llamagen_cfg": True},
        {"guidance_scale": 4.0, "guidance_mode": "constant"},
    ),
}


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
    codebook = pipeline.vqvae.quantize.embedding.weight
    tokenizer = SimpleNamespace(
        quantize=SimpleNamespace(embedding=SimpleNamespace(weight=codebook)), decode_code=lambda ids, shape: ids
    )
    for schedule in SCHEDULES:
        title = f"{len(schedule)} scales to {schedule[-1]} x {schedule[-1]}"
        distance = logits_distance(original, pipeline, labels, schedule)
        yield distance <= TOLERANCE, f"{title}: logits of one pass up to {distance:.1e} apart"
        greedy = [step for step, side in enumerate(schedule) if side > TRAINED_SIDE or side not in SAMPLED_SIDES]
        for name, (theirs, ours) in RUNS.items():
            for kind, top_k, top_p in (("greedy", 1, 0.0), ("sampled", min(TOP_K, len(codebook)), TOP_P)):
                expected = original.autoregressive_infer_cfg(
                    tokenizer, IMAGES, labels, schedule, SEED, top_k=top_k, top_p=top_p, **theirs
                )
                ids = pipeline(
                    labels.tolist(),
                    *[schedule[-1] * pipeline.vqvae.f] * 2,
                    schedule=schedule,
                    top_k=top_k,
                    top_p=top_p or 1.0,
                    greedy_scales=greedy,
                    generator=torch.Generator().manual_seed(SEED),
                    output_type="latent",
                    **ours,
                ).images
                equal = (ids.flatten(1) == expected).double().mean().item()
                yield equal == 1, f"{title}, {name}, {kind}: {equal:.3%} of the ids equal"


def logits_distance(
    original: nn.Module, pipeline: SVQVAENextScalePipeline, labels: torch.Tensor, schedule: Sequence[int]
) -> float:
    """Largest difference of the logits of all scales, given random codes."""
    torch.manual_seed(SEED)
    config, sizes = pipeline.transformer.config, [(side, side) for side in schedule]
    codes = [F.normalize(torch.randn(IMAGES, config["codebook_embed_dim"], *size), dim=1) for size in sizes[:-1]]
    resized = [F.interpolate(grid, size, mode="bicubic") for grid, size in zip(codes, sizes[1:], strict=True)]
    expected = original(labels, torch.cat([grid.flatten(2).transpose(1, 2) for grid in resized], dim=1), schedule)
    return (pipeline.transformer(labels, codes, sizes).logits - expected).abs().max().item()


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
        codes = {name: checkpoint.config[name] for name in ("codebook_size", "codebook_embed_dim")}
        vqvae = SVQVAE(base_channels=32, **codes)  # decodes nothing here
        pipeline = SVQVAENextScalePipeline(vqvae, checkpoint.model(NextScaleTransformer), schedule=[1, TRAINED_SIDE])
        pipeline.set_progress_bar_config(disable=True)
        passed = True
        for holds, line in compare(original, pipeline):
            print(f"{line}  {'ok' if holds else 'DIFFERS'}")
            passed &= holds
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
