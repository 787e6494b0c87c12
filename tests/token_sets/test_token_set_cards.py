import ast
import dataclasses
import re
import shlex
from pathlib import Path

import pytest
from cli_runner import svqvae
from huggingface_hub import DatasetCard

from svqvae_hf import DEFAULT_MODEL
from svqvae_hf.token_sets.cards import public_names, token_set_card
from svqvae_hf.token_sets.settings import TokenSettings

SETTINGS = TokenSettings(
    **{"model": "org/name", "scales": (1.0, 0.5), "f": 4, "codebook_size": 64, "codebook_fingerprint": "0" * 64},
    **{"tile_size": None, "overlap": None, "crops": "whole", "resolution": None, "scale_from": "image"},
)


def card(repo_id, columns=(), **settings):
    settings = dataclasses.replace(SETTINGS, **settings)
    return token_set_card(repo_id=repo_id, settings=settings, columns=columns, totals={"images": 3, "rows": 3})


def test_card_describes_the_set_and_its_columns():
    text = card("org/tokens", ["ids_1", "key", "label"])
    assert DatasetCard(text).data.license == "unknown"
    assert "\n# tokens\n" in text
    assert "| `ids_1` | ids at scale 0.5, row by row |\n" in text
    assert "| scales made from | the image |\n" in text
    assert "| `label` | as in the image set |\n" in text
    assert 'read_settings("org/tokens")' in text
    assert "`svqvae decode org/tokens --model org/name --output DIR`" in text
    assert "{" not in text


def test_card_names_the_licence_of_the_tokenizer(two_images, saved_model, tmp_path):
    assert svqvae("tokenize", two_images / "a.png", "--output", tmp_path / "bundled") == 0
    text = (tmp_path / "bundled" / "README.md").read_text()
    assert "| model | bundled (licence: cc-by-sa-4.0) |" in text
    assert DatasetCard(text).data.license == "unknown", "it is the licence of the images"
    assert svqvae("tokenize", two_images / "a.png", "--output", tmp_path / "tiny", "--model", saved_model) == 0
    assert f"| model | {Path(saved_model).name} |" in (tmp_path / "tiny" / "README.md").read_text()


def test_user_text_cannot_break_the_card():
    repo_id = 'org/a"b\n# c'
    text = card(repo_id, ["a|b"], model="my|models/best one")
    headings = [line for line in text.split("---\n", 2)[2].splitlines() if re.match("#+ ", line)]
    assert headings == ['# a"b # c', "## Columns", "## Use", "## Licence"]
    assert r"| `a\|b` | as in the image set |" in text
    assert r"| model | my\|models/best one |" in text
    calls = re.findall(r"(?:read_settings|load_dataset)\((.*?)[,)]", text)
    assert [ast.literal_eval(call) for call in calls] == [repo_id] * 2
    command = re.search(r"`(svqvae decode .*?)`", text)[1]
    assert shlex.split(command)[3:5] == ["--model", "my|models/best one"]


@pytest.mark.parametrize("model", [[], ["--model", DEFAULT_MODEL]])
def test_command_on_the_card_decodes_a_set_of_the_bundled_model(model, two_images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert svqvae("tokenize", two_images / "a.png", "--output", "tokens", *model) == 0
    command = re.search(r"`svqvae (decode .*?)`", (tmp_path / "tokens" / "README.md").read_text())[1]
    assert svqvae(*shlex.split(command)) == 0
    assert len(list((tmp_path / "DIR").glob("*.png"))) == 1


def test_names_are_public(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "org" / "here").mkdir(parents=True)
    models = {"models/tiny": "tiny", "org/name": "org/name", DEFAULT_MODEL: "bundled"}
    assert {model: public_names(["photos"], model)["model_name"] for model in models} == models
    sets = {("org/photos",): "org/photos", ("org/photos", "more"): None, ("org/here",): None, ("s3://a/b",): None}
    assert {data: public_names(data, "tiny")["source_set"] for data in sets} == sets
