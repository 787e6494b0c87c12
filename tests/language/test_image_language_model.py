from copy import deepcopy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_language_models import CHAT_ML, FAMILIES, load_extended

from svqvae_hf.language.grammar import ImageGrammar
from svqvae_hf.language.image_language_model import ImageLanguageModel
from svqvae_hf.models.image_vocabulary import ImageVocabulary
from svqvae_hf.pipelines.image_chats import MAX_REWRITTEN_TOKENS


def pixels(images):
    return [np.array(image).tolist() for image in images]


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("family", FAMILIES)
def test_images_have_the_grid_that_was_asked_for(family):
    pipe = ImageLanguageModel(*load_extended(family))
    assert [image.size for image in pipe.draw(["a cat", "a cat left of a pear", None])] == [(8, 8)] * 3
    assert [image.size for image in pipe.draw(["a cat"], grid=(2, 3), guidance_scale=2.0)] == [(12, 8)]
    with pytest.raises(ValueError, match="the rows x columns of codes that the model knows"):
        pipe.draw(["a cat"], grid=(9, 9))
    with pytest.raises(ValueError, match=r"`grid` must be a pair of rows and columns of codes, such as .*, got 8\.$"):
        pipe.draw(["a cat"], grid=8)


def test_a_text_is_one_caption_and_no_caption_is_an_error():
    pipe = ImageLanguageModel(*load_extended("qwen"))
    (one,) = pipe.draw("a cat", generator=generators(1))
    assert pixels([one]) == pixels(pipe.draw(["a cat"], generator=generators(1)))
    with pytest.raises(ValueError, match="`prompts` must hold at least one caption"):
        pipe.draw([])
    with pytest.raises(ValueError, match="the prompt and 2 x 2 ids must fit the context of .* tokens, but take"):
        ImageLanguageModel(*load_extended("neox")).draw(["a cat" * 999])


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_ids_with_guidance_equal_those_of_generate(family):
    model, processor = load_extended(family)
    chats = [[{"role": "user", "content": text}] for text in ("a cat", processor.no_condition)]
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    inputs, free = (processor(text=text + processor.begin_image((2, 3)), return_tensors="pt") for text in texts)
    call = {"guidance_scale": 3.0, "do_sample": False, "max_new_tokens": 7, "negative_prompt_ids": free["input_ids"]}
    tokens = model.generate(**inputs, **call, logits_processor=[ImageGrammar(model.config)])
    (images,) = processor.post_process_multimodal_output(tokens, generation_mode="image")
    drawn = ImageLanguageModel(model, processor).draw("a cat", (2, 3), guidance_scale=3.0, temperature=0)
    assert pixels(images) == pixels(drawn)


def test_an_image_depends_on_its_generator_and_caption_alone():
    pipe = ImageLanguageModel(*load_extended("qwen"))
    settings = {"grid": (4, 4), "guidance_scale": 2.0, "top_p": 0.9}
    both = pipe.draw(["a cat", "a red key"], generator=generators(1, 2), **settings)
    alone = pipe.draw(["a red key"], generator=generators(2), **settings)
    assert pixels(both)[1:] == pixels(alone)
    assert pixels(both)[:1] != pixels(pipe.draw(["a cat"], generator=generators(2), **settings))


@pytest.mark.parametrize("family", FAMILIES)
def test_captions_are_texts(family):
    pipe = ImageLanguageModel(*load_extended(family))
    images = pipe.draw(["a cat", None], grid=(4, 4))
    captions = pipe.caption(images, max_new_tokens=5)
    assert [type(caption) for caption in captions] == [str, str]
    assert "<|image" not in "".join(captions)
    assert captions[1:] == pipe.caption(images[1:], max_new_tokens=5) == pipe.caption(images[1], max_new_tokens=5)


def test_answers_begin_as_in_training(monkeypatch):
    model, processor = load_extended("qwen")
    thinks = "{% if message.role == 'assistant' %}<think>\n{% endif %}{{ message.content }}"  # as Qwen3's template
    monkeypatch.setattr(processor, "chat_template", CHAT_ML.replace("{{ message.content }}", thinks))
    asked = ImageLanguageModel(model, processor)._ask(["a cat"], [processor.begin_image((2, 2))])
    chat = [{"role": "user", "content": "a cat"}, {"role": "assistant", "content": processor.begin_image((2, 2))}]
    trained = processor.tokenizer(processor.apply_chat_template(chat)).input_ids
    assert asked["input_ids"][0].tolist() == trained[: asked["input_ids"].shape[1]]
    assert "<think>" in processor.decode(asked["input_ids"][0])


