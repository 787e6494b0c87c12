"""Compares a converted language model with the original code of LlamaGen on the same weights.

python conversion/compare_llamagen.py LLAMAGEN_CHECKOUT CHECKPOINT --grid-size 16

LLAMAGEN_CHECKOUT is a checkout of FoundationVision/LlamaGen. Its code runs unchanged, on random conditions. In float32
and in bfloat16, the script compares the logits of one pass and the greedy ids, with and without guidance. The exit
code is 1 if the two differ by more than rounding.
"""

import argparse
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from svqvae_hf import SVQVAE, LlamaGenForCausalLM, SVQVAEAutoregressivePipeline
from svqvae_hf.loaders.checkpoint_files import Checkpoint, load_checkpoint_file
from svqvae_hf.loaders.llamagen_checkpoints import find_language_model, read_llamagen
from svqvae_hf.pipelines.sampling import guide

IMAGES = 8
GUIDANCE_SCALES = (1.0, 4.0)
FLOAT32_TOLERANCE = 1e-4  # of logits
# The original's `generate` asks for plain attention. PyTorch's choice is the fused one, which rounds in another way.
ATTENTION = {"plain": [SDPBackend.MATH], "fused": [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]}


class Original:
    """A model of the original code, in float32 unless it is moved to another type.

    Args:
        checkout (`Path`): Folder with the original's `autoregressive`.
        checkpoint ([`Checkpoint`]): Checkpoint, whose file is loaded by the original's names.
    """

    def __init__(self, checkout: Path, checkpoint: Checkpoint):
        gpt, self.sampling = import_original(checkout)
        config = checkpoint.config
        self.model: nn.Module = gpt.Transformer(
            gpt.ModelArgs(
                dim=config["hidden_size"],
                n_layer=config["num_hidden_layers"],
                n_head=config["num_attention_heads"],
                vocab_size=config["codebook_size"],
                block_size=config["grid_size"] ** 2,
                num_classes=config["num_classes"],
                cls_token_num=config["num_condition_tokens"],
                caption_dim=config["caption_dim"],
                model_type="c2i" if config["caption_dim"] is None else "t2i",
            )
        )
        weights = find_language_model(load_checkpoint_file(checkpoint.path, checkpoint.source)) or {}
        self.model.load_state_dict({name: weight for name, weight in weights.items() if name != "freqs_cis"})
        self.model.eval()

    def logits(self, ids: torch.Tensor, condition: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Logits `(2 * images, ids, codes)` of one pass, the second half without conditions."""
        for layer in self.model.layers:
            layer.attention.kv_cache = None  # generation leaves it there
        num_condition_tokens = self.model.cls_token_num
        length = num_condition_tokens + ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        attention_mask = causal.repeat(len(ids), 1, 1)  # (images, length, length)
        if mask is None:
            no_condition = torch.full_like(condition, self.model.num_classes)
        else:
            no_condition = self.model.cls_embedding.uncond_embedding.expand_as(condition)
            attention_mask[:, :, :num_condition_tokens] &= mask.bool()[:, None]
            attention_mask |= torch.eye(length, dtype=torch.bool)
        conditions = torch.cat([condition, no_condition])
        masks = attention_mask.repeat(2, 1, 1)[:, None]  # (2 * images, 1, length, length)
        logits, _ = self.model(ids.repeat(2, 1), conditions, mask=masks)
        return logits[:, num_condition_tokens - 1 : -1]

    def greedy_ids(
        self, condition: torch.Tensor, mask: torch.Tensor | None, guidance_scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Most likely ids `(images, ids)`, and the logits `(images, ids, codes)` that they were chosen by."""
        steps: list[torch.Tensor] = []  # logits of each step

        def record(module: nn.Module, args: tuple, output: tuple) -> None:
            steps.append(output[0][:, -1])

        recording = self.model.register_forward_hook(record)
        ids = self.sampling.generate(
            self.model, condition, self.model.block_size, mask, cfg_scale=guidance_scale, sample_logits=False
        )
        recording.remove()
        logits = torch.stack(steps, dim=1)
        if guidance_scale != 1:
            logits = guide(logits, guidance_scale)
        return ids.long(), logits


class Converted:
    """The same model in this package.

    Args:
        checkpoint ([`Checkpoint`]): Checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint):
        self.model = LlamaGenForCausalLM.from_checkpoint(checkpoint)
        tokenizer = SVQVAE(codebook_size=self.model.config.codebook_size, base_channels=32)  # decodes nothing here
        self.pipeline = SVQVAEAutoregressivePipeline(tokenizer, self.model)
        self.pipeline.set_progress_bar_config(disable=True)

    def logits(self, ids: torch.Tensor, condition: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Logits `(2 * images, ids, codes)` of one pass, the second half without conditions."""
        num_codes = self.model.config.codebook_size
        num_ids = ids.shape[1]
        captions = {}
        if mask is None:
            labels = condition  # (images,)
        else:
            labels = condition.new_zeros(len(ids), dtype=torch.int64)
            captions = {"prompt_embeds": condition.repeat(2, 1, 1), "prompt_attention_mask": mask.repeat(2, 1)}
        conditional = num_codes + labels  # first token of each image, (images,)
        unconditional = torch.full_like(conditional, self.model.config.unconditional_token)
        first_tokens = torch.cat([conditional, unconditional])[:, None]  # (2 * images, 1)
        tokens = torch.cat([first_tokens, ids.repeat(2, 1)], dim=1)  # (2 * images, 1 + ids)
        return self.model(tokens, **captions).logits[:, :num_ids, :num_codes].float()

    def greedy_ids(self, condition: torch.Tensor, mask: torch.Tensor | None, guidance_scale: float) -> torch.Tensor:
        """Most likely ids `(images, ids)`."""
        if mask is None:
            conditions = {"class_labels": condition}
        else:
            conditions = {"prompt_embeds": condition, "prompt_attention_mask": mask}
        result = self.pipeline(guidance_scale=guidance_scale, temperature=0, output_type="latent", **conditions)
        return result.images.flatten(1)


def import_original(checkout: Path) -> tuple[ModuleType, ModuleType]:
    """Imports the original's modules of the model and of sampling."""
    if not (checkout / "autoregressive" / "models" / "gpt.py").is_file():
        raise FileNotFoundError(
            f"`{checkout}` must be a checkout of FoundationVision/LlamaGen, but has no autoregressive/models/gpt.py."
        )
    sys.path.insert(0, str(checkout))
    gpt = importlib.import_module("autoregressive.models.gpt")
    generate = importlib.import_module("autoregressive.models.generate")
    return gpt, generate


def make_condition(checkpoint: Checkpoint) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Classes, or random features of captions of several lengths with their mask."""
    config = checkpoint.config
    if config["caption_dim"] is None:
        return torch.arange(IMAGES) % config["num_classes"], None
    tokens = config["num_condition_tokens"]
    lengths = torch.linspace(1, tokens, IMAGES).long()
    mask = (torch.arange(tokens) >= tokens - lengths[:, None]).long()
    features = F.normalize(torch.randn(IMAGES, tokens, config["caption_dim"]), dim=-1)
    return features * mask[..., None], mask


def compare(checkout: Path, checkpoint: Checkpoint) -> Iterator[tuple[bool, str]]:
    """Yields whether each comparison passed, and its line."""
    original = Original(checkout, checkpoint)
    converted = Converted(checkpoint)
    torch.manual_seed(0)
    condition, mask = make_condition(checkpoint)
    ids = torch.randint(checkpoint.config["codebook_size"], (IMAGES, checkpoint.config["grid_size"] ** 2))
    exact = original.logits(ids, condition, mask)
    for dtype in (torch.float32, torch.bfloat16):
        original.model.to(dtype)
        converted.model.to(dtype)
        if mask is not None:
            condition = condition.to(dtype)
        logits = original.logits(ids, condition, mask)
        distance = _distance(converted.logits(ids, condition, mask), logits)
        if dtype == torch.float32:
            tolerance = FLOAT32_TOLERANCE
            allowed = "allowed"
        else:
            tolerance = _distance(logits, exact)
            allowed = "the original's own rounding"
        line = f"logits of one pass up to {distance:.1e} apart, {allowed} {tolerance:.1e}"
        yield distance <= tolerance, f"{dtype}  {line}"
        for guidance_scale in GUIDANCE_SCALES:
            expected, chosen_by = original.greedy_ids(condition, mask, guidance_scale)
            # Logits that are `tolerance` off move the difference of two guided ones by at most this much.
            margin = 2 * (2 * guidance_scale - 1) * tolerance
            for attention, kernels in ATTENTION.items():
                with sdpa_kernel(kernels):
                    converted_ids = converted.greedy_ids(condition, mask, guidance_scale)
                passed, line = compare_ids(converted_ids, expected, chosen_by, margin)
                yield passed, f"{dtype}  guidance {guidance_scale:g}, {attention} attention: {line}"


def compare_ids(ids: torch.Tensor, expected: torch.Tensor, logits: torch.Tensor, margin: float) -> tuple[bool, str]:
    """Compares ids `(images, ids)`, given the logits `(images, ids, codes)` of the expected ones.

    The first unequal id of an image may have a logit up to `margin` below the expected one. Later ids depend on it,
    and are not compared.
    """
    unequal = ids != expected
    rows = unequal.any(1).nonzero().flatten()  # images with an unequal id
    line = f"all {ids.shape[1]} ids equal in {len(ids) - len(rows)} of {len(ids)} images"
    if len(rows) == 0:
        return True, line
    firsts = unequal[rows].float().argmax(1)  # place of the first unequal id of each of these images
    expected_logits = logits[rows, firsts, expected[rows, firsts]]
    logits_of_ids = logits[rows, firsts, ids[rows, firsts]]
    gap = (expected_logits - logits_of_ids).max().item()
    places = ", ".join(str(first) for first in firsts.tolist())
    line += f", first unequal at {places} in others, logits up to {gap:.1e} apart, allowed {margin:.1e}"
    return gap <= margin, line


def _distance(logits: torch.Tensor, reference: torch.Tensor) -> float:
    return (logits - reference).abs().max().item()


@torch.no_grad()
def main() -> int:
    """Runs the script and returns its exit code."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("llamagen_checkout", type=Path, help="folder of the original code")
    parser.add_argument("checkpoint", help="file of a language model, local or `org/repo:file` on the Hub")
    parser.add_argument("--grid-size", type=int, help="ids per side of an image")
    parser.add_argument("--num-heads", type=int, help="for sizes that LlamaGen does not define")
    args = parser.parse_args()
    try:
        checkpoint = read_llamagen(args.checkpoint, grid_size=args.grid_size, num_attention_heads=args.num_heads)
        passed = True
        for holds, line in compare(args.llamagen_checkout, checkpoint):
            verdict = "ok" if holds else "DIFFERS"
            print(f"{line.removeprefix('torch.')}  {verdict}")
            passed &= holds
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
