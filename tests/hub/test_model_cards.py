import ast
import re

import pytest
import torch

from svqvae_hf.hub.model_cards import model_card


def test_user_text_is_escaped(tiny_model):
    origin = {"license": "mit\n# d", "provenance": {"source": "`a|b\nc.pt`"}, "variants": {"fp16": torch.float16}}
    card = model_card(tiny_model.config, repo_id='org/a"b\n# c', **origin)
    headings = [line for line in card.split("---\n", 2)[2].splitlines() if re.match("#+ ", line)]
    assert headings == ['# a"b # c', "## Use", "## Origin", "## Licence"]
    assert r"| source | `a\|b c.pt` |" in card
    calls = re.findall(r"from_pretrained\((.*?)[,)]", card)
    assert [ast.literal_eval(call) for call in calls] == ['org/a"b\n# c'] * 3


@pytest.mark.parametrize("block", [0, 1], ids=["with the package", "without the package"])
def test_example_runs(block, tiny_model, photo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photo.crop((0, 0, 45, 34)).save("photo.jpg")
    tiny_model.save_pretrained("org/name", standalone=True)
    card = model_card(tiny_model.config, repo_id="org/name", standalone=True)
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    found = {}
    exec(blocks[block], found)
    assert torch.is_grad_enabled()
    assert found["ids"].shape == (1, 9, 12)
    assert found["images"][0].size == (45, 34)
    assert (tmp_path / "reconstruction.png").exists()
