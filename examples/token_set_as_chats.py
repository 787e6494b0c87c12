"""Writes a token set as chats for trainers of language models, such as TRL, axolotl, torchtune and LLaMA-Factory.

Each line of the file has `messages`, in which an image is the text of its tokens, as
`training/train_language_model.py` makes them.

python examples/token_set_as_chats.py LM TOKEN_SET chats.jsonl --caption_fraction 0.5 --condition_dropout 0.1
"""

import argparse

import datasets
import numpy as np

from svqvae_hf import SVQVAEProcessor
from svqvae_hf.trainer.examples import ChatExamples, Mix


def main() -> None:
    """Writes the chats."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("language_model", help="folder or Hub id of a language model with image tokens")
    parser.add_argument("token_set", help="folder or Hub id of a token set with captions")
    parser.add_argument("out", help="JSON Lines file to write")
    parser.add_argument("--caption_column", default="caption", help="column of captions (default: caption)")
    parser.add_argument(
        "--caption_fraction", type=float, default=0.0, help="fraction of rows that ask for the caption"
    )
    parser.add_argument("--condition_dropout", type=float, default=0.0, help="fraction of images without a caption")
    parser.add_argument("--seed", type=int, default=0, help="seed of these draws (default: 0)")
    args = parser.parse_args()

    mix = Mix(caption_fraction=args.caption_fraction, condition_dropout=args.condition_dropout, seed=args.seed)
    processor = SVQVAEProcessor.from_pretrained(args.language_model)
    examples = ChatExamples(processor, 0, None, mix, args.token_set, args.caption_column)
    chats = []
    for index, row in enumerate(examples.pairs):
        random = np.random.default_rng((mix.seed, index))
        chats.append({"messages": examples.conversation(row, random)})
    datasets.Dataset.from_list(chats).to_json(args.out)


if __name__ == "__main__":
    main()
