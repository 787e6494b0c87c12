import torch
from torch import nn


class Features(nn.Module):
    """Stand-in for Inception: six numbers per image."""

    num_features = 6

    def forward(self, images):
        images = images.double()
        return torch.cat([images.mean((2, 3)), images.std((2, 3))], dim=1)
