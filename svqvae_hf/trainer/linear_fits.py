"""Linear maps that are fitted to images: principal components and regressions, as weights of convolutions."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

COLOURS = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (-0.5, 1.0, -0.5))  # brightness and two colour differences
SMALLEST_STD = 0.01  # floor for the standard deviation of a component, relative to the largest
POSITIONS = 40_000  # at most, in a regression


@dataclass
class Components:
    """Linear features of images at unit variance, and the convolution that computes them.

    The convolution reads pixels or the features of a finer resolution.

    Args:
        weight (`torch.Tensor` of shape `(components, channels, k, k)`): Weight of the convolution.
        bias (`torch.Tensor` of shape `(components,)`): Bias of the convolution.
        stds (`torch.Tensor` of shape `(components,)`): Standard deviation of each component before it was divided by
            this number, in the unit of `network_range`.
        features (`torch.Tensor` of shape `(batch, components, h, w)`): The components at unit variance.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    stds: torch.Tensor
    features: torch.Tensor


def colour_components(pixels: torch.Tensor) -> Components:
    """Brightness and two colour differences of images `(batch, 3, height, width)`, by a 1 x 1 convolution.

    Each colour is a direction in the space of red, green and blue, scaled to mean 0 and variance 1.
    """
    directions = F.normalize(pixels.new_tensor(COLOURS), dim=1)  # (3, 3)
    mixed = torch.einsum("ij,bjhw->bihw", directions, pixels)  # (B, 3, H, W)
    means = mixed.mean((0, 2, 3))  # (3,)
    stds = mixed.std((0, 2, 3))  # (3,)
    features = (mixed - means[:, None, None]) / stds[:, None, None]
    # The same as one linear map of the pixels: (directions @ pixels - means) / stds = weight @ pixels + bias
    weight = directions / stds[:, None]  # (3, 3)
    bias = -means / stds
    kernel = weight[:, :, None, None]  # (3, 3, 1, 1)
    return Components(kernel, bias, stds, features)


def principal_components(inputs: Components, max_components: int) -> Components:
    """Principal components of 2 x 2 neighbours, from the largest variance to the smallest.

    The variance is the one that a component has in pixels. Features themselves have unit variance.

    Args:
        inputs ([`Components`]): Features `(batch, channels, h, w)` of the resolution above.
        max_components (`int`): Maximum number of components.

    Returns:
        `Components`: Components `(batch, components, h / 2, w / 2)`, by a 2 x 2 convolution of stride 2.
    """
    # Undoes the division that gave each feature unit variance.
    input_stds = inputs.stds[:, None, None]  # (channels, 1, 1)
    unscaled_features = inputs.features * input_stds  # (B, channels, h, w)
    patches = F.unfold(unscaled_features, 2, stride=2)  # (B, channels * 4, patches)
    samples = patches.transpose(1, 2).flatten(0, 1)  # (B * patches, channels * 4)
    variances, directions = _leading_eigenvectors(samples.T.cov(), max_components)
    stds = variances.clamp(min=0).sqrt()  # (components,); rounding can make a small variance negative
    # The projection divides by the standard deviations, so that a tiny one would enlarge noise.
    smallest_std = SMALLEST_STD * variances[0].sqrt()
    stds = stds.clamp(min=smallest_std)

    # Projects samples on the directions, and scales each component to mean 0 and variance 1.
    projection = (directions / stds).T  # (components, channels * 4)
    bias = -projection @ samples.mean(0)  # (components,)
    kernel = projection.unflatten(1, (-1, 2, 2))  # (components, channels, 2, 2)

    # A convolution reads the features without the factor `input_stds`, so its weight takes the factor over.
    weight = kernel * input_stds
    features = F.conv2d(inputs.features, weight, bias, stride=2)  # (B, components, h / 2, w / 2)
    return Components(weight, bias, stds, features)


def _leading_eigenvectors(covariance: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest eigenvalues `(count,)` of a matrix `(n, n)`, and their eigenvectors `(n, count)`."""
    ascending_values, ascending_vectors = torch.linalg.eigh(covariance)
    values = ascending_values.flip(0)
    vectors = ascending_vectors.flip(1)
    return values[:count], vectors[:, :count]


@dataclass
class Fit:
    """Convolution that a regression has found: weight `(targets, inputs, 3, 3)` and bias `(targets,)`."""

    weight: torch.Tensor
    bias: torch.Tensor


def regress(inputs: torch.Tensor, targets: torch.Tensor, ridge: float, border: int) -> Fit:
    """Ridge regression of targets on 3 x 3 neighbours, by normal equations in float64.

    With the neighbours of each position as a row of X, and its targets as a row of Y, the solution W of
    (X^T X + penalty) W = X^T Y is the weight of a convolution.

    Args:
        inputs (`torch.Tensor` of shape `(batch, channels, h, w)`): Inputs.
        targets (`torch.Tensor` of shape `(batch, targets, h, w)`): Targets.
        ridge (`float`): Ridge, relative to the mean square of the inputs.
        border (`int`): Rows and columns at each side that are left out, because they depend on padding.
    """
    largest_border = (min(inputs.shape[-2:]) - 1) // 2  # leaves at least one row and one column
    border = min(border, largest_border)
    generator = torch.Generator().manual_seed(0)
    max_positions_per_image = POSITIONS // len(inputs) + 1
    num_columns = 9 * inputs.shape[1] + 1  # neighbours, and a column of ones for the bias
    gram = inputs.new_zeros(num_columns, num_columns, dtype=torch.float64)  # X^T X
    products = inputs.new_zeros(num_columns, targets.shape[1], dtype=torch.float64)  # X^T Y
    # One image at a time, because neighbours take nine times the memory.
    for image, target in zip(inputs, targets, strict=True):
        neighbours = F.unfold(image[None], 3, padding=1)[0]  # (channels * 9, h * w)
        neighbours = neighbours.unflatten(1, image.shape[-2:])  # (channels * 9, h, w)
        input_rows = _inner_positions(neighbours, border)  # (positions, channels * 9)
        target_rows = _inner_positions(target, border)  # (positions, targets)
        order = torch.randperm(len(target_rows), generator=generator)
        chosen = order[:max_positions_per_image].to(target_rows.device)
        rows = F.pad(input_rows[chosen], (0, 1), value=1.0).double()  # (chosen, columns), with the column of ones
        gram += rows.T @ rows
        products += rows.T @ target_rows[chosen].double()
    penalty = ridge * gram.diagonal().mean() * torch.ones_like(gram[0])  # (columns,)
    penalty[-1] = 0  # only weights are kept small, not the bias
    solution = torch.linalg.solve(gram + penalty.diag(), products).to(inputs.dtype)  # (columns, targets)
    weight = solution[:-1].T.unflatten(1, (-1, 3, 3)).contiguous()  # (targets, channels, 3, 3)
    return Fit(weight, bias=solution[-1])


def _inner_positions(image: torch.Tensor, border: int) -> torch.Tensor:
    """Values of an image `(channels, h, w)` without its border, one row per position: `(positions, channels)`."""
    height, width = image.shape[-2:]
    inner = image[:, border : height - border, border : width - border]
    return inner.flatten(1).T
