"""diffusers' pipelines with a tiny SVQVAE; their other parts are small and random."""

import torch
from conftest import make_tiny
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel, KandinskyV22Pipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

WORDS = ["<pad>", "</s>", "a", "cat", "on", "the", "roof"]
F = 4  # of the tiny model
SIDE = 64  # DiTPipeline makes squares only


def make_pipeline(cls, **config):
    """Builds a pipeline, always with the same weights: `make_tiny` sets the seed."""
    signed = make_tiny(pixel_range=(-1, 1), **config)
    if cls is DiTPipeline:
        return DiTPipeline(dit(), signed, DDIMScheduler(clip_sample=False))
    return cls(movq=signed, unet=kandinsky_unet(cls), scheduler=DDIMScheduler(clip_sample=False))


def dit(sample_size=SIDE // F):
    sizes = {"in_channels": 8, "out_channels": 8, "num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8}
    return DiTTransformer2DModel(sample_size=sample_size, **sizes).eval()


def kandinsky_unet(cls):
    channels = 8 if cls is KandinskyV22Pipeline else 8 + 8 + 1  # latents; masked latents; mask
    config = {"down_block_types": ("SimpleCrossAttnDownBlock2D",), "up_block_types": ("SimpleCrossAttnUpBlock2D",)}
    config |= {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "block_out_channels": (8,), "layers_per_block": 1}
    config |= {"norm_num_groups": 2, "attention_head_dim": 8, "cross_attention_dim": 8, "encoder_hid_dim": 8}
    config |= {"encoder_hid_dim_type": "image_proj", "addition_embed_type": "image"}
    config |= {"resnet_time_scale_shift": "scale_shift", "out_channels": 8 + 8}  # noise; variance
    return UNet2DConditionModel(in_channels=channels, **config).eval()


def text_components() -> dict:
    """A random T5 encoder with the channels of the golden captions, and a tokenizer that ends each text with </s>."""
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(WORDS), d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    return {"text_encoder": T5EncoderModel(config).eval(), "tokenizer": tokenizer}
