"""Compares the exported graph of a language model with its model, on drawings without randomness."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from svqvae_hf.export.comparison import ADVICE, largest_difference
from svqvae_hf.export.drawing_graph import ROW_OUTPUTS, cache_shape
from svqvae_hf.export.onnx_graphs import Graph
from svqvae_hf.export.prompts import prompt_template
from svqvae_hf.pipelines.image_chats import MAX_REWRITTEN_TOKENS, ImageChats

# Runs a graph of `drawing_graph`. It takes the inputs by their names, and returns the outputs in the order of
# `ROW_OUTPUTS`.
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
        ValueError: If more than `MAX_CHANGED` of all ids differ, or pixels do, or a rewritten caption does.
    """
    num_changed = 0
    num_ids = 0
    largest = 0.0  # difference of a pixel
    for caption in captions:
        if model.rewrites and caption is not None:
            compare_rewriting(model, draw_row, caption)
        expected_ids = likeliest_ids(model, caption)
        ids = ids_of_rows(model, draw_row, caption, expected_ids)
        num_changed += int((ids != expected_ids).sum())
        num_ids += expected_ids.numel()
        largest = max(largest, largest_difference(decode, expected_ids[None], model.vqvae))
    if num_changed > MAX_CHANGED * num_ids:
        raise ValueError(
            f"the drawing graph: at most 1 in {1 / MAX_CHANGED:,.0f} ids may differ from the model's, but "
            f"{num_changed} of {num_ids:,} do. {ADVICE}"
        )
    return (
        f"{num_changed} of {num_ids:,} ids of {len(captions)} drawings differ from the model's; pixels differ by at "
        f"most {largest * 255:.2g}/255"
    )


def compare_rewriting(model: ImageChats, draw_row: RowGraph, caption: str) -> None:
    """Raises ValueError unless a graph rewrites a caption as the model does, before it draws."""
    (expected,) = model.rewrite([caption])
    any_grid = model.processor.vocabulary.grids[0]  # the grid stands after the text, so it changes nothing here
    template = prompt_template(model, any_grid)
    question = template.question_tokens(model.tokenizer, caption)
    # After the text, the model begins an image, or ends its answer.
    ends_of_text = (model.processor.vocabulary.begin, model.tokenizer.eos_token_id)
    answer: list[int] = []  # tokens that the graph writes, one after the other
    while len(answer) < MAX_REWRITTEN_TOKENS:
        token = _next_text_token(model, draw_row, question + answer)
        if token in ends_of_text:
            break
        answer.append(token)
    text = model.tokenizer.decode(answer, skip_special_tokens=True).strip()
    if text != expected:
        raise ValueError(
            f"the drawing graph: it must rewrite {caption!r} as the model does, {expected!r}, but writes {text!r}. "
            f"{ADVICE}"
        )


def _next_text_token(model: ImageChats, draw_row: RowGraph, tokens: list[int]) -> int:
    """Likeliest token of a text after these tokens, by a graph.

    The graph takes two rows of tokens, with and without a caption, and returns the next token of the first row. So the
    second row may be anything of the same length.
    """
    inputs = _greedy_inputs(model, [tokens, tokens], num_pads=[0, 0], steps=1)
    text_tokens = _output(draw_row, inputs, "text_tokens")  # (1, 1)
    return text_tokens.item()


