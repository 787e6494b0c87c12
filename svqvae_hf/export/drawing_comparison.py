"""Compares the exported graph of a language model with its model, on drawings without randomness."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from svqvae_hf.export.comparison import ADVICE, largest_difference
from svqvae_hf.export.drawing_graph import cache_shape
from svqvae_hf.export.onnx_graphs import Graph
from svqvae_hf.export.prompts import prompt_template
from svqvae_hf.pipelines.image_chats import ImageChats

RowGraph = Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]

# Each row is drawn after the model's own rows above, so only the rest of a row follows from an id that differs.
MAX_CHANGED = 1e-2  # fraction of all ids


def load_row_graph(path: Path) -> RowGraph:
    """Loads a graph of [`drawing_graph`] in onnxruntime, on the CPU."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, dict(inputs))


def compare_drawings(model: ImageChats, draw_row: RowGraph, decode: Graph, captions: Sequence[str | None]) -> str:
    """Draws captions by graphs and by the model, and compares ids and pixels.

    Args:
        model ([`ImageChats`]): Language model in float32, and its processor.
        draw_row (`Callable`): Graph of [`drawing_graph`].
        decode (`Callable`): Graph of the decoder.
        captions (`Sequence[str]`): Captions; `None` for an image without one.

    Returns:
        `str`: How many ids differ, and by how much pixels do.

    Raises:
        ValueError: If more than `MAX_CHANGED` of all ids differ, or pixels do.
    """
    changed = 0
    total = 0
    largest = 0.0
    for caption in captions:
        expected = likeliest_ids(model, caption)
        ids = ids_of_rows(model, draw_row, caption, expected)
        changed += int((ids != expected).sum())
        total += expected.numel()
        largest = max(largest, largest_difference(decode, expected[None], model.vqvae))
    if changed > MAX_CHANGED * total:
        raise ValueError(
            f"the drawing graph: at most 1 in {1 / MAX_CHANGED:,.0f} ids may differ from the model's, but {changed} "
            f"of {total:,} do. {ADVICE}"
        )
    ids_differ = f"{changed} of {total:,} ids of {len(captions)} drawings differ from the model's"
    return f"{ids_differ}; pixels differ by at most {largest * 255:.2g}/255"


def likeliest_ids(model: ImageChats, caption: str | None) -> torch.Tensor:
    """Ids `(rows, columns)` that the model draws at temperature 0."""
    drawn: dict[str, Any] = {}

    def keep(_: object, row: int, grid: tuple[int, int], values: dict[str, Any]) -> None:
        drawn.update(values)

    model.draw([caption], temperature=0, callback_on_step_end=keep)
    return drawn["ids"][0].cpu()


def ids_of_rows(model: ImageChats, draw_row: RowGraph, caption: str | None, drawn: torch.Tensor) -> torch.Tensor:
    """Ids `(rows, columns)` of a graph, each row after the drawn rows above it."""
    rows, columns = drawn.shape
    vocabulary = model.processor.vocabulary
    no_condition = model.processor.no_condition
    template = prompt_template(model, (rows, columns))
    conditional = template.tokens(model.tokenizer, no_condition if caption is None else caption)
    unconditional = template.tokens(model.tokenizer, no_condition)
    length = max(len(conditional), len(unconditional))
    pads = [length - len(conditional), length - len(unconditional)]
    pad = model.tokenizer.pad_token_id
    prompts = [[pad] * pads[0] + conditional, [pad] * pads[1] + unconditional]

    past_shape = [0 if size is None else size for size in cache_shape(model.language_model)]
    result = []
    for row in range(rows):
        tokens_above = (drawn[:row].flatten() + vocabulary.first_token).tolist()
        tokens = [prompt + tokens_above for prompt in prompts]
        inputs: dict[str, np.ndarray] = {
            "tokens": np.array(tokens, np.int64),
            "pads": np.array(pads, np.int64),
            "past": np.zeros(past_shape, np.float32),
            "guidance": np.array(model.sampling["guidance_scale"], np.float32),
            "temperature": np.array(0, np.float32),
            "top_k": np.array([vocabulary.codebook_size], np.int64),
            "noise": np.zeros((columns, vocabulary.codebook_size), np.float32),
        }
        ids = draw_row(inputs)[-1]  # (columns, 1)
        result.append(torch.from_numpy(ids[:, 0]))
    return torch.stack(result)
