"""Speed of a training step: `python benchmarks/training.py`.

Times a step of training/train.py (two scales, mean squared error, codebook losses, AdamW), with the same model and
crops for each recipe, and then in bfloat16 with crops of other numbers and sides. The plain recipe is eager float32 in
PyTorch's default memory format.
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from measuring import Row, make_parser, parse_options, report, take_turns

sys.path.insert(0, str(Path(__file__).parent.parent / "training"))

from train import KERNEL_NDIM

from svqvae_hf.trainer.losses.objective import Objective
from svqvae_hf.trainer.model import load_model
from svqvae_hf.trainer.optimization import make_optimizer
from svqvae_hf.trainer.train_options import TrainOptions

ROOT = Path(__file__).parent.parent
SCALES = [0.5, 1.0]
RECIPES = {
    "plain: eager, float32": {},
    "channels_last": {"channels_last": True},
    "bfloat16": {"bfloat16": True},
    "bfloat16, channels_last": {"bfloat16": True, "channels_last": True},
}
CROPS = ((4, 64), (8, 64), (32, 64), (2, 128), (8, 128), (1, 256), (2, 256))  # crops per step, side in pixels


def make_step(
    config: str, device: str, count: int, side: int, bfloat16: bool = False, channels_last: bool = False
) -> Callable[[], None]:
    """Makes a model for a recipe, and returns its training step as a function."""
    options = TrainOptions(output_dir="out", train_data_dir="none", model_config_name_or_path=config, resolution=side)
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    vqvae = load_model(options).to(device, memory_format=layout)
    objective = Objective(options, vqvae)
    optimizer, _ = make_optimizer(vqvae, options, options.learning_rate, options.max_steps, KERNEL_NDIM)
    sample = torch.rand(count, 3, side, side).to(device, memory_format=layout)

    def step() -> None:
        with torch.autocast(sample.device.type, torch.bfloat16, enabled=bfloat16):
            output = vqvae(sample, SCALES, scale_from="latents")
            loss, _ = objective(objective.pairs(sample, output), output, step=0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vqvae.parameters(), options.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def time_steps(steps: Mapping[str, Callable[[], None]], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each step."""
    for _ in range(2):  # warms up
        for step in steps.values():
            step()
    _, medians = take_turns(steps, rounds, device)
    return medians


def main() -> None:
    """Reads the arguments, times the steps and reports."""
    parser = make_parser(__doc__, rounds=9)
    parser.add_argument("--model-config", default=str(ROOT / "training" / "configs" / "model_small.json"))
    parser.add_argument("--side", type=int, default=256, help="side of a recipe's crop in pixels (default: 256)")
    parser.add_argument("--crops", type=int, help="only the first N of the other numbers and sides of crops")
    options, machine = parse_options(parser)
    recipes = f"One crop of {options.side} x {options.side}"
    report(options, machine, {recipes: compare_recipes(options), "Crops": compare_crops(options)})


def compare_recipes(options: argparse.Namespace) -> list[Row]:
    """Times a step on one crop by each recipe."""
    steps = {}
    for name, recipe in RECIPES.items():
        steps[name] = make_step(options.model_config, options.device, 1, options.side, **recipe)
    medians = time_steps(steps, options.rounds, options.device)
    plain = next(iter(RECIPES))
    rows = []
    for name, seconds in medians.items():
        row = {"recipe": name, "seconds per step": seconds, "times as fast as plain": medians[plain] / seconds}
        rows.append(row)
    return rows


def compare_crops(options: argparse.Namespace) -> list[Row]:
    """Times a step in bfloat16 on several numbers and sides of crops."""
    steps = {}
    for count, side in CROPS[: options.crops]:
        steps[count, side] = make_step(options.model_config, options.device, count, side, bfloat16=True)
    medians = time_steps(steps, options.rounds, options.device)
    rows = []
    for (count, side), seconds in medians.items():
        row = {
            "crops per step, bfloat16": f"{count} x {side}²",
            "seconds per step": seconds,
            "seconds per megapixel": seconds * 1e6 / (count * side**2),
        }
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
