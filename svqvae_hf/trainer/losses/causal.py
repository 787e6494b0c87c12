"""A loss of latents that cannot be predicted, so that a generator of their ids has less to learn.

CRT (arXiv 2412.16326) trains a causal transformer beside the tokenizer. Here, the predictor is the best linear one for
each batch, so it needs neither training nor a place in checkpoints.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

NEIGHBOURS = ((0, -1), (-1, -1), (-1, 0), (-1, 1))  # offsets (row, column) from a latent to earlier ones
RIDGE = 1e-2  # keeps coefficients finite, as a fraction of the mean square of a latent
FLOOR = 0.004  # about the squared error of quantisation, below which a smaller error saves no bits

Mean = Callable[[torch.Tensor], torch.Tensor]  # averages a tensor over all processes


def mean_of_one_process(value: torch.Tensor) -> torch.Tensor:
    """Averages a tensor over all processes where there is only one: returns it."""
    return value


def causal_loss(latents: torch.Tensor, mean: Mean = mean_of_one_process) -> torch.Tensor:
    """Mean logarithm of the squared error with which latents are predicted from earlier ones.

    Each latent is predicted from its four neighbours to the left and above, by the linear map with the least squared
    error over the batch. Gradients flow through the latents, but not through the coefficients of the map.

    The bits of an id grow with the logarithm of the error, so halving a small error is worth as much as halving a
    large one.

    Args:
        latents (`torch.Tensor` of shape `(batch, codebook_embed_dim, h, w)`): Latents before quantisation.
        mean (`Callable`, *optional*): Averages a tensor over all processes; not needed for one process.

    Returns:
        `torch.Tensor`: Scalar in float32, at least `log(FLOOR)`. If neighbours do not help, the loss is about
            `-log(codebook_embed_dim)`, because the best prediction of a unit vector is then 0.
    """
    with torch.autocast(latents.device.type, enabled=False):
        unit_latents = F.normalize(latents.float(), dim=1)  # (B, C, h, w)
        neighbours = _neighbours(unit_latents)  # (B, 4 * C, h, w), the four earlier neighbours of each latent
        inputs = _flatten(neighbours)  # (B * h * w, 4 * C)
        targets = _flatten(unit_latents)  # (B * h * w, C)
        coefficients = _best_coefficients(inputs, targets, mean)  # (4 * C, C)
        predictions = inputs @ coefficients  # (B * h * w, C)
        squared_errors = (predictions - targets).square().mean(1)  # (B * h * w,)
        # Quantisation causes an error of about `FLOOR` anyway, so a prediction need not be more exact.
        return (squared_errors + FLOOR).log().mean()


def _neighbours(latents: torch.Tensor) -> torch.Tensor:
    """The four earlier neighbours of each latent, `(batch, 4 * channels, h, w)`, with zeros beyond the border."""
    height, width = latents.shape[-2:]
    # One column more at each side and one row more at the top, which the offsets of `NEIGHBOURS` reach
    padded = F.pad(latents, (1, 1, 1, 0))  # (B, C, h + 1, w + 2)
    shifted_latents = []
    for row_offset, column_offset in NEIGHBOURS:
        first_row = 1 + row_offset
        first_column = 1 + column_offset
        shifted = padded[..., first_row : first_row + height, first_column : first_column + width]  # (B, C, h, w)
        shifted_latents.append(shifted)
    return torch.cat(shifted_latents, dim=1)


@torch.no_grad()
def _best_coefficients(inputs: torch.Tensor, targets: torch.Tensor, mean: Mean) -> torch.Tensor:
    """Coefficients `(4 * C, C)` that predict targets `(n, C)` from inputs `(n, 4 * C)` with the least squared error.

    This is a ridge regression over the batches of all processes. The coefficients solve
    (inputs^T inputs / n + penalty) coefficients = inputs^T targets / n.

    Args:
        inputs (`torch.Tensor` of shape `(n, 4 * C)`): The four earlier neighbours of each latent.
        targets (`torch.Tensor` of shape `(n, C)`): The latents, which are unit vectors.
        mean (`Callable`): Averages a tensor over all processes.
    """
    num_inputs = inputs.shape[1]
    num_targets = targets.shape[1]
    # Both products are computed as one, so that the processes exchange one tensor.
    inputs_and_targets = torch.cat([inputs, targets], dim=1)  # (n, 5 * C)
    products = mean(inputs.T @ inputs_and_targets / len(inputs))  # (4 * C, 5 * C)
    input_products = products[:, :num_inputs]  # (4 * C, 4 * C)
    target_products = products[:, num_inputs:]  # (4 * C, C)
    mean_square = 1 / num_targets  # of the values of a unit vector, whose squares sum to 1
    penalty = RIDGE * mean_square * torch.eye(num_inputs, device=inputs.device)
    return torch.linalg.solve(input_products + penalty, target_products)


def _flatten(latents: torch.Tensor) -> torch.Tensor:
    """Latents `(batch, channels, h, w)` as rows `(batch * h * w, channels)`."""
    return latents.movedim(1, -1).flatten(0, 2)
