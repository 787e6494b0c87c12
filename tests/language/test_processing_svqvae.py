import json
import shutil
from base64 import b64encode

import numpy as np
import pytest
import torch
from conftest import make_tiny
from PIL import Image
from tiny_language_models import FAMILIES, extended, load_extended
from tokenizers.processors import TemplateProcessing
from transformers import AutoProcessor, AutoTokenizer

from svqvae_hf import SVQVAEProcessor

SIZES = {(16, 16): (4, 4), (8, 8): (4, 4), (24, 16): (2, 3), (40, 10): (2, 3), (10, 40): (4, 4)}  # pixels to a grid


def noise(width=16, height=16, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def image_part(**size):
    return {"type": "image", "image": noise(**size)}


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_and_images_come_back_in_order(family):
    _, processor = load_extended(family)
    images = [noise(seed=1), noise(24, 16, seed=2)]
    inputs = processor(text="<|image|> left of a <|image|>red key", images=images, return_tensors="pt")
    first, text, second, last = processor.post_process_multimodal_output(inputs.input_ids, generation_mode="mixed")[0]
    assert (text, last) == (" left of a ", "red key")
    expected = processor.decode_images(processor.encode_images(images))
    assert [np.array(image).tolist() for image in (first, second)] == [np.array(image).tolist() for image in expected]
    assert [image.size for image in expected] == [(16, 16), (12, 8)]


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_chat_template_round_trip(family, count):
    _, processor = load_extended(family)
    asked_images = [image_part(seed=seed) for seed in range(count)]
    answered_images = [image_part(width=24, seed=seed) for seed in range(count)]
    question = [*asked_images, {"type": "text", "text": "a cat"}]
    answer = [{"type": "text", "text": "a key"}, *answered_images]
    conversation = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    text = processor.apply_chat_template(conversation)
    plain = [{"role": "user", "content": "a cat"}, {"role": "assistant", "content": "a key"}]
    assert text.replace("<|image|>", "") == processor.apply_chat_template(plain)
    tokens = processor.apply_chat_template(conversation, tokenize=True, return_dict=True)["input_ids"]
    (parts,) = processor.post_process_multimodal_output(tokens, generation_mode="mixed")
    expected_grids = processor.encode_images([part["image"] for part in asked_images + answered_images])
    grids = processor.vocabulary.split(torch.tensor(tokens[0]))[1::2]
    assert [grid.tolist() for grid in grids] == [grid.tolist() for grid in expected_grids]
    texts = [part for part in parts if isinstance(part, str)]
    assert "".join(texts).count("a cat") == 1


def test_a_template_of_the_language_model_is_kept():
    _, processor = load_extended("qwen")
    original = AutoTokenizer.from_pretrained(extended("qwen").parent / "original")
    plain = [{"role": "user", "content": "a cat"}]
    text = original.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    assert processor.apply_chat_template(plain, add_generation_prompt=True) == text
    assert processor.tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True) == text


@pytest.mark.parametrize("size", SIZES)
def test_the_default_grid_has_the_closest_aspect_ratio(size):
    _, processor = load_extended()
    assert processor.encode_images([noise(*size)])[0].shape == SIZES[size]


