"""Trains small readers of captions, which say how well captions teach other people's words before anything is drawn.

    python benchmarks/read_captions.py benchmarks/scene_prompts.tsv --set names=0 wordnet_names=0

A reader is a transformer of half a million parameters. It reads a caption and predicts the ground, the kind of scene
and the objects. A language model that learns to draw from the same captions draws about as many prompts right as the
reader reads. PROMPTS are lines of a prompt and of a plain caption of what must be seen, separated by a tab.
"""

import sys
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from measuring import make_parser, parse_options, report
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

sys.path.insert(0, str(Path(__file__).parent.parent / "training" / "bundled"))

from make_scene_words import make_tokenizer
from make_scenes import FOUR, GROUNDS, OBJECTS, THREE, TWO, Scene
from scene_captions import PLAIN, VOICES, CaptionWriter, Recipe

SLOTS = {"small": ("small",), "large": ("large",), "two": TWO, "three": THREE, "four": FOUR}
SLOTS |= {kind: tuple(kind.split()) for kind in PLAIN if " " in kind}
CHOICES = [list(GROUNDS), list(PLAIN), list(OBJECTS), list(OBJECTS)]  # ground, kind, first and last object
WIDTH, LAYERS, HEADS, LENGTH = 128, 3, 4, 96
BATCH, PLAIN_SHARE = 64, 0.1
TEXTS = 20000  # captions from which a tokenizer learns


class Reader(nn.Module):
    """A small causal transformer that reads a caption, and then one question per choice."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.words = nn.Embedding(vocabulary, WIDTH)
        self.questions = nn.Parameter(0.5 * torch.randn(len(CHOICES), WIDTH))
        nn.init.normal_(self.words.weight, std=0.5)
        sizes = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_hidden_layers": LAYERS}
        heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": WIDTH // HEADS}
        rotation = {"rope_type": "default", "rope_theta": 1000.0}
        config = Qwen3Config(vocab_size=1, **sizes, **heads, rope_parameters=rotation, attn_implementation="eager")
        self.layers = Qwen3Model(config)
        for layer in self.layers.layers:
            nn.init.zeros_(layer.self_attn.o_proj.weight)
            nn.init.zeros_(layer.mlp.down_proj.weight)
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
    answers = [scene.ground, scene.kind, scene.names[0], scene.names[-1]]
    numbers = [choices.index(answer) for choices, answer in zip(CHOICES, answers, strict=True)]
    return caption, numbers


def make_batch(tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens `(batch, length)`, padded on the left, and their mask."""
    encoded = [tokenizer(caption).input_ids[:LENGTH] for caption in captions]
    length = max(len(tokens) for tokens in encoded)
    tokens = torch.tensor([[0] * (length - len(row)) + row for row in encoded])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in encoded])
    return tokens, mask


def train(writer: CaptionWriter, tokenizer: PreTrainedTokenizerFast, options: Namespace) -> Reader:
    """Trains a reader on new captions."""
    torch.manual_seed(options.seed)
    random = Random(options.seed)
    reader = Reader(len(tokenizer))
    matrices = [weight for weight in reader.layers.layers.parameters() if weight.ndim == 2]
    others = [weight for weight in reader.parameters() if all(weight is not matrix for matrix in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.01, weight_decay=0.01),
        torch.optim.Adam(others, lr=3e-3, betas=(0.9, 0.97)),
    ]
    steps = options.examples // BATCH
    schedules = [
        LambdaLR(optimizer, lambda step: min((step + 1) / 50, 1.2 * (1 - step / steps), 1)) for optimizer in optimizers
    ]
    for _ in range(steps):
        captions, answers = zip(*(example(writer, random) for _ in range(BATCH)), strict=True)
        logits = reader(*make_batch(tokenizer, list(captions)))
        targets = torch.tensor(answers).T
        losses = [F.cross_entropy(*pair) for pair in zip(logits, targets, strict=True)]
        torch.stack(losses).sum().backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return reader.eval()


