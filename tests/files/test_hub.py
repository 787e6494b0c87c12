"""A model on the Hub is the same as its folder."""

import shutil

from hub_server import run_python, serve_hub

from svqvae_files.file_names import DEFAULT_MODEL
from svqvae_files.identity import model_digest

DIGEST = """
import sys
from svqvae_files.hub import model_folder
from svqvae_files.identity import model_digest
assert "torch" not in sys.modules
print(model_digest(model_folder("org/model")))
"""


def test_a_model_on_the_hub_has_the_digest_of_its_folder(tmp_path):
    with serve_hub(tmp_path) as env:
        repository = tmp_path / "hub" / "org" / "model"
        shutil.copytree(DEFAULT_MODEL, repository / "main")
        (repository / "settings.json").write_text("{}")
        online = run_python(DIGEST, env)
        offline = run_python(DIGEST, env | {"HF_HUB_OFFLINE": "1"})
    assert online == offline == model_digest(DEFAULT_MODEL) + "\n"
