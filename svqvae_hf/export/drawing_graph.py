"""A language model with image tokens as one ONNX graph that draws a row of ids.

tokens, past --> Loop, once per column: [ language model --> guidance --> top k, noise, argmax ] --> ids of the row
^                                                             |
+------- the id, as the next token; keys and values ----------+
"""

from typing import Any

import onnx
import onnx.parser
import torch
from onnx import TensorProto, helper
from torch import nn
from torch.export import Dim, ExportedProgram
from transformers import DynamicCache, PreTrainedModel

from svqvae_hf.export.onnx_graphs import to_onnx
from svqvae_hf.models.image_vocabulary import ImageVocabulary

ROWS = 2  # of tokens in a batch: one with the caption and one without it, for guidance
KEYS_AND_VALUES = 2  # size of the dimension that holds first the keys, then the values
TOKENS_LENGTH_AXIS = 1  # of tokens `(rows, length)`
PAST_LENGTH_AXIS = 4  # of keys and values `(layers, keys and values, rows, heads, past length, head_dim)`
# Example input of a step, from which the graph is traced. Any values would do.
TRACED_LENGTH = 5  # new tokens
TRACED_PADS = [0, 1]
TRACED_PAST = 3  # tokens of earlier steps
TRACED_GUIDANCE = 1.5
STEP_INPUTS = ["step_tokens", "pads", "step_past", "guidance"]
STEP_OUTPUTS = ["logits", "text_token", "step_present"]
ROW_OUTPUTS = ["next_tokens", "next_past", "ids", "text_tokens"]  # see `drawing_graph`
INTEGER = TensorProto.INT64
REAL = TensorProto.FLOAT
BOOLEAN = TensorProto.BOOL

# Guided logits are cut to the `top_k` largest. Adding Gumbel noise before the argmax samples from their softmax, and
# multiplying the noise by the temperature equals dividing the logits by it. A temperature of 0 takes the likeliest id.
SAMPLING = """
sampling (float[1, codes] logits, int64[1] top_k, float[steps, codes] noise, int64 step, float temperature,
          bool unfinished, int64 first_token)
=> (int64[1] id, int64[2, 1] id_tokens, bool continued)
{
    largest, places = TopK <axis = -1> (logits, top_k)
    last_axis = Constant <value_ints = [-1]> ()
    least = ReduceMin <keepdims = 1> (largest, last_axis)
    is_below = Less (logits, least)
    lowest = Constant <value_float = -3.4e38> ()
    candidates = Where (is_below, lowest, logits)
    noise_of_step = Gather <axis = 0> (noise, step)
    scaled_noise = Mul (noise_of_step, temperature)
    noisy = Add (candidates, scaled_noise)
    id = ArgMax <axis = -1, keepdims = 0> (noisy)
    token = Add (id, first_token)
    both_rows = Constant <value_ints = [2, 1]> ()
    id_tokens = Expand (token, both_rows)
    continued = Identity (unfinished)
}
"""


