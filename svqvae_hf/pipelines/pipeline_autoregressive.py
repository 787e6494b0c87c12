"""Pipeline that samples images from a LlamaGen model, id by id."""

import reprlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import ImagePipelineOutput
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from svqvae_hf.models.modeling_llamagen import LlamaGenForCausalLM
from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.pipelines.captions import encode_captions
from svqvae_hf.pipelines.generator_pipeline import Callback, GeneratorPipeline
from svqvae_hf.pipelines.id_sampler import IdSampler
from svqvae_hf.pipelines.labels import Labels
from svqvae_hf.pipelines.modular_llamagen import LlamaGenBlocks, LlamaGenTextBlocks, condition_inputs
from svqvae_hf.pipelines.sampling import Generators, check_generators, check_outputs, check_sampling, guide, sample


class SVQVAEAutoregressivePipeline(GeneratorPipeline):
    """Samples images id by id: a LlamaGen model predicts ids, row by row, and SVQVAE decodes them.

    Args:
        vqvae ([`SVQVAE`]): Model whose ids the language model was trained on. The weights of original checkpoints do
            not show whether it is.
        language_model ([`LlamaGenForCausalLM`]): Language model. Its config has the classes and the grid of ids.
        class_names (`list[str]`, *optional*): Name of each class, as `ClassLabel.names` of the training set.
        codebook_fingerprint (`str`, *optional*): [`SVQVAE.codebook_fingerprint`] in training, which is saved with the
            pipeline; the fingerprint of `vqvae` by default.
        text_encoder ([`~transformers.T5EncoderModel`], *optional*): Encoder of captions, for a model with captions.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): Tokenizer of captions.

    The attribute `grid` holds the rows and columns of ids.

    Raises:
        TypeError: The language model is another one.
        ValueError: The codebook of `vqvae` is not the language model's, `text_encoder` does not fit it, or the number
            of names is not `num_classes`.

    Example:
        >>> vqvae = SVQVAE.from_single_file("vq_ds16_c2i.pt")
        >>> model = LlamaGenForCausalLM.from_single_file("c2i_B_256.pt", grid_size=256 // vqvae.f)
        >>> pipe = SVQVAEAutoregressivePipeline(vqvae, model)
        >>> images = pipe(class_labels=[3, 7], guidance_scale=2.0, top_k=2000).images
    """

    model_cpu_offload_seq = "text_encoder->language_model->vqvae"
    _optional_components = ["text_encoder", "tokenizer"]

    def __init__(
        self,
        vqvae: SVQVAE,
        language_model: LlamaGenForCausalLM,
        class_names: list[str] | tuple[str, ...] | None = None,
        codebook_fingerprint: str | None = None,
        text_encoder: T5EncoderModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        super().__init__()
        config = language_model.config
        if config.model_type != "llamagen":
            raise TypeError(
                f"`language_model` must be a LlamaGenForCausalLM, got {type(language_model).__name__}. To draw with "
                "another language model, add image tokens with `svqvae extend-lm`."
            )
        if config.codebook_size != vqvae.config["codebook_size"]:
            raise ValueError(
                f"`language_model` must have the {vqvae.config['codebook_size']} codes of `vqvae`, but has "
                f"{config.codebook_size}. Use the SVQVAE that it was trained with."
            )
        if text_encoder is not None:
            check_text_encoder(text_encoder, config.caption_dim)
        self.grid = (config.grid_size, config.grid_size)
        self._register(
            {"vqvae": vqvae, "language_model": language_model, "text_encoder": text_encoder, "tokenizer": tokenizer},
            num_classes=config.num_classes,
            fingerprints=[codebook_fingerprint, config.codebook_fingerprint],
            class_names=class_names,
        )

    def blocks(self) -> type:
        """Class of the blocks that diffusers' `ModularPipeline` runs in place of this pipeline."""
        if self.tokenizer is None:
            return LlamaGenBlocks
        return LlamaGenTextBlocks

    def describe(self) -> tuple[str, str]:
        """Texts of the card: a sentence about the pipeline, and the arguments of an example's call."""
        side = self.grid[0] * self.vqvae.f
        summary = f"Images of {side} x {side} pixels, id by id, from a LlamaGen model over the codebook of an SVQVAE."
        return summary, self._example_arguments()

    def _example_arguments(self) -> str:
        """Arguments of the example on the card: a class, features of a caption, or a caption."""
        reads_captions = self.language_model.config.caption_dim is not None
        if reads_captions and self.text_encoder is None:
            return "prompt_embeds=pipeline.language_model.uncond_embedding[None]"
        if reads_captions:
            return 'prompt="a caption like those it was trained on"'
        if self.num_classes:
            return "class_labels=[0]"
        return ""

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Labels | None = None,
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
            guidance_scale (`float`, defaults to 1.0): Classifier-free guidance: logits are `unconditional +
                guidance_scale * (conditional - unconditional)`. Off at 1. In [-1e6, 1e6].
            guidance_stop (`float`, defaults to 1.0): Fraction of the ids after which guidance ends, as `stop` of
                diffusers' guiders. LlamaGen's `cfg_interval` of n is `(n + 2) / (rows * columns)`.
            temperature (`float`, defaults to 1.0): Divides the logits, in [1e-6, 1e6]; 0 takes the most likely id.
            top_k (`int`, defaults to 0): Number of most likely ids to sample from; 0 means all.
            top_p (`float`, defaults to 1.0): Total probability of the most likely ids to sample from.
            generator (`torch.Generator` or a list of them, *optional*): Source of randomness, one for all images or
                one per image, on any device.
            num_images_per_prompt (`int`, defaults to 1): Images per label or caption.
            output_type (`str`, defaults to `"pil"`): `"pil"` for Pillow images, `"np"` for arrays `(batch, height,
                width, 3)`, `"pt"` for tensors `(batch, 3, height, width)`, both in [0, 1], or `"latent"` for ids
                `(batch, h, w)`.
            return_dict (`bool`, defaults to `True`): Whether to return an output object instead of a tuple.
            callback_on_step_end (`Callable`, *optional*): Called after each row of ids with the pipeline, the number
                of rows before, the grid and a dictionary of tensors. `ids` `(batch, rows so far, columns)` are the
                ids: `pipe.vqvae.decode_tokens(ids)` is a preview. If it returns a dictionary, its `ids` replace
                them, and the rows below follow from these. If it sets `pipe._interrupt = True`, sampling ends, and
                the remaining ids are 0.
            callback_on_step_end_tensor_inputs (`Sequence[str]`, defaults to `("ids",)`): Tensors in the dictionary.
            prompt (`str` or `list[str]`, *optional*): Caption of each image, instead of its class.
            prompt_embeds (`torch.Tensor`, *optional*): Features of the captions instead, as `encode_prompt` returns.
            prompt_attention_mask (`torch.Tensor`, *optional*): Their mask; all features are seen by default.

        Returns:
            [`~diffusers.ImagePipelineOutput`] or `tuple`: The images.

        Raises:
            TypeError: Labels are neither integers nor names.
            ValueError: A value is out of range, or logits are NaN or infinite.
        """
        check_sampling(guidance_scale, temperature, top_k, top_p)
        check_outputs(num_images_per_prompt, output_type, callback_on_step_end_tensor_inputs)
        is_fraction = 0 <= guidance_stop <= 1
        if not is_fraction:
            raise ValueError(f"`guidance_stop` must be a fraction in [0, 1], got {guidance_stop}.")
        self._interrupt = False
        # The condition of each image is a class or a caption.
        captions = self._encode_captions(class_labels, prompt, prompt_embeds, prompt_attention_mask)
        if captions:
            class_labels = [0] * len(captions["prompt_embeds"])  # models with captions have one class, 0
        labels = self._encode_labels(class_labels, num_images=1, guidance_scale=guidance_scale)
        labels = labels.repeat_interleave(num_images_per_prompt)  # (images,)
        for name, values in captions.items():
            captions[name] = values.repeat_interleave(num_images_per_prompt, dim=0)  # (images, ...)
        check_generators(generator, len(labels))
        sample_ids = partial(sample, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        sampler = self._sampler(labels, captions, sample_ids, guidance_scale, guidance_stop)
        rows, columns = self.grid
        for row in self.progress_bar(range(rows)):
            if self.interrupt:
                break
            ids = sampler.next_row()
            replaced = self._call_back(callback_on_step_end, callback_on_step_end_tensor_inputs, row, self.grid, ids)
            if not torch.equal(replaced, ids):
                sampler.replace(replaced)
        size = (rows * self.vqvae.f, columns * self.vqvae.f)
        return self._output(sampler.ids, size, output_type, return_dict)

    def _sampler(
        self,
        labels: torch.Tensor,
        captions: dict[str, torch.Tensor],
        sample_ids: Callable[[torch.Tensor], torch.Tensor],
        guidance_scale: float,
        guidance_stop: float,
    ) -> IdSampler:
        """Sampler of the ids of all images.

        Args:
            labels (`torch.Tensor` of shape `(images,)`): Classes.
            captions (`dict[str, torch.Tensor]`): Features of captions and their mask; empty for a model with classes.
            sample_ids (`Callable`): Samples ids `(images,)` from logits `(images, codes)`.
            guidance_scale (`float`): Scale of classifier-free guidance; 1 for none.
            guidance_stop (`float`): Fraction of the ids after which guidance ends.
        """
        config = self.language_model.config
        rows, columns = self.grid
        num_ids = rows * columns
        has_guidance = guidance_scale != 1
        return IdSampler(
            self.language_model,
            inputs=condition_inputs(config, labels, captions, guided=has_guidance),
            grid=self.grid,
            codes=range(config.codebook_size),
            sample=sample_ids,
            guide=_make_guide(guidance_scale),
            guided_ids=round(guidance_stop * num_ids),
        )

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
        prompts = [prompt] if isinstance(prompt, str) else prompt
        are_texts = all(isinstance(caption, str) for caption in prompts)
        if not prompts or not are_texts:
            raise ValueError(f"`prompt` must be a caption or a list of captions, got {reprlib.repr(prompt)}.")
        length = self.language_model.config.num_condition_tokens
        return encode_captions(self.text_encoder, self.tokenizer, prompts, length, device=self._execution_device)

    def _encode_captions(
        self,
        class_labels: Labels | None,
        prompt: str | list[str] | None,
        prompt_embeds: torch.Tensor | None,
        prompt_attention_mask: torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        """Arguments of the language model for captions; empty for a model with classes."""
        has_prompt = prompt is not None
        has_features = prompt_embeds is not None
        has_mask = prompt_attention_mask is not None
        reads_captions = self.language_model.config.caption_dim is not None
        if not reads_captions:
            if has_prompt or has_features or has_mask:
                raise ValueError(
                    "`prompt`, `prompt_embeds` and `prompt_attention_mask` need a language model with captions, but "
                    f"this one has {self.num_classes} classes. Leave them out."
                )
            return {}
        has_only_prompt = has_prompt and not has_features and not has_mask
        has_only_features = has_features and not has_prompt  # with or without their mask
        has_one_kind_of_caption = has_only_prompt or has_only_features
        if class_labels is not None or not has_one_kind_of_caption:
            raise ValueError(
                "Pipelines for captions take `prompt` or `prompt_embeds`, and no `class_labels`. Pass `prompt` alone."
            )
        if prompt is not None:
            prompt_embeds, prompt_attention_mask = self.encode_prompt(prompt)
        captions = {}
        if prompt_embeds is not None:
            captions["prompt_embeds"] = prompt_embeds.to(self._execution_device)
        if prompt_attention_mask is not None:
            captions["prompt_attention_mask"] = prompt_attention_mask.to(self._execution_device)
        return captions


def _make_guide(guidance_scale: float) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Makes the function that joins logits `(2 * images, codes)`, with and without condition, to `(images, codes)`.

    None for a guidance scale of 1, for which there are only logits with a condition.
    """
    if guidance_scale == 1:
        return None
    return partial(guide, guidance_scale=guidance_scale)


def check_text_encoder(text_encoder: T5EncoderModel, caption_dim: int | None) -> None:
    """Raises ValueError unless the features of a text encoder have the channels of a language model's captions."""
    channels = text_encoder.config.d_model
    if channels == caption_dim:
        return
    if caption_dim is None:
        rule = "which does not take captions"
    else:
        rule = f"which takes captions of {caption_dim} channels"
    raise ValueError(
        f"`text_encoder` must fit the language model, {rule}, but has {channels} channels. Use the text encoder that "
        "it was trained with."
    )