def test_a_model_that_rewrites_draws_what_it_writes(monkeypatch):
    model, processor = load_extended("qwen")
    pipe = ImageLanguageModel(model, processor)
    assert not pipe.rewrites
    assert pipe.rewrite(["my kitty"]) == ["my kitty"]
    monkeypatch.setattr(model.generation_config, "generation_kwargs", {"rewrite_captions": True}, raising=False)
    prompts = ["my kitty", "a red key"]
    answers = pipe.rewrite(prompts)
    alone = [pipe.rewrite([prompt])[0] for prompt in prompts]
    assert answers == alone
    vocabulary = processor.vocabulary
    question = processor.apply_chat_template([{"role": "user", "content": "my kitty"}], add_generation_prompt=True)
    tokens = processor(text=question, return_tensors="pt")["input_ids"]
    num_question_tokens = tokens.shape[1]
    for _ in range(MAX_REWRITTEN_TOKENS):  # the likeliest words, one by one
        logits = model(input_ids=tokens).logits[0, -1]
        is_word = torch.arange(len(logits)) < vocabulary.first_token
        is_word[vocabulary.begin] = True
        token = logits.masked_fill(~is_word, -torch.inf).argmax()
        if token in (vocabulary.begin, processor.tokenizer.eos_token_id):
            break
        tokens = torch.cat([tokens, token.view(1, 1)], dim=1)
    assert answers[0] == processor.decode(tokens[0, num_question_tokens:], skip_special_tokens=True).strip()
    drawn = pipe.draw([*prompts, None], (2, 3), guidance_scale=2.0, temperature=0)
    monkeypatch.setattr(pipe, "_rewrite", lambda questions: ["a cat", "a key", "a bee"][: len(questions)])
    others = pipe.draw([*prompts, None], (2, 3), guidance_scale=2.0, temperature=0)
    assert pixels(drawn)[:2] != pixels(others)[:2]
    assert pixels(drawn)[2:] == pixels(others)[2:]
    text = processor.apply_chat_template(
        [
            {"role": "user", "content": "my kitty"},
            {"role": "assistant", "content": "a cat" + processor.begin_image((2, 3))},
        ],
        continue_final_message=True,
    )
    inputs = processor(text=text, return_tensors="pt")
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=7, logits_processor=[ImageGrammar(model.config)])
    (expected,) = processor.post_process_multimodal_output(tokens, generation_mode="image")
    assert pixels(expected) == pixels(pipe.draw("my kitty", (2, 3), guidance_scale=1.0, temperature=0))
    monkeypatch.setattr(model.generation_config, "generation_kwargs", {"rewrite_captions": "yes"})
    with pytest.raises(ValueError, match="`rewrite_captions` in the generation config must be true or false"):
        pipe.draw("a cat")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # that peft reads
def test_models_without_their_own_weights_are_neither_saved_nor_loaded(tmp_path):
    pipe = ImageLanguageModel(*load_extended("qwen"))
    pipe.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({name: each for name, each in weights.items() if "norm" not in name}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="must be exactly what its config asks for, but are not: missing: model.lay"):
        ImageLanguageModel.from_pretrained(tmp_path)
    adapted = ImageLanguageModel(deepcopy(pipe.language_model), pipe.processor)
    get_peft_model(adapted.language_model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="`language_model` must be saved with its adapter merged"):
        adapted.save_pretrained(tmp_path)


def test_an_edit_keeps_all_codes_outside_the_mask():
    model, processor = load_extended("qwen")
    pipe = ImageLanguageModel(model, processor)
    image, other = pipe.draw(["a cat", "a red key"], grid=(4, 4), generator=generators(1, 2))
    mask = Image.new("L", image.size, 9)  # noise, as in a JPEG
    mask.putpixel((0, mask.height - 1), 255)
    for each in (image, mask):
        each.getexif()[0x0112] = 6  # to be turned clockwise by a quarter
    kept, drawn = {}, pipe.processor.decode_images
    pipe.processor.decode_images = lambda grids: kept.setdefault("ids", [*grids]) and drawn(grids)
    pipe.draw(["a red key"], grid=(4, 4), image=[image], mask_image=[mask], generator=generators(3))
    before = processor.encode_images([image], (4, 4))[0]
    changed = (kept["ids"][0] != before).nonzero().tolist()
    assert changed in ([], [[0, 0]])
    half = Image.frombytes("L", (2, 1), b"\0\xff").resize((128, 128), Image.Resampling.NEAREST)
    assert pipe._ids_to_keep([half], [half], (4, 4), 1)[1][0].tolist() == [[True, True, False, False]] * 4
    whole = Image.new("L", image.size, 255)
    new = pipe.draw(["a red key"], grid=(4, 4), image=[image], mask_image=[whole], generator=generators(2))
    assert pixels(new) == pixels([other])
    for edit in ({"image": [image]}, {"mask_image": [mask]}, {"image": [image], "mask_image": [mask.resize((8, 9))]}):
        with pytest.raises(ValueError, match="one image and one mask of its size per prompt"):
            pipe.draw(["a red key"], **edit)


