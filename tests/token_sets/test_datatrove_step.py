import inspect
import re
from unittest.mock import Mock

import datasets
import pytest
from cli_runner import svqvae
from conftest import ROOT, make_tiny
from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
from token_set_parts import content, save_photos

from svqvae_hf.token_sets.datatrove_step import TokenizeImages

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.mark.slow
def test_tasks_of_datatrove_make_the_files_of_the_command_by_default(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    photos = save_photos(tmp_path / "photos")
    make_tiny().save_pretrained(tmp_path / "tiny")
    step = TokenizeImages([str(photos)], str(tmp_path / "fleet" / "out"), str(tmp_path / "tiny"))
    for _ in range(2):  # the second run finds all tasks done
        LocalPipelineExecutor([step], tasks=3, workers=1, logging_dir=str(tmp_path / "logs")).run()
    assert len(list((tmp_path / "logs" / "completions").iterdir())) == 3
    command = ["tokenize", photos, "--output", tmp_path / "alone" / "out"]
    command += ["--model", tmp_path / "tiny", "--num-parts", "3"]
    assert svqvae(*command) == 1  # skips an image
    assert content(tmp_path / "fleet" / "out") == content(tmp_path / "alone" / "out")


def test_the_slurm_block_of_the_page_runs(monkeypatch):
    """How SLURM and datatrove run the step is for their own tests."""
    executor = Mock()
    monkeypatch.setattr("datatrove.executor.SlurmPipelineExecutor", executor)
    page = (ROOT / "docs" / "fleet.md").read_text()
    code = re.search(r"^## SLURM\n.*?```py\n(.*?)```", page, re.MULTILINE | re.DOTALL)[1]
    exec(code, {"__name__": "__main__"})
    executor.return_value.run.assert_called_once_with()
    options = executor.call_args.kwargs
    assert isinstance(options["pipeline"][0], TokenizeImages)
    assert options.keys() <= inspect.signature(SlurmPipelineExecutor).parameters.keys()


def test_the_step_must_be_the_first():
    with pytest.raises(ValueError, match="`TokenizeImages` must be the first step"):
        TokenizeImages(["photos"], "out", "tiny").run(iter([]))
