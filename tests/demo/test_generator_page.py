"""The page of `svqvae demo --generator`, by its handlers."""

import numpy as np
import pytest
import torch
from conftest import Lazy, make_tiny
from generators import make_autoregressive
from next_scale_golden import make_transformer
from PIL import Image
from tiny_language_models import load_extended

from svqvae_hf import SVQVAENextScalePipeline
from svqvae_hf.language.image_language_model import ImageLanguageModel

demo = Lazy("svqvae_hf.demo.generator_page")
SETTINGS = {"label": 1, "prompt": "", "seed": 7, "guidance": 2.0}


@pytest.fixture
def next_scale():
    names = ["cat", "dog", "fox"]
    return SVQVAENextScalePipeline(make_tiny(), make_transformer(), schedule=[1, 2, 3, 4], class_names=names)


def sample(pipeline, **arguments):
    """Image of the pipeline, and the ids after each step."""
    steps = []
    options = {"class_labels": 1, "guidance_scale": 2.0, "top_p": demo.TOP_P} | arguments
    generator = torch.Generator().manual_seed(7)

    def note(*call):
        steps.append(call[-1]["ids"])

    return pipeline(**options, generator=generator, callback_on_step_end=note).images[0], steps


def pictures(values):
    return [np.asarray(value[1]["value"]) for value in values]


def test_image_grows_scale_by_scale_to_the_image_of_the_pipeline(next_scale):
    values = list(demo.GeneratorPage(next_scale).generate(**SETTINGS))
    image, ids = sample(next_scale)
    assert [value[0] for value in values[:4]] == [
        f"<p>Step {side} of 4: {side} × {side} tokens. class dog, seed 7</p>" for side in (1, 2, 3, 4)
    ]
    for shown, grid in zip(pictures(values), ids, strict=False):
        (decoded,) = next_scale.image_processor.postprocess(next_scale.vqvae.decode_tokens(grid))
        np.testing.assert_array_equal(shown, decoded.resize((16, 16), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(pictures(values)[-1], image)
    summary, _, kept, painting, drawing = values[-1]
    assert "16 × 16 pixels" in summary
    np.testing.assert_array_equal(kept, image)
    assert painting.visible
    assert drawing["background"].size == (demo.EDITOR_PX, demo.EDITOR_PX)


def test_image_grows_row_by_row_to_the_image_of_the_pipeline():
    pipeline = make_autoregressive(class_names=["cat", "<dog>", "fox"])
    values = list(demo.GeneratorPage(pipeline).generate(**SETTINGS))
    image, _ = sample(pipeline)
    titles = [value[0] for value in values]
    assert titles[0] == "<p>Row 1 of 4: 4 × 4 tokens. class &lt;dog&gt;, seed 7</p>"
    assert titles[-1] == "<p><b>16 × 16 pixels</b> in 4 rows. class &lt;dog&gt;, seed 7</p>"
    assert (pictures(values)[2][12:] == demo.PAPER).all()  # the last of four rows is still to come
    assert (pictures(values)[2][:12] != demo.PAPER).any(-1).mean() > 0.9
    np.testing.assert_array_equal(pictures(values)[-1], image)


def test_visitors_at_the_same_time_get_what_they_would_get_alone():
    page = demo.GeneratorPage(ImageLanguageModel(*load_extended()))
    settings = [SETTINGS | {"prompt": prompt, "seed": seed} for seed, prompt in enumerate(["a cat", "a red key"])]
    alone = [pictures(page.generate(**each)) for each in settings]
    first, second = (page.generate(**each) for each in settings)
    together = list(zip(*zip(first, second, strict=True), strict=True))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, pictures(other))


def drawn(box):
    layer = Image.new("RGBA", (demo.EDITOR_PX,) * 2)
    layer.paste((255, 0, 0, 255), box)
    return {"background": None, "layers": [layer], "composite": None}


def test_painted_part_is_generated_anew(next_scale):
    page, picture = demo.GeneratorPage(next_scale), sample(next_scale, class_labels=0)[0]
    half = demo.EDITOR_PX // 2
    values = list(page.repaint(picture, drawn((0, 0, half, demo.EDITOR_PX)), *SETTINGS.values()))
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 8, 16))
    image, ids = sample(next_scale, image=picture, mask_image=mask)
    np.testing.assert_array_equal(pictures(values)[-1], image)
    (known,) = sample(next_scale, image=picture, mask_image=Image.new("L", (16, 16)))[1][-1]
    assert torch.equal(ids[-1][0, :, 2:], known[:, 2:])
    assert not torch.equal(ids[-1][0, :, :2], known[:, :2])


def test_a_language_model_draws_edits_and_describes():
    model = ImageLanguageModel(*load_extended())
    page, settings = demo.GeneratorPage(model), SETTINGS | {"prompt": "a cat"}
    assert page.classes == [("no class", demo.NO_CLASS)]
    values = list(page.generate(**settings))
    (image,) = model.draw(["a cat"], generator=torch.Generator().manual_seed(7), guidance_scale=2.0)
    np.testing.assert_array_equal(pictures(values)[-1], image)
    edited = list(page.repaint(image, drawn((0, 0, demo.EDITOR_PX, demo.EDITOR_PX // 2)), *settings.values()))
    lower = image.height // 2
    np.testing.assert_array_equal(pictures(edited)[-1].shape, np.asarray(image).shape)
    assert not np.array_equal(pictures(edited)[-1][:lower], np.asarray(image)[:lower])
    assert [page.describe(image)] == model.caption([image])
    assert page.describe(None) == ""


def test_mistakes_are_shown_in_the_page(next_scale):
    page = demo.GeneratorPage(next_scale)
    picture = Image.new("RGB", (16, 16))
    for drawing in (None, {"layers": []}, drawn((0, 0, 0, 0))):
        (values,) = page.repaint(picture, drawing, *SETTINGS.values())
        assert "Nothing is painted yet" in values[0]
        assert values[1] == demo.gr.skip()  # the picture stays
    (values,) = page.generate(**(SETTINGS | {"guidance": 1e9}))
    assert "role='alert'>`guidance_scale` must be in" in values[0]
    assert not values[1].visible
