"""Profiles a reconstruction by layer and by operation."""

import re
from collections import defaultdict

from contestants import Contestant
from measuring import Row
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

# Modules by the names of their weights, which are the same in our model and in the original.
LAYER = re.compile(
    r"((?:encoder|decoder)\.(?:conv_in|mid|norm_out|conv_out|conv_blocks\.\d+\.(?:res|attn|downsample|upsample)))"
    r"(?:\.\d+)?|quant_conv|post_quant_conv|quantize"
)
ELSEWHERE = "elsewhere"
# Kind of an operator, by the first key that is part of its name.
OPERATIONS = {
    "conv": "convolution",
    "norm": "norm",
    "silu": "activation",
    "sigmoid": "activation",
    "attention": "attention",
    "mm": "matmul",
    "copy": "copy",
}
OTHER = "other"


def mark_layers(model: nn.Module) -> None:
    """Marks each layer as a range in the profile."""
    for name, module in model.named_modules():
        if found := LAYER.fullmatch(name):
            label = found[1] or name
            ranges: list[record_function] = []

            def enter(*_: object, label: str = label, ranges: list[record_function] = ranges) -> None:
                ranges.append(record_function(f"layer {label}"))
                ranges[-1].__enter__()

            def leave(*_: object, ranges: list[record_function] = ranges) -> None:
                ranges.pop().__exit__(None, None, None)

            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave)


def profile_layers(contestant: Contestant, side: int, rounds: int) -> list[Row]:
    """Measures milliseconds per layer and operation, as means over the rounds. Time outside of layers has its own row.

    Args:
        contestant ([`Contestant`]): A model that is not compiled.
        side (`int`): Side of the image in pixels.
        rounds (`int`): Runs, after one warm-up run.
    """
    model = contestant.load()
    mark_layers(model)
    sample = contestant.sample(side, side)
    contestant.reconstruct(model, sample)
    on_gpu = sample.is_cuda
    with profile(
        activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU] if on_gpu else [ProfilerActivity.CPU]
    ) as profiled:
        for _ in range(rounds):
            contestant.reconstruct(model, sample)
    spent: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))  # layer -> operation -> milliseconds
    for event in profiled.events():
        if event.device_type != DeviceType.CPU:
            continue  # a GPU kernel: its time is also counted at the operator that launched it
        parents = [event]
        while parents[-1].cpu_parent is not None:
            parents.append(parents[-1].cpu_parent)
        layer = next((each.name for each in parents if each.name.startswith("layer ")), ELSEWHERE)
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        operation = next((kind for part, kind in OPERATIONS.items() if part in event.name), OTHER)
        spent[layer.removeprefix("layer ")][operation] += microseconds / 1000 / rounds
    kinds = [*dict.fromkeys(OPERATIONS.values()), OTHER]
    total = sum(sum(each.values()) for each in spent.values())
    rows = [
        {"layer": layer, **{kind: each[kind] for kind in kinds}, "all": sum(each.values())}
        for layer, each in spent.items()
    ]
    rows.append({"layer": "all", **{kind: sum(row[kind] for row in rows) for kind in kinds}, "all": total})
    return [row | {"fraction": f"{row['all'] / total:.1%}"} for row in rows]
