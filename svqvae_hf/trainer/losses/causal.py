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
    """Mean logarithm of the squared error of predicting latents from earlier ones in raster order.

    Each latent is predicted as a linear combination of the latents to its left and above. The coefficients are those
    with the least squared error over the whole batch. No gradient flows through the coefficients. It flows through the
    latents that are predicted, and through those that predict them.

    The bits of an id grow with the logarithm of the squared error, so halving the error counts as much where it is
    small as where it is large.

    Args:
        latents (`torch.Tensor` of shape `(batch, codebook_embed_dim, h, w)`): Latents before quantisation.
        mean (`Callable`, *optional*): Averages a tensor over all processes; not needed for one process.

    Returns:
        `torch.Tensor`: Scalar in float32, at least `log(FLOOR)`. If earlier latents say nothing about a latent, it is
            predicted as 0. The squared error is then the mean square of the values of a unit vector,
            `1 / codebook_embed_dim`, and the loss is about `-log(codebook_embed_dim)`.
    """
    with torch.autocast(latents.device.type, enabled=False):
        latents = F.normalize(latents.float(), dim=1)  # unit vectors
        neighbours = _neighbours(latents)  # (B, 4 * C, h, w)
        inputs = _flatten(neighbours)  # (B * h * w, 4 * C)
        targets = _flatten(latents)  # (B * h * w, C)
        predictions = inputs @ _best_coefficients(inputs, targets, mean)  # (B * h * w, C)
        squared_errors = (predictions - targets).square().mean(1)  # (B * h * w,)
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

    A target is a latent, a unit vector, and its inputs are its four earlier neighbours. The coefficients solve
    (inputs^T inputs) coefficients = inputs^T targets. Both products are means over all processes.
    """
    dim = targets.shape[1]
    inputs_and_targets = torch.cat([inputs, targets], dim=1)  # (n, 5 * C)
    products = mean(inputs.T @ inputs_and_targets / len(inputs))  # (4 * C, 5 * C)
    input_products = products[:, :-dim]  # (4 * C, 4 * C)
    target_products = products[:, -dim:]  # (4 * C, C)
    # The squares of the `dim` values of a unit vector sum to 1, so their mean is 1 / dim. The ridge is relative to it.
    ridge = RIDGE / dim
    input_products.diagonal().add_(ridge)
    return torch.linalg.solve(input_products, target_products)


def _flatten(latents: torch.Tensor) -> torch.Tensor:
    """Latents `(batch, channels, h, w)` as rows `(batch * h * w, channels)`."""
    return latents.movedim(1, -1).flatten(0, 2)
