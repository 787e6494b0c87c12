"""Linear maps that are fitted to images: principal components and regressions, as weights of convolutions."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

COLOURS = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (-0.5, 1.0, -0.5))  # brightness and two colour differences
SMALLEST_STD = 0.01  # floor for the standard deviation of a component, relative to the largest
MAX_POSITIONS = 40_000  # that a regression reads, of all images together


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
    # The convolution reads `inputs.features`, which have unit variance. The components are found in `scaled_features`,
    # which are the same features with the variance that they have in pixels.
    input_stds = inputs.stds[:, None, None]  # (channels, 1, 1)
    scaled_features = inputs.features * input_stds  # (B, channels, h, w)
    patches = F.unfold(scaled_features, kernel_size=2, stride=2)  # (B, channels * 4, patches)
    samples = patches.transpose(1, 2).flatten(0, 1)  # (B * patches, channels * 4)
    # Variances are (components,), and directions are (channels * 4, components).
    variances, directions = _leading_eigenvectors(samples.T.cov(), max_components)
    stds = _standard_deviations(variances)  # (components,)

    # A component is (sample - mean) @ direction / std. As a linear map of the sample, it is matrix @ sample + bias.
    matrix = (directions / stds).T  # (components, channels * 4): each direction is divided by its standard deviation
    bias = -matrix @ samples.mean(0)  # (components,)
    weight_for_scaled = matrix.unflatten(1, (-1, 2, 2))  # (components, channels, 2, 2), reads `scaled_features`
    # For features of unit variance, the weight has the factor: weight * (std * feature) = (weight * std) * feature.
    weight = weight_for_scaled * input_stds  # (components, channels, 2, 2), reads `inputs.features`
    features = F.conv2d(inputs.features, weight, bias, stride=2)  # (B, components, h / 2, w / 2)
    return Components(weight, bias, stds, features)


def _standard_deviations(variances: torch.Tensor) -> torch.Tensor:
    """Square roots of variances `(components,)`, largest first. A floor keeps later divisions from enlarging noise."""
    stds = variances.clamp(min=0).sqrt()  # rounding can make a small variance negative
    smallest_std = SMALLEST_STD * variances[0].sqrt()
    return stds.clamp(min=smallest_std)


def _leading_eigenvectors(covariance: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest eigenvalues `(count,)` of a matrix `(n, n)`, and their eigenvectors `(n, count)`."""
    ascending_values, ascending_vectors = torch.linalg.eigh(covariance)
    values = ascending_values.flip(0)
    vectors = ascending_vectors.flip(1)
    return values[:count], vectors[:, :count]


@dataclass
class Fit:
    """Convolution that a regression has found: weight `(outputs, channels, 3, 3)` and bias `(outputs,)`."""

    weight: torch.Tensor
    bias: torch.Tensor


def regress(inputs: torch.Tensor, targets: torch.Tensor, ridge: float, border: int) -> Fit:
    """Finds the 3 x 3 convolution that best computes targets from inputs, by ridge regression.

    X has a row for each position of each image: the 3 x 3 neighbours of the position, and a one. Y has a row for each
    position: its targets. The solution W of (X^T X + penalty) W = X^T Y holds the weight and the bias.

    Args:
        inputs (`torch.Tensor` of shape `(batch, channels, h, w)`): Inputs.
        targets (`torch.Tensor` of shape `(batch, outputs, h, w)`): What the convolution should compute.
        ridge (`float`): Ridge, relative to the mean square of the inputs.
        border (`int`): Rows and columns at each side that are left out, because they depend on padding.
    """
    largest_border = (min(inputs.shape[-2:]) - 1) // 2  # leaves at least one row and one column
    border = min(border, largest_border)
    # X^T X has the shape (columns, columns), and X^T Y has (columns, outputs). There is a column for each of the
    # channels * 9 values of the neighbours, in the order of a convolution's weight. The last column is for the bias.
    xtx, xty = _normal_equations(inputs, targets, border)
    penalty = torch.zeros_like(xtx.diagonal())  # (columns,)
    penalty[:-1] = ridge * xtx.diagonal().mean()  # only weights are kept small, not the bias
    solution = torch.linalg.solve(xtx + penalty.diag(), xty).to(inputs.dtype)  # (columns, outputs)
    weight_rows = solution[:-1].T  # (outputs, channels * 9)
    weight = weight_rows.unflatten(1, (-1, 3, 3)).contiguous()  # (outputs, channels, 3, 3)
    bias = solution[-1]  # (outputs,)
    return Fit(weight, bias)


def _normal_equations(inputs: torch.Tensor, targets: torch.Tensor, border: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes X^T X `(columns, columns)` and X^T Y `(columns, outputs)` in float64, from random positions of images.

    A position has one row in X and one in Y. Its row in X holds its 3 x 3 neighbours in the inputs
    `(batch, channels, h, w)` and a one. Its row in Y holds its values in the targets `(batch, outputs, h, w)`.
    Positions less than `border` from a side of the image have no rows.
    """
    num_columns = 9 * inputs.shape[1] + 1  # of X: 9 neighbours in each channel, and the one
    num_outputs = targets.shape[1]
    xtx = inputs.new_zeros(num_columns, num_columns, dtype=torch.float64)
    xty = inputs.new_zeros(num_columns, num_outputs, dtype=torch.float64)
    max_positions_per_image = MAX_POSITIONS // len(inputs) + 1
    generator = torch.Generator().manual_seed(0)
    # Both are sums over positions, so each image adds its own. All images at once would take too much memory, because
    # the neighbours are nine times as large as the image.
    for image, target in zip(inputs, targets, strict=True):
        neighbours = _neighbours(image)  # (channels * 9, h, w)
        neighbour_rows = _rows_without_border(neighbours, border)  # (positions, channels * 9)
        target_rows = _rows_without_border(target, border)  # (positions, outputs)
        random_order = torch.randperm(len(target_rows), generator=generator)
        drawn = random_order[:max_positions_per_image].to(inputs.device)  # numbers of rows
        x = _append_ones(neighbour_rows[drawn]).double()  # (drawn, columns)
        y = target_rows[drawn].double()  # (drawn, outputs)
        xtx += x.T @ x
        xty += x.T @ y
    return xtx, xty


def _neighbours(image: torch.Tensor) -> torch.Tensor:
    """3 x 3 neighbours `(channels * 9, h, w)` of each position of an image `(channels, h, w)`, channel by channel.

    Neighbours outside the image are zeros.
    """
    height, width = image.shape[-2:]
    flat_neighbours = F.unfold(image[None], kernel_size=3, padding=1)[0]  # (channels * 9, h * w)
    return flat_neighbours.unflatten(1, (height, width))


def _rows_without_border(image: torch.Tensor, border: int) -> torch.Tensor:
    """Values of an image `(channels, h, w)` without its border, one row per position: `(positions, channels)`."""
    height, width = image.shape[-2:]
    inner = image[:, border : height - border, border : width - border]
    return inner.flatten(1).T


def _append_ones(rows: torch.Tensor) -> torch.Tensor:
    """Rows `(n, columns)` with a one at the end of each: `(n, columns + 1)`."""
    ones = rows.new_ones(len(rows), 1)
    return torch.cat([rows, ones], dim=1)
