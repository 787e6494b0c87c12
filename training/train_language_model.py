"""Trains a language model with image tokens on chats: to draw images from captions, and to describe images.

accelerate launch training/train_language_model.py --model_name_or_path LM --token_set TOKENS --output_dir OUT \
    --max_steps N
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from language_options import LanguageRunOptions, read_run_options
from language_trainer import LanguageRun, language_model_card, run_language_training
from lora import add_lora, save_adapter
from transformers import (
    AutoConfig,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    GenerationConfig,
    PreTrainedModel,
    TrainingArguments,
)

from svqvae_hf import SVQVAEProcessor
from svqvae_hf.loaders.causal_models import load_causal_model
from svqvae_hf.loaders.folder_checks import check_files
from svqvae_hf.loaders.saved_parts import record_parts
from svqvae_hf.models.image_vocabulary import ImageVocabulary
from svqvae_hf.pipelines.image_chats import REWRITES, ImageChats
from svqvae_hf.token_sets.manifest import TokenSet
from svqvae_hf.trainer.data.held_out import check_held_out_tokens
from svqvae_hf.trainer.examples import ChatExamples, Mix, read_texts
from svqvae_hf.trainer.options import FRACTION, option, range_faults
from svqvae_hf.trainer.scripts import one_line_errors

SCRIPT = "training/train_language_model.py"
CAPTION_COLUMN = "caption"  # of a token set, unless `--caption_column` names another


@dataclass
class LanguageModelOptions(LanguageRunOptions):
    """Options of the data and the model. All options of `transformers.TrainingArguments` can be given as well."""

    model_name_or_path: str | None = option(None, "Model of `svqvae extend-lm` to train: folder or Hub id.")
    caption_fraction: float = option(0.5, "Fraction of chats from image to caption; the others go the other way.")
    text_files: list[str] = option([], "JSON Lines files: `text`, with <|image|> for each of `images`, rows of ids.")
    text_fraction: float = option(0.0, "Fraction of examples from the text files; the others are chats.")
    rewrite_fraction: float = option(0.0, "Fraction of chats that rewrite captions; above 0, these come first.")
    packing: bool = option(True, "Pack each batch of chats into one sequence; --no_packing pads, for the CPU.")

    def faults(self) -> Iterator[str]:
        """Yields an error message for each fault, also in the options of chats and texts."""
        yield from super().faults()
        yield from range_faults(self, FRACTION, "caption_fraction", "text_fraction", "rewrite_fraction")
        if self.model_name_or_path is None:
            yield "`--model_name_or_path` must be given. To train a LlamaGen, use training/train_llamagen.py."
        yield from self._source_faults()

    def _source_faults(self) -> Iterator[str]:
        """Yields an error message for each source of examples that is missing, or that no example comes from."""
        uses_chats = self.text_fraction < 1
        uses_texts = self.text_fraction > 0
        fraction = f"`--text_fraction` {self.text_fraction:g}"
        if uses_chats and not self.token_set:
            yield f"`--token_set` must be given with {fraction}. Change one of them."
        if self.token_set and not uses_chats:
            yield f"`--token_set` must not be given with {fraction}. Change one of them."
        if uses_texts and not self.text_files:
            yield f"`--text_files` must be given with {fraction}. Change one of them."
        if self.text_files and not uses_texts:
            yield f"`--text_files` must not be given with {fraction}. Change one of them."

    def mix(self, seed: int) -> Mix:
        """Fractions of all kinds of examples in training, with the seed of all draws."""
        return Mix(
            condition_dropout=self.condition_dropout,
            caption_fraction=self.caption_fraction,
            first_caption_fraction=self.first_caption_fraction,
            text_fraction=self.text_fraction,
            rewrite_fraction=self.rewrite_fraction,
            seed=seed,
        )


def main(options: LanguageModelOptions, arguments: TrainingArguments) -> None:
    """Trains a language model and saves it, or its LoRA adapter, in the output folder."""
    run_language_training(SCRIPT, partial(train, options), options, arguments)


def train(options: LanguageModelOptions, run: LanguageRun) -> None:
    """Trains a language model and saves it, or its LoRA adapter, in the output folder."""
    base = str(options.model_name_or_path)
    model, processor = load_language_model(options)
    set_rewriting(model, processor, options)
    context_length = getattr(model.config.get_text_config(), "max_position_embeddings", sys.maxsize)  # in tokens
    examples = open_examples(options, processor, context_length, run)
    held_out = open_held_out(options, processor, context_length, run)
    vocabulary = processor.vocabulary
    code_tokens = range(vocabulary.first_token, vocabulary.begin)  # the begin of an image follows the last code
    collate: Any = DataCollatorForSeq2Seq(processor.tokenizer)
    if options.packing:
        collate = DataCollatorWithFlattening()
    trained_model: Any = model
    save = partial(save_with_processor, processor)
    if options.lora_rank:
        trained_model = add_lora(model, options.lora_rank)
        save = partial(save_adapter, base=base)
    trainer = run.train(trained_model, examples, held_out, collate, code_tokens)
    make_card = partial(language_model_card, options, base, of_a_pipeline=False)
    run.publish(trainer, save, make_card)


def load_language_model(options: LanguageModelOptions) -> tuple[PreTrainedModel, SVQVAEProcessor]:
    """Loads a language model with image tokens in float32, or in its own type for LoRA, and its processor."""
    source = str(options.model_name_or_path)
    check_files(source)
    vocabulary = ImageVocabulary.from_config(AutoConfig.from_pretrained(source))
    processor = SVQVAEProcessor.from_pretrained(source)
    if vocabulary != processor.vocabulary:
        raise ValueError(f"the language model and the processor in `{source}` must have the same image tokens.")
    tokenizer = processor.tokenizer
    if not tokenizer.pad_token:
        tokenizer.pad_token = tokenizer.eos_token
    model = load_causal_model(
        source,
        dtype="auto" if options.lora_rank else torch.float32,
        attn_implementation=options.attn_implementation,
    )
    # `custom_pipelines` names code in the repository of the model. The result is saved without that code.
    model.config.__dict__.pop("custom_pipelines", None)
    return model, processor


def set_rewriting(model: PreTrainedModel, processor: SVQVAEProcessor, options: LanguageModelOptions) -> None:
    """Sets in the model's generation config whether it writes a caption of its own before each image.

    Raises:
        ValueError: An adapter would have to change the generation config, which belongs to its base.
    """
    rewrites = options.rewrite_fraction > 0
    base_rewrites = ImageChats(model, processor).rewrites  # as the generation config says before training
    if rewrites == base_rewrites:
        return
    if options.lora_rank:
        fraction_of_base = "above 0" if base_rewrites else "0"
        raise ValueError(
            f"`--rewrite_fraction` must be {fraction_of_base} for an adapter, as for its base "
            f"`{options.model_name_or_path}`, got {options.rewrite_fraction:g}. Change it, or train without "
            "`--lora_rank`."
        )
    values = model.generation_config.to_diff_dict()  # only the values that differ from the defaults
    # A generation config with this mark, which transformers sets, keeps no values that transformers does not know.
    # `generation_kwargs` is one of these.
    values.pop("_from_model_config", None)
    if values.get("generation_kwargs") is None:
        values["generation_kwargs"] = {}
    values["generation_kwargs"][REWRITES] = rewrites
    model.generation_config = GenerationConfig(**values)


def open_examples(
    options: LanguageModelOptions, processor: SVQVAEProcessor, context_length: int, run: LanguageRun
) -> ChatExamples:
    """Opens the examples of the run: chats about the token set, and texts."""
    examples = ChatExamples(
        processor=processor,
        context=context_length,
        count=run.num_examples,
        mix=options.mix(run.arguments.seed),
        token_set=options.token_set,
        caption_column=options.caption_column or CAPTION_COLUMN,
        texts=read_texts(options.text_files, processor, context_length),
    )
    examples.check_lengths()
    return examples


def open_held_out(
    options: LanguageModelOptions, processor: SVQVAEProcessor, context_length: int, run: LanguageRun
) -> ChatExamples | None:
    """Opens the examples of the validation, if there is one: a chat about each row, and no caption is dropped.

    Raises:
        ValueError: The run trains on some of the rows.
    """
    if options.validation_token_set is None:
        return None
    mix_of_training = options.mix(run.arguments.seed)
    held_out = ChatExamples(
        processor=processor,
        context=context_length,
        count=None,
        mix=replace(mix_of_training, condition_dropout=0.0, text_fraction=0.0),
        token_set=options.validation_token_set,
        caption_column=options.caption_column or CAPTION_COLUMN,
    )
    held_out.check_lengths()
    if options.token_set is not None:
        held_out_set = TokenSet(options.validation_token_set)
        check_held_out_tokens(held_out_set, TokenSet(options.token_set), "--validation_token_set")
    return held_out


def save_with_processor(processor: SVQVAEProcessor, folder: Path) -> Path:
    """Saves the processor beside the trained model in a folder, and returns the folder."""
    processor.save_pretrained(folder)
    record_parts(folder)
    return folder


if __name__ == "__main__":
    with one_line_errors():
        main(*read_run_options(LanguageModelOptions, sys.argv[1:]))
