"""Trains small readers of captions, which say how well captions teach other people's words before anything is drawn.

    python benchmarks/read_captions.py benchmarks/scene_prompts.tsv --set names=0 wordnet_names=0

A reader is a transformer of half a million parameters. It predicts the ground, the kind of scene and the objects of a
caption. A language model that learns to draw from the same captions draws about as many prompts right as it reads.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from measuring import make_parser, parse_options, report
from scenes import percent, read_prompts
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

sys.path.insert(0, str(Path(__file__).parent.parent / "training" / "bundled"))

from make_scene_words import make_tokenizer
from make_scenes import FOUR, GROUNDS, OBJECTS, THREE, TWO, Scene
from scene_captions import PLAIN, VOICES, CaptionWriter, Recipe

from svqvae_hf.trainer.muon import MuonAndAdam

SLOTS = {"small": ("small",), "large": ("large",), "two": TWO, "three": THREE, "four": FOUR}
SLOTS |= {kind: tuple(kind.split()) for kind in PLAIN if " " in kind}
CHOICES = [list(GROUNDS), list(PLAIN), list(OBJECTS), list(OBJECTS)]  # ground, kind, first and last object
WIDTH, LENGTH, BATCH, PLAIN_SHARE = 128, 96, 64, 0.1
SIZES = {"vocab_size": 1, "hidden_size": WIDTH, "intermediate_size": 384, "num_hidden_layers": 3, "head_dim": 32}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 4}
SEED, TEXTS = 0, 20000  # captions from which a tokenizer learns


class Reader(nn.Module):
    """A small causal transformer that reads a caption, and then one question per choice."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.words = nn.Embedding.from_pretrained(0.5 * torch.randn(vocabulary, WIDTH), freeze=False)
        self.questions = nn.Parameter(0.5 * torch.randn(len(CHOICES), WIDTH))
        self.layers = Qwen3Model(Qwen3Config(**SIZES, attn_implementation="eager"))
        self.heads = nn.ModuleList(nn.Linear(WIDTH, len(choices)) for choices in CHOICES)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        """Logits of each choice for tokens `(batch, length)`, which are padded on the left."""
        questions = self.questions.expand(len(tokens), -1, -1)
        embedded = torch.cat([self.words(tokens), questions], dim=1)  # (batch, length + 4, width)
        mask = F.pad(mask, (0, len(CHOICES)), value=1)
        hidden = self.layers(inputs_embeds=embedded, attention_mask=mask, use_cache=False).last_hidden_state
        answers = hidden[:, -len(CHOICES) :]
        return [head(answers[:, number]) for number, head in enumerate(self.heads)]


def example(writer: CaptionWriter, random: Random) -> tuple[str, list[int]]:
    """A caption, and the numbers of the right choices."""
    scene = Scene.draw(random, held_out=False)
    caption = scene.caption(random, writer=writer)
    if random.random() < PLAIN_SHARE:
        caption = scene.plain()[0]
    answers = scene.ground, scene.kind, scene.names[0], scene.names[-1]
    return caption, [choices.index(answer) for choices, answer in zip(CHOICES, answers, strict=True)]


def make_batch(tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens `(batch, length)`, padded on the left, and their mask."""
    padding = {"padding": True, "padding_side": "left", "truncation": True, "max_length": LENGTH}
    batch = tokenizer(captions, **padding, return_tensors="pt")
    return batch.input_ids, batch.attention_mask


def train(writer: CaptionWriter, tokenizer: PreTrainedTokenizerFast, steps: int) -> Reader:
    """Trains a reader on new captions."""
    torch.manual_seed(SEED)
    random = Random(SEED)
    reader = Reader(len(tokenizer))
    matrices = [weight for weight in reader.layers.layers.parameters() if weight.ndim == 2]
    others = [weight for weight in reader.parameters() if all(weight is not matrix for matrix in matrices)]
    optimizer = MuonAndAdam([{"params": matrices}, {"params": others}], lr=3e-3, betas=(0.9, 0.95))
    schedule = LambdaLR(optimizer, lambda step: min((step + 1) / 50, 1.2 * (1 - step / steps), 1))
    for _ in range(steps):
        examples = [example(writer, random) for _ in range(BATCH)]
        logits = reader(*make_batch(tokenizer, [caption for caption, _ in examples]))
        answers = torch.tensor([numbers for _, numbers in examples])  # (batch, 4)
        losses = [F.cross_entropy(logit, answers[:, number]) for number, logit in enumerate(logits)]
        torch.stack(losses).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return reader.eval()


@torch.inference_mode()
def read(reader: Reader, tokenizer: PreTrainedTokenizerFast, prompts: list[str], meanings: list[str]) -> str:
    """Percentage of the prompts of which a reader reads the whole scene."""
    logits = reader(*make_batch(tokenizer, prompts))
    numbers = torch.stack([answer.argmax(1) for answer in logits], dim=1)  # (prompts, 4)
    right = []
    for row, meaning in zip(numbers.tolist(), meanings, strict=True):
        ground, kind, first, last = (choices[number] for choices, number in zip(CHOICES, row, strict=True))
        names = [first, last] if " " in kind else [first] * len(SLOTS[kind])
        scene = Scene(ground, tuple(zip(SLOTS[kind], names, strict=True)))
        right.append(scene.means(meaning))
    return percent(right)


def make_words_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of the whole words of texts, which leaves other words out."""
    splitter = pre_tokenizers.Split(Regex(r"[a-z0-9]+"), "removed", invert=True)
    words = {word for text in texts for word, _ in splitter.pre_tokenize_str(text.lower())}
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["", *sorted(words)])}, unk_token=""))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), splitter
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="")


def main() -> None:
    """Trains one reader and prints what it reads."""
    parser = make_parser(__doc__, rounds=1)
    parser.add_argument("prompts", type=Path, nargs="+", help="lines of a prompt, a tab, and a plain caption")
    parser.add_argument("--tokenizer", default="1536", help="number of byte pairs (258: bytes), or `words`")
    parser.add_argument("--voices", nargs="+", choices=VOICES, default=VOICES, help="writers (default: all)")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="other values for the recipe")
    parser.add_argument("--examples", type=int, default=64000, help="captions to learn from")
    options, machine = parse_options(parser, "cpu")
    values = {}
    for text in options.set:
        name, value = text.split("=")
        values[name] = float(value)
    writer = CaptionWriter(replace(Recipe(), voices=tuple(options.voices), **values))
    random = Random(99)
    texts = [example(writer, random)[0] for _ in range(TEXTS)] + writer.wordnet["words"]
    is_words = options.tokenizer == "words"
    tokenizer = make_words_tokenizer(texts) if is_words else make_tokenizer(texts, int(options.tokenizer))
    reader = train(writer, tokenizer, options.examples // BATCH)
    row = {"tokens": len(tokenizer), "writers": " ".join(options.voices), "recipe": " ".join(options.set)}
    row |= {"captions": options.examples, "CPU s": f"{time.process_time():.0f}"}
    for path in options.prompts:
        row[path.stem] = read(reader, tokenizer, *read_prompts(path))
    report(options, machine, {"Captions read, %": [row]})


if __name__ == "__main__":
    main()