@torch.inference_mode()
def count_right(reader: Reader, tokenizer: PreTrainedTokenizerFast, prompts: list[str], meanings: list[str]) -> float:
    """Percentage of the prompts of which a reader reads the whole scene."""
    logits = reader(*make_batch(tokenizer, prompts))
    numbers = torch.stack([answer.argmax(1) for answer in logits], dim=1)  # (prompts, 4)
    right = 0
    for row, meaning in zip(numbers.tolist(), meanings, strict=True):
        ground, kind, first, last = (choices[number] for choices, number in zip(CHOICES, row, strict=True))
        names = [first] * len(SLOTS[kind])
        if " " in kind:
            names = [first, last]
        scene = Scene(ground, tuple(zip(SLOTS[kind], names, strict=True)))
        right += scene.means(meaning)
    return 100 * right / len(meanings)


def tokenizer_of(kind: str, texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte pairs, of so many tokens, or whole words, of which unknown ones are left out, or bytes."""
    if kind.isdigit():
        return make_tokenizer(texts, int(kind))
    tokenizer = make_tokenizer(texts, 258)
    if kind == "words":
        backend = Tokenizer(models.WordLevel(unk_token=""))
        backend.normalizer = tokenizer.backend_tokenizer.normalizer
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[a-z0-9]+"), "removed", invert=True)
        words = {word for text in texts for word, _ in backend.pre_tokenizer.pre_tokenize_str(text.lower())}
        backend.model = models.WordLevel({word: number for number, word in enumerate(["", *sorted(words)])}, "")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    return tokenizer


def main() -> None:
    """Trains one reader and prints what it reads."""
    parser = make_parser(__doc__, rounds=1)
    parser.add_argument("prompts", type=Path, nargs="+", metavar="PROMPTS", help="TSV files")
    parser.add_argument("--tokenizer", default="1536", help="number of byte pairs, `words`, or `bytes`")
    parser.add_argument("--without", choices=VOICES, help="leave this writer out, and read captions by this writer")
    parser.add_argument("--voices", nargs="+", choices=VOICES, default=VOICES, help="writers (default: all)")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="other values for the recipe")
    parser.add_argument("--examples", type=int, default=64000, help="captions to learn from")
    parser.add_argument("--seed", type=int, default=0)
    options, machine = parse_options(parser, "cpu")
    values = {name: float(value) for name, value in (text.split("=") for text in options.set)}
    voices = tuple(voice for voice in options.voices if voice != options.without)
    writer = CaptionWriter(replace(Recipe(), voices=voices, **values))
    random = Random(99)
    texts = [example(writer, random)[0] for _ in range(TEXTS)] + writer.wordnet["words"]
    tokenizer = tokenizer_of(options.tokenizer, texts)
    start = time.process_time()
    reader = train(writer, tokenizer, options)
    row = {"tokenizer": options.tokenizer, "recipe": " ".join(options.set), "without": options.without or ""}
    row |= {"tokens": len(tokenizer), "CPU s": f"{time.process_time() - start:.0f}"}
    for path in options.prompts:
        lines = [line.split("\t") for line in path.read_text("utf-8").splitlines()]
        prompts, meanings = zip(*lines, strict=True)
        row[path.stem] = f"{count_right(reader, tokenizer, list(prompts), list(meanings)):.1f}"
    if options.without:
        other = CaptionWriter(replace(Recipe(), voices=(options.without,), wordnet_names=0, random_words=0))
        scenes = [Scene.draw(random, held_out=False) for _ in range(1000)]
        captions = [scene.caption(random, writer=other) for scene in scenes]
        row["this writer's captions"] = (
            f"{count_right(reader, tokenizer, captions, [scene.plain()[1] for scene in scenes]):.1f}"
        )
    report(options, machine, {"Captions read, %": [row]})


if __name__ == "__main__":
    main()
