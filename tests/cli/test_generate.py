"""`svqvae generate`."""

from argparse import Namespace

import numpy as np
import pytest
import torch
from cli_runner import fails, svqvae, visible
from conftest import ROOT
from generators import make_autoregressive, make_llamagen, make_next_scale
from peft import LoraConfig, get_peft_model
from PIL import Image
from pipeline_parts import text_components
from tiny_language_models import extended
from transformers import AutoModelForCausalLM

from svqvae_cli import generate
from svqvae_cli.loading import load_generator

PHOTO = ROOT / "docs" / "images" / "chelsea.png"


@pytest.fixture(scope="module")
def pipeline():
    return make_autoregressive(class_names=["tench, Tinca", "../up", "1"])


@pytest.fixture(scope="module")
def saved(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved_next_scale(tmp_path_factory):
    folder = tmp_path_factory.mktemp("next_scale")
    make_next_scale().save_pretrained(folder)
    return folder


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def is_picture(file, image):
    with Image.open(file) as written:
        return np.array_equal(written, image)


def test_images_of_classes(saved, pipeline, tmp_path, capsys):
    arguments = ["--class", "1", "0", "--num-images", "3", "--seed", "7", "--top-k", "9", "--batch-size", "2"]
    arguments += ["--guidance-scale", "2", "--temperature", "0.9", "--top-p", "0.8"]
    assert svqvae("generate", "--model", saved, *arguments, "--output", tmp_path) == 0
    assert {*visible(tmp_path)} == {f"class_{name}_{index}.png" for name in "10" for index in range(3)}
    assert capsys.readouterr().out == f"written  {tmp_path} (images: 6)\n"
    call = {"top_k": 9, "guidance_scale": 2.0, "temperature": 0.9, "top_p": 0.8}
    (image,) = pipeline(0, generator=[seeded(7 + 4)], **call).images
    assert is_picture(tmp_path / "class_0_1.png", image)


def test_names_of_classes_name_files(saved, pipeline, tmp_path):
    classes = ["../up", "tench, Tinca", "1", "0"]  # "1" is a name, "0" a number
    assert svqvae("generate", "--model", saved, "--class", *classes, "--output", tmp_path) == 0
    files = [f"class_{name}_0.png" for name in ("up", "tench-Tinca", "1", "0")]
    assert {*visible(tmp_path)} == {*files}
    images = pipeline([1, 0, 2, 0], generator=[seeded(index) for index in range(4)]).images
    assert all(is_picture(tmp_path / file, image) for file, image in zip(files, images, strict=True))


@pytest.mark.parametrize("labels", [["C#", "C++"], ["C-2", "C#", "C+"]])
def test_classes_whose_names_differ_in_signs_alone_have_their_own_files(labels):
    names = generate._condition_names(Namespace(prompt=None, class_labels=labels))
    assert len(set(names)) == len(labels)


def test_a_row_of_images_per_caption(tmp_path, capsys):
    pipeline = make_llamagen("t2i", **text_components())
    pipeline.save_pretrained(tmp_path / "pipeline")
    call = (
        "generate",
        "--model",
        tmp_path / "pipeline",
        "--output",
        tmp_path / "out",
        "--prompt",
        "the cat",
        "a roof",
    )
    assert svqvae(*call, "--num-images", 2, "--guidance-scale", 2) == 0
    files = [f"prompt_{caption}_{index}.png" for caption in range(2) for index in range(2)]
    assert visible(tmp_path / "out") == files
    (image,) = pipeline(prompt="a roof", guidance_scale=2.0, generator=seeded(2)).images
    assert is_picture(tmp_path / "out" / "prompt_1_0.png", image)
    capsys.readouterr()
    assert "not allowed with argument --prompt" in fails(capsys, *call, "--class", "0")


def test_steps_of_a_next_scale_pipeline(saved_next_scale, tmp_path):
    assert svqvae("generate", "--model", saved_next_scale, "--class", "0", "--steps", "2", "--output", tmp_path) == 0
    (image,) = make_next_scale()(0, num_inference_steps=2, generator=[seeded(0)]).images
    assert is_picture(tmp_path / "class_0_0.png", image)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # that peft reads
def test_an_adapter_is_merged(saved, saved_next_scale, tmp_path, capsys):
    pipeline = make_autoregressive()
    (plain,) = pipeline(0, temperature=0).images
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, lora_alpha=64)
    adapter = get_peft_model(pipeline.language_model, config)
    adapter.save_pretrained(tmp_path / "adapter")
    arguments = ["--class", "0", "--temperature", "0", "--output"]
    assert svqvae("generate", "--model", saved, "--adapter", tmp_path / "adapter", *arguments, tmp_path / "out") == 0
    pipeline.language_model = adapter.merge_and_unload()
    (adapted,) = pipeline(0, temperature=0).images
    assert is_picture(tmp_path / "out" / "class_0_0.png", adapted)
    assert not np.array_equal(adapted, plain)
    capsys.readouterr()
    for model, other, message in (
        (saved, saved, "must be a LoRA adapter for the language model of --model"),
        (saved_next_scale, tmp_path / "adapter", "--adapter does not apply to --model, whose class is"),
        (saved, "nowhere", "there is no file or folder `nowhere`"),
    ):
        assert message in fails(capsys, "generate", "--model", model, "--adapter", other, *arguments, tmp_path / "new")


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # of peft
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # that peft reads
@pytest.mark.parametrize("layers", [["embed_tokens", "q_proj"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_an_adapter_of_a_tied_embedding_or_head_leaves_the_other_as_it_is(layers, tmp_path):
    base = extended("llama")
    language_model = AutoModelForCausalLM.from_pretrained(base).eval()
    assert language_model.config.tie_word_embeddings
    config = LoraConfig(target_modules=layers, init_lora_weights=False, lora_alpha=64)
    adapter = get_peft_model(language_model, config).eval()
    adapter.save_pretrained(tmp_path, save_embedding_layers=False)
    tokens = torch.arange(9)[None]
    merged = load_generator(str(base), "cpu", "float32", str(tmp_path)).language_model
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens).logits, adapter(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--class", "3"], "`class_labels` must be in [0, 3), got [3]"),
        (["--class", "cat"], "`class_labels` must be numbers in [0, 3) or names of classes, ['tench, Tinca'"),
        (["--class", "1", "2", "1"], "--class must name each class once, got 1 2 1. For more, use --num-images"),
        (["--steps", "3"], "pipeline`, whose class is SVQVAEAutoregressivePipeline. Leave it out"),
        (["--prompt", "a cat"], "pipeline` has none. Leave it out, or pass --class."),
        (["--grid", "4x4"], "--grid does not apply to `"),
        (["--batch-size", "0"], "argument --batch-size: must be an integer above 0, got '0'"),
    ],
)
def test_mistakes_are_one_line(arguments, message, saved, tmp_path, capsys):
    assert message in fails(capsys, "generate", "--model", saved, *arguments, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_generator_without_classes_takes_no_class(tmp_path, capsys):
    make_autoregressive(num_classes=0).save_pretrained(tmp_path / "pipeline")
    capsys.readouterr()  # the bars of saving
    arguments = ["--model", tmp_path / "pipeline", "--class", "0", "--output", tmp_path / "out"]
    assert "pipeline` has none. Leave it out." in fails(capsys, "generate", *arguments)


def test_classes_whose_names_differ_in_signs_alone_have_files_of_their_own(tmp_path):
    make_autoregressive(class_names=["C++", "C#", "C"]).save_pretrained(tmp_path / "pipeline")
    words = ["generate", "--model", tmp_path / "pipeline", "--class", "C++", "C#", "C"]
    assert svqvae(*words, "--output", tmp_path / "out") == 0
    assert visible(tmp_path / "out") == ["class_C-1_0.png", "class_C-2_0.png", "class_C_0.png"]


@pytest.mark.parametrize("state", ["run_state.pt", "trainer_state.json"])
def test_an_unfinished_run_is_named(state, tmp_path, capsys):
    run = tmp_path / "run"
    for step in (9, 22, 100):
        checkpoint = run / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "config.json").write_text("{}")
    (run / "checkpoint-9" / state).touch()
    (run / "checkpoint-22" / state).touch()  # checkpoint-100 is not whole
    messages = {
        run: f"the run in `{run}` is not finished. Its last checkpoint is checkpoint-22. Finish the run by",
        run / "checkpoint-22": f"`{run}/checkpoint-22` is a checkpoint. Finish the run by",
    }
    for model, message in messages.items():
        output = ["--output", tmp_path / "out"]
        assert message in fails(capsys, "generate", "--model", model, *output)
        assert message in fails(capsys, "caption", PHOTO, "--model", model, *output)
        assert message in fails(capsys, "reconstruct", PHOTO, "--model", model, *output)
        error = fails(capsys, "info", model)
        assert message in error
        assert ("or end it there with --max_steps 22" in error) == (state == "run_state.pt")


def test_seeds_fit_in_64_bits(saved, tmp_path, capsys):
    error = fails(capsys, "generate", "--model", saved, "--output", tmp_path / "out", "--seed", 10**20)
    assert "argument --seed: must be an integer of at most" in error
    assert svqvae("generate", "--model", saved, "--output", tmp_path / "out", "--seed", 2**62, "--num-images", 2) == 0
