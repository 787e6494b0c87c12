"""Trains a LlamaGen on the classes or the captions of a token set, a new one or one of a pipeline.

accelerate launch training/train_llamagen.py --model_config_name_or_path CONFIG --vqvae_name_or_path MODEL \
    --token_set TOKENS --output_dir OUT --max_steps N
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from language_options import LanguageRunOptions, read_run_options
from language_trainer import LanguageRun, language_model_card, run_language_training
from lora import add_lora, save_adapter
from torch.utils.data import default_collate
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, TrainingArguments

from svqvae_hf import SVQVAE, LlamaGenConfig, LlamaGenForCausalLM, SVQVAEAutoregressivePipeline
from svqvae_hf.hub.repositories import from_hub, public_name
from svqvae_hf.pipelines.captions import encode_captions
from svqvae_hf.pipelines.text_encoders import load_text_encoder
from svqvae_hf.trainer.configs import check_keys
from svqvae_hf.trainer.data.token_sequences import TokenSource
from svqvae_hf.trainer.examples import LlamaGenExamples, Mix
from svqvae_hf.trainer.options import option
from svqvae_hf.trainer.pipeline_run import generator_card, open_token_sets
from svqvae_hf.trainer.publishing import Result
from svqvae_hf.trainer.scripts import one_line_errors

SCRIPT = "training/train_llamagen.py"


@dataclass
class LlamaGenOptions(LanguageRunOptions):
    """Options of the data and the model. All options of `transformers.TrainingArguments` can be given as well."""

    pipeline_name_or_path: str | None = option(None, "Pipeline of LlamaGen to train further: folder or Hub id.")
    model_config_name_or_path: str | None = option(None, "Config of a new LlamaGen: a config.json, its folder or id.")
    vqvae_name_or_path: str | None = option(None, "SVQVAE of a new LlamaGen: folder or Hub id.")
    text_encoder_name_or_path: str | None = option(None, "T5 encoder of the captions of a new LlamaGen.")
    label_column: str | None = option(None, "Column of the classes.")

    def faults(self) -> Iterator[str]:
        """Yields an error message for each fault, also in the options of LlamaGen."""
        yield from super().faults()
        is_new = self.model_config_name_or_path is not None  # a new LlamaGen is made from a config
        has_pipeline = self.pipeline_name_or_path is not None
        has_both = is_new and has_pipeline
        has_neither = not is_new and not has_pipeline
        if has_both or has_neither:
            yield "Pass one of `--pipeline_name_or_path` and `--model_config_name_or_path`."
        if is_new and self.vqvae_name_or_path is None:
            yield "A new LlamaGen needs `--vqvae_name_or_path`."
        if is_new and self.lora_rank:
            yield "`--lora_rank` must be left out for a new LlamaGen."
        if not is_new and (self.vqvae_name_or_path or self.text_encoder_name_or_path):
            yield "`--vqvae_name_or_path` and `--text_encoder_name_or_path` are for a new LlamaGen. Leave them out."
        if self.token_set is None:
            yield "`--token_set` must be given."


@dataclass
class Parts:
    """Parts of the pipeline that are not trained.

    Args:
        vqvae ([`SVQVAE`]): Tokenizer of the images.
        text_encoder (`T5EncoderModel`, *optional*): Text encoder of the captions.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Tokenizer of the text encoder.
    """

    vqvae: SVQVAE
    text_encoder: Any = None
    tokenizer: Any = None

    def pipeline(self, language_model: PreTrainedModel, class_names: Any) -> SVQVAEAutoregressivePipeline:
        """Pipeline of these parts and a language model."""
        return SVQVAEAutoregressivePipeline(
            self.vqvae,
            language_model,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            class_names=class_names,
        )

    def encode(self, captions: list[str], length: int) -> dict[str, torch.Tensor]:
        """Features of captions, cut to a number of positions, as arguments of the model."""
        features, mask = encode_captions(self.text_encoder, self.tokenizer, captions, length, truncate=True)
        return {"prompt_embeds": features, "prompt_attention_mask": mask}


def main(options: LlamaGenOptions, arguments: TrainingArguments) -> None:
    """Trains a LlamaGen and saves its pipeline, or its LoRA adapter, in the output folder."""
    run_language_training(SCRIPT, partial(train, options), options, arguments)


def train(options: LlamaGenOptions, run: LanguageRun) -> None:
    """Trains a LlamaGen and saves its pipeline, or its LoRA adapter, in the output folder."""
    if options.pipeline_name_or_path is None:
        start = start_new(options)
    else:
        start = start_from_pipeline(options)
    parts = start.parts
    model = start.model
    class_names = start.token_set.class_names
    check_fit(options, model.config, start.token_set)
    vqvae_source = options.vqvae_name_or_path or options.pipeline_name_or_path
    parts.vqvae.register_to_config(_name_or_path=public_name(str(vqvae_source)))

    examples, held_out = make_examples(options, start, run)
    encode_captions_of_batch = None
    if options.caption_column is not None:
        parts.text_encoder.requires_grad_(False).to(run.arguments.device)
        encode_captions_of_batch = partial(parts.encode, length=model.config.num_condition_tokens)
    codes = range(model.config.codebook_size)
    trained_model: Any = model
    if options.lora_rank:
        trained_model = add_lora(model, options.lora_rank)
    trainer = run.train(trained_model, examples, held_out, default_collate, codes, encode_captions_of_batch)
    if options.lora_rank:
        base = str(options.pipeline_name_or_path)
        save_lora = partial(save_adapter, base=base, subfolder="language_model")
        make_lora_card = partial(language_model_card, options, base, of_a_pipeline=True)
        run.publish(trainer, save_lora, make_lora_card)
        return

    def save(folder: Path) -> Path:
        language_model = LlamaGenForCausalLM.from_pretrained(folder)
        pipeline: Any = parts.pipeline(language_model, class_names)
        pipeline.save_pretrained(folder / "pipeline")
        return folder / "pipeline"

    def make_card(result: Result, rows: dict[str, str]) -> str:
        pipeline = parts.pipeline(model, class_names)
        summary, call = pipeline.describe()
        return generator_card(options, result, pipeline, rows, summary, call)

    run.publish(trainer, save, make_card)


@dataclass
class Start:
    """What a run starts from.

    Args:
        parts ([`Parts`]): Parts of the pipeline that are not trained.
        model (`PreTrainedModel`): LlamaGen to train.
        token_set ([`TokenSource`]): Token set of training.
        held_out ([`TokenSource`], *optional*): Token set of a validation.
    """

    parts: Parts
    model: PreTrainedModel
    token_set: TokenSource
    held_out: TokenSource | None


def start_new(options: LlamaGenOptions) -> Start:
    """Makes a new LlamaGen for a token set, and loads the parts of its pipeline."""
    parts = Parts(SVQVAE.from_pretrained(options.vqvae_name_or_path))
    if options.text_encoder_name_or_path is not None:
        parts.text_encoder, parts.tokenizer = load_text_encoder(options.text_encoder_name_or_path)
    token_set, held_out = open_token_sets(options, parts.vqvae)
    model = new_llamagen(options, token_set, parts.text_encoder)
    return Start(parts, model, token_set, held_out)


def start_from_pipeline(options: LlamaGenOptions) -> Start:
    """Loads a pipeline, whose LlamaGen is trained further in float32."""
    pipeline = SVQVAEAutoregressivePipeline.from_pretrained(str(options.pipeline_name_or_path))
    parts = Parts(pipeline.vqvae, pipeline.text_encoder, pipeline.tokenizer)
    token_set, held_out = open_token_sets(options, parts.vqvae, pipeline.config["class_names"])
    model = pipeline.language_model.float()
    if options.attn_implementation is not None:
        model.set_attn_implementation(options.attn_implementation)
    return Start(parts, model, token_set, held_out)


def make_examples(
    options: LlamaGenOptions, start: Start, run: LanguageRun
) -> tuple[LlamaGenExamples, LlamaGenExamples | None]:
    """Examples of the run, and one of each held-out row for a validation, which drops no class or caption."""
    seed = run.arguments.seed
    mix = Mix(
        condition_dropout=options.condition_dropout,
        first_caption_fraction=options.first_caption_fraction,
        seed=seed,
    )
    examples = LlamaGenExamples(start.token_set, run.num_examples, mix)
    if start.held_out is None:
        return examples, None
    held_out = LlamaGenExamples(start.held_out, len(start.held_out.rows), Mix(seed=seed))
    return examples, held_out


def check_condition_tokens(config: LlamaGenConfig, config_source: str) -> None:
    """Raises ValueError if the config of a model for captions has no number of their tokens."""
    if config.num_condition_tokens < 2:
        raise ValueError(
            f"`num_condition_tokens` of `{config_source}` must be the number of tokens of a caption that the "
            f"model reads, such as 120, got {config.num_condition_tokens}. Add it to the config."
        )


def new_llamagen(options: LlamaGenOptions, token_set: TokenSource, text_encoder: Any) -> PreTrainedModel:
    """New LlamaGen of a config, for the codes, the classes or captions, and the size of a token set."""
    config_source = str(options.model_config_name_or_path)
    config = from_hub(AutoConfig.from_pretrained, config_source)
    if not isinstance(config, LlamaGenConfig):
        raise ValueError(
            f"`--model_config_name_or_path` must be a config of type llamagen, but `{config_source}` is of type "
            f"{config.model_type}. To train another language model, add image tokens with `svqvae extend-lm`."
        )
    check_keys(config_source, config.to_dict(), LlamaGenConfig().to_dict())
    finest_rows, _ = token_set.grids[-1]
    settings = config.to_diff_dict()  # only the values that differ from the defaults
    settings |= {
        "attn_implementation": options.attn_implementation,
        "vocab_size": 0,  # `LlamaGenConfig` computes it from the numbers of codes and classes
        "codebook_size": token_set.settings.codebook_size,
        "num_classes": token_set.num_classes,
        "grid_size": finest_rows,
        "codebook_fingerprint": token_set.settings.codebook_fingerprint,
    }
    if text_encoder is None:
        settings["num_condition_tokens"] = 1  # the class
        settings["caption_dim"] = None
    else:
        check_condition_tokens(config, config_source)
        settings["num_condition_tokens"] = config.num_condition_tokens
        settings["caption_dim"] = text_encoder.config.d_model
    new_config = LlamaGenConfig(**settings)
    return AutoModelForCausalLM.from_config(new_config, dtype=torch.float32)


def check_fit(options: LlamaGenOptions, config: LlamaGenConfig, token_set: TokenSource) -> None:
    """Raises unless a LlamaGen reads the sequences of a token set."""
    reads_captions = config.caption_dim is not None
    has_captions = options.caption_column is not None
    if reads_captions != has_captions:
        raise ValueError("`--caption_column` must be given for a LlamaGen with a text encoder, and only for one.")
    has_same_grid = token_set.grids == [(config.grid_size, config.grid_size)]
    has_same_classes = token_set.num_classes == config.num_classes
    if not has_same_grid or not has_same_classes:
        raise ValueError(
            f"The token set must have one scale of {config.grid_size} x {config.grid_size} ids and "
            f"{config.num_classes} classes, but has scales of {token_set.grids} ids and {token_set.num_classes} "
            "classes. Tokenize square images at one scale, and name the column of the same classes or captions."
        )


if __name__ == "__main__":
    with one_line_errors():
        main(*read_run_options(LlamaGenOptions, sys.argv[1:]))
