"""The page of `svqvae demo --generator`, by its handlers."""

import numpy as np
import pytest
import torch
from conftest import Lazy, make_tiny
from next_scale_golden import make_transformer
from PIL import Image
from tiny_language_models import load_extended
from transformers import LlamaConfig, LlamaForCausalLM

from svqvae_hf import SVQVAEAutoregressivePipeline, SVQVAENextScalePipeline
from svqvae_hf.language.image_language_model import ImageLanguageModel
from svqvae_hf.pipelines.sequences import SequenceLayout

demo = Lazy("svqvae_hf.demo.generator_page")
SETTINGS = {"label": 1, "prompt": "", "seed": 7, "guidance": 2.0}


@pytest.fixture
def next_scale():
    names = ["cat", "dog", "fox"]
    return SVQVAENextScalePipeline(make_tiny(), make_transformer(), schedule=[1, 2, 3, 4], class_names=names)


@pytest.fixture
def autoregressive():
    layout = SequenceLayout(64, 4, 16, 24, (0.5, 1.0), 3)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=layout.vocab_size,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=layout.length,
        initializer_range=0.5,
    )
    model = LlamaForCausalLM(config).eval()
    return SVQVAEAutoregressivePipeline(make_tiny(), model, num_classes=3, height=16, width=24, scales=(0.5, 1.0))


def sample(pipeline, **arguments):
    """Image of the pipeline, and the ids after each step."""
    steps = []
    options = {"class_labels": 1, "guidance_scale": 2.0, "top_p": demo.TOP_P} | arguments
    generator = torch.Generator().manual_seed(7)
    note = lambda *call: steps.append(call[-1]["ids"])  # noqa: E731
    return pipeline(**options, generator=generator, callback_on_step_end=note).images[0], steps


def pictures(values):
    return [np.asarray(value[1]["value"]) for value in values]


def test_image_grows_scale_by_scale_to_the_image_of_the_pipeline(next_scale):
    values = list(demo.GeneratorPage(next_scale).generate(**SETTINGS))
    image, ids = sample(next_scale)
    assert [value[0] for value in values[:4]] == [
        f"<p>Step {side} of 4: {side} × {side} tokens</p>" for side in (1, 2, 3, 4)
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


def test_image_grows_row_by_row_to_the_image_of_the_pipeline(autoregressive):
    values = list(demo.GeneratorPage(autoregressive).generate(**SETTINGS))
    image, _ = sample(autoregressive)
    titles = [value[0] for value in values]
    assert "Row 1 of 6: 3 × 2 tokens" in titles[0]
    assert "Row 5 of 6: 6 × 4 tokens" in titles[4]
    assert (pictures(values)[4][12:] == demo.PAPER).all()  # the last of four rows is still to come
    assert (pictures(values)[4][:12] != demo.PAPER).any(-1).mean() > 0.9
    np.testing.assert_array_equal(pictures(values)[-1], image)


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
