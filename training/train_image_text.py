"""Trains a language model with image tokens on images and texts, to draw images and to describe them.

python training/train_image_text.py --model_name_or_path LM --token_set TOKENS --output_dir OUT --max_steps N
"""

import json
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from pytorch_optimizer.optimizer.soap import SOAP
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from svqvae_hf import SVQVAEProcessor
from svqvae_hf.language.image_vocabulary import ImageVocabulary
from svqvae_hf.token_sets.settings import read_settings, row_tokens
from svqvae_hf.tokens.image_tokens import check_same_codebook
from svqvae_hf.trainer.checkpoints import find_checkpoint
from svqvae_hf.trainer.data.token_sequences import check_captions
from svqvae_hf.trainer.optimization import MAX_PRECONDITION_DIM
from svqvae_hf.trainer.options import OptionParser, script_name
from svqvae_hf.trainer.scripts import one_line_errors

IGNORED = -100  # label that the loss skips
FRACTIONS = ("caption_fraction", "condition_dropout", "first_caption_fraction", "scheduled_sampling", "text_fraction")


@dataclass
class ImageTextOptions:
    """Options of the data and the model. All options of `transformers.TrainingArguments` can be given as well."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub id, as `svqvae extend-lm` wrote it."})
    token_set: str | None = field(default=None, metadata={"help": "Token set of `svqvae tokenize`: folder or Hub id."})
    caption_column: str = field(
        default="caption",
        metadata={"help": "Column of the captions: a text or a list; the model learns to write the first."},
    )
    first_caption_fraction: float = field(
        default=0.0,
        metadata={"help": "Fraction of images drawn from the first caption of a list; the others from any of it."},
    )
    caption_fraction: float = field(
        default=0.5, metadata={"help": "Fraction of pairs from image to text; the others go from text to image."}
    )
    condition_dropout: float = field(
        default=0.1, metadata={"help": "Fraction of images trained without their caption, for guidance."}
    )
    scheduled_sampling: float = field(
        default=0.0,
        metadata={
            "help": "Largest fraction of the ids of an image that the model reads as it draws them itself: it learns "
            "to follow the caption after its own mistakes. Takes a third more time."
        },
    )
    text_files: list[str] = field(
        default_factory=list,
        metadata={"help": "JSON Lines files of texts: `text`, with <|image|> for each of `images`, rows of ids each."},
    )
    text_fraction: float = field(
        default=0.0, metadata={"help": "Fraction of examples from the text files; the others are pairs."}
    )
    packing: bool = field(
        default=True, metadata={"help": "Pack each batch into one sequence; `--no_packing` pads instead, for the CPU."}
    )
    completion_only_loss: bool = field(
        default=True, metadata={"help": "Learn only the answer; `--no_completion_only_loss` learns the prompt, too."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention of transformers; `eager` is fast for short examples on a CPU."}
    )
    use_soap: bool = field(default=False, metadata={"help": "Train with SOAP in place of `--optim`."})
    lora_rank: int = field(
        default=0, metadata={"help": "Rank of LoRA on all linear layers, with the rows of image tokens; 0 trains all."}
    )

    def __post_init__(self) -> None:
        """Checks the options, except against data and model."""
        for name in FRACTIONS:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`--{name}` must lie in [0, 1], but is {getattr(self, name)}.")
        needs = {"token_set": self.text_fraction < 1, "text_files": self.text_fraction > 0}
        for name, needed in needs.items():
            if needed != bool(getattr(self, name)):
                raise ValueError(
                    f"`--{name}` must {'' if needed else 'not '}be given with `--text_fraction` "
                    f"{self.text_fraction:g}. {'Pass it' if needed else 'Leave it out'}, or change the fraction."
                )


class ImageTextExamples(Dataset):
    """Examples of a run. Each is a function of the seed and its number, so a resumed run sees the same."""

    def __init__(self, options: ImageTextOptions, processor: SVQVAEProcessor, count: int, seed: int, context: int):
        self.options, self.processor, self.count, self.seed, self.context = options, processor, count, seed, context
        self.pairs: Any = []
        if options.token_set is not None:
            self.settings = read_settings(options.token_set)
            check_same_codebook(processor.vqvae, self.settings)
            self.pairs = datasets.load_dataset(options.token_set, split="train")
            check_captions(self.pairs, options.caption_column)
        self.texts = read_texts(options.text_files)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        rng = np.random.default_rng((self.seed, index))
        if rng.random() < self.options.text_fraction:
            return self.text_example(self.texts[index % len(self.texts)])
        return self.pair_example(self.pairs[index % len(self.pairs)], rng)

    def text_example(self, row: dict[str, Any]) -> dict[str, list[int]]:
        """A text with any number of images. All of its tokens are learned."""
        images = [self.processor.image_text(torch.tensor(ids)) for ids in row.get("images", [])]
        texts = row["text"].split(self.processor.image_token)
        if len(texts) != len(images) + 1:
            raise ValueError(
                f"a text must have as many {self.processor.image_token} as images, but has {len(texts) - 1} for "
                f"{len(images)} images: {row['text']!r:.60}."
            )
        text = "".join(part for pair in zip(texts, [*images, ""], strict=True) for part in pair)
        tokens = self.tokenize(text + (self.processor.tokenizer.eos_token or ""))[: self.context]
        return {"input_ids": tokens, "labels": tokens}

    def pair_example(self, row: dict[str, Any], rng: np.random.Generator) -> dict[str, list[int]]:
        """A conversation that asks for an image or for its caption. The answer is learned."""
        image = self.processor.image_text(row_tokens(row, self.settings).ids[-1])
        captions = row[self.options.caption_column]
        captions = [captions] if isinstance(captions, str) else captions
        is_first = rng.random() < self.options.first_caption_fraction
        caption = captions[0 if is_first else rng.integers(len(captions))]
        draws = [image, captions[0]]
        if rng.random() >= self.options.caption_fraction:
            draws = [caption if rng.random() >= self.options.condition_dropout else self.processor.no_condition, image]
        roles = zip(("user", "assistant"), draws, strict=True)
        conversation = [{"role": role, "content": content} for role, content in roles]
        tokens = self.tokenize(self.processor.apply_chat_template(conversation))
        prompt = self.tokenize(self.processor.apply_chat_template(conversation[:1], add_generation_prompt=True))
        if len(tokens) > self.context:
            raise ValueError(
                f"an image with its caption must fit the context of {self.context} tokens, but takes {len(tokens)}. "
                "Tokenize smaller images."
            )
        same = [own == other for own, other in zip(tokens, prompt, strict=False)]
        asked = [*same, False].index(False) if self.options.completion_only_loss else 0
        return {"input_ids": tokens, "labels": [IGNORED] * asked + tokens[asked:]}

    def tokenize(self, text: str) -> list[int]:
        """Tokens as the processor makes them, without a second begin of sequence."""
        bos = self.processor.tokenizer.bos_token
        return self.processor.tokenizer(text, add_special_tokens=not (bos and text.startswith(bos))).input_ids


def read_texts(files: Sequence[str]) -> list[dict[str, Any]]:
    """Reads the objects of JSON Lines files, each with a `text`."""
    texts = []
    for file in files:
        lines = [*enumerate(Path(file).read_text("utf-8").split("\n"), start=1)]
        for number, line in [each for each in lines if each[1].strip()] or lines[:1]:
            try:
                texts.append(json.loads(line))
                texts[-1]["text"].split()
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                message = f"line {number} of `{file}` must be a JSON object with a `text`. Correct it."
                raise ValueError(message) from error
    return texts


class ModalityLoss:
    """Cross-entropy of the next token, and its mean over texts and over images since the last log."""

    def __init__(self, vocabulary: ImageVocabulary):
        self.vocabulary = vocabulary
        self.sums = torch.zeros(2, 2)  # loss and number of tokens, of texts and of images

    def __call__(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        """Returns the loss of logits `(batch, length, vocab_size)` and labels `(batch, length)`."""
        targets = labels[:, 1:].flatten()
        logits = outputs.logits[:, :-1].flatten(0, 1).float()
        losses = F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORED)
        counted = targets != IGNORED
        is_image = targets >= self.vocabulary.first_token
        masks = torch.stack([counted & ~is_image, counted & is_image]).float()
        with torch.no_grad():
            self.sums = self.sums.to(losses.device) + torch.stack([masks @ losses, masks.sum(1)], dim=1)
        return losses.sum() / (counted.sum() if num_items_in_batch is None else num_items_in_batch)


class ImageTextTrainer(Trainer):
    """Trainer with scheduled sampling, which logs the losses of texts and of images separately."""

    scheduled_sampling = 0.0

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Computes the loss, with scheduled sampling on some of the ids."""
        if self.scheduled_sampling:
            inputs = inputs | {"input_ids": self.draw_some(model, inputs)}
        return super().compute_loss(model, inputs, *args, **kwargs)

    @torch.no_grad()
    def draw_some(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """Replaces some ids by ids that the model samples after the tokens before them."""
        vocabulary, tokens = self.compute_loss_func.vocabulary, inputs["input_ids"].clone()
        is_image = (tokens >= vocabulary.first_token) & (tokens < vocabulary.begin)
        share = self.scheduled_sampling * torch.rand(len(tokens), 1, device=tokens.device)
        chosen = (is_image & (torch.rand(tokens.shape, device=tokens.device) < share))[:, 1:]
        logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits[:, :-1][chosen]
        drawn = logits[:, vocabulary.first_token : vocabulary.begin].float().softmax(-1).multinomial(1)
        tokens[:, 1:][chosen] = vocabulary.first_token + drawn[:, 0]
        return tokens

    def log(self, logs: dict[str, float], *args: Any) -> None:
        """Adds `loss_text` and `loss_image` to the log of the training loss."""
        if "loss" in logs:
            sums = self.accelerator.reduce(self.compute_loss_func.sums).tolist()
            self.compute_loss_func.sums = torch.zeros(2, 2)
            for name, (total, count) in zip(("text", "image"), sums, strict=True):
                logs[f"loss_{name}"] = total / (count or math.nan)
        super().log(logs, *args)


def add_lora(model: PreTrainedModel, vocabulary: ImageVocabulary, rank: int) -> PeftModel:
    """Freezes a model, and adds LoRA to its linear layers and trainable rows for the image tokens."""
    tables = {id(model.get_input_embeddings().weight): model.get_input_embeddings()}
    tables.setdefault(id(model.get_output_embeddings().weight), model.get_output_embeddings())
    names = [name for name, module in model.named_modules() if any(module is table for table in tables.values())]
    rows = [*range(vocabulary.first_token, vocabulary.stop)]
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules="all-linear", trainable_token_indices=dict.fromkeys(names, rows)
    )
    return get_peft_model(model, config)


