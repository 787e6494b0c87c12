import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import standalone_process
import torch
from conftest import ROOT, make_tiny
from diffusers import AutoModel, DDIMScheduler, DiTPipeline
from diffusers.utils.dynamic_modules_utils import get_relative_import_files, get_relative_imports
from generators import make_llamagen, make_next_scale
from huggingface_hub import ModelCard
from next_scale_golden import GOLDEN as FLEXVAR
from next_scale_golden import make_transformer
from pipeline_parts import dit, text_components
from safetensors.torch import load_file
from transformers import AutoImageProcessor

import svqvae_hf
from svqvae_hf import (
    DEFAULT_GENERATOR,
    SVQVAE,
    LlamaGenForCausalLM,
    NextScaleTransformer,
    SVQVAEImageProcessor,
    SVQVAENextScalePipeline,
)
from svqvae_hf.conversion.convert import convert
from svqvae_hf.hub.code import AUTO_CLASSES
from svqvae_hf.language.image_language_model import ImageLanguageModel
from svqvae_hf.models.processing_svqvae import SVQVAEProcessor
from svqvae_hf.pipelines.generator_pipeline import GeneratorPipeline


@pytest.fixture(scope="module")
def repositories(tmp_path_factory) -> Path:
    """Repositories of the golden models, with their code."""
    folder = tmp_path_factory.mktemp("repositories")
    vqvae = SVQVAE.from_single_file(ROOT / "tests" / "golden" / "svqvae_tiny.safetensors")
    vqvae.save_pretrained(folder / "tokenizer", standalone=True)
    NextScaleTransformer.from_single_file(FLEXVAR).save_pretrained(folder / "next_scale", standalone=True)
    make_llamagen("c2i").language_model.save_pretrained(folder / "llamagen", standalone=True)
    for name, pipeline in pipelines().items():
        pipeline.save_pretrained(folder / name, standalone=True)
    ImageLanguageModel.from_pretrained(DEFAULT_GENERATOR).save_pretrained(folder / "drawer", standalone=True)
    return folder


def pipelines() -> dict[str, GeneratorPipeline]:
    """Pipelines of LlamaGen's golden models, and of a random next-scale model."""
    return {
        "classes": make_llamagen("c2i"),
        "text": make_llamagen("t2i", **text_components()),
        "scales": make_next_scale(),
        "scales of text": make_captioned(),
    }


def make_captioned() -> SVQVAENextScalePipeline:
    tokenizer = text_components()["tokenizer"]
    transformer = make_transformer(num_classes=0, vocab_size=len(tokenizer), max_text_length=4)
    return SVQVAENextScalePipeline(make_tiny(), transformer, schedule=[1, 2, 4], tokenizer=tokenizer)


