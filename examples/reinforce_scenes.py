"""Trains a language model that draws scenes further with GRPO of TRL (`pip install trl`), on grades of its pictures.

The grader of `benchmarks/scenes.py` reads the scene from a picture. Each line of a file of prompts has a prompt and a
plain caption of its meaning. A model that rewrites captions writes one before its picture, and learns from the grade
of the picture which captions to write. The share of right pictures of the held-out files is printed before and after.

python examples/reinforce_scenes.py LM OUT benchmarks/scene_prompts_choosing.tsv \
    --held_out benchmarks/scene_prompts_stranger_1.tsv benchmarks/scene_prompts_stranger_2.tsv
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from svqvae_hf import SVQVAEProcessor
from svqvae_hf.language.image_language_model import ImageLanguageModel

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from scenes import BATCH, Grader, Scene, load_objects, read_prompts

MAX_CAPTION_TOKENS = 64  # that a model may write before a picture, with the tokens around the picture


def make_reward(processor: SVQVAEProcessor, grader: Grader) -> Callable[..., list[float]]:
    """Makes TRL's reward function: from 0 to 1 for each answer, by the scene that the grader reads in its picture."""

    def scene(completion_ids: Sequence[list[int]], meaning: Sequence[str], **_: Any) -> list[float]:
        rewards = []
        for tokens, plain_caption in zip(completion_ids, meaning, strict=True):
            try:
                _, ids, *_ = processor.vocabulary.split(torch.tensor(tokens))
            except ValueError:  # the answer has no picture, or its tokens are in disorder
                rewards.append(0.0)
                continue
            (picture,) = processor.decode_images([ids])
            rewards.append(grade(grader(picture), plain_caption))
        return rewards

    return scene


def grade(scene: Scene, plain_caption: str) -> float:
    """1 for a scene that fulfils a caption. Otherwise half of the share of words that both have in common."""
    if scene.means(plain_caption):
        return 1.0
    asked = set(plain_caption.split())
    shares = [0.0]
    for caption in scene.plain():
        seen = set(caption.split())
        shares.append(len(asked & seen) / len(asked | seen))
    return max(shares) / 2


def print_share(model: ImageLanguageModel, grader: Grader, file: Path) -> None:
    """Prints the share of the prompts of a file whose picture is right. One picture each, as the model samples."""
    captions, meanings = read_prompts(file)
    pictures = []
    for start in range(0, len(captions), BATCH):
        pictures += model.draw(captions[start : start + BATCH], generator=torch.Generator().manual_seed(start))
    right = [grader(picture).means(meaning) for picture, meaning in zip(pictures, meanings, strict=True)]
    print(f"{file.name}: {sum(right) / len(right):.1%} right", flush=True)


def main() -> None:
    """Grades the model, trains it, saves it and grades it again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of a language model that draws scenes")
    parser.add_argument("output", help="folder of the trained model")
    parser.add_argument("prompts", type=Path, help="file of prompts to train on")
    parser.add_argument("--held_out", type=Path, nargs="*", default=[], help="files of prompts to grade on")
    parser.add_argument("--steps", type=int, default=26, help="updates (default: 26)")
    args = parser.parse_args(sys.argv[1:])

    grader = Grader(load_objects())
    model = ImageLanguageModel.from_pretrained(args.model, dtype="float32")
    for file in args.held_out:
        print_share(model, grader, file)
    rows, columns = model.processor.vocabulary.grids[0]
    captions, meanings = read_prompts(args.prompts)
    chats = [[{"role": "user", "content": caption}] for caption in captions]
    prompts = model.processor.apply_chat_template(chats, add_generation_prompt=True)
    config = GRPOConfig(
        args.output,
        max_steps=args.steps,
        learning_rate=3e-5,
        temperature=0.6,
        per_device_train_batch_size=64,
        num_generations=8,  # pictures of a prompt, which are compared with each other
        max_completion_length=MAX_CAPTION_TOKENS + rows * columns,
        gradient_checkpointing=False,
        use_cpu=not torch.accelerator.is_available(),
        save_strategy="no",
    )
    trainer = GRPOTrainer(
        model.language_model,
        reward_funcs=make_reward(model.processor, grader),
        args=config,
        train_dataset=Dataset.from_dict({"prompt": prompts, "meaning": meanings}),
        processing_class=model.tokenizer,
    )
    trainer.train()
    model.language_model.eval()
    model.save_pretrained(args.output)
    for file in args.held_out:
        print_share(model, grader, file)


if __name__ == "__main__":
    main()
