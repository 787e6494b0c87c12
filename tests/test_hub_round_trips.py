"""A token set and a pipeline, pushed to a stand-in for the Hub, and a language model, loaded in one new process."""

import json

import pytest
from conftest import make_tiny
from hub_server import run_python, serve_hub
from huggingface_hub import ModelCard
from tiny_language_models import extended
from token_set_parts import content, save_photos
from transformers import LlamaConfig, LlamaForCausalLM

from svqvae_hf import SVQVAEAutoregressivePipeline

PIPELINE = """
import sys
from pathlib import Path
import torch
from diffusers import DiffusionPipeline
from transformers import AutoModelForCausalLM, AutoProcessor
import svqvae_hf

def sample(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(0, generator=torch.Generator().manual_seed(0), output_type="pt").images

work = Path(sys.argv[1])
saved = DiffusionPipeline.from_pretrained(work / "pipeline")  # found by `import svqvae_hf` alone
assert type(AutoProcessor.from_pretrained(sys.argv[2])) is svqvae_hf.SVQVAEProcessor
assert AutoModelForCausalLM.from_pretrained(sys.argv[2]).config.image_vocabulary["grids"]
saved.push_to_hub("org/dreams", private=True, license="mit")
for cls in (DiffusionPipeline, svqvae_hf.SVQVAEAutoregressivePipeline):
    loaded = cls.from_pretrained("org/dreams")
    assert type(loaded) is svqvae_hf.SVQVAEAutoregressivePipeline
    assert torch.equal(sample(loaded), sample(saved))
saved.push_to_hub("org/dreams", variant="fp16")
saved.save_pretrained(work / "twice", push_to_hub=True, repo_id="org/twice", private=True)
"""

TOKEN_SET = """
import datasets
from huggingface_hub import HfApi
from svqvae_hf.data.image_sets import open_images
from svqvae_hf.token_sets.writer import tokenize_set
from svqvae_hf.token_sets.decoding import detokenize_set
from svqvae_hf.token_sets.settings import read_settings

model = saved.vqvae.eval()
HfApi().create_repo("org/photos", repo_type="dataset")
HfApi().upload_folder(repo_id="org/photos", repo_type="dataset", folder_path=work / "photos")
images = open_images(["org/photos"])
tokenize_set(model, images, work / "out", model_name="org/tiny", source_set="org/photos")
HfApi().create_repo("org/tokens", repo_type="dataset")
HfApi().upload_folder(repo_id="org/tokens", repo_type="dataset", folder_path=work / "out")
assert read_settings("org/tokens") == read_settings(work / "out")
rows = datasets.load_dataset("org/tokens", split="train")
assert rows.to_list() == datasets.load_dataset(str(work / "out"), split="train").to_list()
detokenize_set(model, "org/tokens", work / "images", max_images=1)
try:
    read_settings("org/gone")
except OSError as error:
    print(error)
print(list(rows["key"]), rows.features["label"].names)
"""


def save_pipeline(folder):
    vqvae = make_tiny(sample_size=8)
    config = LlamaConfig(
        vocab_size=66,  # 64 codes, one class, no class
        max_position_embeddings=5,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    SVQVAEAutoregressivePipeline(vqvae, LlamaForCausalLM(config).eval(), num_classes=1).save_pretrained(folder)


@pytest.mark.slow
def test_pipeline_and_token_set_by_hub_id(tmp_path):
    save_pipeline(tmp_path / "pipeline")
    photos = save_photos(tmp_path / "photos")
    for i, name in ((0, "cat"), (1, "dog")):
        (photos / name).mkdir()
        (photos / f"{i}.png").rename(photos / name / f"{i}.png")
    for path in photos.glob("*.png"):
        path.unlink()
    with serve_hub(tmp_path) as env:
        gone, rows = run_python(PIPELINE + TOKEN_SET, env, tmp_path, extended("llama")).splitlines()[-2:]
    assert gone.startswith("could not download the token set `org/gone` from the Hub: the repository does not exist")
    assert rows == "['cat/0.png', 'dog/1.png'] ['cat', 'dog']"
    pushed = tmp_path / "hub" / "org" / "tokens"
    weights = {
        name: {*(tmp_path / "hub" / "org" / name / "main").rglob("*model*.safetensors")}
        for name in ("dreams", "twice")
    }
    assert {name: sum(".fp16." in file.name for file in files) for name, files in weights.items()} == {
        "dreams": 2,
        "twice": 0,
    }
    assert len(weights["dreams"]) == 2 * len(weights["twice"]) == 4
    for name in ("dreams", "twice"):
        settings = json.loads((tmp_path / "hub" / "org" / name / "settings.json").read_text())
        assert settings["visibility"] == "private"
    dreams = (tmp_path / "hub" / "org" / "dreams" / "main" / "README.md").read_text()
    assert ModelCard(dreams).data.license == "mit"
    assert content(pushed / "main") == content(tmp_path / "out")
    card = (pushed / "main" / "README.md").read_text()
    assert "source_datasets:\n- org/photos" in card
    assert (tmp_path / "images" / "00000000_x1.png").exists()
