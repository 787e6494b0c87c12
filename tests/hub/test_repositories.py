import json

import pytest
from hub_server import run_python, serve_hub

pytestmark = pytest.mark.slow

# One process makes all calls to the Hub and prints what the tests check, because the Hub's URL is read at import.
CLIENT = """
import json, os, sys, time
from pathlib import Path
import torch
from huggingface_hub import HfApi, constants
from svqvae_hf import SVQVAE
from svqvae_hf.conversion.convert import convert

golden, work = Path(sys.argv[1]), Path(sys.argv[2])
seen = {"errors": {}}

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
convert(file, work / "out", repo_id="org/converted")
HfApi().create_repo("org/converted", private=True)
HfApi().upload_folder(repo_id="org/converted", folder_path=work / "out")
seen["from_pretrained"] = same(model, SVQVAE.from_pretrained("org/converted"))
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

error("no repository", SVQVAE.from_single_file, "org/gone:file.pt")
error("no file", SVQVAE.from_single_file, "org/raw:gone.pt")
error("gated", SVQVAE.from_single_file, "org/gated:file.pt")
del os.environ["HF_TOKEN"]
error("no login", model.push_to_hub, "org/new")

os.environ["HF_TOKEN"] = "hf_stand_in"
error("licence of a model", model.push_to_hub, "org/new", license="my own")

hub, constants.ENDPOINT = constants.ENDPOINT, "http://127.0.0.1:1"
start = time.monotonic()
seen["unreachable"] = same(model, SVQVAE.from_pretrained("org/pushed")) and time.monotonic() - start < 5
error("no network", model.push_to_hub, "org/new")
constants.ENDPOINT, constants.HF_HUB_OFFLINE = hub, True
seen["offline file"] = same(model, SVQVAE.from_single_file("org/raw:files/svqvae_tiny.safetensors"))
seen["offline model"] = same(model, SVQVAE.from_pretrained("org/pushed"))
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
def seen(hub, request):
    folder, env = hub
    golden = request.config.rootpath / "tests" / "golden"
    return json.loads(run_python(CLIENT, env, golden, folder))


def test_pushed_conversion_loads_bit_equal(hub, seen):
    assert seen["from_pretrained"]
    assert sorted(file.name for file in (hub[0] / "hub" / "org" / "converted" / "main").iterdir()) == [
        "README.md",
        "config.json",
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
    assert "library_name: diffusers" in card


def test_pull_request_leaves_main_unchanged(hub, seen):
    assert seen["requested"].endswith("/org/converted/discussions/1")
    assert seen["from_request"]
    assert seen["main_unchanged"]
    assert "license: mit" in (hub[0] / "hub" / "org" / "converted" / "refs" / "pr" / "1" / "README.md").read_text()


def test_errors_are_one_line(seen):
    messages = {
        "no repository": "Could not download `org/gone:file.pt` from the Hub: the repository does not exist",
        "no file": "Could not download `org/raw:gone.pt` from the Hub: the repository has no such file.",
        "gated": "Could not download `org/gated:file.pt` from the Hub: access is restricted. Accept the terms",
        "no login": "Could not create `org/new` on the Hub: you are not logged in. Log in with `hf auth login`.",
        "no network": "Could not create `org/new` on the Hub: it cannot be reached. Check the network",
    }
    for fault, message in messages.items():
        kind, text = seen["errors"][fault]
        assert kind == "OSError"
        assert message in text
        assert "\n" not in text


def test_wrong_licence_is_found_before_a_repository_is_made(hub, seen):
    assert seen["errors"]["licence of a model"] == [
        "ValueError",
        "`license` must be an identifier that the Hub knows, such as `apache-2.0` or `other`, got 'my own'.",
    ]
    assert not (hub[0] / "hub" / "org" / "new").exists()


def test_offline_and_without_a_network_downloaded_files_load(seen):
    assert seen["unreachable"]
    assert seen["offline file"]
    assert seen["offline model"]
    assert seen["errors"]["offline"][1] == (
        "Could not download `org/raw:files/taming_tiny.pt` from the Hub: the Hub cannot be reached, and the cache has "
        "no complete copy. Check the network, HF_HUB_OFFLINE and HF_ENDPOINT."
    )