@pytest.fixture(scope="module")
def without_package(repositories, tmp_path_factory) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, str]]]:
    """Outputs of the repositories and the table of tools, in an environment that has all packages but this one."""
    folder = tmp_path_factory.mktemp("environment")
    packages = folder / "packages"
    packages.mkdir()
    for installed in Path(sysconfig.get_path("purelib")).iterdir():
        if "svqvae" not in installed.name:
            (packages / installed.name).symlink_to(installed)
    offline = {"PYTHONPATH": str(packages), "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    script = shutil.copy(standalone_process.__file__, folder)
    command = [sys.executable, "-S", script, repositories, folder / "outputs"]  # -S: no .pth file adds this package
    options = {"env": os.environ | offline, "cwd": folder, "capture_output": True, "text": True}
    done = subprocess.run(command, **options, stdin=subprocess.DEVNULL, check=False)
    assert not done.returncode, done.stderr
    return load_file(folder / "outputs"), json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_outputs_equal_those_of_the_package(repositories, without_package):
    expected = standalone_process.outputs(
        SVQVAE.from_pretrained(repositories / "tokenizer"),
        svqvae_hf.SVQVAEImageProcessor.from_pretrained(repositories / "tokenizer"),
        NextScaleTransformer.from_pretrained(repositories / "next_scale"),
        LlamaGenForCausalLM.from_pretrained(repositories / "llamagen"),
    )
    found, _ = without_package
    assert found.keys() >= expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.slow
@pytest.mark.parametrize("name", standalone_process.PIPELINES)
def test_pipelines_equal_those_of_the_package(name, repositories, without_package):
    cls = SVQVAENextScalePipeline if "scales" in name else svqvae_hf.SVQVAEAutoregressivePipeline
    pipeline = cls.from_pretrained(repositories / name)
    if "text" not in name:
        names = [*"abcdefghijklm"[: pipeline.num_classes]]
        assert [*cls.from_pretrained(repositories / name, class_names=names).config["class_names"]] == names
    condition = {"prompt": ["a cat"]} if "text" in name else {"class_labels": [0, 2]}
    for scale in (1.0, 2.5):
        options = {"guidance_scale": scale, "temperature": 0}
        options |= {"guidance_mode": "constant"} if "scales" in name else {}
        ids = pipeline(**condition, **options, output_type="latent").images
        images = np.stack(pipeline(**condition, **options).images)
        assert torch.equal(without_package[0][f"ids of {name}, {scale}"], ids)
        assert np.array_equal(without_package[0][f"images of {name}, {scale}"].numpy(), images)


@pytest.mark.slow
def test_transformers_draws_the_pictures_of_the_package(repositories, without_package):
    model = ImageLanguageModel.from_pretrained(DEFAULT_GENERATOR)
    images = model.draw(standalone_process.CAPTIONS, temperature=0)
    assert np.array_equal(without_package[0]["drawn"].numpy(), np.stack(images))


@pytest.mark.slow
def test_every_cell_of_the_table_of_tools(repositories, without_package):
    page = (ROOT / "docs" / "standalone.md").read_text()
    reasons = dict(re.findall(r"^(\d)\. .*: \"(.+)\"$", page, re.MULTILINE))
    errors = without_package[1]  # of each tool with each kind of repository, empty if it works
    tools_of_page = set()
    for line in page.splitlines():
        tool, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        if tool not in errors:
            continue
        tools_of_page.add(tool)
        for kind, cell in zip(standalone_process.KINDS, cells, strict=True):
            error = " ".join(errors[tool][kind].split())
            if cell == "yes":
                assert error == "", (tool, kind)
            else:
                assert reasons[cell] in error, (tool, kind)
                assert error, (tool, kind)
    assert tools_of_page == errors.keys()


MODEL_FILES = {
    *("modeling_svqvae", "checks", "layers", "loading", "quantizer", "resizing", "tiling"),
    *("image_processing_svqvae", "image_files"),
}


def test_a_diffusers_pipeline_with_a_tokenizer_from_a_repository_with_code_loads_again(repositories, tmp_path):
    options = {"trust_remote_code": True, "pixel_range": (-1, 1)}
    vqvae = AutoModel.from_pretrained(str(repositories / "tokenizer"), **options)
    assert type(vqvae).__module__.startswith("diffusers_modules.")
    pipeline = DiTPipeline(dit(), vqvae, DDIMScheduler())
    for name in ("saved", "saved_again"):
        pipeline.save_pretrained(tmp_path / name)
        pipeline = DiTPipeline.from_pretrained(tmp_path / name, trust_remote_code=True)
        assert pipeline.config["vae"] == ("modeling_svqvae", "SVQVAE")
    assert type(pipeline.vae).__module__.startswith("diffusers_modules.")
    latents = torch.randn(1, vqvae.config["latent_channels"], 4, 4)
    assert torch.equal(pipeline.vae.decode(latents).sample, vqvae.decode(latents).sample)


def test_files_of_code_are_those_of_the_package(repositories):
    files = {path.stem: path for path in (repositories / "tokenizer").glob("*.py")}
    assert files.keys() == MODEL_FILES
    for path in [*files.values(), *repositories.glob("next_scale/*.py"), *repositories.glob("llamagen/*.py")]:
        assert path.read_bytes() == (ROOT / "svqvae_hf" / "models" / path.name).read_bytes()


@pytest.mark.parametrize("model_class", [each for each in AUTO_CLASSES if each is not SVQVAEProcessor])
def test_the_file_of_a_class_names_all_files_that_it_needs(model_class):
    """From a local folder, diffusers copies no more than these to its cache."""
    source = inspect.getfile(model_class)
    needed = {f"{Path(source).parent / name}.py" for name in get_relative_imports(source)}
    assert {*get_relative_import_files(source)} == needed


def test_converted_checkpoint_carries_its_code(tmp_path):
    convert(ROOT / "tests" / "golden" / "svqvae_tiny.safetensors", tmp_path / "out", standalone=True)
    assert {path.stem for path in (tmp_path / "out").glob("*.py")} == MODEL_FILES
    assert "trust_remote_code=True" in (tmp_path / "out" / "README.md").read_text()


def test_a_standalone_folder_gets_a_card_with_the_origin_of_the_loaded_weights(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "adapted")
    rows = "| | |\n|---|---|\n| steps | 800 |\n| started from | `org/first` (licence: mit) |\n"
    trained_card = f"---\nlicense: mit\nbase_model: org/first\ntags: [svqvae]\n---\n\n{rows}"
    (tmp_path / "adapted" / "README.md").write_text(trained_card)
    vqvae = svqvae_hf.SVQVAE.from_pretrained(tmp_path / "adapted")
    vqvae.save_pretrained(tmp_path / "shared", standalone=True)
    card = ModelCard((tmp_path / "shared" / "README.md").read_text())
    assert (card.data.license, card.data.base_model) == ("mit", "org/first")
    assert "| started from | `adapted` (licence: mit) |\n| before: steps | 800 |\n" in card.text
    assert 'AutoModel.from_pretrained("shared", trust_remote_code=True)' in card.text
    vqvae.save_pretrained(tmp_path / "adapted", standalone=True)
    assert (tmp_path / "adapted" / "README.md").read_text() == trained_card
    vqvae.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "README.md").exists()


