import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, make_tiny
from train import KERNEL_NDIM

from svqvae_hf import SVQVAE
from svqvae_hf.trainer.model import frozen_parts, initialise, load_model, step_scales
from svqvae_hf.trainer.optimization import parameter_groups
from svqvae_hf.trainer.train_options import TrainOptions


def make_options(**options):
    return TrainOptions(**({"output_dir": "out", "train_data_dir": "y", "model_config_name_or_path": "x"} | options))


@pytest.mark.parametrize(("name", "num_ids"), [("model_f8", 1024), ("model_f16", 256)])
def test_ids_of_a_picture_of_256_pixels(name, num_ids):
    """As docs/generation.md states them."""
    config = SVQVAE.load_config(ROOT / "training" / "configs" / f"{name}.json")
    with torch.device("meta"):
        vqvae = SVQVAE.from_config(config)
    latents = vqvae.encode(torch.zeros(1, 3, 256, 256, device="meta")).latents
    assert latents[0, 0].numel() == num_ids
    assert vqvae.config["codebook_size"] == 16384


def test_an_image_does_not_fade_in_a_new_encoder():
    torch.manual_seed(0)
    model = make_tiny(encoder_ch_mult=(1, 1, 2, 2, 4), decoder_ch_mult=(1, 1, 2, 2, 4))
    sample = F.interpolate(2 * torch.rand(8, 3, 4, 4) - 1, 64)
    last = []
    model.encoder.norm_out.register_forward_pre_hook(lambda _, inputs: last.append(inputs[0]))

    def fraction_of_the_image():
        model.encoder(sample)
        hidden = last.pop()
        return (hidden.var((0, 2, 3)).mean() / hidden.square().mean()).item()

    assert fraction_of_the_image() < 0.7
    initialise(model)
    assert fraction_of_the_image() > 0.95
    assert all(not layer.bias.any() for layer in model.modules() if isinstance(layer, torch.nn.Conv2d))


@pytest.mark.parametrize(
    ("options", "frozen"),
    [
        ({}, set()),
        ({"codebook_decay": 0.9}, {"quantize"}),
        ({"train": "decoder", "validation_data_dir": "z"}, {"encoder", "quant_conv", "quantize"}),
    ],
)
def test_frozen_parts_get_no_gradient_and_no_optimizer(tmp_path, options, frozen):
    make_tiny(dropout_p=0.1).save_pretrained(tmp_path)
    options = make_options(
        **options, model_config_name_or_path=None, pretrained_model_name_or_path=str(tmp_path), resolution=64
    )
    model = load_model(options)
    parts_without_gradient = set()
    trained = set()  # ids of parameters
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            trained.add(id(parameter))
        else:
            parts_without_gradient.add(name.split(".")[0])
    assert parts_without_gradient == frozen
    assert len(frozen_parts(options, model)) == len(frozen)
    optimized = set()
    for group in parameter_groups(model, 0.1, KERNEL_NDIM):
        optimized.update(id(parameter) for parameter in group["params"])
    assert optimized == trained
    assert model.config["sample_size"] == 64
    assert model.encoder.training == (options.train == "all")
    assert model.decoder.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 30}, "must be multiples of f = 4, but one is 30"),
        (
            {"kmeans_steps": [5], "kmeans_batches": 1, "per_device_train_batch_size": 1, "resolution": 16},
            "64, but .* gives 16",
        ),
    ],
)
def test_options_that_do_not_fit_the_model_are_refused(tmp_path, options, message):
    make_tiny().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_model(
            make_options(**options, model_config_name_or_path=None, pretrained_model_name_or_path=f"{tmp_path}")
        )


# Scales


def test_random_scales_end_with_the_full_one_and_differ():
    options = make_options(num_scales=4)
    seen = [step_scales(options, 8, step) for step in range(50)]
    for scales in seen:
        assert scales[-1] == 1
        assert scales == sorted(set(scales))
        assert all(scale * 8 == round(scale * 8) for scale in scales)
    assert {round(scale * 8) for scales in seen for scale in scales} == set(range(1, 9))
    assert step_scales(options, 8, step=7) == seen[7]
    assert step_scales(make_options(num_scales=9), 2, step=0) == [0.5, 1.0]
    assert step_scales(make_options(scales=[1.0, 0.25]), 8, step=3) == [0.25, 1.0]