def _output(draw_row: RowGraph, inputs: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """Runs a graph, and returns its output of this name."""
    outputs = draw_row(inputs)
    return outputs[ROW_OUTPUTS.index(name)]


def likeliest_ids(model: ImageChats, caption: str | None) -> torch.Tensor:
    """Ids `(rows, columns)` that the model draws at temperature 0."""
    drawn: dict[str, Any] = {}

    def keep_ids(_: object, row: int, grid: tuple[int, int], tensors: dict[str, Any]) -> None:
        """Keeps the ids of all rows so far, after each row."""
        drawn["ids"] = tensors["ids"]

    model.draw([caption], temperature=0, callback_on_step_end=keep_ids)
    return drawn["ids"][0].cpu()


def ids_of_rows(
    model: ImageChats, draw_row: RowGraph, caption: str | None, ids_of_model: torch.Tensor
) -> torch.Tensor:
    """Ids `(rows, columns)` that a graph draws, to compare them with the ids that the model has drawn.

    Args:
        model ([`ImageChats`]): Language model, and its processor.
        draw_row (`Callable`): Graph, which draws one row of ids at a time.
        caption (`str`, *optional*): Caption.
        ids_of_model (`torch.Tensor` of shape `(rows, columns)`): Ids that the model has drawn. The graph continues
            them at each row. If it continued its own ids, all ids after a first different one would differ, too.
    """
    num_rows, num_columns = ids_of_model.shape
    first_token = model.processor.vocabulary.first_token  # token of id 0
    prompts = _padded_prompts(model, caption, (num_rows, num_columns))
    ids_of_graph = []
    for row in range(num_rows):
        ids_above = ids_of_model[:row].flatten()  # (row * columns,)
        tokens_above = (ids_above + first_token).tolist()
        # For guidance, the graph reads the ids twice: after the prompt with the caption, and after the one without it.
        sequences = [prompt + tokens_above for prompt in prompts.tokens]
        inputs = _greedy_inputs(model, sequences, prompts.num_pads, steps=num_columns)
        ids = _output(draw_row, inputs, "ids")  # (columns, images), where there is one image
        ids_of_graph.append(torch.from_numpy(ids.squeeze(1)))  # (columns,)
    return torch.stack(ids_of_graph)  # (rows, columns)


def _greedy_inputs(
    model: ImageChats, tokens: Sequence[Sequence[int]], num_pads: Sequence[int], steps: int
) -> dict[str, np.ndarray]:
    """Inputs of the graph for the likeliest ids of some steps.

    Args:
        model ([`ImageChats`]): Language model, and its processor.
        tokens (`Sequence[Sequence[int]]`): Two rows of tokens of equal length, with the caption and without it.
        num_pads (`Sequence[int]`): Number of pads at the start of both rows.
        steps (`int`): Number of ids to draw.
    """
    num_codes = model.processor.vocabulary.codebook_size
    # At temperature 0 the noise counts for nothing, and the likeliest of all codes is drawn.
    return {
        "tokens": np.array(tokens, np.int64),
        "pads": np.array(num_pads, np.int64),
        "past": np.zeros(cache_shape(model.language_model, num_tokens=0), np.float32),
        "guidance": np.array(model.sampling["guidance_scale"], np.float32),
        "temperature": np.array(0, np.float32),
        "top_k": np.array([num_codes], np.int64),
        "noise": np.zeros((steps, num_codes), np.float32),
    }


@dataclass(frozen=True)
class _Prompts:
    """Prompts with and without a caption, of equal length.

    Args:
        tokens (`list[list[int]]`): Tokens of both prompts, padded on the left.
        num_pads (`list[int]`): Number of pads of both prompts.
    """

    tokens: list[list[int]]
    num_pads: list[int]


def _padded_prompts(model: ImageChats, caption: str | None, grid: tuple[int, int]) -> _Prompts:
    """Prompts for an image with this grid: with the caption, if any, and then without it."""
    no_condition = model.processor.no_condition
    template = prompt_template(model, grid)
    unconditional = template.tokens(model.tokenizer, caption=no_condition)
    if caption is None:
        conditional = unconditional
    elif model.rewrites:
        # Such a model answers with the caption in other words, and then with the image.
        (rewritten,) = model.rewrite([caption])
        conditional = template.tokens(model.tokenizer, caption=caption, written=rewritten)
    else:
        conditional = template.tokens(model.tokenizer, caption=caption)
    length = max(len(conditional), len(unconditional))
    padded_prompts = []
    num_pads = []
    for tokens in (conditional, unconditional):
        num_missing = length - len(tokens)
        padded_prompts.append([model.tokenizer.pad_token_id] * num_missing + tokens)
        num_pads.append(num_missing)
    return _Prompts(padded_prompts, num_pads)
