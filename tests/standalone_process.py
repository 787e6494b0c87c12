"""Loads repositories with their own code, in an environment without this package, and saves what they compute.

The tokenizer and the pipelines are saved and loaded again before.

python standalone_process.py REPOSITORIES OUTPUT
"""

import copy
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoModel, DiffusionPipeline, ModularPipeline
from diffusers.commands import diffusers_cli
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoProcessor, pipeline

PIPELINES = ("classes", "text", "scales", "scales of text")
PROMPT = torch.tensor([[256 + 3], [256 + 7]])


def tokens_and_pixels(vqvae, processor) -> dict[str, torch.Tensor]:
    image = Image.linear_gradient("L").resize((75, 43)).rotate(30).convert("RGB")
    batch = processor([image, image.transpose(Image.Transpose.ROTATE_180)])
    with torch.no_grad():
        ids = vqvae.encode_tokens(batch["pixel_values"], scales=[1, 0.5, 2])
        vqvae.enable_tiling(32)
        tiled_ids = vqvae.encode_tokens(batch["pixel_values"])
        sample = vqvae.decode(tiled_ids).sample
        vqvae.disable_tiling()
        vqvae.enable_slicing()
        sliced = vqvae.decode_tokens(ids[1])
        vqvae.disable_slicing()
        forward = vqvae(batch["pixel_values"], scales=[1, 0.5], tile_size=32)
        half = copy.deepcopy(vqvae).to(torch.bfloat16)
        half_ids = half.encode_tokens(batch["pixel_values"].to(torch.bfloat16))
        latents = vqvae.encode(batch["pixel_values"]).latents
        pixels = processor.postprocess(vqvae.decode_tokens(ids[0]), batch["image_sizes"], output_type="pt")
    return {
        **{"latents": latents, "ids": ids[0], "ids at 0.5": ids[1], "ids at 2": ids[2], "sliced": sliced},
        **{"forward": forward.sample[0], "forward at 0.5": forward.sample[1]},
        "losses": torch.stack([*forward.losses[0]]),
        **{"ids in half precision": half_ids, "sample in half precision": half.decode_tokens(half_ids)},
        **{"tiled ids": tiled_ids, "tiled sample": sample},
        "decoded latents": vqvae.decode(latents).sample.detach(),
        "not quantised": vqvae.decode(latents, force_not_quantize=True).sample.detach(),
        "pixels": pixels.contiguous(),
    }


def logits_of_scales(transformer) -> torch.Tensor:
    torch.manual_seed(0)
    codes = [torch.randn(2, transformer.config["codebook_embed_dim"], 2, 3)]
    with torch.no_grad():
        return transformer(torch.tensor([0, 5]), codes, [(2, 3), (3, 4)]).logits


def outputs(vqvae, processor, transformer, language_model) -> dict[str, torch.Tensor]:
    greedy = language_model.generate(PROMPT, max_new_tokens=16, do_sample=False)
    return tokens_and_pixels(vqvae, processor) | {"logits": logits_of_scales(transformer), "greedy ids": greedy}


def sampled(pipelines: dict[str, ModularPipeline]) -> dict[str, torch.Tensor]:
    """Greedy ids and pixels of each pipeline, with and without guidance."""
    found = {}
    for name, each in pipelines.items():
        condition = {"prompt": ["a cat"]} if "text" in name else {"class_labels": [0, 2]}
        for scale in (1.0, 2.5):
            ids, images = sample(each, scale, **condition)
            found |= {f"ids of {name}, {scale}": ids, f"images of {name}, {scale}": torch.from_numpy(images)}
    return found


def sample(pipeline: ModularPipeline, guidance_scale: float, **condition) -> tuple[torch.Tensor, np.ndarray]:
    pipeline.update_components(guider=pipeline.guider.new(guidance_scale=guidance_scale))
    state = pipeline(**condition, temperature=0)
    return state.get("ids").contiguous(), np.stack(state.get("images"))


def error_of(load, *args: str) -> str:
    try:
        load(*args)
    except (OSError, ValueError, SystemExit) as error:
        return str(error)
    return ""


def load_pipeline(folder: str) -> ModularPipeline:
    pipeline = ModularPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline.load_components(trust_remote_code=True)
    return pipeline


