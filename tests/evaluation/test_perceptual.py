import copy
import functools
from urllib.error import URLError

import lpips
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchvision.models import get_model

from svqvae_hf.evaluation.perceptual import load_inception, load_lpips

MODELS = {"vgg": "vgg16", "alex": "alexnet", "squeeze": "squeezenet1_1"}  # torchvision's names


@functools.cache
def draw_backbone(net):
    """Makes torchvision's network with random weights, without weights for its classifier."""
    with torch.device("meta"):
        model = get_model(MODELS[net], weights=None)
    generator = torch.Generator().manual_seed(0)
    model.features.to_empty(device="cpu")
    for parameter in model.features.parameters():
        fan_in = parameter[0].numel()
        std = (2 / fan_in) ** 0.5 if parameter.ndim == 4 else 0.1
        nn.init.normal_(parameter, std=std, generator=generator)
    return model


def save_backbone(net, path):
    state_dict = {f"features.{key}": tensor for key, tensor in draw_backbone(net).features.state_dict().items()}
    state_dict["classifier.0.weight"] = torch.ones(1)
    (save_file if path.suffix == ".safetensors" else torch.save)(state_dict, path)
    return path


@pytest.fixture(scope="module")
def alex(tmp_path_factory):
    return load_lpips("alex", save_backbone("alex", tmp_path_factory.mktemp("weights") / "alex.pth"))


@pytest.fixture
def package_lpips(monkeypatch):
    """Makes the package's own model with the weights of [`draw_backbone`], instead of a download."""

    def make(net):
        with monkeypatch.context() as patch:
            patch.setattr(lpips.pretrained_networks.tv, MODELS[net], lambda pretrained: draw_backbone(net))
            return lpips.LPIPS(net=net, verbose=False)

    return make


def draw_images(side=40):
    torch.manual_seed(0)
    return (torch.rand(2, 3, side, side + 8) * 2 - 1).requires_grad_(), torch.rand(2, 3, side, side + 8) * 2 - 1


@pytest.mark.slow
@pytest.mark.parametrize(("net", "suffix"), [("vgg", ".safetensors"), ("alex", ".safetensors"), ("squeeze", ".pth")])
def test_distance_and_gradient_equal_the_package(package_lpips, tmp_path, net, suffix):
    sample, target = draw_images()
    distance = load_lpips(net, save_backbone(net, tmp_path / f"weights{suffix}"))(sample, target)
    expected = package_lpips(net)(sample, target).mean()
    assert distance.shape == ()
    assert distance > 0.01
    torch.testing.assert_close(distance, expected)
    gradients = [torch.autograd.grad(loss, sample)[0] for loss in (distance, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3 * gradients[1].abs().max().item())


@pytest.mark.parametrize(("dtype", "bias"), [(torch.float32, 1e-25), (torch.bfloat16, -1e-3), (torch.float16, 0.0)])
def test_gradient_is_finite_for_constant_and_identical_images(alex, dtype, bias):
    silent = copy.deepcopy(alex)  # its features of grey, or their squares, are 0
    for name, parameter in silent.net.named_parameters():
        if name.endswith("bias"):
            nn.init.constant_(parameter, bias)
    grey = silent.scaling_layer.shift.expand(2, 3, 40, 48)
    _, target = draw_images()
    for model, image, reference in ((silent, grey, target), (silent, grey, grey), (alex, grey, target)):
        sample = image.clone().requires_grad_()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            loss = model(sample, reference)
        loss.backward()
        assert loss.dtype == torch.float32
        assert loss.isfinite()
        assert (loss == 0) == (image is reference)
        assert sample.grad.isfinite().all()


# Files


@pytest.mark.parametrize("fault", ["missing", "unexpected", "misshapen"])
def test_faulty_weights_are_named(tmp_path, fault):
    state_dict = torch.load(save_backbone("squeeze", tmp_path / "weights.pth"), weights_only=True)
    key = "features.20.weight" if fault == "unexpected" else "features.0.weight"
    if fault == "missing":
        del state_dict[key]
    else:
        state_dict[key] = torch.ones(1)
    torch.save(state_dict, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=rf"another shape: {key}\. Pass"):
        load_lpips("squeeze", tmp_path / "weights.pth")


def test_weights_are_downloaded_from_torchvision(monkeypatch):
    asked = []

    def no_network(url, **options):
        asked.append((url.rpartition("/")[2].partition("-")[0], options["check_hash"], options["weights_only"]))
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    with pytest.raises(OSError, match=r"Could not download the weights .*no network.* pass its path"):
        load_lpips("alex")
    assert asked == [(MODELS["alex"], True, True)]


# Inception


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """Network with random weights, and its file."""
    path = tmp_path_factory.mktemp("weights") / "inception.safetensors"
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        patch.setattr(torch, "load", lambda *_, **__: None)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], "")
    save_file(network.state_dict(), path)
    return network, path


@pytest.mark.slow
def test_inception_has_the_weights_of_the_file(inception):
    network, path = inception
    loaded = load_inception(path)
    images = torch.randint(256, (2, 3, 40, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(images), network(images)[0])
    assert loaded(images).shape == (2, loaded.num_features)
