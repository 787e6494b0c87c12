"""Folders of tiny models, token files, token sets and images, and the commands that read them."""

import shutil
from pathlib import Path

import torch
from cli_runner import svqvae
from conftest import ROOT, make_tiny
from context_models import make_context_model
from damage import Command
from generators import make_autoregressive, make_next_scale
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from tiny_language_models import extended, make_language_model, save_language_model

CLIP = (100, 100, 124, 116)
# Of a model that others have saved, nobody can tell whether generation_config.json is its own, or should be there.
PLAIN_LM = ("plain_lm/config.json", "plain_lm/model.safetensors", "plain_lm/tokenizer.json")
WEIGHTS_AND_CONFIG = ("model/config.json", "model/diffusion_pytorch_model.safetensors")
CHECKPOINTS = {
    "svqvae.safetensors": "svqvae_tiny.safetensors",
    "flexvar_transformer.pth": "flexvar_transformer_tiny.pth",
    "llamagen_gpt.pt": "llamagen_gpt_c2i_tiny.pt",
}


def make_workspace(root: Path) -> list[Command]:
    """Writes the folders, and returns the commands."""
    _save_models(root)
    _save_images(root)
    _save_checkpoints(root)
    model = "--model {root}/model"
    for command in (
        f"encode {root}/photos --output {root}/tokens --model {root}/model",
        f"encode {root}/photos --output {root}/compressed --model {root}/model --compress",
        f"tokenize {root}/photos --model {root}/model --output {root}/set --workers 0",
        f"tokenize {root}/three --model {root}/model --output {root}/started --workers 0 --num-parts 3 --part 1",
        f"encode {root}/photos --output {root}/encoded --model {root}/model",
        f"decode {root}/set --output {root}/decoded --model {root}/model",
        f"caption {root}/photos --output {root}/captioned --model {root}/lm --max-tokens 3",
    ):
        code = svqvae(*command.split())
        if code:
            raise RuntimeError(f"`{command}` ended with exit code {code}")
    models = {"model": "other_model"}
    generators = {"llamagen": "other_llamagen", "lm": "other_lm", "adapter": "other_adapter", "scales": "other_scales"}
    out = "--output {root}/out"
    encode = f"encode {{root}}/photos {out} {model}"
    decode_set = f"decode {{root}}/set {out} {model}"
    draw = f"generate --model {{root}}/llamagen {out} --class 1"
    draw_scales = f"generate --model {{root}}/scales {out} --class 1"
    draw_by_lm = f"generate --model {{root}}/lm {out} --prompt red --grid 2x2"
    caption = f"caption {{root}}/photos {out} --model {{root}}/lm --max-tokens 3"
    evaluate = f"evaluate {{root}}/photos {model} {out} --scales 1 --codecs jpeg --device cpu"
    convert = f"convert {{root}}/checkpoints/svqvae.safetensors {out} --license mit"
    convert_scales = "convert {root}/checkpoints/flexvar_transformer.pth --tokenizer {root}/scales_tokenizer"
    convert_ids = "convert {root}/checkpoints/llamagen_gpt.pt --tokenizer {root}/ids_tokenizer"
    resume = f"tokenize {{root}}/three {model} --output {{root}}/started --workers 0 --num-parts 3"
    return [
        Command(evaluate, (*WEIGHTS_AND_CONFIG, "photos"), {}),  # a model without a context model is whole
        Command(f"export {{root}}/model {out}", WEIGHTS_AND_CONFIG, {}),
        Command(convert, ("checkpoints/svqvae.safetensors",), {}),
        Command(
            f"{convert_scales} {out} --license mit --image-size 16",
            ("checkpoints/flexvar_transformer.pth", "scales_tokenizer"),
            {},
        ),
        Command(
            f"{convert_ids} {out} --license mit --image-size 16 --num-heads 4",
            ("checkpoints/llamagen_gpt.pt", "ids_tokenizer"),
            {},
        ),
        Command("info {root}/model", ("model",), {}),
        Command("info {root}/llamagen", ("llamagen",), {}),
        Command("info {root}/scales", ("scales",), {}),
        Command("info {root}/lm", ("lm",), {}),
        Command("info {root}/adapter", ("adapter",), {}),
        Command("info {root}/checkpoints/svqvae.safetensors", ("checkpoints/svqvae.safetensors",), {}),
        Command("info {root}/started", ("started",), {}),
        Command(resume, ("started", "three", "model"), models, output="started"),
        Command(f"encode {{root}}/photos --output {{root}}/encoded {model}", ("encoded",), {}, output="encoded"),
        Command(f"decode {{root}}/set --output {{root}}/decoded {model}", ("decoded",), {}, output="decoded"),
        Command(caption.replace("/out", "/captioned"), ("captioned",), {}, output="captioned"),
        Command(encode, ("model",), {}),
        Command(encode, ("model",), models, is_repeated=True),
        Command(f"{encode} --compress", ("model",), models, is_repeated=True),
        Command(f"reconstruct {{root}}/photos {out} {model}", ("model",), models, is_repeated=True),
        Command(f"decode {{root}}/tokens {out} {model}", ("model",), models),
        Command(f"decode {{root}}/tokens {out} {model}", ("tokens/a.safetensors",), {}),
        Command(f"decode {{root}}/compressed {out} {model}", ("model", "compressed/a.svqz"), models),
        Command(decode_set, ("set",), {}),
        Command(decode_set, ("set", "model"), models, is_repeated=True),
        Command("info {root}/set", ("set",), {}),
        Command("info {root}/tokens/a.safetensors", ("tokens/a.safetensors",), {}),
        Command("info {root}/compressed/a.svqz", ("compressed/a.svqz",), {}),
        Command(draw, ("llamagen",), {}),
        Command(draw, ("llamagen",), generators, is_repeated=True),
        Command(draw_scales, ("scales",), {}),
        Command(draw_scales, ("scales",), generators, is_repeated=True),
        Command(draw_by_lm, ("lm",), {}),
        Command(draw_by_lm, ("lm",), generators, is_repeated=True),
        Command(f"{draw_by_lm} --adapter {{root}}/adapter", ("adapter",), {}),
        Command(f"{draw_by_lm} --adapter {{root}}/adapter", ("adapter",), generators, is_repeated=True),
        Command(caption, ("lm",), {}),
        Command(caption, ("lm",), generators, is_repeated=True),
        Command(f"extend-lm {{root}}/plain_lm --vqvae {{root}}/model {out}", PLAIN_LM + ("model",), {}),
    ]


