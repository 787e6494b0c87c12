"""Captioned images learned by heart: `python benchmarks/captions_by_heart.py PIPELINE TOKENS`.

The most likely ids of each caption are compared with those of its image. With `--adapter`, the ids of the captions of
the pipeline itself are compared before the adapter is added and with the adapter off.
"""

import time

import torch
from measuring import Row, describe_machine, make_parser, report
from peft import PeftModel

from svqvae_hf import SVQVAEAutoregressivePipeline
from svqvae_hf.trainer.data.token_sequences import TokenSource


def measure(pipeline: SVQVAEAutoregressivePipeline, tokens: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Most likely ids of the captions of a token set, and the ids of its images, `(images, ids)` each."""
    source = TokenSource(tokens, None, "caption")
    batch = source.batch(range(len(source.rows)))
    captions = [caption for (caption,) in batch.captions or []]
    found = pipeline(prompt=captions, temperature=0, output_type="latent").images.flatten(1)
    return found, batch.sequences[:, 1:]


def main() -> None:
    """Reads the arguments, compares ids and reports."""
    parser = make_parser(__doc__, rounds=1)
    parser.add_argument("pipeline", help="folder of the pipeline")
    parser.add_argument("tokens", help="token set that it was trained on; with an adapter, that of the adapter")
    parser.add_argument("--adapter", help="folder of a LoRA adapter")
    parser.add_argument("--own", help="with an adapter: token set that the pipeline itself was trained on")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipeline = SVQVAEAutoregressivePipeline.from_pretrained(options.pipeline).to(options.device)
    pipeline.set_progress_bar_config(disable=True)
    rows: list[Row] = []

    def add(name: str, tokens: str) -> torch.Tensor:
        start = time.perf_counter()
        found, expected = measure(pipeline, tokens)
        equal = found.cpu() == expected
        seconds = time.perf_counter() - start  # after the GPU is done
        rows.append(
            {
                "model": name,
                "images": len(equal),
                "images with all ids": int(equal.all(1).sum()),
                "fraction of equal ids": equal.double().mean().item(),
                "seconds per image": seconds / len(equal),
            }
        )
        return found

    if options.adapter is None:
        add("trained", options.tokens)
    else:
        before = add("before the adapter", options.own)
        adapter = PeftModel.from_pretrained(pipeline.language_model, options.adapter)
        add("with the adapter", options.tokens)
        with adapter.disable_adapter():
            after = add("adapter off", options.own)
        print(f"ids with the adapter off are those before: {torch.equal(after, before)}")
    report(options, describe_machine(options.device, options.threads), {"Ids that come back": rows})


if __name__ == "__main__":
    main()