def test_saved_and_loaded_again(tmp_path):
    _, processor = load_extended("qwen")
    processor.save_pretrained(tmp_path / "lm")
    loaded = AutoProcessor.from_pretrained(tmp_path, subfolder="lm")
    assert isinstance(loaded, SVQVAEProcessor)
    assert loaded.vocabulary == processor.vocabulary
    assert loaded.chat_template == processor.chat_template
    arguments = {"text": "a <|image|>", "images": noise()}
    assert loaded(**arguments)["input_ids"] == processor(**arguments)["input_ids"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"text": "<|image|>"}, "Found 1 <\\|image\\|> tokens in the text but no images were passed"),
        ({"text": "<|image|>", "images": noise(), "grid": (3, 3)}, "knows, 2 x 2, 2 x 3, 4 x 4, got 3 x 3. Choose"),
        ({"text": []}, "`text` must be a text or a list of texts, got \\[\\]"),
        ({"text": [3]}, "`text` must be a text or a list of texts, got 3 among them"),
        ({"text": {"text": "a"}}, "`text` must be a text or a list of texts, got {'text': 'a'}"),
        ({"text": "<|image_00001|> a"}, "outside an image there must be no image token"),
        ({"text": "<|image_begin|><|image_2x2|><|image_00001|>a"}, "must have 4 codes and then <\\|image_end\\|>"),
        ({"text": "<|image_begin|><|image_2x2|>" + "<|image_00001|>" * 5}, "must have 4 codes and then"),
    ],
)
def test_wrong_inputs_are_explained(call, message):
    _, processor = load_extended()
    with pytest.raises(ValueError, match=message):
        processor(**call)


def test_a_template_with_a_begin_of_sequence_gets_no_second_one():
    _, processor = load_extended("llama")
    tokenizer, original = processor.tokenizer.backend_tokenizer, processor.tokenizer.backend_tokenizer.post_processor
    bos = processor.tokenizer.bos_token, processor.tokenizer.bos_token_id
    tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    calls = {"text": "a"}, {"text": f"{bos[0]}a"}, {"text": [f"{bos[0]}a"], "text_kwargs": {"padding": False}}
    assert [processor(**call)["input_ids"][0].count(bos[1]) for call in calls] == [1] * 3
    tokenizer.post_processor = original


def test_an_image_by_its_url_is_read_as_from_a_file(tmp_path):
    _, processor = load_extended()
    Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    url = "data:image/png;base64," + b64encode((tmp_path / "clear.png").read_bytes()).decode()
    by_path, by_url = (processor(text="<|image|>", images=source) for source in (tmp_path / "clear.png", url))
    assert by_path["input_ids"] == by_url["input_ids"]


def test_an_image_in_which_a_sequence_ends_is_left_out_of_a_batch():
    _, processor = load_extended()
    begun = processor(text="a" + processor.begin_image((2, 2)))["input_ids"][0]
    full = processor(text="a <|image|> b", images=noise())["input_ids"][0]
    (expected,) = processor.post_process_multimodal_output([full], generation_mode="mixed")
    for cut in (begun, [*begun, processor.vocabulary.first_token], begun[:-1]):
        with pytest.warns(UserWarning, match="sequence 1 ends inside an image.*Raise `max_new_tokens`"):
            first, second, third = processor.post_process_multimodal_output([full, cut, full], generation_mode="mixed")
        assert [type(part) for part in first] == [type(part) for part in third] == [type(part) for part in expected]
        assert second == ["a"]


def forget_parts(folder):
    """Removes the record of the parts that were saved with a processor."""
    path = folder / "processor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"parts": {}}))


@pytest.mark.parametrize("change", ["codebook", "tokenizer", "config"])
def test_parts_that_do_not_belong_together_are_refused(tmp_path, change):
    shutil.copytree(extended("qwen"), tmp_path / "lm")
    if change == "codebook":
        vqvae = make_tiny()
        torch.nn.init.ones_(vqvae.quantize.embedding.weight)
        vqvae.save_pretrained(tmp_path / "lm" / "vqvae")
        forget_parts(tmp_path / "lm")
        message = "of the model's codebook, with fingerprint"
    elif change == "tokenizer":
        AutoTokenizer.from_pretrained(extended("qwen").parent / "original").save_pretrained(tmp_path / "lm")
        forget_parts(tmp_path / "lm")
        message = "the tokenizer must have the image tokens 300 to 369"
    else:
        (tmp_path / "lm" / "processor_config.json").write_text(json.dumps({"processor_class": "SVQVAEProcessor"}))
        message = "must have an `image_vocabulary`, but has none"
    with pytest.raises(ValueError, match=message):
        AutoProcessor.from_pretrained(tmp_path / "lm")
