"""Licences, base models and stages that a result inherits."""

import pytest
from hub_server import run_python, serve_hub
from huggingface_hub import ModelCard

from svqvae_hf import DEFAULT_GENERATOR, DEFAULT_MODEL, SVQVAE
from svqvae_hf.hub.origin import STARTED_FROM, find_origin


def write_card(folder, license, more="", rows=""):
    folder.mkdir(parents=True)
    text = f"---\nlicense: {license}\ntags:\n- svqvae\n{more}---\n\n## Origin\n\n| | |\n|---|---|\n{rows}\n"
    (folder / "README.md").write_text(f"{text}\n## Licence\n")
    return str(folder)


def test_only_stated_licence_is_inherited_and_each_is_listed(tmp_path):
    tokens, model = write_card(tmp_path / "tokens", "cc-by-4.0"), write_card(tmp_path / "model", "unknown")
    origin = find_origin({"vqvae": model, "text encoder": str(tmp_path)}, {"token set": tokens})
    assert origin.license == "cc-by-4.0"
    assert origin.rows == {
        "vqvae": "`model` (licence: not known)",
        "text encoder": f"`{tmp_path.name}` (licence: not known)",
        "token set": "`tokens` (licence: cc-by-4.0)",
    }


def test_different_licences_need_a_decision(tmp_path):
    sources = {"vqvae": DEFAULT_MODEL}, {"token set": write_card(tmp_path / "tokens", "cc-by-nc-4.0")}
    with pytest.raises(ValueError, match="`bundled` cc-by-sa-4.0, `tokens` cc-by-nc-4.0. Pass .* `--license`"):
        find_origin(*sources)
    assert find_origin(*sources, "other").license == "other"
    for licences, expected in {"mit": "mit", "mit, gpl-3.0": "other", "unknown": None}.items():
        card = write_card(tmp_path / licences, f"[{licences}]")
        assert find_origin({"of": card}).license == expected


def test_licence_without_conditions_yields_to_another_one(tmp_path):
    images = {"image set": write_card(tmp_path / "images", "cc0-1.0")}
    assert find_origin({"vqvae": DEFAULT_MODEL}, images).license == "cc-by-sa-4.0"
    assert find_origin({}, images).license == "cc0-1.0"


def test_further_training_keeps_base_model_and_stages(tmp_path):
    rows = "| steps | 5 of `a\\|b` |\n| before: steps | 4 |\n| before (2): steps | 3 |"
    origin = find_origin({STARTED_FROM: write_card(tmp_path / "first", "mit", "base_model: org/original\n", rows)})
    assert (origin.license, origin.base_model) == ("mit", "org/original")
    expected_rows = {"before: steps": "5 of `a|b`", "before (2): steps": "4", "before (3): steps": "3"}
    assert origin.rows == {STARTED_FROM: "`first` (licence: mit)"} | expected_rows


def test_images_below_a_model_do_not_have_its_licence(tmp_path):
    model = write_card(tmp_path / "project", "mit")
    (tmp_path / "project" / "config.json").write_text("{}")
    (tmp_path / "project" / "photos").mkdir()
    assert find_origin({"vqvae": f"{model}/photos"}).license == "mit"
    assert find_origin({}, {"image set": f"{model}/photos"}).license is None
    assert find_origin({}, {"image set": model}).license == "mit"


def test_card_on_the_hub(tmp_path):
    with serve_hub(tmp_path) as env:
        write_card(tmp_path / "hub" / "org" / "model" / "main", "mit")
        (tmp_path / "hub" / "org" / "model" / "settings.json").write_text("{}")
        sources = {STARTED_FROM: "org/model", "source": "org/none", "file": "org/model:weights.pt"}
        code = f"from svqvae_hf.hub.origin import find_origin; print(*find_origin({sources}), sep='\\n')"
        licence, base, rows = run_python(code, env).splitlines()
    assert (licence, base) == ("mit", "org/model")
    assert "'source': '`org/none` (licence: not known)', 'file': '`org/model:weights.pt` (licence: mit)'" in rows


def test_bundled_models_state_their_licence_also_in_their_parts():
    for source in (DEFAULT_MODEL, DEFAULT_GENERATOR, f"{DEFAULT_GENERATOR}/vqvae"):
        assert find_origin({"source": source}).license == "cc-by-sa-4.0"
    card = SVQVAE.from_pretrained(DEFAULT_MODEL).make_card("org/copy")
    assert ModelCard(card).data.license == "cc-by-sa-4.0"


def test_broken_card_is_named(tmp_path):
    (tmp_path / "README.md").write_text("---\n[\n---\n")
    with pytest.raises(ValueError, match=f"the card of `{tmp_path}`, README.md, must start with YAML"):
        find_origin({"vqvae": str(tmp_path)})


@pytest.mark.parametrize("metadata", ["tags: 3", "tags: svqvae", "base_model: 3", "base_model: {a: b}", "license: []"])
def test_metadata_of_other_types_states_nothing(tmp_path, metadata):
    (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\n")
    assert find_origin({STARTED_FROM: str(tmp_path)})[:2] == (None, None)


def test_the_first_of_several_base_models_is_named(tmp_path):
    (tmp_path / "README.md").write_text("---\nbase_model:\n- org/first\n- org/second\n---\n")
    assert find_origin({STARTED_FROM: str(tmp_path)}).base_model == "org/first"


@pytest.mark.parametrize("metadata", ["- a", "3", "license: 3", "license: {a: b}"])
def test_metadata_that_is_no_card_is_one_line(tmp_path, metadata):
    (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\n")
    with pytest.raises(ValueError, match="card") as error:
        find_origin({"vqvae": str(tmp_path)})
    assert "\n" not in str(error.value)
