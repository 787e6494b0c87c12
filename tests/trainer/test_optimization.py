import pytest
import torch
from accelerate import Accelerator
from conftest import make_tiny
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from train import KERNEL_NDIM

from svqvae_hf.trainer.optimization import parameter_groups, rescale_gradients
from svqvae_hf.trainer.options import RunOptions
from svqvae_hf.trainer.weights import Weights


def test_weight_decay_excludes_norms_biases_and_codes():
    model = make_tiny()
    decayed, others = parameter_groups(model, 0.1, KERNEL_NDIM)
    assert {parameter.ndim for parameter in decayed["params"]} == {4}
    assert any(parameter is model.quantize.embedding.weight for parameter in others["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


def step_with_gradient(gradient, max_grad_norm):
    """Norm, weights and learning rate after one step of plain SGD from 0 with this gradient."""
    layer = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(layer.weight)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    schedule = LambdaLR(optimizer, lambda step: 1.0 - step / 2)
    layer.weight.grad = torch.tensor([gradient])
    options = RunOptions(output_dir="out", max_grad_norm=max_grad_norm)
    weights = Weights(options, Accelerator(cpu=True), layer, layer, optimizer, schedule, use_ema=False)
    numbers = weights.update()
    assert layer.weight.grad is None
    return numbers["grad_norm"].item(), layer.weight[0].tolist(), schedule.get_last_lr()


def test_gradients_are_clipped_to_their_norm():
    assert step_with_gradient([3.0, 4.0], max_grad_norm=6.0) == (5.0, [-3.0, -4.0], [0.5])
    norm, weights, _ = step_with_gradient([3.0, 4.0], max_grad_norm=1.0)
    assert norm == 5
    assert weights == pytest.approx([-0.6, -0.8], abs=1e-5)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
def test_a_gradient_that_is_not_finite_changes_no_weight_but_the_learning_rate_advances():
    norm, weights, learning_rates = step_with_gradient([1.0, float("inf")], max_grad_norm=1.0)
    assert norm == float("inf")
    assert weights == [0.0, 0.0]
    assert learning_rates == [0.5]


def test_gradients_are_rescaled():
    layer = nn.Linear(2, 1)
    layer.weight.grad = torch.tensor([[2.0, 4.0]])
    rescale_gradients(layer, 0.5)
    assert layer.weight.grad.tolist() == [[1.0, 2.0]]
    assert layer.bias.grad is None
