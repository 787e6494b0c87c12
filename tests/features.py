import numpy as np
import torch
from torch import nn

SSIM = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255, "channel_axis": 2}


def pixels(image):
    return torch.from_numpy(np.array(image)).movedim(-1, 0)[None]


class Features(nn.Module):
    """Stand-in for Inception: six numbers per image."""

    num_features = 6

    def forward(self, images):
        images = images.double()
        return torch.cat([images.mean((2, 3)), images.std((2, 3))], dim=1)
