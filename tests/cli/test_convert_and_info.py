import pytest
from cli_runner import fails, names, svqvae
from conftest import ROOT
from generators import make_autoregressive, make_next_scale
from peft import LoraConfig

from svqvae_hf import SVQVAE

pytestmark = pytest.mark.usefixtures("few_windows")
GOLDEN = ROOT / "tests" / "golden" / "svqvae_tiny.safetensors"


def read_facts(capsys):
    return dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())


def test_convert_and_info(tmp_path, capsys):
    repo = tmp_path / "repo"
    assert svqvae("convert", GOLDEN, "--output", repo, "--variant", "fp16", "--license", "mit") == 0
    assert "svqvae" in capsys.readouterr().out
    assert {"README.md", "config.json", "diffusion_pytorch_model.fp16.safetensors"} <= set(names(repo))
    assert svqvae("info", repo) == 0
    facts = read_facts(capsys)
    assert facts["kind"] == "SVQVAE"
    model = SVQVAE.from_pretrained(repo)
    assert (facts["f"], facts["encoder_ch_mult"]) == ("2", "[1, 2]")
    assert facts["parameters"] == f"{model.num_parameters():,}"
    assert model.codebook_fingerprint() in facts["codebook"]
    assert svqvae("info", GOLDEN) == 0
    facts = read_facts(capsys)
    assert facts["kind"].startswith("original checkpoint, SVQVAE")
    assert facts["encoder_ch_mult"] == "(1, 2)"


def test_info_of_a_token_file(two_images, tmp_path, saved_model, capsys):
    svqvae("encode", two_images / "a.png", "--output", tmp_path, "--model", saved_model, "--scales", "2", "1")
    capsys.readouterr()
    assert svqvae("info", tmp_path / "a.safetensors") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split(None, 1) == ["kind", "token file"]
    assert any("57 x 35 pixels" in line for line in lines)
    assert lines[-3].split() == ["scales", "from", "image"]
    assert lines[-2].startswith("scale 2")
    assert "30 x 18 = 540 tokens" in lines[-2]
    assert f"6.00 bits/token, {15 * 9 * 6 / (57 * 35):.4f} bits/pixel" in lines[-1]


def test_info_of_a_token_set(two_images, tmp_path, saved_model, capsys):
    argv = ["--model", saved_model, "--workers", "0", "--crops", "centre", "--resolution", "16", "--num-parts", "1"]
    argv += ["--tile-size", "32", "--overlap", "8", "--scale-from", "latents"]
    svqvae("tokenize", two_images, "--output", tmp_path / "set", *argv)
    capsys.readouterr()
    assert svqvae("info", tmp_path / "set") == 0
    lines = capsys.readouterr().out.splitlines()
    facts = {line[:13].strip(): line[13:].strip() for line in lines}
    assert (facts["kind"], facts["rows"], facts["Parquet files"]) == ("token set", "2", "1")
    assert facts["parts"] == "1 (complete; finished: 1)"
    assert (facts["crops"], facts["resolution"], facts["scales"]) == ("centre", "16", "1")
    assert (facts["tiles"], facts["scales from"]) == ("32 pixels, overlap 8", "latents")
    assert facts["codebook"] == f"64 codes, sha256 {SVQVAE.from_pretrained(saved_model).codebook_fingerprint()}"


@pytest.mark.parametrize(("resolution", "is_told"), [(16, False), (17, True)])
def test_padding_of_crops_is_told(two_images, tmp_path, saved_model, capsys, resolution, is_told):
    argv = ["--model", saved_model, "--workers", "0", "--crops", "centre", "--resolution", resolution]
    assert svqvae("tokenize", two_images, "--output", tmp_path / "set", *argv) == 0
    told = "--resolution 17 is not a multiple of 4, the f of the model. Each crop is padded to 20 x 20 pixels"
    assert (told in capsys.readouterr().err) == is_told


def test_classes_of_subfolders_are_told(photo, tmp_path, saved_model, capsys):
    for number in range(12):
        folder = tmp_path / "photos" / f"{2000 + number}"
        folder.mkdir(parents=True)
        photo.crop((100, 100, 116, 116)).save(folder / "0.png")
    svqvae("tokenize", tmp_path / "photos", "--output", tmp_path / "set", "--model", saved_model, "--workers", "0")
    classes = "12 (2000, 2001, 2002, 2003, 2004, 2005, 2006, 2007, 2008, 2009, ...)"
    assert capsys.readouterr().out.startswith(f"classes  label, the names of subfolders: {classes}\nwritten  ")
    svqvae("info", tmp_path / "set")
    assert f"classes of label  {classes}" in capsys.readouterr().out


