"""Networks that compare images as people do: LPIPS, and the Inception network of FID."""

import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import lpips
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torchmetrics.image.fid import NoTrainInceptionV3
from torchvision.models import get_weight

from svqvae_hf.untrusted.pickles import load_pickle


class Backbone(NamedTuple):
    """A network of LPIPS: the name of torchvision's weights, and the smallest image side it takes, in pixels."""

    weights: str
    min_side: int


BACKBONES = {
    "vgg": Backbone("VGG16_Weights.IMAGENET1K_V1", 16),
    "alex": Backbone("AlexNet_Weights.IMAGENET1K_V1", 31),
    "squeeze": Backbone("SqueezeNet1_1_Weights.IMAGENET1K_V1", 17),
}
NORM_EPS = 1e-10  # the package's
INCEPTION_FEATURES = 2048


class LPIPS(lpips.LPIPS):
    """The `lpips` package's distance, as a loss: frozen, in evaluation mode whatever its parent does.

    The network runs in the type of autocast, the distance of its features in float32. Its gradient is finite even
    where the features of a place are so small that their norm is 0; in the package it is not.

    Source: arXiv 1801.03924, section 3.
    """

    def __init__(self, net: str):
        # The package looks for its linear layers beside the class's file, which is this one.
        linear_layers = Path(lpips.__file__).parent / "weights" / "v0.1" / f"{net}.pth"
        with warnings.catch_warnings():
            # The package calls torchvision by arguments that are deprecated.
            warnings.filterwarnings("ignore", category=UserWarning, module=r"torchvision\.models\._utils")
            super().__init__(net=net, pnet_rand=True, model_path=str(linear_layers), verbose=False)
        self.min_side = BACKBONES[net].min_side
        self.requires_grad_(False)

    def forward(self, sample: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Mean distance of pairs of images.

        Args:
            sample (`torch.Tensor` of shape `(batch, 3, height, width)`): Images in [-1, 1], sides at least
                `min_side`.
            target (`torch.Tensor` of shape `(batch, 3, height, width)`): Their references, likewise.

        Returns:
            `torch.Tensor`: Scalar in float32, the mean over the batch.
        """
        features = [self.net(self.scaling_layer(image)) for image in (sample, target)]
        with torch.autocast(sample.device.type, enabled=False):
            distances = []
            for linear, *pair in zip(self.lins, *features, strict=True):
                of_sample, of_target = (F.normalize(each.float(), dim=1, eps=NORM_EPS) for each in pair)
                distances.append(linear((of_sample - of_target).square()).mean())
        return torch.stack(distances).sum()

    def train(self, mode: bool = True) -> "LPIPS":
        """Stays in evaluation mode."""
        return super().train(False)


def load_lpips(net: str, weights: str | Path | None = None) -> LPIPS:
    """Loads LPIPS. Its linear layers come with the `lpips` package, the weights of the network under them do not.

    Args:
        net (`str`): "vgg", "alex" or "squeeze".
        weights (`str` or `Path`, *optional*): State dict of torchvision's network, `.safetensors` or a pickle with
            weights only; its classifier is not needed. Downloaded, as torchvision does, if not given.

    Raises:
        OSError: If the file is not there, or the weights cannot be downloaded.
        ValueError: If the network is unknown, or the file cannot be read or is of another network.
    """
    if net not in BACKBONES:
        raise ValueError(f"The network of LPIPS must be one of {', '.join(BACKBONES)}, but is {net!r}.")
    state_dict = _download(net) if weights is None else _read(Path(weights), "LPIPS's network")
    model = LPIPS(net)
    # `slice2.5.bias`: the number is that of torchvision's layer.
    names = {key: f"features.{key.partition('.')[2]}" for key in model.net.state_dict()}
    expected = {names[key]: tensor.shape for key, tensor in model.net.state_dict().items()}
    given = {name: tensor.shape for name, tensor in state_dict.items() if not name.startswith("classifier.")}
    wrong = sorted({name for name, _ in expected.items() ^ given.items()})
    if wrong:
        raise ValueError(
            f"`{weights}` must hold torchvision's {BACKBONES[net].weights.partition('_')[0]}, but these weights are "
            f"missing, unexpected or of another shape: {', '.join(wrong)}. Pass that network's file, or the name of "
            "another network."
        )
    model.net.load_state_dict({key: state_dict[name] for key, name in names.items()})
    return model


def load_inception(weights: str | Path) -> NoTrainInceptionV3:
    """Loads the Inception network that FID is defined by, with TensorFlow's weights and resizing.

    Args:
        weights (`str` or `Path`): torch-fidelity's state dict of it (`pt_inception-2015-12-05-6726825d.pth`),
            `.safetensors` or a pickle with weights only.

    Returns:
        `nn.Module`: Takes images `(batch, 3, height, width)` in uint8 and gives features `(batch, 2048)`.

    Raises:
        OSError: If the file is not there.
        ValueError: If the file cannot be read or is of another network.
    """
    state_dict = _read(Path(weights), "FID's Inception network")
    with tempfile.NamedTemporaryFile(suffix=".pth") as copy:
        # torch-fidelity would run whatever a pickle holds; a copy of the weights alone holds nothing to run.
        torch.save(dict(state_dict), copy.name)
        try:
            inception = NoTrainInceptionV3(
                "inception-v3-compat", [str(INCEPTION_FEATURES)], copy.name, antialias=False
            )
        except RuntimeError as error:  # keys or shapes
            raise ValueError(
                f"`{weights}` must hold the weights of torch-fidelity's Inception network, but its keys or shapes are "
                "others. Pass the file `pt_inception-2015-12-05-6726825d.pth`."
            ) from error
    inception.num_features = INCEPTION_FEATURES
    return inception


def _download(net: str) -> Mapping[str, torch.Tensor]:
    url = get_weight(BACKBONES[net].weights).url
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:  # the latter where the hash is wrong
        raise OSError(
            f"The weights of LPIPS's network, {url}, cannot be downloaded: {error}. Download the file elsewhere and "
            "pass its path."
        ) from error


def _read(path: Path, what: str) -> Mapping[str, torch.Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"The weights of {what} must be a file, but `{path}` is not one.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state_dict = load_pickle(path)
        if not all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state_dict.items()):
            raise TypeError("not names and tensors alone")
    except OSError:
        raise
    except Exception as error:  # a broken pickle makes the reader raise almost anything
        raise ValueError(
            f"`{path}` must be a state dict, .safetensors or a pickle with weights only, but cannot be read as one. "
            "Save the weights of the network alone: `torch.save(model.state_dict(), file)`."
        ) from error
    return state_dict
