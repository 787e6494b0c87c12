"""Runs the tests that diffusers has for its models on ours. CONTRIBUTING has the command and where they lie."""

import torch
from tests.models.autoencoders.testing_utils import AutoencoderTesterMixin
from tests.models.testing_utils import (
    AttentionBackendTesterMixin,
    BaseModelTesterConfig,
    ModelTesterMixin,
    TrainingTesterMixin,
)

from svqvae_hf import SVQVAE, NextScaleTransformer


class ModelTests(BaseModelTesterConfig, ModelTesterMixin, AttentionBackendTesterMixin, TrainingTesterMixin):
    def random(self, *shape):
        return torch.rand(shape, generator=torch.Generator().manual_seed(0))


class TestSVQVAE(ModelTests, AutoencoderTesterMixin):
    model_class = SVQVAE
    output_shape = (3, 32, 32)
    test_outputs_equivalence = None  # it cannot compare named tuples, as `VQLosses` is
    test_forward_with_norm_groups = None  # it sets `block_out_channels`, an option of `AutoencoderKL`

    def get_init_dict(self):
        options = {"base_channels": 16, "norm_num_groups": 8, "z_channels": 16, "codebook_size": 64}
        return options | {"encoder_ch_mult": (1, 2), "decoder_ch_mult": (1, 2)}

    def get_dummy_inputs(self):
        return {"sample": self.random(2, 3, 32, 32)}


class TestNextScaleTransformer(ModelTests):
    model_class = NextScaleTransformer
    output_shape = (21, 64)

    def get_init_dict(self):
        options = {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 16}
        return options | {"num_classes": 10, "codebook_size": 64}

    def get_dummy_inputs(self):
        codes = [self.random(2, 8, side, side) for side in (1, 2)]
        return {"class_labels": torch.tensor([1, 10]), "codes": codes, "sizes": [(1, 1), (2, 2), (4, 4)]}