CAPTIONS = ["a whale above a guitar on pink", "three foxes on white"]
KINDS = {"tokenizer": "tokenizer", "LlamaGen": "classes", "next-scale": "scales", "language model": "drawer"}
TRUSTED = {"trust_remote_code": True}


def drawn_and_described(folder: str) -> dict[str, torch.Tensor]:
    """Pictures and greedy captions of the bundled language model, by transformers' pipeline."""
    pipe = pipeline("any-to-any", model=folder, **TRUSTED)
    records = pipe(CAPTIONS, generation_mode="image", temperature=0)
    images = [record["generated_image"] for record in records]
    chats = [[{"role": "user", "content": [{"type": "image", "image": image}]}] for image in images]
    texts = [pipe(chat, return_full_text=False)[0]["generated_text"] for chat in chats]
    assert texts == CAPTIONS
    return {"drawn": torch.from_numpy(np.stack(images))}


def run_cli(verb: str, folder: str, *options: str) -> None:
    sys.argv = ["diffusers-cli", verb, "-m", folder, "--trust-remote-code", *options]
    diffusers_cli.main()


LABEL = ("--pipeline-kwargs", '{"class_labels": 2}', "--output-key", "images")


def place(folder: str) -> dict[str, str | bool]:
    """Where a repository has its tokenizer."""
    return TRUSTED | ({} if Path(folder).name == "tokenizer" else {"subfolder": "vqvae"})


TOOLS = {  # the rows of the table in docs/standalone.md
    "`AutoModel` of diffusers": lambda folder: AutoModel.from_pretrained(folder, **place(folder)),
    "`AutoImageProcessor`": lambda folder: AutoImageProcessor.from_pretrained(folder, **place(folder)),
    "`AutoProcessor`": lambda folder: AutoProcessor.from_pretrained(folder, **TRUSTED),
    "`AutoModelForCausalLM`": lambda folder: AutoModelForCausalLM.from_pretrained(folder, **TRUSTED).generate(PROMPT),
    '`pipeline("text-generation")`': lambda folder: pipeline("text-generation", model=folder, **TRUSTED)("a whale"),
    '`pipeline("any-to-any")`': drawn_and_described,
    "`ModularPipeline`": lambda folder: load_pipeline(folder)(class_labels=2),
    "`diffusers-cli schema`": lambda folder: run_cli("schema", folder),
    "`diffusers-cli run`": lambda folder: run_cli("run", folder, *LABEL, "-o", f"{folder}.png"),
    "`DiffusionPipeline`": lambda folder: DiffusionPipeline.from_pretrained(folder, **TRUSTED),
}


def table(repositories: Path) -> dict[str, dict[str, str]]:
    """The error of each tool on each kind of repository, or an empty text."""
    cells: dict[str, dict[str, str]] = {}
    for name, tool in TOOLS.items():
        for kind, folder in KINDS.items():
            cells.setdefault(name, {})[kind] = error_of(tool, str(repositories / folder))
    return cells


def main(repositories: Path, output: Path) -> None:
    assert importlib.util.find_spec("svqvae_hf") is None
    tokenizer, next_scale, llamagen = (str(repositories / name) for name in ("tokenizer", "next_scale", "llamagen"))
    saved = str(output.parent / "saved")
    AutoModel.from_pretrained(tokenizer, **TRUSTED).save_pretrained(saved)
    found = outputs(
        AutoModel.from_pretrained(saved, **TRUSTED),
        AutoImageProcessor.from_pretrained(tokenizer, **TRUSTED),
        AutoModel.from_pretrained(next_scale, **TRUSTED),
        AutoModelForCausalLM.from_pretrained(llamagen, **TRUSTED),
    )
    pipelines = {}
    for name in PIPELINES:
        pipeline, saved = load_pipeline(str(repositories / name)), str(output.parent / name)
        pipeline.save_pretrained(saved, overwrite_modular_index=True)
        pipeline.blocks.save_pretrained(saved)
        pipelines[name] = load_pipeline(saved)
    save_file(found | sampled(pipelines) | drawn_and_described(str(repositories / "drawer")), output)
    sys.stdout.write("\n" + json.dumps(table(repositories)))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