def test_info_of_a_token_set_that_is_not_complete(two_images, tmp_path, saved_model, capsys):
    argv = ["--model", saved_model, "--workers", "0", "--num-parts", "2", "--part", "1"]
    svqvae("tokenize", two_images, "--output", tmp_path / "set", *argv)
    capsys.readouterr()
    assert svqvae("info", f"file://{tmp_path / 'set'}") == 0
    assert read_facts(capsys) == {"kind": "token set", "parts": "2 (not complete; finished: 1)", "missing": "0"}
    error = fails(capsys, "decode", tmp_path / "set", "--output", tmp_path / "out", "--model", saved_model)
    assert f"parts of `{tmp_path / 'set'}` are missing. Run the same `svqvae tokenize` again." in error


@pytest.mark.parametrize("lost_file", ["parts/options.json", "svqvae_tokens.json"])
def test_info_of_a_token_set_that_has_lost_its_options(two_images, tmp_path, saved_model, capsys, lost_file):
    folder = tmp_path / "set"
    argv = ["tokenize", two_images, "--output", folder, "--model", saved_model, "--workers", "0", "--num-parts", "2"]
    parts = ["0"] if lost_file == "parts/options.json" else ["0", "1"]
    for part in parts:
        svqvae(*argv, "--part", part)
    (folder / lost_file).unlink()
    capsys.readouterr()
    for command in (["info", folder], ["decode", folder, "--output", tmp_path / "out", "--model", saved_model]):
        error = fails(capsys, *command)
        assert f"`{folder}/{lost_file}` is missing, although the token set has other files. Run the same" in error
    assert svqvae(*argv, "--part", "0") == 0
    assert (folder / lost_file).is_file()
    assert svqvae("info", folder) == 0


def test_info_of_an_adapter(tmp_path, capsys):
    LoraConfig(r=4, target_modules=["q_proj"], base_model_name_or_path="org/lm").save_pretrained(tmp_path)
    assert svqvae("info", tmp_path) == 0
    expected = {"kind": "LoRA adapter", "base_model_name_or_path": "org/lm", "r": "4", "target_modules": "['q_proj']"}
    assert expected.items() <= read_facts(capsys).items()


def test_info_of_pipelines_and_their_generators(tmp_path, capsys):
    make_autoregressive(class_names=["cat", "dog", "fox"]).save_pretrained(tmp_path / "ids")
    make_next_scale().save_pretrained(tmp_path / "scales")
    for folder, facts in {
        "ids": {"kind": "SVQVAEAutoregressivePipeline", "class_names": "['cat', 'dog', 'fox']"},
        "scales": {"kind": "SVQVAENextScalePipeline", "vqvae": "['svqvae_hf', 'SVQVAE']"},
        "ids/language_model": {"kind": "LlamaGenForCausalLM", "grid_size": "4"},
        "scales/transformer": {"kind": "NextScaleTransformer", "num_classes": "3"},
    }.items():
        assert svqvae("info", tmp_path / folder) == 0
        found = read_facts(capsys)
        assert facts.items() <= found.items()
        assert "[None, None]" not in found.values()


def test_a_converted_file_is_not_converted_again(tmp_path, saved_model, capsys):
    file = f"{saved_model}/diffusion_pytorch_model.safetensors"
    message = f"`{file}` is already converted. Load its folder, `{saved_model}`, with `from_pretrained`."
    assert message in fails(capsys, "convert", file, "--output", tmp_path / "out")
    assert message in fails(capsys, "info", file)


@pytest.mark.parametrize("source", ["empty.pt", "text.pt", "cut.safetensors", "folder"])
def test_source_that_is_not_a_checkpoint_is_an_error(tmp_path, capsys, source):
    (tmp_path / "empty.pt").touch()
    (tmp_path / "text.pt").write_text("Dear diary,")
    (tmp_path / "cut.safetensors").write_bytes(GOLDEN.read_bytes()[:1000])
    (tmp_path / "folder").mkdir()
    before = names(tmp_path)
    assert source in fails(capsys, "convert", tmp_path / source, "--output", tmp_path / "repo")
    assert source in fails(capsys, "info", tmp_path / source)
    assert names(tmp_path) == before
