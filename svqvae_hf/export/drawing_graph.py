"""A language model with image tokens as one ONNX graph that draws a row of ids.

tokens, past --> Loop, once per column: [ language model --> guidance --> top k, noise, argmax ] --> ids of the row
^                                                             |
+------- the id, as the next token; keys and values ----------+
"""

from typing import Any

import onnx
import onnx.parser
import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from transformers import DynamicCache, PreTrainedModel

from svqvae_hf.export.onnx_graphs import to_onnx
from svqvae_hf.models.image_vocabulary import ImageVocabulary

ROWS = 2  # one with the caption and one without it, for guidance
TRACED_LENGTH = 5  # tokens of the traced prompt
TRACED_PAST = 3

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
        self.first_token = vocabulary.first_token
        self.end_of_codes = vocabulary.begin

    def forward(
        self, tokens: torch.Tensor, pads: torch.Tensor, past: torch.Tensor, guidance: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs the language model on new tokens.

        Args:
            tokens (`torch.Tensor` of shape `(2, length)`): New tokens. The first may be padded on the left.
            pads (`torch.Tensor` of shape `(2,)`): Number of pads of each row.
            past (`torch.Tensor` of shape `(layers, 2, 2, heads, past length, head_dim)`): Keys and values of the
                tokens before.
            guidance (`torch.Tensor` of shape `()`): Guidance scale.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Guided logits `(1, codes)`, and `past` with the new tokens.
        """
        length = tokens.shape[1]
        past_length = past.shape[4]
        places = past_length + torch.arange(length)
        all_places = torch.arange(past_length + length)
        is_before = all_places[None, None, :] <= places[None, :, None]  # (1, length, past + length)
        is_text = all_places[None, None, :] >= pads[:, None, None]  # (2, 1, past + length)
        is_itself = all_places[None, None, :] == places[None, :, None]  # pads see themselves, so that no row is empty
        mask = (is_before & is_text) | is_itself
        bias = torch.where(mask, 0.0, torch.finfo(torch.float32).min)[:, None]  # (2, 1, length, past + length)
        positions = (places[None, :] - pads[:, None]).clamp_min(0)  # (2, length)

        layers = [(past[layer, 0], past[layer, 1]) for layer in range(past.shape[0])]
        output = self.language_model(
            input_ids=tokens,
            attention_mask=bias,
            position_ids=positions,
            past_key_values=DynamicCache(layers),
            use_cache=True,
            logits_to_keep=1,
        )
        logits = output.logits[:, -1, self.first_token : self.end_of_codes]  # (2, codes)
        conditional = logits[:1]
        unconditional = logits[1:]
        guided = unconditional + guidance * (conditional - unconditional)
        present = [torch.stack([layer.keys, layer.values]) for layer in output.past_key_values.layers]
        return guided, torch.stack(present)


def drawing_graph(language_model: PreTrainedModel, vocabulary: ImageVocabulary) -> onnx.ModelProto:
    """Converts a language model to a graph that draws a row of ids.

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
    """
    program = trace_step(language_model, vocabulary)
    step = to_onnx(program, ["step_tokens", "pads", "step_past", "guidance"], ["logits", "step_present"])
    weights = list(step.graph.initializer)
    sampling = onnx.parser.parse_graph(SAMPLING)

    cache = cache_shape(language_model)
    codes = vocabulary.codebook_size
    value = onnx.helper.make_tensor_value_info
    integer = onnx.TensorProto.INT64
    real = onnx.TensorProto.FLOAT
    boolean = onnx.TensorProto.BOOL
    body = onnx.helper.make_graph(
        [*step.graph.node, *sampling.node],
        "step",
        inputs=[
            value("step", integer, []),
            value("unfinished", boolean, []),
            value("step_tokens", integer, [ROWS, None]),
            value("step_past", real, cache),
        ],
        outputs=[
            value("continued", boolean, []),
            value("id_tokens", integer, [ROWS, 1]),
            value("step_present", real, cache),
            value("id", integer, [1]),
        ],
    )
    axes = onnx.helper.make_tensor("first_axis", integer, [1], [0])
    first_token = onnx.helper.make_tensor("first_token", integer, [], [vocabulary.first_token])
    nodes = [
        onnx.helper.make_node("Shape", ["noise"], ["noise_length"], start=0, end=1),
        onnx.helper.make_node("Squeeze", ["noise_length", "first_axis"], ["steps"]),
        onnx.helper.make_node("Loop", ["steps", "", "tokens", "past"], ["next_tokens", "next_past", "ids"], body=body),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "row",
        inputs=[
            value("tokens", integer, [ROWS, "length"]),
            value("pads", integer, [ROWS]),
            value("past", real, cache),
            value("guidance", real, []),
            value("temperature", real, []),
            value("top_k", integer, [1]),
            value("noise", real, ["steps", codes]),
        ],
        outputs=[
            value("next_tokens", integer, [ROWS, "one"]),
            value("next_past", real, cache),
            value("ids", integer, ["steps", 1]),
        ],
        initializer=[*weights, axes, first_token],
    )
    model = onnx.helper.make_model(graph, opset_imports=step.opset_import, ir_version=step.ir_version)
    onnx.checker.check_model(model)
    return model


def trace_step(language_model: PreTrainedModel, vocabulary: ImageVocabulary) -> ExportedProgram:
    """Traces a step, with a dynamic number of new tokens and of tokens before."""
    tokens = torch.full((ROWS, TRACED_LENGTH), vocabulary.begin)
    pads = torch.tensor([0, 1])
    past_shape = [TRACED_PAST if size is None else size for size in cache_shape(language_model)]
    past = torch.zeros(past_shape)
    guidance = torch.tensor(1.5)
    dims = ({1: Dim.DYNAMIC}, None, {4: Dim.DYNAMIC}, None)
    step = DrawingStep(language_model, vocabulary)
    return torch.export.export(step, (tokens, pads, past, guidance), dynamic_shapes=dims, strict=False)


def cache_shape(language_model: PreTrainedModel) -> list[Any]:
    """Shape of keys and values `(layers, 2, rows, heads, tokens, head_dim)`; `None` for the number of tokens."""
    config = language_model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return [config.num_hidden_layers, 2, ROWS, config.num_key_value_heads, None, head_dim]
