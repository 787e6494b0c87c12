"""The page of `svqvae demo --generator`, by its handlers."""

from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import Lazy, make_tiny
from generators import make_autoregressive
from make_scenes import GROUNDS, OBJECTS
from next_scale_golden import make_transformer
from PIL import Image
from tiny_language_models import load_extended

from svqvae_hf import DEFAULT_GENERATOR, SVQVAENextScalePipeline
from svqvae_hf.language.image_language_model import ImageLanguageModel
from svqvae_hf.pipelines.known_objects import KnownObjects
from svqvae_hf.pipelines.known_objects_file import read_known_objects

demo = Lazy("svqvae_hf.demo.generator_page")
generators = Lazy("svqvae_hf.demo.page_generators")
SETTINGS = {"label": 1, "prompt": "", "seed": 7, "guidance": 2.0, "temperature": 1.0}


@pytest.fixture
def next_scale():
    names = ["cat", "dog", "fox"]
    return SVQVAENextScalePipeline(make_tiny(), make_transformer(), schedule=[1, 2, 3, 4], class_names=names)


def sample(pipeline, **arguments):
    """Image of the pipeline, and the ids after each step."""
    steps = []
    options = {"class_labels": 1, "guidance_scale": 2.0, "top_p": generators.TOP_P} | arguments
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
    first_settings = SETTINGS | {"prompt": "a cat", "seed": 0}
    second_settings = SETTINGS | {"prompt": "a red key", "seed": 1}
    first_alone = pictures(page.generate(**first_settings))
    second_alone = pictures(page.generate(**second_settings))
    first_updates = []
    second_updates = []
    visits = zip(page.generate(**first_settings), page.generate(**second_settings), strict=True)
    for first_update, second_update in visits:  # the page draws for both in turns
        first_updates.append(first_update)
        second_updates.append(second_update)
    np.testing.assert_array_equal(pictures(first_updates), first_alone)
    np.testing.assert_array_equal(pictures(second_updates), second_alone)


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
    assert page.classes == [("no class", generators.NO_CLASS)]
    values = list(page.generate(**settings))
    (image,) = model.draw(["a cat"], generator=torch.Generator().manual_seed(7), guidance_scale=2.0)
    np.testing.assert_array_equal(pictures(values)[-1], image)
    edited = list(page.repaint(image, drawn((0, 0, demo.EDITOR_PX, demo.EDITOR_PX // 2)), *settings.values()))
    lower = image.height // 2
    np.testing.assert_array_equal(pictures(edited)[-1].shape, np.asarray(image).shape)
    assert not np.array_equal(pictures(edited)[-1][:lower], np.asarray(image)[:lower])
    assert [page.describe(image)] == model.caption([image])
    assert page.describe(None) == ""


def test_a_program_gets_the_picture_or_an_error(next_scale):
    page = demo.GeneratorPage(next_scale)
    image, _ = sample(next_scale)
    drawn_image, notes = page.draw(**SETTINGS)
    np.testing.assert_array_equal(drawn_image, image)
    assert notes == ""
    with pytest.raises(Exception, match="The seed must be"):
        page.draw(**(SETTINGS | {"seed": -1}))


def test_a_program_gets_the_notes_on_its_prompt(monkeypatch):
    known_objects = KnownObjects(names=frozenset(["a", "cat", "on", "pink"]), things=frozenset(["violin"]))
    model = ImageLanguageModel(*load_extended(), known_objects)
    monkeypatch.setattr(model, "rewrite", lambda prompts: ["a cat on pink"])
    with pytest.warns(UserWarning, match="cannot draw: violin"):
        _, notes = demo.GeneratorPage(model).draw(**(SETTINGS | {"prompt": "a violin on pink"}))
    assert notes == "drawn as 'a cat on pink', the model cannot draw: violin"


def test_the_page_says_what_to_do_first(next_scale):
    assert demo.GeneratorPage(next_scale).invitation == "Choose a class, and click Generate."
    drawing = ImageLanguageModel(*load_extended())
    assert demo.GeneratorPage(drawing).invitation == "Type what to draw, and click Generate."
    assert demo.GeneratorPage(drawing, Mock()).invitation.startswith("Press an example")


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


@pytest.mark.parametrize("seed", [1e20, -1, float("nan")])
def test_a_seed_out_of_range_is_an_error_in_the_page(next_scale, seed):
    (values,) = demo.GeneratorPage(next_scale).generate(**(SETTINGS | {"seed": seed}))
    assert f"role='alert'>The seed must be a whole number from 0 to 4294967295, got {seed:g}." in values[0]


def test_no_seed_is_0(next_scale):
    page = demo.GeneratorPage(next_scale)
    without, with_0 = (list(page.generate(**(SETTINGS | {"seed": seed}))) for seed in (None, 0))
    np.testing.assert_array_equal(pictures(without)[-1], pictures(with_0)[-1])
    assert "seed 0" in without[-1][0]


def test_one_dot_of_paint_counts(next_scale):
    mask = demo.painted_mask(drawn((100, 200, 101, 201)), (16, 16))
    assert np.argwhere(np.asarray(mask)).tolist() == [[200 * 16 // demo.EDITOR_PX, 100 * 16 // demo.EDITOR_PX]]


def test_temperature_is_in_the_open(monkeypatch):
    model = ImageLanguageModel(*load_extended())
    page = demo.GeneratorPage(model)
    assert page.generator.seed_note == "Another number makes another picture"
    config = model.language_model.generation_config
    monkeypatch.setattr(config, "generation_kwargs", {"temperature": 0.1}, raising=False)
    page = demo.GeneratorPage(model)
    assert page.generator.temperature == 0.1
    assert page.generator.seed_note == "At a temperature of 0.1, many numbers make the same picture"
    settings = SETTINGS | {"prompt": "a cat"}
    warm, cold = (pictures(page.generate(**(settings | {"temperature": value})))[-1] for value in (1.0, 0.0))
    assert not np.array_equal(warm, cold)
    (expected,) = model.draw(["a cat"], temperature=0.0, guidance_scale=2.0)
    np.testing.assert_array_equal(cold, expected)


def test_hints_of_the_bundled_model_are_true():
    """They name what the training pictures show, and the model can draw each thing of the examples."""
    hints = Lazy("svqvae_hf.demo.hints").SCENES
    assert hints.objects == tuple(OBJECTS)
    assert hints.backgrounds == tuple(GROUNDS)
    known_objects = read_known_objects(DEFAULT_GENERATOR)
    for example in hints.examples:
        assert known_objects.unknown(example) == []
