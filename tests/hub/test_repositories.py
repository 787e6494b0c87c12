"""Models, a pipeline and a token set, uploaded to a stand-in for the Hub and loaded from there by one new process."""

import json

import pytest
from conftest import ROOT
from generators import make_autoregressive, make_next_scale
from hub_server import run_python, serve_hub
from huggingface_hub import ModelCard
from tiny_language_models import extended
from token_set_parts import content, save_photos

pytestmark = pytest.mark.slow

# One process makes all calls to the Hub and prints what the tests check, because the Hub's URL is read at import.
CLIENT = """
import json, os, sys, time
from pathlib import Path
import datasets
import torch
from diffusers import AutoModel, ModularPipeline
from huggingface_hub import HfApi, constants
from transformers import AutoModelForCausalLM, AutoProcessor
import svqvae_hf
golden, work = Path(sys.argv[1]), Path(sys.argv[2])
saved = svqvae_hf.SVQVAEAutoregressivePipeline.from_pretrained(work / "pipeline")
from svqvae_hf import SVQVAE
from svqvae_hf.conversion.convert import convert
from svqvae_hf.data.image_sets import open_images
from svqvae_hf.token_sets.decoding import detokenize_set
from svqvae_hf.token_sets.settings import read_settings
from svqvae_hf.token_sets.writer import tokenize_set
from svqvae_hf.tokens.context_model import find_context_model
seen = {"errors": {}}
def sample(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(0, generator=torch.Generator().manual_seed(0), output_type="pt").images
def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
def error(name, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as error:
        seen["errors"][name] = [type(error).__name__, str(error)]
file = golden / "svqvae_tiny.safetensors"
model = SVQVAE.from_single_file(file)
convert(file, work / "out", variant="fp16", repo_id="org/converted")
HfApi().create_repo("org/converted", private=True)
HfApi().upload_folder(repo_id="org/converted", folder_path=work / "out")
seen["from_pretrained"] = same(model, SVQVAE.from_pretrained("org/converted"))
half = {"variant": "fp16", "torch_dtype": torch.float16}
seen["variant"] = same(*(SVQVAE.from_pretrained(name, **half) for name in ("org/converted", work / "out")))
seen["pushed"] = model.push_to_hub("org/pushed")
seen["from_push"] = same(model, SVQVAE.from_pretrained("org/pushed"))
HfApi().create_repo("org/raw")
HfApi().upload_folder(repo_id="org/raw", folder_path=golden, allow_patterns=["*tiny.*"], path_in_repo="files")
seen["from_single_file"] = same(model, SVQVAE.from_single_file("org/raw:files/svqvae_tiny.safetensors"))
llamagen = SVQVAE.from_single_file("org/raw:files/llamagen_tiny.pt")
seen["from_pickle"] = same(llamagen, SVQVAE.from_single_file(golden / "llamagen_tiny.pt"))
source = "org/raw:files/taming_tiny.ckpt"
taming = SVQVAE.from_single_file(source)
seen["requested"] = taming.push_to_hub("org/converted", create_pr=True, license="mit")
seen["from_request"] = same(taming, SVQVAE.from_pretrained("org/converted", revision="refs/pr/1"))
seen["main_unchanged"] = same(model, SVQVAE.from_pretrained("org/converted"))
# A pipeline and a language model
processor = AutoProcessor.from_pretrained(sys.argv[3])
assert type(processor) is svqvae_hf.SVQVAEProcessor
processor.save_pretrained(work / "processor", push_to_hub=True, repo_id="org/processor")
assert same(AutoProcessor.from_pretrained("org/processor").vqvae, processor.vqvae)
assert AutoModelForCausalLM.from_pretrained(sys.argv[3]).config.image_vocabulary["grids"]
saved.push_to_hub("org/dreams", private=True, license="mit")
assert torch.equal(sample(svqvae_hf.SVQVAEAutoregressivePipeline.from_pretrained("org/dreams")), sample(saved))
saved.push_to_hub("org/dreams", variant="fp16")
saved.save_pretrained(work / "twice", push_to_hub=True, repo_id="org/twice", private=True)
# Code beside the weights
scales = svqvae_hf.SVQVAENextScalePipeline.from_pretrained(work / "scales")
scales.push_to_hub("org/scales", standalone=True)
scales.vqvae.push_to_hub("org/tokenizer", standalone=True)
modular = ModularPipeline.from_pretrained("org/scales", trust_remote_code=True)
modular.load_components(trust_remote_code=True)
models = modular.vqvae, modular.transformer, AutoModel.from_pretrained("org/tokenizer", trust_remote_code=True)
assert all(type(model).__module__.startswith("diffusers_modules.") for model in models)
expected = scales(class_labels=2, temperature=0, output_type="latent").images
assert modular(class_labels=2, temperature=0, output="ids").equal(expected)
# A token set
tokenizer = saved.vqvae.eval()
HfApi().create_repo("org/photos", repo_type="dataset")
HfApi().upload_folder(repo_id="org/photos", repo_type="dataset", folder_path=work / "photos")
images = open_images(["org/photos"])
tokenize_set(tokenizer, images, work / "out-tokens", model_name="org/tiny", source_set="org/photos")
HfApi().create_repo("org/tokens", repo_type="dataset")
HfApi().upload_folder(repo_id="org/tokens", repo_type="dataset", folder_path=work / "out-tokens")
assert read_settings("org/tokens") == read_settings(work / "out-tokens")
rows = datasets.load_dataset("org/tokens", split="train")
assert rows.to_list() == datasets.load_dataset(str(work / "out-tokens"), split="train").to_list()
detokenize_set(tokenizer, "org/tokens", work / "images", max_images=1)
seen["rows"] = list(rows["key"]), rows.features["label"].names
error("no token set", read_settings, "org/gone")
error("no repository", SVQVAE.from_single_file, "org/gone:file.pt")
error("no file", SVQVAE.from_single_file, "org/raw:gone.pt")
error("gated", SVQVAE.from_single_file, "org/gated:file.pt")
del os.environ["HF_TOKEN"]
error("no login", model.push_to_hub, "org/new")
os.environ["HF_TOKEN"] = "hf_stand_in"
error("licence of a model", model.push_to_hub, "org/new", license="my own")
assert find_context_model("org/pushed", "") is None
hub, constants.ENDPOINT = constants.ENDPOINT, "http://127.0.0.1:1"
start = time.monotonic()
seen["unreachable"] = same(model, SVQVAE.from_pretrained("org/pushed")) and time.monotonic() - start < 5
error("no network", model.push_to_hub, "org/new")
constants.ENDPOINT, constants.HF_HUB_OFFLINE = hub, True
seen["offline file"] = same(model, SVQVAE.from_single_file("org/raw:files/svqvae_tiny.safetensors"))
seen["offline model"] = same(model, SVQVAE.from_pretrained("org/pushed"))
assert find_context_model("org/pushed", "") is None
error("offline", SVQVAE.from_single_file, "org/raw:files/taming_tiny.pt")
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    with serve_hub(folder) as env:
        gated = folder / "hub" / "org" / "gated"
        (gated / "main").mkdir(parents=True)
        (gated / "settings.json").write_text('{"gated": true}')
        yield folder, env


@pytest.fixture(scope="module")
def seen(hub):
    folder, env = hub
    make_autoregressive(class_names=["cat", "dog", "fox"]).save_pretrained(folder / "pipeline")
    make_next_scale().save_pretrained(folder / "scales")
    photos = save_photos(folder / "photos")
    for i, name in ((0, "cat"), (1, "dog")):
        (photos / name).mkdir()
        (photos / f"{i}.png").rename(photos / name / f"{i}.png")
    for path in photos.glob("*.png"):
        path.unlink()
    return json.loads(run_python(CLIENT, env, ROOT / "tests" / "golden", folder, extended("llama")).splitlines()[-1])


def test_pushed_conversion_loads_bit_equal(hub, seen):
    assert seen["from_pretrained"]
    assert seen["variant"]
    assert sorted(file.name for file in (hub[0] / "hub" / "org" / "converted" / "main").iterdir()) == [
        "README.md",
        "config.json",
        "diffusion_pytorch_model.fp16.safetensors",
        "diffusion_pytorch_model.safetensors",
        "preprocessor_config.json",
    ]
    card = (hub[0] / "hub" / "org" / "converted" / "main" / "README.md").read_text()
    assert 'from_pretrained("org/converted")' in card


def test_pushed_model_loads_bit_equal(hub, seen):
    assert seen["from_push"]
    assert "/org/pushed/commit/" in seen["pushed"]
    card = (hub[0] / "hub" / "org" / "pushed" / "main" / "README.md").read_text()
    assert 'from_pretrained("org/pushed")' in card
    assert "library_name: svqvae-hf" in card


def test_pull_request_leaves_main_unchanged(hub, seen):
    assert seen["requested"].endswith("/org/converted/discussions/1")
    assert seen["from_request"]
    assert seen["main_unchanged"]
    assert "license: mit" in (hub[0] / "hub" / "org" / "converted" / "refs" / "pr" / "1" / "README.md").read_text()


@pytest.mark.usefixtures("seen")
def test_pushed_pipelines_have_weights_card_and_visibility(hub):
    folder = hub[0] / "hub" / "org"
    weights = list((folder / "dreams" / "main").rglob("*model*.safetensors"))
    half_precision = [file for file in weights if ".fp16." in file.name]
    assert (len(weights), len(half_precision)) == (4, 2)
    weights_without_variant = list((folder / "twice" / "main").rglob("*model*.safetensors"))
    assert len(weights_without_variant) == 2
    assert not any(".fp16." in file.name for file in weights_without_variant)
    for name in ("dreams", "twice"):
        assert json.loads((folder / name / "settings.json").read_text())["visibility"] == "private"
    assert ModelCard((folder / "dreams" / "main" / "README.md").read_text()).data.license == "mit"


def test_token_set_is_made_from_a_set_on_the_hub_and_decoded_there(hub, seen):
    folder = hub[0]
    assert seen["rows"] == [["cat/0.png", "dog/1.png"], ["cat", "dog"]]
    pushed = folder / "hub" / "org" / "tokens" / "main"
    assert content(pushed) == content(folder / "out-tokens")
    assert "source_datasets:\n- org/photos" in (pushed / "README.md").read_text()
    assert (folder / "images" / "cat" / "0_x1.png").exists()


def test_errors_are_one_line(seen):
    messages = {
        "no token set": "could not download `org/gone` from the Hub: the repository does not exist",
        "no repository": "could not download `org/gone:file.pt` from the Hub: the repository does not exist",
        "no file": "could not download `org/raw:gone.pt` from the Hub: the repository has no such file.",
        "gated": "could not download `org/gated:file.pt` from the Hub: access is restricted. Accept the terms",
        "no login": "Could not create `org/new` on the Hub: you are not logged in. Log in with `hf auth login`.",
        "no network": "Could not create `org/new` on the Hub: the Hub cannot be reached. Check the network",
    }
    for fault, message in messages.items():
        kind, text = seen["errors"][fault]
        assert kind == "OSError"
        assert message in text
        assert "\n" not in text


def test_wrong_licence_is_found_before_a_repository_is_made(hub, seen):
    assert seen["errors"]["licence of a model"] == [
        "ValueError",
        "`license` must be an identifier that the Hub knows, such as `apache-2.0`, or `other` for the rest, got "
        "'my own'.",
    ]
    assert not (hub[0] / "hub" / "org" / "new").exists()


def test_offline_and_without_a_network_downloaded_files_load(seen):
    assert seen["unreachable"]
    assert seen["offline file"]
    assert seen["offline model"]
    assert seen["errors"]["offline"][1] == (
        "could not download `org/raw:files/taming_tiny.pt` from the Hub: the Hub cannot be reached, and no complete "
        "copy is cached. Check the network, HF_HUB_OFFLINE and HF_ENDPOINT."
    )
