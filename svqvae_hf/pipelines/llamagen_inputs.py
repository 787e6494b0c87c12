"""The start of LlamaGen's sequences, which are a condition token and the ids of an image, row by row."""

from collections.abc import Mapping
from typing import Any

import torch


def condition_inputs(
    config: Any, labels: torch.Tensor, captions: Mapping[str, torch.Tensor | None], *, guided: bool
) -> dict[str, torch.Tensor]:
    """Arguments of a model for the tokens before the ids of images.

    Args:
        config ([`LlamaGenConfig`]): Config of the model.
        labels (`torch.Tensor` of shape `(batch,)`): Classes in `[0, num_classes)`, or `num_classes` for no condition.
        captions (`Mapping[str, torch.Tensor]`): `prompt_embeds` and `prompt_attention_mask` for a model with captions.
        guided (`bool`): Whether as many rows without a condition follow.
    """
    inputs = {name: each for name, each in captions.items() if each is not None}
    if "prompt_embeds" in inputs:  # the one class of models with captions
        labels = torch.zeros_like(inputs["prompt_embeds"][:, 0, 0], dtype=torch.long)
    inputs["input_ids"] = config.codebook_size + labels[:, None]
    if guided:
        inputs = {name: torch.cat([each, each]) for name, each in inputs.items()}
        inputs["input_ids"][len(labels) :] = config.unconditional_token
    return inputs
