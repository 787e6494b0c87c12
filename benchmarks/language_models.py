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
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import torch
from measuring import Row, make_parser, parse_options, report, take_turns
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from svqvae_hf import SVQVAEProcessor
from svqvae_hf.language.grammar import ImageGrammar
from svqvae_hf.token_sets.settings import read_settings, row_tokens

sys.path.insert(0, str(Path(__file__).parent.parent / "training"))

from language_trainer import ModalityLoss

from svqvae_hf.trainer.examples import IGNORED

NEW_TOKENS = 64
BATCH = 8
SAMPLES_AT_ONCE = 1000  # of each prompt


def by_heart(model: PreTrainedModel, processor: SVQVAEProcessor, tokens: str) -> list[Row]:
    """Compares the most likely answers of a model with the pairs of a token set."""
    settings, rows = read_settings(tokens), datasets.load_dataset(tokens, split="train")
    captions, grids = rows["caption"], [max(row_tokens(row, settings).ids, key=torch.numel).long() for row in rows]

    def answers(contents: list[str], length: int) -> list[list[torch.Tensor]]:
        conversations = [[{"role": "user", "content": content}] for content in contents]
        texts = processor.apply_chat_template(conversations, add_generation_prompt=True)
        inputs = processor(text=texts, padding=True, padding_side="left", return_tensors="pt").to(model.device)
        grammar = ImageGrammar(model.config)
        made = model.generate(
            **inputs,
            max_new_tokens=length,
            do_sample=False,
            eos_token_id=processor.tokenizer.eos_token_id,
            logits_processor=[grammar],
        )
        new = made[:, inputs["input_ids"].shape[1] :].cpu()
        return [processor.vocabulary.split(each) for each in new]

    drawn = answers(captions, max(ids.numel() for ids in grids) + 8)
    images = [len(made) > 1 and torch.equal(made[1], ids) for made, ids in zip(drawn, grids, strict=True)]
    told = answers([*map(processor.image_text, grids)], 64)
    texts = [processor.decode(made[0], skip_special_tokens=True).split() for made in told]
    return [
        {"direction": "text to image", "pairs": len(grids), "equal": sum(images)},
        {
            "direction": "image to text",
            "pairs": len(grids),
            "equal": sum(text == caption.split() for text, caption in zip(texts, captions, strict=True)),
        },
    ]


def sample_grammar(model: PreTrainedModel, processor: SVQVAEProcessor, samples: int, length: int) -> Row:
    """Samples sequences from random logits, from prompts of several lengths with padding on the left."""
    vocabulary, grammar = processor.vocabulary, ImageGrammar(model.config)
    starts = [[], [vocabulary.begin], vocabulary.begin_image(vocabulary.grids[0])]
    prompts = torch.tensor([[1] * (2 - len(start)) + start for start in starts]).repeat(SAMPLES_AT_ONCE, 1)
    generator = torch.Generator().manual_seed(0)
    images, malformed, barred = 0, 0, 0.0

    def sample(tokens: torch.Tensor) -> list[torch.Tensor]:
        """Samples from random logits, and cuts off the images that are not finished."""
        nonlocal barred
        inside = (tokens == vocabulary.begin).any(1)
        for _ in range(length):
            logits = torch.randn(len(tokens), grammar.bias.shape[1], generator=generator)
            logits[:, vocabulary.begin] += 6
            probabilities = grammar(tokens, logits).softmax(-1)
            barred += probabilities[~inside, vocabulary.first_token : vocabulary.begin].sum().item()
            token = (probabilities / torch.empty_like(logits).exponential_(generator=generator)).argmax(-1)
            inside = (inside | (token == vocabulary.begin)) & (token != vocabulary.end)
            tokens = torch.cat([tokens, token[:, None]], dim=1)
        last = [
            (row == vocabulary.begin).nonzero()[-1] if unfinished else len(row)
            for row, unfinished in zip(tokens, inside, strict=True)
        ]
        return [row[:stop] for row, stop in zip(tokens, last, strict=True)]

    chunks = (sample(prompts) for _ in range(-(-samples // len(prompts))))
    for sequence in islice((sequence for chunk in chunks for sequence in chunk), samples):
        try:
            images += len(vocabulary.split(sequence)) // 2
        except ValueError:
            malformed += 1
    probability = {"probability of codes outside images": barred}
    return {"sequences": samples, "images": images, "malformed": malformed, **probability}


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
    return [
        {
            "run": name,
            "tokens per second": BATCH * NEW_TOKENS / seconds[name],
            "ratio to the plain model": seconds[f"plain {name}"] / seconds[name],
        }
        for name in ("generation", "training")
    ]


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
