"""Each script of `training/` and `conversion/` with two wrong inputs: one line, exit code 2, and nothing is left."""

import runpy
import shutil
import sys

import pytest
from conftest import ROOT
from training_runs import cpu

TRAIN = "--output_dir out --train_data_dir two_images --model_config_name_or_path"
NO_IMAGES = "--output_dir out --train_data_dir ./nowhere --model_config_name_or_path {model}"
PIPELINE = "--output_dir out --vqvae_name_or_path {model} --model_config_name_or_path network.json"
LLAMAGEN = "--output_dir out --pipeline_name_or_path empty --token_set two_images"
WRONG = {  # words on the command line, and a part of the message
    "training/train.py": [
        (NO_IMAGES, "no file or folder matches: `./nowhere`"),
        (f"{TRAIN} broken.json", "`broken.json` must hold a JSON object"),
    ],
    "training/train_latent_diffusion.py": [
        (f"{PIPELINE} --train_data_dir two_images --resolution 30", "must be a multiple of 8, f of the SVQVAE times"),
        (f"{PIPELINE} --train_data_dir empty", "a set must hold images, but the folder has none: `empty`"),
    ],
    "training/train_next_scale.py": [
        (f"{PIPELINE} --token_set two_images", "a token set must be a folder with svqvae_tokens.json"),
        (PIPELINE, "the following arguments are required: --token_set"),
    ],
    "training/train_language_model.py": [
        ("--output_dir out --token_set two_images", "`--model_name_or_path` must be given"),
        ("--output_dir out --model_name_or_path empty --token_set two_images", "`--max_steps` must be given."),
    ],
    "training/train_llamagen.py": [
        ("--output_dir out --token_set two_images", "Pass one of `--pipeline_name_or_path` and"),
        (f"{LLAMAGEN} --max_steps 0", "`--max_steps` must be at least 1, but is 0."),
    ],
    "training/bundled/prepare_photos.py": [
        ("out", "the following arguments are required: --list"),
        ("out --list broken.json", "must have the columns licence, package, path, registry"),
    ],
    "training/bundled/prepare_drawings.py": [
        ("out --photos empty", "`empty/train` must hold photographs"),
        ("empty --photos empty", "OUT must be a new folder"),
    ],
    "training/bundled/add_colours.py": [
        ("{model} two_images empty", "OUT must be a new folder, but `empty` exists"),
        ("{model} two_images out", "MODEL must have more than 2,197 codes"),
    ],
    "training/bundled/make_scenes.py": [
        ("", "the following arguments are required: out"),
        ("out --font nowhere.ttf", "nowhere.ttf"),
    ],
    "training/bundled/make_first_pictures.py": [
        ("", "the following arguments are required: out"),
        ("out --font nowhere.ttf", "nowhere.ttf"),
    ],
    "training/bundled/make_scene_words.py": [
        ("", "the following arguments are required: out"),
        ("broken.json", "broken.json"),
    ],
    "training/bundled/colour_names.py": [
        ("", "the following arguments are required: out"),
        ("nowhere/out.json", "nowhere/out.json"),
    ],
    "training/bundled/wordnet.py": [
        ("", "the following arguments are required: out, folder"),
        ("out nowhere --wordnet empty", "data.noun"),
    ],
    "training/train_context.py": [
        ("empty", "the following arguments are required: token_sets"),
        ("empty two_images", "no file named config.json"),
    ],
    "conversion/compare.py": [
        ("empty broken.json", "`broken.json` must be a whole PyTorch checkpoint"),
        ("empty {golden}", "`empty` must be a checkout of Open-Model-Initiative/SVQVAE, but has no svqvae.py"),
    ],
    "conversion/compare_flexvar.py": [
        ("empty broken.json", "`broken.json` must be a whole PyTorch checkpoint"),
        ("empty {golden}", "must be a checkpoint of FlexVAR's transformer"),
    ],
    "conversion/compare_llamagen.py": [
        ("empty broken.json", "`broken.json` must be a whole PyTorch checkpoint"),
        ("empty {golden}", "must be a checkpoint of a language model of LlamaGen"),
    ],
    "conversion/convert.py": [
        ("broken.json --output out", "`broken.json` must be a whole PyTorch checkpoint"),
        ("{golden} --output two_images", "`two_images` must be a new or empty folder, but it is not empty"),
    ],
}


@pytest.mark.parametrize(("script", "words", "message"), [(name, *case) for name in WRONG for case in WRONG[name]])
def test_wrong_inputs_of_scripts(two_images, tmp_path, saved_model, monkeypatch, capsys, script, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.json").write_text("hello")
    shutil.copy(ROOT / "training" / "configs" / "dit_small.json", tmp_path / "network.json")
    before = sorted(tmp_path.rglob("*"))
    golden = ROOT / "tests" / "golden" / "svqvae_tiny.safetensors"
    monkeypatch.setattr(sys, "argv", [script, *words.format(model=saved_model, golden=golden).split()])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with cpu(), pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
    assert "error: " in err
    assert message in err
    assert sorted(tmp_path.rglob("*")) == before


def test_each_script_has_two_wrong_inputs():
    paths = [path for room in ("training", "conversion") for path in (ROOT / room).rglob("*.py")]
    paths = [path for path in paths if "__main__" in path.read_text()]
    assert WRONG.keys() == {str(path.relative_to(ROOT)) for path in paths}
    assert {len(cases) for cases in WRONG.values()} == {2}