def test_the_card_of_changed_weights_has_no_figures_of_the_loaded_ones(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "adapted")
    rows = "| | |\n|---|---|\n| steps | 800 |\n| validation | psnr@1 25.78 |\n| validation_2 | psnr@1 29.79 |\n"
    (tmp_path / "adapted" / "README.md").write_text(f"---\nlicense: mit\ntags: [svqvae]\n---\n\n{rows}")
    vqvae = svqvae_hf.SVQVAE.from_pretrained(tmp_path / "adapted", torch_dtype=torch.float16)
    assert "| before: validation_2 | psnr@1 29.79 |" in vqvae.make_card("same")
    with torch.no_grad():
        next(vqvae.parameters()).mul_(0.5)
    card = vqvae.make_card("mixed")
    assert "psnr" not in card
    assert "| weights | differ from the weights of `adapted`; not measured |" in card
    assert "| before: steps | 800 |" in card
    assert "| weights | halves |" in vqvae.make_card("mixed", provenance={"weights": "halves"})


def test_a_saved_folder_has_the_options_of_its_card(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "adapted")
    rows = "| | |\n|---|---|\n| validation | psnr@1 25.78 |\n"
    (tmp_path / "adapted" / "README.md").write_text(f"---\nlicense: mit\ntags: [svqvae]\n---\n\n{rows}")
    vqvae = svqvae_hf.SVQVAE.from_pretrained(tmp_path / "adapted")
    with torch.no_grad():
        next(vqvae.parameters()).mul_(0.5)
    for weights in ("halves", "thirds"):
        vqvae.save_pretrained(tmp_path / "mixed", standalone=True, provenance={"weights": weights})
        assert f"| weights | {weights} |" in (tmp_path / "mixed" / "README.md").read_text()
    vqvae.save_pretrained(tmp_path / "adapted", license="cc0-1.0")  # into the folder that the weights came from
    card = ModelCard((tmp_path / "adapted" / "README.md").read_text())
    assert card.data.license == "cc0-1.0"
    assert "psnr" not in card.text
    assert "| weights | differ from the weights of `adapted`; not measured |" in card.text


def test_a_standalone_pipeline_inherits_the_licence_of_the_loaded_one(repositories, tmp_path):
    folder = shutil.copytree(repositories / "classes", tmp_path / "trained")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    pipeline = svqvae_hf.SVQVAEAutoregressivePipeline.from_pretrained(folder)
    pipeline.save_pretrained(tmp_path / "shared", standalone=True)
    card = ModelCard((tmp_path / "shared" / "README.md").read_text())
    assert card.data.license == "mit"
    assert "| started from | `trained` (licence: mit) |" in card.text
    pipeline.save_pretrained(folder, standalone=True)
    assert ModelCard(pipeline.make_card("org/new", license="apache-2.0")).data.license == "apache-2.0"
    pipeline.save_pretrained(folder, license="apache-2.0")
    assert ModelCard((folder / "README.md").read_text()).data.license == "apache-2.0"


def test_a_standalone_language_model_gets_a_card(repositories, tmp_path):
    folder = shutil.copytree(repositories / "drawer", tmp_path / "drawer")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    ImageLanguageModel.from_pretrained(folder).save_pretrained(tmp_path / "scenes", standalone=True)
    card = ModelCard((tmp_path / "scenes" / "README.md").read_text())
    assert (card.data.license, card.data.library_name) == ("mit", "transformers")
    assert "| started from | `drawer` (licence: mit) |" in card.text
    assert 'pipeline("any-to-any", model="scenes", trust_remote_code=True)' in card.text


def test_saving_a_processor_keeps_the_code_of_a_repository(repositories, tmp_path):
    for name, cls in (("tokenizer", SVQVAEImageProcessor), ("drawer", svqvae_hf.SVQVAEProcessor)):
        folder = shutil.copytree(repositories / name, tmp_path / name)
        cls.from_pretrained(folder).save_pretrained(folder)
        for path in (repositories / name).rglob("*config.json"):
            written = json.loads((folder / path.relative_to(repositories / name)).read_text())
            assert written.get("auto_map") == json.loads(path.read_text()).get("auto_map"), path
    processor = SVQVAEImageProcessor()
    processor.save_pretrained(tmp_path / "tokenizer")
    loaded = AutoImageProcessor.from_pretrained(tmp_path / "tokenizer", trust_remote_code=True)
    assert loaded.to_dict()["auto_map"]


def test_code_is_written_only_if_asked_for(repositories, tmp_path):
    models = {"tokenizer": SVQVAE, "next_scale": NextScaleTransformer, "llamagen": LlamaGenForCausalLM}
    for name, cls in models.items():
        cls.from_pretrained(repositories / name).save_pretrained(tmp_path / name)
        assert "auto_map" not in json.loads((tmp_path / name / "config.json").read_text())
        assert list((repositories / name).glob("*.py"))
    assert not list(tmp_path.rglob("*.py"))
