"""Tests of `svqvae_hf.trainer.muon`."""

import copy

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM

from svqvae_hf.trainer.muon import MuonAndAdam, muon_groups

LEARNING_RATE = 0.01


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True))


def make_optimizer(model):
    return MuonAndAdam(muon_groups(model, weight_decay=0.0), lr=LEARNING_RATE, betas=(0.9, 0.95))


def train(model, optimizer, steps):
    for step in steps:
        tokens = torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(step))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_groups_hold_each_weight_once_and_matrices_of_layers_alone_in_the_first(model):
    matrices, others = (group["params"] for group in muon_groups(model, weight_decay=0.1))
    layers = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    assert {id(weight) for weight in matrices} == {id(weight) for weight in layers}
    assert sorted(map(id, matrices + others)) == sorted(map(id, model.parameters()))


def test_updates_of_matrices_are_orthogonal(model):
    weight = model.model.layers[0].self_attn.q_proj.weight
    before = weight.detach().clone()
    train(model, make_optimizer(model), [0])
    update = torch.linalg.svdvals((before - weight).detach()) / (LEARNING_RATE * 0.2 * 16**0.5)
    assert update.median() > 0.5
    assert update.max() < 1.5


def test_a_schedule_changes_both_optimizers(model):
    optimizer = make_optimizer(model)
    schedule = LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    train(model, optimizer, [0])
    schedule.step()
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, [1])
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_three_steps_and_three_more_from_a_saved_state_equal_six(model, tmp_path):
    resumed = copy.deepcopy(model)
    train(model, make_optimizer(model), range(6))
    optimizer = make_optimizer(resumed)
    train(resumed, optimizer, range(3))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    optimizer = make_optimizer(resumed)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    train(resumed, optimizer, range(3, 6))
    assert all(torch.equal(weight, resumed.state_dict()[name]) for name, weight in model.state_dict().items())
