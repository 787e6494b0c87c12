"""A language model with image tokens: `python benchmarks/language_models.py LM TOKENS`.

- By heart: the most likely image of each caption and caption of each image, beside the token set it was trained on.
- Grammar: sequences sampled from random logits, how many of them have a malformed image or do not match
  the regular expression, and the probability of codes outside images, summed.
- Speed: tokens per second of generation with and without the grammar, and of training with and without the loss by
  modality, of the same model.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from measuring import Row, make_parser, parse_options, report, take_turns
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from svqvae_hf import SVQVAEProcessor
from svqvae_hf.language.grammar import ImageGrammar
from svqvae_hf.models.image_vocabulary import ImageVocabulary
from svqvae_hf.token_sets.settings import read_settings, row_tokens

sys.path.insert(0, str(Path(__file__).parent.parent / "training"))

from modality_loss import ModalityLoss

from svqvae_hf.trainer.examples import IGNORED

NEW_TOKENS = 64
BATCH = 8
SAMPLES_AT_ONCE = 1000  # of each prompt


def by_heart(model: PreTrainedModel, processor: SVQVAEProcessor, tokens: str) -> list[Row]:
    """Compares the most likely answers of a model with the pairs of a token set."""
    settings = read_settings(tokens)
    captions = []
    grids = []  # of the scale with most ids
    for row in datasets.load_dataset(tokens, split="train"):
        captions.append(row["caption"])
        grids.append(max(row_tokens(row, settings).ids, key=torch.numel).long())

    most_ids = max(grid.numel() for grid in grids)
    equal_images = 0
    for answer, grid in zip(answers(model, processor, captions, most_ids + 8), grids, strict=True):
        if len(answer) > 1 and torch.equal(answer[1], grid):
            equal_images += 1

    image_texts = [processor.image_text(grid) for grid in grids]
    equal_captions = 0
    for answer, caption in zip(answers(model, processor, image_texts, 64), captions, strict=True):
        text = processor.decode(answer[0], skip_special_tokens=True)
        if text.split() == caption.split():
            equal_captions += 1
    return [
        {"direction": "text to image", "pairs": len(grids), "equal": equal_images},
        {"direction": "image to text", "pairs": len(grids), "equal": equal_captions},
    ]


def answers(
    model: PreTrainedModel, processor: SVQVAEProcessor, contents: list[str], length: int
) -> list[list[torch.Tensor]]:
    """The most likely answer to each content, split into texts and images in turn."""
    conversations = [[{"role": "user", "content": content}] for content in contents]
    texts = processor.apply_chat_template(conversations, add_generation_prompt=True)
    inputs = processor(text=texts, padding=True, padding_side="left", return_tensors="pt").to(model.device)
    sequences = model.generate(
        **inputs,
        max_new_tokens=length,
        do_sample=False,
        eos_token_id=processor.tokenizer.eos_token_id,
        logits_processor=[ImageGrammar(model.config)],
    )
    prompt_length = inputs["input_ids"].shape[1]
    return [processor.vocabulary.split(sequence[prompt_length:]) for sequence in sequences.cpu()]


def sample_grammar(model: PreTrainedModel, processor: SVQVAEProcessor, samples: int, length: int) -> Row:
    """Samples sequences from random logits, from prompts of several lengths with padding on the left."""
    vocabulary = processor.vocabulary
    padding = 1
    no_image = [padding, padding]
    begun_image = [padding, vocabulary.begin]
    prompts = torch.tensor([no_image, begun_image, vocabulary.begin_image(vocabulary.grids[0])])
    prompts = prompts.repeat(SAMPLES_AT_ONCE, 1)
    sampler = RandomSampler(vocabulary, ImageGrammar(model.config))
    images = 0
    malformed = 0
    num_sequences = 0
    while num_sequences < samples:
        sequences = sampler.sample(prompts, length)[: samples - num_sequences]
        num_sequences += len(sequences)
        for sequence in sequences:
            try:
                images += len(vocabulary.split(sequence)) // 2
            except ValueError:
                malformed += 1
    return {
        "sequences": samples,
        "images": images,
        "malformed": malformed,
        "probability of codes outside images": sampler.probability_outside,
    }


class RandomSampler:
    """Samples tokens from random logits, as the grammar allows.

    Args:
        vocabulary ([`ImageVocabulary`]): Image tokens.
        grammar ([`ImageGrammar`]): Grammar.

    Attributes:
        probability_outside (`float`): Probability of codes outside images, summed over all tokens so far.
    """

    def __init__(self, vocabulary: ImageVocabulary, grammar: ImageGrammar):
        self.vocabulary = vocabulary
        self.grammar = grammar
        self.generator = torch.Generator().manual_seed(0)
        self.probability_outside = 0.0

    def sample(self, tokens: torch.Tensor, length: int) -> list[torch.Tensor]:
        """Continues prompts `(batch, tokens)`, and cuts off the images that are not finished."""
        vocabulary = self.vocabulary
        is_inside = (tokens == vocabulary.begin).any(1)  # (batch,)
        for _ in range(length):
            logits = torch.randn(len(tokens), self.grammar.bias.shape[1], generator=self.generator)
            logits[:, vocabulary.begin] += 6
            probabilities = self.grammar(tokens, logits).softmax(-1)  # (batch, vocabulary)
            codes = probabilities[~is_inside, vocabulary.first_token : vocabulary.begin]
            self.probability_outside += codes.sum().item()
            waiting_times = torch.empty_like(logits).exponential_(generator=self.generator)
            token = (probabilities / waiting_times).argmax(-1)  # drawn by these probabilities
            is_inside = (is_inside | (token == vocabulary.begin)) & (token != vocabulary.end)
            tokens = torch.cat([tokens, token[:, None]], dim=1)
        sequences = []
        for row, is_unfinished in zip(tokens, is_inside, strict=True):
            if is_unfinished:
                last_begin = (row == vocabulary.begin).nonzero()[-1]
                row = row[:last_begin]
            sequences.append(row)
        return sequences


def speed(model: PreTrainedModel, processor: SVQVAEProcessor, rounds: int) -> list[Row]:
    """Tokens per second with what images add, and without."""
    grid = max(processor.vocabulary.grids)
    prompt = torch.tensor([processor.vocabulary.begin_image(grid)] * BATCH, device=model.device)
    length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "pad_token_id": 0}
    grammar = ImageGrammar(model.config)
    loss = ModalityLoss(range(processor.vocabulary.first_token, processor.vocabulary.begin))
    tokens = torch.randint(1, processor.vocabulary.begin, (1, BATCH * NEW_TOKENS), device=model.device)

    def generate(processors: list[Any]) -> None:
        model.generate(prompt, do_sample=True, logits_processor=processors, **length)

    def train(compute: Callable[[], torch.Tensor]) -> None:
        model.zero_grad()
        compute().backward()

    labels = tokens.clone()
    labels[:, 0] = IGNORED
    contestants = {
        "generation": lambda: generate([grammar]),
        "plain generation": lambda: generate([]),
        "training": lambda: train(lambda: loss(model(tokens, use_cache=False), labels)),
        "plain training": lambda: train(lambda: model(tokens, labels=labels, use_cache=False).loss),
    }
    _, seconds = take_turns(contestants, rounds, str(model.device))
    rows = []
    for name in ("generation", "training"):
        row = {
            "run": name,
            "tokens per second": BATCH * NEW_TOKENS / seconds[name],
            "ratio to the plain model": seconds[f"plain {name}"] / seconds[name],
        }
        rows.append(row)
    return rows


def main() -> None:
    """Reads the arguments, measures and reports."""
    parser = make_parser(__doc__, rounds=20)
    parser.add_argument("lm", help="folder of the language model")
    parser.add_argument("tokens", help="token set with captions that it was trained on")
    parser.add_argument("--adapter", help="folder of a LoRA adapter")
    parser.add_argument(
        "--samples", type=int, default=100_000, help="sequences of random logits (default: %(default)s)"
    )
    options, machine = parse_options(parser)
    model = AutoModelForCausalLM.from_pretrained(options.lm).to(options.device).eval()
    processor = SVQVAEProcessor.from_pretrained(options.lm)
    text = torch.arange(1, 100, device=model.device)[None]
    with torch.no_grad():
        before = model(text).logits
    if options.adapter:
        model = PeftModel.from_pretrained(model, options.adapter).eval()
        with torch.no_grad(), model.disable_adapter():
            equal = torch.equal(before, model(text).logits)
    tables: dict[str, list[Row]] = {"By heart": by_heart(model, processor, options.tokens)}
    if options.adapter:
        tables["By heart"].append({"direction": "text, adapter off", "pairs": 1, "equal": int(equal)})
    start = time.perf_counter()
    sampled = sample_grammar(model, processor, options.samples, 40)
    tables["Grammar"] = [{**sampled, "seconds": time.perf_counter() - start}]
    tables["Speed"] = speed(model, processor, options.rounds)
    report(options, machine, tables)


if __name__ == "__main__":
    main()