class DrawingStep(nn.Module):
    """One forward pass of the rows with and without a caption, up to guided logits.

    Args:
        language_model ([`~transformers.PreTrainedModel`]): Causal language model in float32.
        vocabulary ([`ImageVocabulary`]): Its image tokens.
    """

    def __init__(self, language_model: PreTrainedModel, vocabulary: ImageVocabulary):
        super().__init__()
        self.language_model = language_model
        # A vocabulary holds first the tokens of texts, then the codes of images, then the token that begins an image.
        self.first_code = vocabulary.first_token
        self.last_code = vocabulary.first_token + vocabulary.codebook_size - 1
        num_tokens = language_model.config.get_text_config().vocab_size
        all_tokens = torch.arange(num_tokens)
        # After a token of a text comes another one, or the token that begins an image.
        is_of_text = all_tokens < self.first_code
        begins_image = all_tokens == vocabulary.begin
        self.may_follow_text = is_of_text | begins_image  # (vocabulary,)

    def forward(
        self, tokens: torch.Tensor, pads: torch.Tensor, past: torch.Tensor, guidance: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Runs the language model on new tokens of two rows, row 0 with the caption and row 1 without it.

        Args:
            tokens (`torch.Tensor` of shape `(2, length)`): New tokens. The first may be padded on the left.
            pads (`torch.Tensor` of shape `(2,)`): Number of pads of each row.
            past (`torch.Tensor` of shape `(layers, 2, 2, heads, past length, head_dim)`): Keys and values of tokens
                of earlier steps. Axis 1 holds the keys, then the values. Axis 2 holds row 0, then row 1.
            guidance (`torch.Tensor` of shape `()`): Guidance scale.

        Returns:
            `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`:

            - Guided logits `(1, codes)` of the next id, for drawing.
            - For writing, the next token `(1,)` of row 0: the likeliest token of a text, or the begin of an image.
            - `past` with the new tokens: `(layers, 2, 2, heads, past length + length, head_dim)`.
        """
        length = tokens.shape[TOKENS_LENGTH_AXIS]
        past_length = past.shape[PAST_LENGTH_AXIS]
        # Each token has an index in its row, counted from 0 over pads, tokens of earlier steps and new tokens.
        all_indices = torch.arange(past_length + length)  # (past length + length,)
        new_indices = past_length + torch.arange(length)  # (length,)
        output = self.language_model(
            input_ids=tokens,
            attention_mask=attention_bias(new_indices, all_indices, pads),  # (2, 1, length, past length + length)
            position_ids=position_ids(new_indices, pads),  # (2, length)
            past_key_values=unpack_cache(past),
            use_cache=True,
            logits_to_keep=1,  # the logits after the last new token
        )
        next_logits = output.logits[:, -1]  # (2, vocabulary)
        with_caption = next_logits[:1]  # (1, vocabulary)
        without_caption = next_logits[1:]  # (1, vocabulary)
        guided_logits = self._guided_logits(with_caption, without_caption, guidance)
        text_token = self._likeliest_text_token(with_caption)
        return guided_logits, text_token, pack_cache(output.past_key_values)

    def _guided_logits(
        self, with_caption: torch.Tensor, without_caption: torch.Tensor, guidance: torch.Tensor
    ) -> torch.Tensor:
        """Guided logits `(1, codes)`, from logits `(1, vocabulary)` with the caption and without it."""
        conditional = with_caption[:, self.first_code : self.last_code + 1]  # (1, codes)
        unconditional = without_caption[:, self.first_code : self.last_code + 1]  # (1, codes)
        return unconditional + guidance * (conditional - unconditional)

    def _likeliest_text_token(self, logits: torch.Tensor) -> torch.Tensor:
        """Likeliest token `(1,)` of a text, or the begin of an image, from logits `(1, vocabulary)`."""
        lowest = torch.finfo(torch.float32).min
        logits_of_text = torch.where(self.may_follow_text, logits, lowest)  # (1, vocabulary)
        return logits_of_text.argmax(-1)


def attention_bias(new_indices: torch.Tensor, all_indices: torch.Tensor, num_pads: torch.Tensor) -> torch.Tensor:
    """Bias of attention: 0 where a new token sees a token of its row, and very low where it does not.

    A token sees itself and the tokens before it, except for pads. In a row of 2 pads and the tokens "a", "cat", the
    token "cat" sees "a" and "cat". A pad sees itself, because attention must not be empty.

    Args:
        new_indices (`torch.Tensor` of shape `(length,)`): Indices of the new tokens in a row.
        all_indices (`torch.Tensor` of shape `(total,)`): Indices of all tokens of a row, from 0.
        num_pads (`torch.Tensor` of shape `(2,)`): Number of pads at the start of each row.

    Returns:
        `torch.Tensor` of shape `(2, 1, length, total)`: The bias for the row with the caption, and the one without it.
            The dimension of size 1 stands for all heads.
    """
    seeing = new_indices[None, :, None]  # (1, length, 1)
    seen = all_indices[None, None, :]  # (1, 1, total)
    first_after_pads = num_pads[:, None, None]  # (2, 1, 1): after 2 pads, which have the indices 0 and 1, it is 2
    is_not_later = seen <= seeing  # (1, length, total)
    is_not_pad = seen >= first_after_pads  # (2, 1, total)
    is_itself = seen == seeing  # (1, length, total)
    is_visible = (is_not_later & is_not_pad) | is_itself  # (2, length, total)
    bias = torch.where(is_visible, 0.0, torch.finfo(torch.float32).min)
    return bias[:, None]  # (2, 1, length, total)


def position_ids(new_indices: torch.Tensor, num_pads: torch.Tensor) -> torch.Tensor:
    """Positions `(2, length)` that the language model takes for new tokens. They are counted without the pads.

    A row of 3 pads and the tokens "a", "cat" has the positions 0, 0, 0, 0, 1. The positions of the pads do not matter.

    Args:
        new_indices (`torch.Tensor` of shape `(length,)`): Indices of the new tokens in a row, counted with the pads.
        num_pads (`torch.Tensor` of shape `(2,)`): Number of pads at the start of each row.
    """
    positions = new_indices[None, :] - num_pads[:, None]  # (2, length), negative for pads
    return positions.clamp_min(0)


def unpack_cache(past: torch.Tensor) -> DynamicCache:
    """Cache of transformers from keys and values `(layers, 2, 2, heads, past length, head_dim)`."""
    keys_and_values = []  # a pair per layer
    for layer in range(past.shape[0]):
        keys = past[layer, 0]  # (2, heads, past length, head_dim)
        values = past[layer, 1]  # (2, heads, past length, head_dim)
        keys_and_values.append((keys, values))
    return DynamicCache(keys_and_values)


def pack_cache(cache: DynamicCache) -> torch.Tensor:
    """Keys and values `(layers, 2, 2, heads, tokens, head_dim)` from a cache of transformers."""
    layers = []
    for layer in cache.layers:
        layers.append(torch.stack([layer.keys, layer.values]))  # (2, 2, heads, tokens, head_dim)
    return torch.stack(layers)


def drawing_graph(language_model: PreTrainedModel, vocabulary: ImageVocabulary) -> onnx.ModelProto:
    """Converts a language model to a graph that draws a row of ids, or writes a token of text.

    Args:
        language_model ([`~transformers.PreTrainedModel`]): Causal language model in float32 on the CPU.
        vocabulary ([`ImageVocabulary`]): Its image tokens.

    Returns:
        `onnx.ModelProto`: Graph with these inputs and outputs. Its number of steps is the length of the noise.

        | input | shape | |
        |---|---|---|
        | `tokens` | `(2, length)` | prompts with and without the caption, padded on the left, or `next_tokens` |
        | `pads` | `(2,)` | number of pads of each prompt |
        | `past` | `(layers, 2, 2, heads, past, head_dim)` | empty for a prompt, then `next_past` |
        | `guidance`, `temperature` | `()` | |
        | `top_k` | `(1,)` | number of likeliest ids to sample from, at most all |
        | `noise` | `(steps, codes)` | Gumbel noise |

        | output | shape | |
        |---|---|---|
        | `next_tokens` | `(2, 1)` | tokens of the last id |
        | `next_past` | as `past` | keys and values |
        | `ids` | `(steps, 1)` | ids of the row |
        | `text_tokens` | `(steps, 1)` | likeliest text after the tokens of the first row, in place of each id |
    """
    cache = cache_shape(language_model)
    step = to_onnx(trace_step(language_model, vocabulary), STEP_INPUTS, STEP_OUTPUTS)
    body = loop_body(step.graph, cache)
    nodes = [
        helper.make_node("Shape", ["noise"], ["noise_length"], start=0, end=1),
        helper.make_node("Squeeze", ["noise_length", "first_axis"], ["steps"]),
        helper.make_node("Loop", ["steps", "", "tokens", "past"], ROW_OUTPUTS, body=body),
    ]
    inputs = [
        helper.make_tensor_value_info("tokens", INTEGER, [ROWS, "length"]),
        helper.make_tensor_value_info("pads", INTEGER, [ROWS]),
        helper.make_tensor_value_info("past", REAL, cache),
        helper.make_tensor_value_info("guidance", REAL, []),
        helper.make_tensor_value_info("temperature", REAL, []),
        helper.make_tensor_value_info("top_k", INTEGER, [1]),
        helper.make_tensor_value_info("noise", REAL, ["steps", vocabulary.codebook_size]),
    ]
    outputs = [
        helper.make_tensor_value_info("next_tokens", INTEGER, [ROWS, "one"]),
        helper.make_tensor_value_info("next_past", REAL, cache),
        helper.make_tensor_value_info("ids", INTEGER, ["steps", 1]),
        helper.make_tensor_value_info("text_tokens", INTEGER, ["steps", 1]),
    ]
    constants = [
        helper.make_tensor("first_axis", INTEGER, [1], [0]),
        helper.make_tensor("first_token", INTEGER, [], [vocabulary.first_token]),
    ]
    weights = list(step.graph.initializer)
    graph = helper.make_graph(nodes, "row", inputs, outputs, initializer=weights + constants)
    model = helper.make_model(graph, opset_imports=step.opset_import, ir_version=step.ir_version)
    onnx.checker.check_model(model)
    return model


def loop_body(step: onnx.GraphProto, shape_of_cache: list[Any]) -> onnx.GraphProto:
    """Joins a step of the language model with the sampling of its id. Weights stay outside.

    The nodes of both are joined by the names of their values, which are listed in `STEP_INPUTS`, `STEP_OUTPUTS` and
    `SAMPLING`: `SAMPLING` takes the `logits` that the step returns.

    ONNX's `Loop` prescribes the order of inputs and outputs:

        input of a step                   output of a step
        step          its number
        unfinished    whether to go on    continued       becomes `unfinished` of the next step
        step_tokens                       id_tokens       becomes `step_tokens` of the next step
        step_past                         step_present    becomes `step_past` of the next step
                                          id              collected from all steps
                                          text_token      collected from all steps

    Args:
        step (`onnx.GraphProto`): Graph of [`DrawingStep`].
        shape_of_cache (`list`): Shape of the keys and values, from [`cache_shape`].
    """
    sampling = onnx.parser.parse_graph(SAMPLING)
    inputs = [
        helper.make_tensor_value_info("step", INTEGER, []),
        helper.make_tensor_value_info("unfinished", BOOLEAN, []),
        helper.make_tensor_value_info("step_tokens", INTEGER, [ROWS, None]),
        helper.make_tensor_value_info("step_past", REAL, shape_of_cache),
    ]
    outputs = [
        helper.make_tensor_value_info("continued", BOOLEAN, []),
        helper.make_tensor_value_info("id_tokens", INTEGER, [ROWS, 1]),
        helper.make_tensor_value_info("step_present", REAL, shape_of_cache),
        helper.make_tensor_value_info("id", INTEGER, [1]),
        helper.make_tensor_value_info("text_token", INTEGER, [1]),
    ]
    nodes = list(step.node) + list(sampling.node)
    return helper.make_graph(nodes, "step", inputs, outputs)


def trace_step(language_model: PreTrainedModel, vocabulary: ImageVocabulary) -> ExportedProgram:
    """Traces [`DrawingStep`] with example inputs.

    The program takes any length of `tokens`, and any past length of `past`, which may be 0.
    """
    example_inputs = (
        torch.full((ROWS, TRACED_LENGTH), vocabulary.begin),  # tokens
        torch.tensor(TRACED_PADS),  # pads
        torch.zeros(cache_shape(language_model, TRACED_PAST)),  # past
        torch.tensor(TRACED_GUIDANCE),  # guidance
    )
    axes_of_any_length = {
        "tokens": {TOKENS_LENGTH_AXIS: Dim.DYNAMIC},
        "pads": None,
        "past": {PAST_LENGTH_AXIS: Dim.DYNAMIC},
        "guidance": None,
    }
    step = DrawingStep(language_model, vocabulary)
    return torch.export.export(step, example_inputs, dynamic_shapes=axes_of_any_length, strict=False)


def cache_shape(language_model: PreTrainedModel, num_tokens: int | None = None) -> list[Any]:
    """Shape of the keys and values of all layers, `(layers, keys and values, rows, heads, tokens, head_dim)`.

    `num_tokens` is `None` for any number of tokens.
    """
    config = language_model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None)
    if heads is None:  # such a model has as many heads of keys and values as of queries
        heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None)
    if head_dim is None:  # the heads share the channels of the model
        head_dim = config.hidden_size // config.num_attention_heads
    return [config.num_hidden_layers, KEYS_AND_VALUES, ROWS, heads, num_tokens, head_dim]
