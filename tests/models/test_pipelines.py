"""SVQVAE as the tokenizer of diffusers' pipelines; their other parts are small and random."""

import numpy as np
import pytest
import torch
from conftest import make_tiny
from diffusers import (
    AmusedImg2ImgPipeline,
    AmusedInpaintPipeline,
    AmusedPipeline,
    DiffusionPipeline,
    KandinskyV22InpaintPipeline,
    KandinskyV22Pipeline,
    LDMPipeline,
)
from PIL import Image
from pipeline_parts import AMUSED, SIDE, F, make_pipeline

KANDINSKY = [KandinskyV22Pipeline, KandinskyV22InpaintPipeline]
PIPELINES = [*AMUSED, LDMPipeline, *KANDINSKY]
IMAGE_INPUT = (AmusedImg2ImgPipeline, AmusedInpaintPipeline, KandinskyV22InpaintPipeline)
MASK_INPUT = (AmusedInpaintPipeline, KandinskyV22InpaintPipeline)

HEIGHT, WIDTH = 64, 48
KEPT = WIDTH // 2  # the masks repaint the columns from here on

pytestmark = pytest.mark.usefixtures("no_grad", "few_windows")


def make_call(cls, image):
    call = {"num_inference_steps": 3, "output_type": "np"}
    if cls in AMUSED:
        call |= {"prompt": "a cat"}
    if cls in KANDINSKY:
        call |= {"image_embeds": torch.linspace(-1, 1, 8)[None], "negative_image_embeds": torch.zeros(1, 8)}
    if cls in (AmusedPipeline, *KANDINSKY):
        call |= {"height": HEIGHT, "width": WIDTH}
    if cls in IMAGE_INPUT:
        call |= {"image": image}
    if cls in MASK_INPUT:
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        mask[:, KEPT:] = 255
        call |= {"mask_image": Image.fromarray(mask)}
    return call


def run(pipeline, call, **changes):
    return pipeline(**(call | changes), generator=torch.Generator().manual_seed(0)).images


def switch_tiling(model, tiling):
    """Switches tiling on if asked for; the list given gets an entry for each tile."""
    tiles = []
    if tiling:
        model.enable_tiling(16, 4, on_tile=lambda done, total: tiles.append(done))
    return tiles


def to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


def to_numpy(sample):
    return sample.permute(0, 2, 3, 1).numpy()


@pytest.fixture
def image(photo):
    return photo.resize((WIDTH, HEIGHT))


@pytest.mark.parametrize("cls", PIPELINES)
def test_pipeline_gives_images(cls, image):
    pipeline, call = make_pipeline(cls), make_call(cls, image)
    height, width = (SIDE, SIDE) if cls is LDMPipeline else (HEIGHT, WIDTH)
    images = run(pipeline, call)
    assert images.shape == (1, height, width, 3)
    assert images.min() >= 0
    assert images.max() <= 1
    assert images.std() > 0.1
    (picture,) = run(pipeline, call, output_type="pil")
    assert np.array_equal(np.array(picture), (images[0] * 255).round())


# aMUSEd: the pipelines work on ids, in [0, 1]


@pytest.mark.slow
@pytest.mark.parametrize("tiling", [False, True])
@pytest.mark.parametrize("cls", AMUSED)
def test_amused_decodes_its_ids_with_our_model(cls, tiling, image):
    pipeline, call = make_pipeline(cls), make_call(cls, image)
    tiles = switch_tiling(pipeline.vqvae, tiling)
    ids = run(pipeline, call, output_type="latent")
    assert ids.shape == (1, HEIGHT // F, WIDTH // F)
    torch.testing.assert_close(run(pipeline, call, output_type="pt"), pipeline.vqvae.decode_tokens(ids))
    assert bool(tiles) == tiling


def test_amused_inpaint_keeps_our_ids_where_the_mask_is_black(image):
    pipeline, call = make_pipeline(AmusedInpaintPipeline), make_call(AmusedInpaintPipeline, image)
    ids = pipeline.vqvae.encode_tokens(to_tensor(image))
    made = run(pipeline, call, output_type="latent")
    kept = KEPT // F
    assert torch.equal(made[..., :kept], ids[..., :kept])
    assert (made[..., kept:] == ids[..., kept:]).float().mean() < 0.5
    assert made.max() < 64


def test_amused_upcasts_a_half_precision_model(image):
    call = make_call(AmusedInpaintPipeline, image)
    pipeline = make_pipeline(AmusedInpaintPipeline, force_upcast=True)
    pipeline.vqvae.half().float()
    in_float32 = run(pipeline, call)
    pipeline.vqvae.half()
    assert np.array_equal(run(pipeline, call), in_float32)
    assert pipeline.vqvae.dtype == torch.float16


# LDM and Kandinsky 2.2: the pipelines work on latents, in [-1, 1]; `make_tiny()` has the same weights, in [0, 1]


@pytest.mark.slow
@pytest.mark.parametrize("tiling", [False, True])
def test_ldm_quantises_and_decodes_with_our_model(tiling):
    pipeline, by_hand = make_pipeline(LDMPipeline), make_tiny()
    tiles = [switch_tiling(model, tiling) for model in (pipeline.vqvae, by_hand)]
    latents = []  # the pipeline has no way to ask for them
    pipeline.vqvae.quantize.register_forward_pre_hook(lambda module, inputs: latents.extend(inputs))
    images = run(pipeline, make_call(LDMPipeline, None))
    expected = by_hand.decode_tokens(by_hand.quantize.nearest_ids(*latents))
    np.testing.assert_allclose(images, to_numpy(expected), atol=1e-4)
    assert [bool(each) for each in tiles] == [tiling, tiling]


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


@pytest.mark.parametrize("cls", [AmusedPipeline, LDMPipeline, KandinskyV22Pipeline])
def test_saved_pipelines_load(cls, image, tmp_path):
    """Other tests load pipelines by their Hub ids and in new processes."""
    pipeline, call = make_pipeline(cls), make_call(cls, image)
    pipeline.save_pretrained(tmp_path)
    np.testing.assert_allclose(run(DiffusionPipeline.from_pretrained(tmp_path), call), run(pipeline, call), atol=1e-5)
