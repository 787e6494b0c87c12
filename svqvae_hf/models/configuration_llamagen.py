"""Config of LlamaGen's language models."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig


@strict
class LlamaGenConfig(LlamaConfig):
    """Config of a [`LlamaGenForCausalLM`]; the defaults are LlamaGen-B for classes at 256 x 256 pixels.

    The vocabulary is the codes, then the classes, then the unconditional token. A model for captions has one class,
    "with its caption".

    Args:
        codebook_size (`int`, defaults to 16384): Codes of the tokenizer.
        num_classes (`int`, defaults to 1000): Number of classes, 1 for captions.
        grid_size (`int`, defaults to 16): Rows and columns of ids of an image.
        num_condition_tokens (`int`, defaults to 1): Positions before the first id: 1 for a class, 120 in LlamaGen's
            models for captions.
        caption_dim (`int`, *optional*): Channels of the caption features. Classes instead of captions by default.
        codebook_fingerprint (`str`, *optional*): [`SVQVAE.codebook_fingerprint`] of the tokenizer.
        hidden_size (`int`, defaults to 768): Channels.
        intermediate_size (`int`, defaults to 2048): Channels within a feed-forward block.
        num_hidden_layers (`int`, defaults to 12): Number of layers.
        num_attention_heads (`int`, defaults to 12): Number of heads. A head has a multiple of 4 channels.
        **kwargs: Further fields of [`~transformers.LlamaConfig`]. `vocab_size` is at least
            `codebook_size + num_classes + 1`. `head_dim`, `max_position_embeddings` and `num_key_value_heads` are
            computed.

    Raises:
        ValueError: The heads do not divide the channels, or do not have a multiple of 4 channels each.
    """

    model_type = "llamagen"
    default_theta = 10_000.0
    use_bias = False  # read by the layers of Ernie 4.5; not annotated, so it is no field of the config

    vocab_size: int = 0
    codebook_size: int = 16384
    num_classes: int = 1000
    grid_size: int = 16
    num_condition_tokens: int = 1
    caption_dim: int | None = None
    codebook_fingerprint: str | None = None
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    rms_norm_eps: float = 1e-5
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # Attention rotates pairs of channels: half of the pairs of a head by the row of an id, and half by its column.
        # So a head must have a multiple of two pairs.
        smallest_head_dim = 4
        if self.hidden_size % (self.num_attention_heads * smallest_head_dim) != 0:
            raise ValueError(
                f"`num_attention_heads` must divide the {self.hidden_size} channels into heads of a multiple of 4 "
                f"channels, got {self.num_attention_heads}."
            )
        # The last token is the unconditional one. A config may state a larger vocabulary, such as a padded one.
        smallest_vocab_size = self.unconditional_token + 1
        self.vocab_size = max(self.vocab_size, smallest_vocab_size)
        self.head_dim = self.hidden_size // self.num_attention_heads
        self.max_position_embeddings = self.num_condition_tokens + self.grid_size**2
        self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)

    @property
    def unconditional_token(self) -> int:
        """Token for no class or no caption."""
        return self.codebook_size + self.num_classes
