"""Tensors on a wrong device, found without a GPU."""

import os

import pytest
import torch
import train
from conftest import Lazy, make_tiny
from generators import make_autoregressive, make_next_scale
from PIL import Image
from processes import start
from tiny_language_models import extended
from trainer.test_train import EVERYTHING

from svqvae_hf.data.image_sets import open_images
from svqvae_hf.evaluation.perceptual import LPIPS
from svqvae_hf.language.image_language_model import ImageLanguageModel
from svqvae_hf.models import tiling
from svqvae_hf.models.tiling import Tiles
from svqvae_hf.token_sets.writer import tokenize_set
from svqvae_hf.tokens.image_tokens import decode_image, encode_image
from svqvae_hf.trainer import checkpoints
from svqvae_hf.trainer.losses import objective
from svqvae_hf.trainer.publishing import Result
from svqvae_hf.trainer.run import run_training
from svqvae_hf.trainer.train_options import TrainOptions

standin = Lazy("standin_device")  # imported in a process of its own, because it changes torch


@pytest.mark.slow
def test_models_generators_and_training_keep_to_their_device(photo, tmp_path):
    (tmp_path / "photos").mkdir()
    photo.crop((100, 100, 175, 143)).save(tmp_path / "photos" / "photo.png")
    process = start(work, tmp_path, extended("llama"))
    process.join()
    assert not process.exitcode


def work(folder, language_model):
    tiling.CONTEXT_WINDOWS = 2
    photo, device = Image.open(folder / "photos" / "photo.png"), standin.DEVICE
    sample = torch.rand(2, 3, *photo.size, device=device)
    assert (sample + torch.ones(())).device == device
    with pytest.raises(RuntimeError, match="two devices"):
        sample + torch.zeros(photo.size)
    use_tokenizer(make_tiny().to(device), sample, photo)
    generate(device, photo)
    model = ImageLanguageModel.from_pretrained(language_model).to(device)
    (image,) = model.draw(["a cat"], (2, 3), guidance_scale=2.0)
    model.draw(None, (2, 3), image=[image], mask_image=[Image.new("L", image.size, 255)])
    model.caption([photo], max_new_tokens=2)
    train_model(folder, device)
    tokenize_set(make_tiny().to(device), open_images([f"{folder}/photos"]), folder / "tokens", model_name="model")


def use_tokenizer(model, sample, photo):
    for tiles in (None, Tiles(32, 4)):
        for ids in model.encode_tokens(sample, [1, 0.5, 2], "image", tiles):
            assert ids.device == model.decode_tokens(ids).device == sample.device
        decode_image(model, encode_image(model, photo, [1, 0.5], "latents", tiles), tiles)
    quantized = model.quantize(model.encode(sample).latents)[0]
    assert model.decode(quantized, force_not_quantize=True).sample.device == sample.device
    model.train()(sample, [1, 0.5], tile_size=32).sample[0].mean().backward()
    assert model.encoder.conv_in.weight.grad.device == sample.device


def generate(device, photo):
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    for pipeline in (make_autoregressive().to(device), make_next_scale().to(device)):
        pipeline([0, 2], guidance_scale=2.0, generator=generators)
    pipeline([0, 2], image=photo.resize((16, 16)), mask_image=Image.new("L", (16, 16), 255), generator=generators)


def train_model(folder, device):
    make_tiny(entropy_loss_ratio=0.1).save_pretrained(folder / "model")
    objective.load_lpips = lambda net, _: LPIPS(net)
    checkpoints.save_checkpoint = Result.publish = lambda *_: (
        None
    )  # safetensors reads memory by its address, which it has not
    os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
    files = {"model_config_name_or_path": f"{folder}/model/config.json", "train_data_dir": f"{folder}/photos"}
    options = EVERYTHING | files | {"output_dir": f"{folder}/trained", "max_steps": 4, "adversarial_start": 2}
    run_training(train.train, TrainOptions(**options))