def test_masks_keep_their_thin_strokes_and_may_be_floats():
    """Also on large photographs, of which only the middle is drawn."""
    pipe = ImageLanguageModel(*load_extended("qwen"))
    mask = Image.new("L", (900, 600))
    mask.putpixel((449, 10), 255)
    mask.putpixel((10, 300), 255)  # left of the middle
    photo = Image.new("RGB", mask.size)
    expected = [[True, False, True, True]] + [[True] * 4] * 3
    assert pipe._ids_to_keep([photo], [mask], (4, 4), 1)[1][0].tolist() == expected
    for mode in ("L", "P", "RGB"):
        with_transparency = mask.convert(mode)
        black = (0, 0, 0) if mode == "RGB" else 0
        with_transparency.info["transparency"] = black  # as a program that shrinks PNG files may declare
        assert pipe._ids_to_keep([photo], [with_transparency], (4, 4), 1)[1][0].tolist() == expected
    floats = Image.fromarray(np.asarray(mask, np.float32) / 255)
    assert floats.mode == "F"
    assert pipe._ids_to_keep([photo], [floats], (4, 4), 1)[1][0].tolist() == expected


def test_sampling_of_images_defaults_to_the_generation_config():
    pipe = ImageLanguageModel(*load_extended("qwen"))
    asked = pipe.draw(["a cat"], guidance_scale=3.0, top_k=5, generator=generators(1))
    assert pixels(asked) != pixels(pipe.draw(["a cat"], generator=generators(1)))
    captions = pipe.caption(asked)
    pipe.language_model.generation_config.generation_kwargs = {"guidance_scale": 3.0, "top_k": 5, "boi_token_id": 9}
    assert pixels(asked) == pixels(pipe.draw(["a cat"], generator=generators(1)))
    assert pipe.caption(asked) == captions
    del pipe.language_model.generation_config.generation_kwargs


def test_single_images_and_integers_of_numpy_are_taken():
    pipe = ImageLanguageModel(*load_extended("qwen"))
    (image,) = pipe.draw("a cat", grid=(4, 4), generator=generators(1))
    mask = Image.new("L", image.size, 255)
    call = {"grid": (4, 4), "top_k": np.int64(5)}
    alone = pipe.draw("a red key", image=image, mask_image=mask, generator=generators(2), **call)
    listed = pipe.draw(["a red key"], image=[image], mask_image=[mask], generator=generators(2), **call)
    assert pixels(alone) == pixels(listed)


def test_wrong_prompts_and_images_are_explained():
    pipe = ImageLanguageModel(*load_extended("qwen"))
    with pytest.raises(ValueError, match="`prompts` must hold texts, or None for an image without one, got 3"):
        pipe.draw(["a cat", 3])
    for prompt in ("?!", " ", "..."):
        with pytest.raises(ValueError, match="a prompt must have a word or a symbol, got .* Say what to draw"):
            pipe.draw(["a cat", prompt])
    with pytest.raises(ValueError, match="`images` must hold at least one image, got none"):
        pipe.caption([])


@pytest.mark.parametrize("stored", [[], "hot", {"temperature": "hot"}])
def test_a_damaged_sampling_is_explained(stored):
    pipe = ImageLanguageModel(*load_extended("qwen"))
    pipe.language_model.generation_config.generation_kwargs = stored
    with pytest.raises(ValueError, match="generation config must be"):
        pipe.draw("a cat")
    del pipe.language_model.generation_config.generation_kwargs


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for message in messages %}{{ message.content", "must be a whole template of Jinja, but is damaged"),
        ("{{ messages[0].content }}", "must write what the assistant answers, but leaves it out"),
    ],
)
def test_a_damaged_template_is_explained(monkeypatch, template, message):
    pipe = ImageLanguageModel(*load_extended("qwen"))
    monkeypatch.setattr(pipe.processor, "chat_template", template)
    with pytest.raises(ValueError, match=message):
        pipe.draw("a cat")


@pytest.mark.parametrize("entries", [[], None, "x", {}, {"first_token": 3}, {"f": "8"}])
def test_damaged_image_tokens_are_explained(entries):
    vocabulary = load_extended("qwen")[1].vocabulary.to_config()
    if entries == {"f": "8"}:
        entries = vocabulary | entries
    with pytest.raises(ValueError, match="`image_vocabulary`"):
        ImageVocabulary.from_config({"image_vocabulary": entries})
