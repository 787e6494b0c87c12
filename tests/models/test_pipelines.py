"""SVQVAE as the tokenizer of diffusers' pipelines; their other parts are small and random."""

import numpy as np
import pytest
import torch
from conftest import make_tiny
from diffusers import DiffusionPipeline, DiTPipeline, KandinskyV22InpaintPipeline, KandinskyV22Pipeline
from PIL import Image
from pipeline_parts import SIDE, F, make_pipeline

KANDINSKY = [KandinskyV22Pipeline, KandinskyV22InpaintPipeline]
PIPELINES = [DiTPipeline, *KANDINSKY]

HEIGHT, WIDTH = 64, 48
KEPT = WIDTH // 2  # the masks repaint the columns from here on

pytestmark = pytest.mark.usefixtures("no_grad", "few_windows")


def make_call(cls, image):
    call = {"num_inference_steps": 3, "output_type": "np"}
    if cls is DiTPipeline:
        return call | {"class_labels": [3], "guidance_scale": 2.0}
    embeds = {"image_embeds": torch.linspace(-1, 1, 8)[None], "negative_image_embeds": torch.zeros(1, 8)}
    call |= embeds | {"height": HEIGHT, "width": WIDTH}
    if cls is KandinskyV22InpaintPipeline:
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        mask[:, KEPT:] = 255
        call |= {"image": image, "mask_image": Image.fromarray(mask)}
    return call


def run(pipeline, call, **changes):
    return pipeline(**(call | changes), generator=torch.Generator().manual_seed(0)).images


def switch_tiling(model, tiling):
    """Switches tiling on if asked for; the list given gets an entry for each tile."""
    tiles = []
    if tiling:
        model.enable_tiling(16, 4)
        decode = model.decode_window
        model.decode_window = lambda window, shared=None: tiles.append(1) or decode(window, shared)
    return tiles


def to_numpy(sample):
    return sample.permute(0, 2, 3, 1).numpy()


@pytest.fixture
def image(photo):
    return photo.resize((WIDTH, HEIGHT))


@pytest.mark.parametrize("cls", PIPELINES)
def test_pipeline_gives_images(cls, image):
    pipeline, call = make_pipeline(cls), make_call(cls, image)
    height, width = (SIDE, SIDE) if cls is DiTPipeline else (HEIGHT, WIDTH)
    images = run(pipeline, call)
    assert images.shape == (1, height, width, 3)
    assert images.min() >= 0
    assert images.max() <= 1
    assert images.std() > 0.1
    (picture,) = run(pipeline, call, output_type="pil")
    assert np.array_equal(np.array(picture), (images[0] * 255).round())


# The pipelines work on latents, in [-1, 1]; `make_tiny()` has the same weights, in [0, 1]


@pytest.mark.slow
@pytest.mark.parametrize("tiling", [False, True])
def test_dit_quantises_and_decodes_with_our_model(tiling, monkeypatch):
    pipeline = make_pipeline(DiTPipeline)
    model = make_tiny()
    tiles_of_pipeline = switch_tiling(pipeline.vae, tiling)
    tiles_of_model = switch_tiling(model, tiling)
    decode = pipeline.vae.decode
    decoded_latents = []

    def record(latents):  # the pipeline has no way to ask for its latents
        decoded_latents.append(latents)
        return decode(latents)

    monkeypatch.setattr(pipeline.vae, "decode", record)
    images = run(pipeline, make_call(DiTPipeline, None))
    (latents,) = decoded_latents
    expected = model.decode_tokens(model.quantize.nearest_ids(latents))
    np.testing.assert_allclose(images, to_numpy(expected), atol=1e-4)
    assert bool(tiles_of_pipeline) == tiling
    assert bool(tiles_of_model) == tiling


@pytest.mark.slow
@pytest.mark.parametrize("tiling", [False, True])
@pytest.mark.parametrize("cls", KANDINSKY)
def test_kandinsky_decodes_its_latents_with_our_model(cls, tiling, image):
    pipeline, call, by_hand = make_pipeline(cls), make_call(cls, image), make_tiny()
    tiles = [switch_tiling(model, tiling) for model in (pipeline.movq, by_hand)]
    latents = run(pipeline, call, output_type="latent")
    assert latents.shape == (1, 8, HEIGHT // F, WIDTH // F)
    expected = by_hand.decode(latents, force_not_quantize=True).sample
    np.testing.assert_allclose(run(pipeline, call), to_numpy(expected.clamp(0, 1)), atol=1e-5)
    assert not torch.allclose(expected, by_hand.decode(latents).sample, atol=0.1)  # quantised
    assert [bool(each) for each in tiles] == [tiling, tiling]


# Saved pipelines


@pytest.mark.parametrize("cls", [DiTPipeline, KandinskyV22Pipeline])
def test_saved_pipelines_load(cls, image, tmp_path):
    """Other tests load pipelines by their Hub ids and in new processes."""
    pipeline, call = make_pipeline(cls), make_call(cls, image)
    pipeline.save_pretrained(tmp_path)
    np.testing.assert_allclose(run(DiffusionPipeline.from_pretrained(tmp_path), call), run(pipeline, call), atol=1e-5)
