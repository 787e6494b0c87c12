import pytest
import torch
import torch.nn.functional as F
from conftest import make_tiny
from train import CONVOLUTION_NDIM

from svqvae_hf.trainer.model import frozen_parts, initialise, load_model, training_mode, whiten_latents
from svqvae_hf.trainer.run import parameter_groups
from svqvae_hf.trainer.train_options import TrainConfig


def make_config(**options):
    return TrainConfig(**({"output_dir": "out", "train_data_dir": "y", "model_config_name_or_path": "x"} | options))


def test_an_image_does_not_fade_on_its_way_through_a_new_model():
    torch.manual_seed(0)
    model = make_tiny(encoder_ch_mult=(1, 1, 2, 2, 4), decoder_ch_mult=(1, 1, 2, 2, 4))
    sample = F.interpolate(2 * torch.rand(8, 3, 4, 4) - 1, 64)
    last = []
    model.encoder.norm_out.register_forward_pre_hook(lambda _, inputs: last.append(inputs[0]))

    def share_of_the_image():
        model.encoder(sample)
        hidden = last.pop()
        return (hidden.var((0, 2, 3)).mean() / hidden.square().mean()).item()

    assert share_of_the_image() < 0.7
    initialise(model)
    assert share_of_the_image() > 0.95
    assert all(not layer.bias.any() for layer in model.modules() if isinstance(layer, torch.nn.Conv2d))


def test_latents_of_more_dimensions_than_features_are_refused():
    with pytest.raises(ValueError, match="of at most its `z_channels` = 4, but it is 8"):
        whiten_latents(make_tiny(z_channels=4), [])


def test_whitened_latents_have_mean_0_and_variance_1_and_are_principal_components():
    model = make_tiny(z_channels=16, dropout_p=0.5).train()
    initialise(model)
    samples = [torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)]
    whiten_latents(model, iter(samples))
    assert model.training
    model.eval()
    latents = torch.cat([model.encode(sample).latents for sample in samples]).permute(0, 2, 3, 1).flatten(0, 2)
    torch.testing.assert_close(latents.mean(0), torch.zeros(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.T.cov(), torch.eye(8), atol=1e-2, rtol=0)
    features = torch.cat([model.encoder(sample) for sample in samples]).permute(0, 2, 3, 1).flatten(0, 2)
    best = torch.linalg.svdvals(features - features.mean(0))[:8].square().sum()
    basis = torch.linalg.qr(model.quant_conv.weight[..., 0, 0].T)[0]
    torch.testing.assert_close(((features - features.mean(0)) @ basis).square().sum(), best, rtol=1e-3, atol=0)


def test_weight_decay_leaves_norms_biases_and_codes_alone():
    model = make_tiny()
    decayed, others = parameter_groups(model, 0.1, CONVOLUTION_NDIM)
    assert {parameter.ndim for parameter in decayed["params"]} == {4}
    assert any(parameter is model.quantize.embedding.weight for parameter in others["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("options", "frozen"),
    [
        ({}, set()),
        ({"freeze_codebook": True}, {"quantize"}),
        ({"train": "decoder", "validation_data_dir": "z"}, {"encoder", "quant_conv", "quantize"}),
    ],
)
def test_what_is_frozen_gets_no_gradient_and_no_optimizer(tmp_path, options, frozen):
    make_tiny(dropout_p=0.1).save_pretrained(tmp_path)
    config = make_config(
        **options, model_config_name_or_path=None, pretrained_model_name_or_path=str(tmp_path), resolution=64
    )
    model = load_model(config)
    kept = {name.split(".")[0] for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert kept == frozen
    assert len(frozen_parts(config, model)) == len(frozen)
    optimized = {id(each) for group in parameter_groups(model, 0.1, CONVOLUTION_NDIM) for each in group["params"]}
    assert optimized == {id(each) for each in model.parameters() if each.requires_grad}
    assert model.config["sample_size"] == 64
    if options.get("train") == "decoder":
        assert not model.encoder.training
        assert model.decoder.training
        assert not training_mode(config, model.eval()).encoder.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 30}, "must be multiples of f = 4, but one is 30"),
        ({"kmeans_steps": [5], "kmeans_batches": 1, "train_batch_size": 1, "resolution": 16}, "64, but .* give 16 in"),
    ],
)
def test_options_that_do_not_fit_the_model_are_refused(tmp_path, options, message):
    make_tiny().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_model(make_config(**options, model_config_name_or_path=None, pretrained_model_name_or_path=str(tmp_path)))


@pytest.mark.filterwarnings("ignore")  # torch's own, when it compiles
def test_compiled_blocks_compute_the_same(tmp_path):
    make_tiny(encoder_ch_mult=(1,), decoder_ch_mult=(1,)).save_pretrained(tmp_path)
    options = {"model_config_name_or_path": None, "pretrained_model_name_or_path": str(tmp_path), "resolution": 64}
    plain, compiled = (load_model(make_config(**options, torch_compile=each)) for each in (False, True))
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    for side in (8, 12):
        sample = torch.rand(1, 3, side, side)
        losses = [F.mse_loss(model(sample).sample, sample) for model in (plain, compiled)]
        torch.testing.assert_close(*losses)
    losses[1].backward()
