"""Pipeline that samples images from a causal language model over the ids of an SVQVAE."""

import reprlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import ImagePipelineOutput
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, T5EncoderModel

from svqvae_hf.models.checks import check_scales
from svqvae_hf.models.loading import list_faults
from svqvae_hf.models.modeling_llamagen import LlamaGenForCausalLM
from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.pipelines.captions import encode_captions
from svqvae_hf.pipelines.generator_pipeline import GeneratorPipeline, evaluation_mode
from svqvae_hf.pipelines.labels import Labels
from svqvae_hf.pipelines.sampling import Generators, check_generators, check_sampling, guide, make_warpers
from svqvae_hf.pipelines.sequences import SequenceLayout
from svqvae_hf.pipelines.token_sampler import TokenSampler

# Pipeline, rows sampled before, scale, tensors -> tensors that replace them
Callback = Callable[[Any, int, float, dict[str, torch.Tensor]], dict[str, torch.Tensor] | None]


class SVQVAEAutoregressivePipeline(GeneratorPipeline):
    """Samples images token by token: a causal language model predicts ids, scale by scale, and SVQVAE decodes them.

    Args:
        vqvae ([`SVQVAE`]): Model whose ids the language model was trained on.
        language_model ([`~transformers.PreTrainedModel`]): Causal language model of transformers, with a vocabulary
            of `layout.vocab_size` tokens.
        num_classes (`int`, defaults to 0): Number of classes in training.
        height (`int`, *optional*): Height in pixels of the training images; `sample_size` of `vqvae` by default.
        width (`int`, *optional*): Width in pixels of the training images; `sample_size` of `vqvae` by default.
        scales (`list[float]`, defaults to `(1.0,)`): Scales in training, from coarse to fine.
        codebook_fingerprint (`str`, *optional*): [`SVQVAE.codebook_fingerprint`] in training, which is saved with the
            pipeline; the fingerprint of `vqvae` by default.
        scale_from (`str`, defaults to `"image"`): What was resized to the scales in training, see
            [`SVQVAE.encode_scales`].
        class_names (`list[str]`, *optional*): Name of each class, as `ClassLabel.names` of the training set.
        text_encoder ([`~transformers.T5EncoderModel`], *optional*): Encoder of captions, for a
            [`LlamaGenForCausalLM`] with captions.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): Tokenizer of captions.

    The attribute `layout`, a [`SequenceLayout`], defines the order of the tokens. Both models are in evaluation mode
    during sampling.

    Raises:
        ValueError: The vocabulary, the context or the grid of the language model does not match the layout, `vqvae`
            does not have the codebook with this fingerprint, or the number of names is not `num_classes`.

    Example:
        >>> pipe = SVQVAEAutoregressivePipeline.from_pretrained("org/name")
        >>> images = pipe(class_labels=[3, 7], guidance_scale=2.0, top_k=200).images
    """

    model_cpu_offload_seq = "text_encoder->language_model->vqvae"
    _optional_components = ["text_encoder", "tokenizer"]

    def __init__(
        self,
        vqvae: SVQVAE,
        language_model: PreTrainedModel,
        num_classes: int = 0,
        height: int | None = None,
        width: int | None = None,
        scales: list[float] | tuple[float, ...] = (1.0,),
        codebook_fingerprint: str | None = None,
        scale_from: str = "image",
        class_names: list[str] | None = None,
        text_encoder: T5EncoderModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        super().__init__()
        side = vqvae.config["sample_size"]
        self.layout = SequenceLayout(
            codebook_size=vqvae.config["codebook_size"],
            f=vqvae.f,
            height=side if height is None else height,
            width=side if width is None else width,
            scales=scales,
            num_classes=num_classes,
            scale_from=scale_from,
        )
        _check_language_model(language_model, self.layout)
        _check_text_encoder(text_encoder, language_model)
        self._register(
            {"vqvae": vqvae, "language_model": language_model, "text_encoder": text_encoder, "tokenizer": tokenizer},
            num_classes,
            [codebook_fingerprint, getattr(language_model.config, "codebook_fingerprint", None)],
            class_names,
            num_classes=num_classes,
            height=self.layout.height,
            width=self.layout.width,
            scales=list(self.layout.scales),
            scale_from=scale_from,
        )

    @classmethod
    def _check_weights(cls, name: str, folder: Path, kwargs: dict[str, Any]) -> None:
        if "language_model" in kwargs:
            return
        folder, variant = folder / "language_model", kwargs.get("variant")
        if not any(f".{variant}" in file.name for file in folder.glob("*.safetensors")):
            variant = None  # as diffusers, component by component
        _, info = AutoModelForCausalLM.from_pretrained(
            folder, device_map="meta", use_safetensors=True, variant=variant, output_loading_info=True
        )
        faults = list_faults(info)  # transformers only warns
        if faults:
            raise ValueError(
                f"the language model of {name} must have exactly the weights that its config asks for, but has "
                f"faults: {faults}. Restore its files."
            )

    @classmethod
    def from_llamagen(
        cls, vqvae: SVQVAE, language_model: LlamaGenForCausalLM, **components: Any
    ) -> "SVQVAEAutoregressivePipeline":
        """Makes a pipeline of a LlamaGen model and its tokenizer, whose fingerprint the model's config then stores.

        Args:
            vqvae ([`SVQVAE`]): Tokenizer that the model was trained with. The weights do not show whether it is.
            language_model ([`LlamaGenForCausalLM`]): Model, whose config has the classes and the size of the images.
            **components: Further arguments of the pipeline.

        Example:
            >>> vqvae = SVQVAE.from_single_file("vq_ds16_c2i.pt")
            >>> model = LlamaGenForCausalLM.from_single_file("c2i_B_256.pt", grid_size=256 // vqvae.f)
            >>> pipe = SVQVAEAutoregressivePipeline.from_llamagen(vqvae, model)
        """
        config = language_model.config
        config.codebook_fingerprint = vqvae.codebook_fingerprint()
        side = config.grid_size * vqvae.f
        return cls(vqvae, language_model, num_classes=config.num_classes, height=side, width=side, **components)

    def describe(self) -> tuple[str, str]:
        """Texts of the card: a sentence about the pipeline, and the arguments of an example's call."""
        layout = self.layout
        scales = ", ".join(f"{scale:g}" for scale in layout.scales)
        summary = (
            f"Images of {layout.width} x {layout.height} pixels (width x height), id by id at scales {scales}, from a "
            "causal language model over the codebook of an SVQVAE."
        )
        if getattr(self.language_model.config, "caption_dim", None) is not None:
            if self.text_encoder is None:
                return summary, "prompt_embeds=pipeline.language_model.uncond_embedding[None]"
            return summary, 'prompt="a caption like those it was trained on"'
        return summary, "class_labels=[0]" if layout.num_classes else ""

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Labels | None = None,
        scales: float | Sequence[float] | None = None,
        guidance_scale: float = 1.0,
        guidance_stop: float = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: Generators = None,
        num_images_per_prompt: int = 1,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("ids",),
        prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Samples images.

        Args:
            class_labels (`int`, `str` or a list of them, *optional*): Class of each image, by its number in
                `[0, num_classes)` or its name in `class_names`; by default the images have no class.
            scales (`float` or `Sequence[float]`, *optional*): Scales to return, each once; the finest by default.
                Sampling ends with the finest of them.
            guidance_scale (`float`, defaults to 1.0): Classifier-free guidance: logits are `unconditional +
                guidance_scale * (conditional - unconditional)`. Off at 1. In [-1e6, 1e6].
            guidance_stop (`float`, defaults to 1.0): Fraction of the sampled ids after which guidance ends, as `stop`
                of diffusers' guiders. LlamaGen's `cfg_interval` of n is `(n + 2) / (rows * columns)`.
            temperature (`float`, defaults to 1.0): Divides the logits, in [1e-6, 1e6]; 0 takes the most likely token.
            top_k (`int`, defaults to 0): Number of most likely tokens to sample from; 0 means all.
            top_p (`float`, defaults to 1.0): Total probability of the most likely tokens to sample from.
            generator (`torch.Generator` or a list of them, *optional*): Source of randomness, one for all images or
                one per image, on any device.
            num_images_per_prompt (`int`, defaults to 1): Images per label.
            output_type (`str`, defaults to `"pil"`): `"pil"` for Pillow images, `"np"` for arrays `(batch, height,
                width, 3)`, `"pt"` for tensors `(batch, 3, height, width)`, both in [0, 1], or `"latent"` for ids
                `(batch, h, w)`.
            return_dict (`bool`, defaults to `True`): Whether to return an output object instead of a tuple.
            callback_on_step_end (`Callable`, *optional*): Called after each row of ids with the pipeline, the number
                of rows sampled before, the current scale and a dictionary of tensors. `ids` `(batch, rows so far, w)`
                are the ids of this scale: `pipe.vqvae.decode_tokens(ids)` is a preview. If it returns a dictionary,
                its `ids` replace them, and the rows below follow from these. If it sets `pipe._interrupt = True`,
                sampling ends, and the remaining ids are 0.
            callback_on_step_end_tensor_inputs (`Sequence[str]`, defaults to `("ids",)`): Tensors in the dictionary.
            prompt (`str` or `list[str]`, *optional*): Caption of each image, instead of its class.
            prompt_embeds (`torch.Tensor`, *optional*): Features of the captions instead, as `encode_prompt` returns.
            prompt_attention_mask (`torch.Tensor`, *optional*): Their mask; all features are seen by default.

        Returns:
            [`~diffusers.ImagePipelineOutput`] or `tuple`: `images`; for several `scales`, a list of images per scale,
            in their order.

        Raises:
            TypeError: Labels are neither integers nor names.
            ValueError: A value is out of range, or logits are NaN or infinite.
        """
        layout = self.layout
        wanted = layout.scales[-1:] if scales is None else _check_scales(scales, layout)
        last = max(layout.scales.index(scale) for scale in wanted)
        tensor_inputs = callback_on_step_end_tensor_inputs
        check_sampling(guidance_scale, temperature, top_k, top_p, num_images_per_prompt, output_type, tensor_inputs)
        if not 0 <= guidance_stop <= 1:
            raise ValueError(f"`guidance_stop` must be a fraction in [0, 1], got {guidance_stop}.")
        self._interrupt = False
        with evaluation_mode(self.vqvae, self.language_model):
            captions = self._encode_captions(class_labels, prompt, prompt_embeds, prompt_attention_mask)
            if captions:
                class_labels = [0] * len(captions["prompt_embeds"])  # the one class, "with its caption"
            labels = self._encode_labels(class_labels, 1, guidance_scale)
            unknown = [labels.new_zeros((len(labels), *grid)) for grid in layout.grids]
            sequences = layout.encode(unknown, labels).repeat_interleave(num_images_per_prompt, dim=0)
            captions = {name: each.repeat_interleave(num_images_per_prompt, dim=0) for name, each in captions.items()}
            check_generators(generator, len(sequences))
            rows = [  # index of the scale, positions of the row
                (index, range(start, start + columns))
                for index, (span, (_, columns)) in enumerate(zip(layout.spans, layout.grids, strict=True))
                for start in range(span.start, span.stop, columns)
                if index <= last
            ]
            sampler = TokenSampler(
                self.language_model,
                layout,
                captions,
                guide=partial(guide, guidance_scale=guidance_scale),
                guided_ids=round(guidance_stop * sum(len(row) for _, row in rows)) if guidance_scale != 1 else 0,
                warpers=make_warpers(temperature, top_k, top_p),
                greedy=temperature == 0,
                generator=generator,
            )
            for step, (index, row) in enumerate(self.progress_bar(rows)):
                if self.interrupt:
                    break
                sampler.sample(sequences, row)
                ids = sequences[:, layout.spans[index].start : row.stop].unflatten(1, (-1, len(row)))
                replaced = self._call_back(callback_on_step_end, tensor_inputs, step, layout.scales[index], ids)
                if not torch.equal(replaced, ids):
                    ids.copy_(replaced)  # a view of the sequences
                    sampler.forget()
            grids, _ = layout.decode(sequences[:, : layout.spans[last].stop])
            size = (layout.height, layout.width)
            images = [self._decode(grids[layout.scales.index(scale)], size, scale, output_type) for scale in wanted]
        result = images if isinstance(scales, Iterable) else images[0]
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=result) if return_dict else (result,)

    def encode_prompt(self, prompt: str | list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Encodes captions to the features that the language model reads.

        Args:
            prompt (`str` or `list[str]`): Captions.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Features `(batch, num_condition_tokens, caption_dim)`, text at the end
            and zeros before it, and their mask `(batch, num_condition_tokens)`.

        Raises:
            ValueError: The pipeline has no text encoder, or a caption is not a text or too long.
        """
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError(
                "`prompt` needs a pipeline with `text_encoder` and `tokenizer`, but this one has none. Load it with "
                "both, or pass `prompt_embeds`."
            )
        length = self.language_model.config.num_condition_tokens
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not prompts or not all(isinstance(each, str) for each in prompts):
            raise ValueError(f"`prompt` must be a caption or a list of captions, got {reprlib.repr(prompt)}.")
        return encode_captions(self.text_encoder, self.tokenizer, prompts, length)

    def _encode_captions(
        self,
        class_labels: Labels | None,
        prompt: str | list[str] | None,
        prompt_embeds: torch.Tensor | None,
        prompt_attention_mask: torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        """Arguments of the language model for captions; empty for other models."""
        if getattr(self.language_model.config, "caption_dim", None) is None:
            if prompt is not None or prompt_embeds is not None:
                raise ValueError(
                    "`prompt` and `prompt_embeds` need a language model with captions, but this one has "
                    f"{self.layout.num_classes} classes. Leave them out."
                )
            return {}
        if (prompt is None) == (prompt_embeds is None) or class_labels is not None:
            raise ValueError(
                "Pipelines for captions take `prompt` or `prompt_embeds`, and no `class_labels`. Pass `prompt` alone."
            )
        if prompt is not None:
            prompt_embeds, prompt_attention_mask = self.encode_prompt(prompt)
        given = {"prompt_embeds": prompt_embeds, "prompt_attention_mask": prompt_attention_mask}
        return {name: each.to(self._execution_device) for name, each in given.items() if each is not None}


def _check_language_model(language_model: PreTrainedModel, layout: SequenceLayout) -> None:
    config = language_model.config
    if config.vocab_size != layout.vocab_size:
        raise ValueError(
            f"the vocabulary of the language model must have {layout.vocab_size} tokens ({layout.codebook_size} "
            f"codes, {layout.num_classes} classes, one for no class and {len(layout.scales) - 1} separators), got "
            f"{config.vocab_size}. Use the model that was trained on these ids."
        )
    grid_size = getattr(config, "grid_size", None)  # of LlamaGen's models
    if grid_size is not None and layout.grids != ((grid_size, grid_size),):
        grids = ", ".join(f"{rows} x {columns}" for rows, columns in layout.grids)
        raise ValueError(
            f"the language model has {grid_size} x {grid_size} ids per image, but images of {layout.height} x "
            f"{layout.width} pixels (height x width) at these scales have {grids}. Pass `height` and `width` of "
            f"{grid_size * layout.f}, and one scale."
        )
    context = getattr(config, "max_position_embeddings", layout.length)  # some models have no limit
    if context < layout.length:
        raise ValueError(
            f"`max_position_embeddings` of the language model must be at least {layout.length}, the length of a "
            f"sequence, got {context}. Use smaller images or scales, or another model."
        )


def _check_text_encoder(text_encoder: T5EncoderModel | None, language_model: PreTrainedModel) -> None:
    caption_dim = getattr(language_model.config, "caption_dim", None)
    if text_encoder is not None and text_encoder.config.d_model != caption_dim:
        captions = "does not take captions" if caption_dim is None else f"takes captions of {caption_dim} channels"
        raise ValueError(
            f"`text_encoder` must fit the language model, which {captions}, but has {text_encoder.config.d_model} "
            "channels. Use the text encoder that it was trained with."
        )


def _check_scales(scales: float | Sequence[float], layout: SequenceLayout) -> Sequence[float]:
    scales = check_scales(scales)
    if not set(scales) <= set(layout.scales) or len(set(scales)) < len(scales):
        raise ValueError(f"`scales` must be among {list(layout.scales)}, as in training, each once, got {scales!r}.")
    return scales