def soap_arguments(arguments: TrainingArguments) -> dict[str, Any]:
    """Converts the options of Adam to arguments of SOAP."""
    return {
        "lr": arguments.learning_rate,
        "betas": (arguments.adam_beta1, arguments.adam_beta2),
        "max_precondition_dim": MAX_PRECONDITION_DIM,
    }


def main(options: ImageTextOptions, arguments: TrainingArguments) -> None:
    """Trains a language model and saves it with its processor, or its LoRA adapter, in the output folder."""
    if arguments.max_steps < 1:
        raise ValueError(f"`--max_steps` must be at least 1, but is {arguments.max_steps}.")
    for folder in Path(arguments.output_dir).glob("checkpoint-*"):
        if not (folder / "trainer_state.json").exists():  # written last: the run was killed
            shutil.rmtree(folder)
    checkpoint = find_checkpoint(arguments.output_dir, arguments.resume_from_checkpoint)
    config = AutoConfig.from_pretrained(options.model_name_or_path)
    vocabulary = ImageVocabulary.from_config(config)
    context = getattr(config.get_text_config(), "max_position_embeddings", sys.maxsize)
    processor = SVQVAEProcessor.from_pretrained(options.model_name_or_path)
    dtype = "auto" if options.lora_rank else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        options.model_name_or_path, dtype=dtype, attn_implementation=options.attn_implementation
    )
    model.config.use_cache = False  # a model with a cache would not tell packed examples apart
    if options.lora_rank:
        model = add_lora(model, vocabulary, options.lora_rank)
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    tokenizer = processor.tokenizer
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    examples = ImageTextExamples(options, processor, arguments.max_steps * batch, arguments.seed, context)
    trainer = ImageTextTrainer(
        model,
        arguments,
        train_dataset=examples,
        data_collator=DataCollatorWithFlattening() if options.packing else DataCollatorForSeq2Seq(tokenizer),
        compute_loss_func=ModalityLoss(vocabulary),
        optimizer_cls_and_kwargs=(SOAP, soap_arguments(arguments)) if options.use_soap else None,
    )
    trainer.scheduled_sampling = options.scheduled_sampling
    trainer.train(checkpoint and str(checkpoint))
    model.config.use_cache = True
    trainer.save_model()
    if not options.lora_rank and trainer.is_world_process_zero():
        processor.save_pretrained(arguments.output_dir)


if __name__ == "__main__":
    with one_line_errors():
        parser = OptionParser((ImageTextOptions, TrainingArguments), prog=script_name(), allow_abbrev=False)
        main(*parser.parse_args_into_dataclasses())
