"""Blocks of next-scale models for diffusers' `ModularPipeline`. A repository with code holds all files named here."""

from typing import Any

import torch
from diffusers import AutoModel, ComponentSpec, ConfigSpec, InputParam, OutputParam
from transformers import DynamicCache, PreTrainedTokenizerBase

from .captions import pad_captions
from .labels import ClassStep
from .modular_blocks import GUIDER, IDS, LABELS, SAMPLING, VQVAE, BlockList, DecodeStep, Step, guide_step, is_guided
from .sampling import check_finite, sample
from .schedules import fit_schedule

TRANSFORMER = ComponentSpec("transformer", AutoModel)


class TransformerClassStep(ClassStep):
    """Converts classes to labels."""

    expected_components = [TRANSFORMER]


class ScalePredictor:
    """Next-scale transformer with its cache, and the codes of the scale that it reads next.

    Args:
        transformer ([`NextScaleTransformer`]): Transformer.
        vqvae ([`SVQVAE`]): Tokenizer, for its codes.
        labels (`torch.Tensor` of shape `(images,)`): Classes.
        text (`torch.Tensor` of shape `(images, length)`, *optional*): Tokens of captions.
        pad_token (`int`, defaults to 0): Token of an empty caption.
        guided (`bool`): Whether to predict without the class or the caption as well.
    """

    def __init__(
        self,
        transformer: Any,
        vqvae: Any,
        labels: torch.Tensor,
        text: torch.Tensor | None = None,
        pad_token: int = 0,
        *,
        guided: bool,
    ):
        if guided:
            # The batch of the transformer has two rows per image: first all images with their class or caption, then
            # all images without it.
            labels = _append_rows_of(transformer.config["num_classes"], labels)  # (images,) -> (2 * images,)
            if text is not None:
                text = _append_rows_of(pad_token, text)  # (images, length) -> (2 * images, length)
        self.transformer = transformer
        self.guided = guided
        self.labels = labels  # (rows,)
        self.text = text  # (rows, length)
        self.codebook = _read_codebook(vqvae).to(labels.device)  # (codebook_size, dim)
        self.cache = DynamicCache()
        # Codes that the transformer reads to predict the next scale: none for the first scale, then one tensor
        # (rows, dim, h, w) with the codes of the last scale.
        self.codes: list[torch.Tensor] = []

    def next_logits(self, size: tuple[int, int]) -> torch.Tensor:
        """Logits of the next scale, `(images, tokens, codebook_size)`; if guided, then those without a condition."""
        return self.transformer(self.labels, self.codes, [size], self.cache, self.text).logits

    def add(self, ids: torch.Tensor) -> None:
        """Takes the ids `(images, h, w)` that were sampled for the scale, to predict the next scale from them."""
        codes = self.codebook[ids].permute(0, 3, 1, 2)  # (images, dim, h, w)
        if self.guided:
            codes = torch.cat([codes, codes])  # the rows without a condition see the same codes
        self.codes = [codes]


def _append_rows_of(value: int, rows: torch.Tensor) -> torch.Tensor:
    """Appends equally many rows of one value: `(images, ...)` -> `(2 * images, ...)`."""
    rows_of_value = torch.full_like(rows, value)
    return torch.cat([rows, rows_of_value])


def _read_codebook(vqvae: Any) -> torch.Tensor:
    """Codes of all ids, `(codebook_size, dim)`, on the device of the codebook."""
    quantizer = vqvae.quantize
    device = quantizer.embedding.table().device  # the CPU while the tokenizer is offloaded
    all_ids = torch.arange(quantizer.size, device=device)
    return quantizer.get_codebook_entry(all_ids)


class TokenizeCaptionStep(Step):
    """Tokenizes captions."""

    description = "Tokenizes captions for the transformer, which reads them before the first scale."
    expected_components = [ComponentSpec("tokenizer", PreTrainedTokenizerBase), TRANSFORMER]
    inputs = [InputParam.template("prompt"), InputParam.template("num_images_per_prompt")]
    intermediate_outputs = [OutputParam(**LABELS), OutputParam("text", torch.Tensor), OutputParam("pad_token")]

    def run(self, components: Any, values: Any) -> None:
        """Sets `text` and `pad_token`, and `labels` to the label for no class, because captions have no class."""
        prompts = [values.prompt] if isinstance(values.prompt, str) else values.prompt
        config = components.transformer.config
        device = components._execution_device
        text = pad_captions(components.tokenizer, prompts, config["max_text_length"])  # (prompts, length)
        text_of_images = text.repeat_interleave(values.num_images_per_prompt, dim=0)  # (images, length)
        num_images = len(text_of_images)
        values.text = text_of_images.to(device)
        values.labels = torch.full((num_images,), config["num_classes"], device=device)
        values.pad_token = components.tokenizer.pad_token_id


class SampleScalesStep(Step):
    """Samples ids scale by scale."""

    description = "Samples all ids of a scale in one step, from coarse to fine."
    expected_components = [VQVAE, TRANSFORMER, GUIDER]
    expected_configs = [ConfigSpec("schedule", [])]
    inputs = [
        InputParam(**LABELS, required=True),
        InputParam("text", description="Tokens of captions; none by default."),
        InputParam("pad_token", default=0, description="Token of an empty caption."),
        InputParam("schedule", description="Pairs (height, width) in ids, coarse to fine; as in training by default."),
        *SAMPLING,
    ]
    intermediate_outputs = [OutputParam(**IDS)]

    def run(self, components: Any, values: Any) -> None:
        """Sets `ids` to the ids of the last scale."""
        schedule = values.schedule or components.config["schedule"]  # pairs of height and width in ids
        size_of_image = tuple(schedule[-1])
        sizes = fit_schedule(schedule, size_of_image)  # as tuples; raises unless each scale is larger than the last
        guided = is_guided(components.guider)
        predictor = ScalePredictor(
            components.transformer, components.vqvae, values.labels, values.text, values.pad_token, guided=guided
        )
        for step, size in enumerate(sizes):
            # Logits are (images, tokens, codes), and with guidance (2 * images, tokens, codes).
            logits = predictor.next_logits(size)
            if guided:
                logits = guide_step(components.guider, logits, step, len(sizes))
            check_finite(logits.amax(-1), components.transformer, "transformer")
            flat_ids = sample(logits, values.temperature, values.top_k, values.top_p, values.generator)
            ids = flat_ids.unflatten(1, size)  # (images, tokens) -> (images, h, w)
            predictor.add(ids)
        values.ids = ids


class NextScaleBlocks(BlockList):
    """Blocks of a next-scale model and its tokenizer, for diffusers' `ModularPipeline`.

    Example:
        >>> pipe = ModularPipeline.from_pretrained("org/name", trust_remote_code=True)
        >>> pipe.load_components(trust_remote_code=True)
        >>> pipe.update_components(guider=pipe.guider.new(guidance_scale=3.5))
        >>> images = pipe(class_labels=[3, 7], top_k=900, top_p=0.95, output="images")
    """

    description = "Generates images scale by scale."
    block_classes = [TransformerClassStep, SampleScalesStep, DecodeStep]


class NextScaleTextBlocks(NextScaleBlocks):
    """Blocks of a next-scale model that reads captions, and of its tokenizers."""

    description = "Generates images of captions scale by scale."
    block_classes = [TokenizeCaptionStep, SampleScalesStep, DecodeStep]
