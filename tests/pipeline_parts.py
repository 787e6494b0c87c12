"""diffusers' pipelines with a tiny SVQVAE; their other parts are small and random."""

import torch
from conftest import make_tiny
from diffusers import (
    AmusedImg2ImgPipeline,
    AmusedInpaintPipeline,
    AmusedPipeline,
    AmusedScheduler,
    DDIMScheduler,
    KandinskyV22Pipeline,
    LDMPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    UVit2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

WORDS = ["<pad>", "</s>", "a", "cat", "on", "the", "roof"]
AMUSED = [AmusedPipeline, AmusedImg2ImgPipeline, AmusedInpaintPipeline]
F = 4  # of the tiny model
SIDE = 64  # LDMPipeline makes squares only


def make_pipeline(cls, **config):
    """Builds a pipeline, always with the same weights: `make_tiny` sets the seed."""
    if cls in AMUSED:
        return cls(vqvae=make_tiny(**config), **amused_parts())
    signed = make_tiny(pixel_range=(-1, 1), **config)
    if cls is LDMPipeline:
        return cls(vqvae=signed, unet=ldm_unet(), scheduler=DDIMScheduler())
    return cls(movq=signed, unet=kandinsky_unet(cls), scheduler=DDIMScheduler(clip_sample=False))


def ldm_unet():
    return UNet2DModel(
        sample_size=SIDE // F,
        in_channels=8,
        out_channels=8,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=2,
        add_attention=False,
    ).eval()


def kandinsky_unet(cls):
    return UNet2DConditionModel(
        in_channels=8 if cls is KandinskyV22Pipeline else 8 + 8 + 1,  # latents; masked latents; mask
        out_channels=8 + 8,  # noise; variance
        block_out_channels=(8,),
        down_block_types=("SimpleCrossAttnDownBlock2D",),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D",),
        layers_per_block=1,
        norm_num_groups=2,
        attention_head_dim=8,
        cross_attention_dim=8,
        encoder_hid_dim=8,
        encoder_hid_dim_type="image_proj",
        addition_embed_type="image",
        resnet_time_scale_shift="scale_shift",
    ).eval()


def amused_parts():
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "c": 2, "a": 3, "t</w>": 4}
    text_config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=8,
        intermediate_size=8,
        projection_dim=8,
        num_hidden_layers=2,
        num_attention_heads=1,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    transformer = UVit2DModel(
        hidden_size=8,
        cond_embed_dim=8,
        micro_cond_encode_dim=2,
        micro_cond_embed_dim=10,  # 5 numbers of 2
        encoder_hidden_size=8,
        codebook_size=64,
        vocab_size=65,  # the codes and the mask
        in_channels=8,
        block_out_channels=8,
        num_res_blocks=1,
        block_num_heads=1,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
    )
    return {
        "tokenizer": CLIPTokenizer(vocabulary, model_max_length=8),
        "text_encoder": CLIPTextModelWithProjection(text_config).eval(),
        "transformer": transformer.eval(),
        "scheduler": AmusedScheduler(mask_token_id=64),
    }


def text_components() -> dict:
    """A random T5 encoder with the channels of the golden captions, and a tokenizer that ends each text with </s>."""
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(WORDS), d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    return {"text_encoder": T5EncoderModel(config).eval(), "tokenizer": tokenizer}
