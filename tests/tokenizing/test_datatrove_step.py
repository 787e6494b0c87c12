import datasets
import pytest
from cli_runner import svqvae
from conftest import make_tiny
from datatrove.executor import LocalPipelineExecutor
from token_set_parts import SCALES, content, save_photos

from svqvae_hf.tokenizing.datatrove_step import TokenizeImages

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:datatrove", "ignore::ResourceWarning")


def test_tasks_of_datatrove_make_the_set_of_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    photos = save_photos(tmp_path / "photos")
    make_tiny().save_pretrained(tmp_path / "tiny")
    step = TokenizeImages(
        [str(photos)], str(tmp_path / "fleet" / "out"), str(tmp_path / "tiny"), scales=SCALES, device="cpu"
    )
    for _ in range(2):  # the second run finds all tasks done
        LocalPipelineExecutor([step], tasks=3, workers=1, logging_dir=str(tmp_path / "logs")).run()
    assert len(list((tmp_path / "logs" / "completions").iterdir())) == 3
    arguments = ["--model", tmp_path / "tiny", "--scales", *SCALES, "--num-parts", "3", "--workers", "0"]
    assert svqvae("tokenize", photos, tmp_path / "alone" / "out", *arguments, "--device", "cpu") == 1  # skips an image
    assert content(tmp_path / "fleet" / "out") == content(tmp_path / "alone" / "out")


def test_the_step_must_be_the_first():
    with pytest.raises(ValueError, match="`TokenizeImages` must be the first step"):
        TokenizeImages(["photos"], "out", "tiny").run(iter([]))
