import torch

from svqvae_hf.trainer.losses.moving_average import MovingAverage


def test_mean_weighs_each_batch_by_its_age():
    torch.manual_seed(0)
    batches = torch.randn(30, 2, 3, dtype=torch.float64)
    average = MovingAverage((2, 3), decay=0.9)
    assert average.mean.eq(0).all()
    for count, batch in enumerate(batches, 1):
        average.update(batch)
        weights = 0.9 ** torch.arange(count - 1, -1, -1, dtype=torch.float64)
        expected = (weights[:, None, None] * batches[:count]).sum(0) / weights.sum()
        torch.testing.assert_close(average.mean, expected.float())


def test_batch_with_a_value_that_is_not_finite_is_skipped():
    average, expected = MovingAverage((2,), 0.5), MovingAverage((2,), 0.5)
    for batch in ([1.0, 2.0], [torch.nan, 5.0], [3.0, -torch.inf], [4.0, 0.0]):
        average.update(torch.tensor(batch))
        if torch.tensor(batch).isfinite().all():
            expected.update(torch.tensor(batch))
    assert average.mean.tolist() == expected.mean.tolist()


def test_loss_keeps_the_mean_it_was_computed_with():
    average = MovingAverage((1,), 0.5)
    average.update(torch.tensor([2.0]))
    value = torch.ones(1, requires_grad=True)
    loss = (value * average.mean).sum()
    average.update(torch.tensor([8.0]))
    loss.backward()
    assert value.grad.item() == 2


def test_average_continues_from_its_state():
    torch.manual_seed(0)
    whole = MovingAverage((3,), 0.9)
    for batch in torch.randn(4, 3):
        whole.update(batch)
    resumed = MovingAverage((3,), 0.9)
    resumed.load_state_dict(whole.state_dict())
    for batch in torch.randn(4, 3):
        whole.update(batch)
        resumed.update(batch)
    assert torch.equal(resumed.mean, whole.mean)