def _save_models(root: Path) -> None:
    """Each model has another one of the same kind."""
    for name, seed in (("model", 0), ("other_model", 1)):
        vqvae = _seeded(make_tiny(sample_size=16), seed)
        vqvae.save_pretrained(root / name)
        make_context_model(vqvae.codebook_fingerprint()).save_pretrained(root / name)
    for name, seed in (("llamagen", 0), ("other_llamagen", 1)):
        pipeline = make_autoregressive(class_names=["a", "b", "c"])
        _seeded(pipeline.language_model, seed)
        pipeline.save_pretrained(root / name)
    for name, seed in (("scales", 0), ("other_scales", 1)):
        pipeline = make_next_scale()
        _seeded(pipeline.transformer, seed)
        pipeline.save_pretrained(root / name)
    shutil.copytree(extended("qwen"), root / "lm")
    shutil.copytree(extended("llama"), root / "other_lm")
    save_language_model(root / "plain_lm", "qwen")
    for name, seed in (("adapter", 0), ("other_adapter", 1)):
        language_model, _ = make_language_model("qwen")
        adapted = get_peft_model(language_model, LoraConfig(r=2, target_modules=["q_proj"]))
        _seeded(adapted, seed)
        adapted.save_pretrained(root / name)


def _seeded(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Changes the weights a little, by chance, for other seeds than 0."""
    generator = torch.Generator().manual_seed(seed)
    if seed:
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def _save_images(root: Path) -> None:
    (root / "photos").mkdir()
    (root / "three").mkdir()
    with Image.open(ROOT / "docs" / "images" / "chelsea.png") as photo:
        clip = photo.convert("RGB").crop(CLIP)
    clip.save(root / "photos" / "a.png")
    for number in range(3):
        clip.rotate(90 * number).save(root / "three" / f"{number}.png")


def _save_checkpoints(root: Path) -> None:
    """Original checkpoints, and tokenizers that fit the generators among them."""
    (root / "checkpoints").mkdir()
    for name, golden in CHECKPOINTS.items():
        shutil.copy(ROOT / "tests" / "golden" / golden, root / "checkpoints" / name)
    make_tiny(codebook_size=256).save_pretrained(root / "ids_tokenizer")
    vqvae = make_tiny(codebook_size=160, codebook_embed_dim=32, sample_size=16)
    outputs = load_file(ROOT / "tests" / "golden" / "flexvar_transformer_tiny.outputs.safetensors")
    vqvae.quantize.embedding.weight.data = outputs["codebook"].clone()
    vqvae.save_pretrained(root / "scales_tokenizer")
