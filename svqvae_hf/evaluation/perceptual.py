"""Perceptual networks: LPIPS, and the Inception network of FID. Loads their weights from files."""

import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import lpips
import torch
import torch.nn.functional as F
from torchmetrics.image.fid import NoTrainInceptionV3
from torchvision.models import get_weight

from svqvae_hf.loaders.checkpoint_checks import check_tensors, select_weights
from svqvae_hf.loaders.checkpoint_files import load_checkpoint_file, top_level_weights


class Backbone(NamedTuple):
    """Network under LPIPS: its name in torchvision, and the smallest image side in pixels."""

    architecture: str
    min_side: int

    @property
    def weights(self) -> str:
        """Name of its weights in torchvision."""
        return f"{self.architecture}_Weights.IMAGENET1K_V1"


BACKBONES = {
    "vgg": Backbone("VGG16", 16),
    "alex": Backbone("AlexNet", 31),
    "squeeze": Backbone("SqueezeNet1_1", 17),
}
NORM_EPS = 1e-10  # as in the `lpips` package
FID_FEATURES = 2048


class LPIPS(lpips.LPIPS):
    """LPIPS from the `lpips` package as a loss: frozen, and always in evaluation mode.

    The network runs in autocast's dtype, the distance between its features in float32. Unlike the package's gradient,
    this one stays finite if the features at a position are so small that their norm is 0.

    Source: arXiv 1801.03924, section 3.
    """

    def __init__(self, net: str):
        linear_layers = Path(lpips.__file__).parent / "weights" / "v0.1" / f"{net}.pth"
        with warnings.catch_warnings():
            # The package calls torchvision with deprecated arguments.
            warnings.filterwarnings("ignore", category=UserWarning, module=r"torchvision\.models\._utils")
            super().__init__(
                net=net,
                pnet_rand=True,  # random weights instead of downloaded ones; `load_lpips` replaces them
                model_path=str(linear_layers),  # by default, the package searches beside the file of this subclass
                verbose=False,
            )
        self.min_side = BACKBONES[net].min_side
        self.requires_grad_(False)

    def forward(self, sample: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Mean distance between pairs of images.

        Args:
            sample (`torch.Tensor` of shape `(batch, 3, height, width)`): Images in [-1, 1] with sides of at
                least `min_side` pixels.
            target (`torch.Tensor` of shape `(batch, 3, height, width)`): Their references in [-1, 1].

        Returns:
            `torch.Tensor`: Mean over the batch, a float32 scalar.
        """
        sample_features = self.net(self.scaling_layer(sample))  # one map per layer, (batch, channels, h, w)
        target_features = self.net(self.scaling_layer(target))
        distances = []
        with torch.autocast(sample.device.type, enabled=False):
            for linear, sample_map, target_map in zip(self.lins, sample_features, target_features, strict=True):
                unit_sample = F.normalize(sample_map.float(), dim=1, eps=NORM_EPS)
                unit_target = F.normalize(target_map.float(), dim=1, eps=NORM_EPS)
                difference = (unit_sample - unit_target).square()
                distances.append(linear(difference).mean())
        return torch.stack(distances).sum()

    def train(self, mode: bool = True) -> "LPIPS":
        """Stays in evaluation mode, because the distance must not depend on the parent's mode."""
        return super().train(False)


def load_lpips(net: str, weights: str | Path | None = None) -> LPIPS:
    """Loads LPIPS. The `lpips` package contains its linear layers, but not the weights of the network under them.

    Args:
        net (`str`): "vgg", "alex" or "squeeze".
        weights (`str` or `Path`, *optional*): State dict of torchvision's network, `.safetensors` or a pickle with
            weights only. Its classifier is not needed. Downloaded from torchvision's server if not given.

    Raises:
        OSError: If the file does not exist, or the weights cannot be downloaded.
        ValueError: If the network is unknown, or the file cannot be read or belongs to another network.
    """
    if net not in BACKBONES:
        raise ValueError(f"The network of LPIPS must be one of {', '.join(BACKBONES)}, got {net!r}.")
    if weights is None:
        state_dict = _download_weights(net)
    else:
        state_dict = _read_weights(Path(weights), "LPIPS's network")
    model = LPIPS(net)
    wrong_names = _wrong_weights(model, state_dict)
    if wrong_names:
        raise ValueError(
            f"`{weights}` must hold torchvision's {BACKBONES[net].architecture}, but these weights are missing, "
            f"unexpected or of another shape: {', '.join(wrong_names)}. Pass that network's file, or the name of "
            "another network."
        )
    # The `lpips` package splits torchvision's network into slices, so the same weights have other names in it.
    renamed_weights = {}
    for name_in_package in model.net.state_dict():
        renamed_weights[name_in_package] = state_dict[_torchvision_name(name_in_package)]
    model.net.load_state_dict(renamed_weights)
    return model


def load_inception(weights: str | Path) -> NoTrainInceptionV3:
    """Loads the Inception network that defines FID, with TensorFlow's weights and resizing.

    Args:
        weights (`str` or `Path`): State dict from torch-fidelity (`weights-inception-2015-12-05-6726825d.pth`),
            `.safetensors` or a pickle with weights only.

    Returns:
        `nn.Module`: Maps images `(batch, 3, height, width)` in uint8 to features `(batch, 2048)`.

    Raises:
        OSError: If the file does not exist.
        ValueError: If the file cannot be read or belongs to another network.
    """
    state_dict = _read_weights(Path(weights), "FID's Inception network")
    with tempfile.NamedTemporaryFile(suffix=".pth") as copy:
        # torch-fidelity loads pickles without `weights_only`, so it gets a copy that holds nothing but tensors.
        torch.save(dict(state_dict), copy.name)
        try:
            inception = NoTrainInceptionV3("inception-v3-compat", [str(FID_FEATURES)], copy.name, antialias=False)
        except RuntimeError as error:  # keys or shapes
            raise ValueError(
                f"`{weights}` must hold the weights of torch-fidelity's Inception network, but its keys or shapes "
                "differ. Pass the file `weights-inception-2015-12-05-6726825d.pth`."
            ) from error
    inception.num_features = FID_FEATURES
    return inception


def _torchvision_name(name_in_package: str) -> str:
    """Name in torchvision, such as `features.5.bias`, of a weight that the package calls `slice2.5.bias`."""
    _, _, layer_and_kind = name_in_package.partition(".")
    return f"features.{layer_and_kind}"


def _wrong_weights(model: LPIPS, state_dict: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of torchvision's weights that do not fit the network under LPIPS, which has no classifier."""
    expected_shapes = {}
    for name_in_package, tensor in model.net.state_dict().items():
        expected_shapes[_torchvision_name(name_in_package)] = tensor.shape
    shapes = {}
    for name, tensor in state_dict.items():
        if not name.startswith("classifier."):
            shapes[name] = tensor.shape
    return _differing_names(expected_shapes, shapes)


def _differing_names(expected_shapes: Mapping[str, torch.Size], shapes: Mapping[str, torch.Size]) -> list[str]:
    """Sorted names of the weights that are missing, unexpected or of another shape."""
    names = []
    for name in sorted(expected_shapes.keys() | shapes.keys()):
        if expected_shapes.get(name) != shapes.get(name):
            names.append(name)
    return names


def _download_weights(net: str) -> Mapping[str, torch.Tensor]:
    """Downloads the weights of LPIPS's network from torchvision's server, or finds them in torch's cache."""
    url = get_weight(BACKBONES[net].weights).url
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:  # RuntimeError for a wrong hash
        raise OSError(
            f"Could not download the weights of LPIPS's network from {url}: {error}. Download the file elsewhere and "
            "pass its path as `weights` (`--lpips_weights` in training)."
        ) from error


def _read_weights(path: Path, network: str) -> Mapping[str, torch.Tensor]:
    """Reads the tensors of a .safetensors file or a pickle. Whether they belong to the network is checked later."""
    if not path.is_file():
        raise FileNotFoundError(f"The weights of {network} must be a file, but `{path}` is not one.")
    content = load_checkpoint_file(path, source=path)
    entries = select_weights(content, top_level_weights(content), source=path)  # by name; raises if there are no names
    # Other values than tensors are not weights. If one of them replaces a weight, the weight is reported as missing.
    weights = {name: value for name, value in entries.items() if isinstance(value, torch.Tensor)}
    check_tensors(weights, path)  # raises for a tensor without data
    return weights
