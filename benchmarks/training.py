"""Speed of a training step: `python benchmarks/training.py [--threads N] [--output FILE]`.

Times a step of training/train.py (two scales, mean squared error, codebook losses, AdamW), with the same model and
crops for each recipe, and then in bfloat16 with crops of other numbers and sides. The steps take turns, so that the
load of the machine affects all alike. The plain recipe is eager float32 in PyTorch's default memory format. Prints
tables; `--output` also writes all times as JSON.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "training"))

from train import CONVOLUTION_NDIM

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
    model_config: str,
    sample: torch.Tensor,
    bfloat16: bool = False,
    channels_last: bool = False,
) -> Callable[[], None]:
    """Makes a model for a recipe, and returns its training step as a function."""
    options = TrainOptions(
        output_dir="out",
        train_data_dir="none",
        model_config_name_or_path=model_config,
        resolution=sample.shape[-1],
    )
    torch.manual_seed(0)
    vqvae = load_model(options).to(sample.device)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    vqvae.to(memory_format=layout)
    objective = Objective(options, vqvae)
    optimizer, _ = make_optimizer(vqvae, options, options.learning_rate, options.max_train_steps, CONVOLUTION_NDIM)
    sample = sample.contiguous(memory_format=layout)

    def step() -> None:
        with torch.autocast(sample.device.type, torch.bfloat16) if bfloat16 else nullcontext():
            output = vqvae(sample, SCALES, scale_from="latents")
            loss, _ = objective(objective.pairs(sample, output), output, step=0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vqvae.parameters(), options.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if sample.device.type == "cuda":
            torch.cuda.synchronize()

    return step


def time_steps(steps: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step in each round."""
    for _ in range(2):  # compiles and warms up
        for step in steps.values():
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    """Reads the arguments, times the steps and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_config", default=str(ROOT / "training" / "runs" / "default_config.json"))
    parser.add_argument("--batch_size", type=int, default=1, help="crops per step")
    parser.add_argument("--side", type=int, default=256, help="side of a crop in pixels")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps per recipe")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sample = torch.rand(options.batch_size, 3, options.side, options.side, device=options.device)
    steps = {name: make_step(options.model_config, sample, **recipe) for name, recipe in RECIPES.items()}
    seconds = time_steps(steps, options.rounds)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    plain = next(iter(medians.values()))
    crops = f"{options.batch_size} x {options.side}² pixels"
    print(f"{crops}, {options.device}, {options.threads} threads, torch {torch.__version__}\n")
    print("| recipe | seconds per step | times as fast as plain |\n|---|---|---|")
    for name, median in medians.items():
        print(f"| {name} | {median:.3f} | {plain / median:.2f} |")

    by_crops = {
        f"{count} x {side}²": make_step(
            options.model_config, torch.rand(count, 3, side, side, device=options.device), bfloat16=True
        )
        for count, side in CROPS
    }
    crop_seconds = time_steps(by_crops, options.rounds)
    print("\n| crops per step, bfloat16 | seconds per step | seconds per megapixel |\n|---|---|---|")
    for (count, side), (name, values) in zip(CROPS, crop_seconds.items(), strict=True):
        median = statistics.median(values)
        print(f"| {name} | {median:.3f} | {median * 1e6 / (count * side**2):.2f} |")
    if options.output:
        machine = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
        content = vars(options) | machine | {"seconds": seconds | crop_seconds, "output": str(options.output)}
        options.output.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
