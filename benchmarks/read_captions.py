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

from svqvae_hf.trainer.muon import MuonAndAdam, muon_groups

SLOTS = {"small": ("small",), "large": ("large",), "two": TWO, "three": THREE, "four": FOUR}
SLOTS |= {kind: tuple(kind.split()) for kind in PLAIN if " " in kind}
CHOICES = [list(GROUNDS), list(PLAIN), list(OBJECTS), list(OBJECTS)]  # ground, kind, first and last object
WIDTH = 128  # of the transformer
LENGTH = 96  # tokens of a caption, at most
BATCH = 64  # captions
PLAIN_SHARE = 0.1  # fraction of captions that are the plain ones
SIZES = {
    "vocab_size": 1,
    "hidden_size": WIDTH,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
SEED = 0
TEXTS = 20000  # captions from which a tokenizer learns


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
        answers = hidden[:, -len(CHOICES) :]  # (batch, 4, width)
        return [head(answers[:, number]) for number, head in enumerate(self.heads)]


def example(writer: CaptionWriter, random: Random) -> tuple[str, list[int]]:
    """A caption, and the numbers of the right choices."""
    scene = Scene.draw(random, held_out=False)
    caption = scene.caption(random, writer=writer)
    if random.random() < PLAIN_SHARE:
        caption = scene.plain()[0]
    answers = (scene.ground, scene.kind, scene.names[0], scene.names[-1])
    numbers = [choices.index(answer) for choices, answer in zip(CHOICES, answers, strict=True)]
    return caption, numbers


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
    optimizer = make_optimizer(reader)

    def warm_up_and_decay(step: int) -> float:
        return min((step + 1) / 50, 1.2 * (1 - step / steps), 1)

    schedule = LambdaLR(optimizer, warm_up_and_decay)
    for _ in range(steps):
        captions = []
        answers = []
        for _ in range(BATCH):
            caption, numbers = example(writer, random)
            captions.append(caption)
            answers.append(numbers)
        tokens, mask = make_batch(tokenizer, captions)
        logits = reader(tokens, mask)  # of each choice, (batch, options)
        targets = torch.tensor(answers)  # (batch, 4)
        losses = [F.cross_entropy(logits[number], targets[:, number]) for number in range(len(CHOICES))]
        torch.stack(losses).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return reader.eval()


def make_optimizer(reader: Reader) -> MuonAndAdam:
    """Muon for the matrices of the layers, and Adam for all other weights."""
    matrix_group, other_group = muon_groups(reader.layers, weight_decay=0.1)
    other_group["params"] += [*reader.words.parameters(), reader.questions, *reader.heads.parameters()]
    other_group["weight_decay"] = 0.01  # as when the percentages in the docs were measured
    return MuonAndAdam([matrix_group, other_group], lr=3e-3, betas=(0.9, 0.95))


@torch.inference_mode()
def read(reader: Reader, tokenizer: PreTrainedTokenizerFast, prompts: list[str], meanings: list[str]) -> str:
    """Percentage of the prompts whose whole scene a reader reads."""
    tokens, mask = make_batch(tokenizer, prompts)
    numbers = [logits.argmax(1) for logits in reader(tokens, mask)]
    answers = torch.stack(numbers, dim=1).tolist()  # (prompts, 4)
    is_right = []
    for numbers_of_prompt, meaning in zip(answers, meanings, strict=True):
        scene = scene_of_answers(numbers_of_prompt)
        is_right.append(scene.means(meaning))
    return percent(is_right)


def scene_of_answers(numbers: list[int]) -> Scene:
    """Scene of the numbers of the four choices."""
    ground, kind, first, last = (choices[number] for choices, number in zip(CHOICES, numbers, strict=True))
    slots = SLOTS[kind]
    is_pair = " " in kind
    names = [first, last] if is_pair else [first] * len(slots)
    return Scene(ground, tuple(zip(slots, names, strict=True)))


def make_words_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of the whole words of texts, which leaves other words out."""
    splitter = pre_tokenizers.Split(Regex(r"[a-z0-9]+"), "removed", invert=True)
    words: set[str] = set()
    for text in texts:
        words.update(word for word, _ in splitter.pre_tokenize_str(text.lower()))
    numbers = {word: number for number, word in enumerate(["", *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token=""))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = splitter
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
    if options.tokenizer == "words":
        tokenizer = make_words_tokenizer(texts)
    else:
        tokenizer = make_tokenizer(texts, int(options.tokenizer))
    reader = train(writer, tokenizer, options.examples // BATCH)
    row = {
        "tokens": len(tokenizer),
        "writers": " ".join(options.voices),
        "recipe": " ".join(options.set),
        "captions": options.examples,
        "CPU s": f"{time.process_time():.0f}",
    }
    for path in options.prompts:
        prompts, meanings = read_prompts(path)
        row[path.stem] = read(reader, tokenizer, prompts, meanings)
    report(options, machine, {"Captions read, %": [row]})


if __name__ == "__main__":
    main()
