"""Two sets of captioned photographs to learn by heart: `python benchmarks/captioned_photos.py PHOTOS OUT`.

OUT gets two sets of 64 photographs with made-up captions, a random text encoder, and a tokenizer of 256 codes for
language models as small as those in tests/golden. docs/generation.md has the commands that train on them, and
captions_by_heart.py measures the result.
"""

import argparse
import itertools
import json
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

import svqvae_hf
from svqvae_hf import SVQVAE

SETS = {"first": "photo", "second": "painting"}  # a word of its own in the captions of each set
WORDS = (
    ("red", "green", "blue", "white"),
    ("cat", "boat", "house", "tree"),
    ("by night", "in snow", "at sea", "on hills"),
)
SMALL_CODEBOOK = 256
CAPTION_DIM = 32  # channels of the captions of tests/golden/llamagen_gpt_t2i_tiny.pt


def prepare(photos: Path, out: Path) -> None:
    """Writes captioned photographs, a text encoder and a small tokenizer to a new folder."""
    torch.manual_seed(0)
    files = sorted(photos.iterdir())
    vocabulary = {"<pad>": 0, "</s>": 1}
    for index, (name, kind) in enumerate(SETS.items()):
        captions = [f"a {kind} of a {' '.join(words)}" for words in itertools.product(*WORDS)]
        folder = out / name
        folder.mkdir(parents=True)
        rows = []
        for number, caption in enumerate(captions):
            with Image.open(files[index * len(captions) + number]) as image:
                image.convert("RGB").save(folder / f"{number:02}.png")
            rows.append(json.dumps({"file_name": f"{number:02}.png", "caption": caption}))
            for word in caption.split():
                vocabulary.setdefault(word, len(vocabulary))
        (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    save_text_encoder(vocabulary, out / "text_encoder")
    save_small_tokenizer(out / "tokenizer")


def save_text_encoder(vocabulary: dict[str, int], folder: Path) -> None:
    """Saves a random T5 encoder, and a tokenizer whose tokens are words."""
    config = T5Config(vocab_size=len(vocabulary), d_model=CAPTION_DIM, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    T5EncoderModel(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)


def save_small_tokenizer(folder: Path) -> None:
    """Saves the bundled model with a random choice of its codes."""
    whole = SVQVAE.from_pretrained(svqvae_hf.DEFAULT_MODEL)
    weights = whole.state_dict()
    chosen = torch.randperm(whole.config["codebook_size"])[:SMALL_CODEBOOK]
    weights["quantize.embedding.weight"] = weights["quantize.embedding.weight"][chosen]
    small = SVQVAE.from_config(dict(whole.config) | {"codebook_size": SMALL_CODEBOOK})
    small.load_state_dict(weights)
    small.save_pretrained(folder)


def main() -> None:
    """Reads the arguments and writes the sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="folder of at least 128 photographs")
    parser.add_argument("out", type=Path, help="new folder")
    prepare(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
