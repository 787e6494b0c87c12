"""Config of LlamaGen's language models."""

from typing import Any

from transformers import LlamaConfig


class LlamaGenConfig(LlamaConfig):
    """Config of a [`LlamaGenForCausalLM`]; the defaults are LlamaGen-B for classes at 256 x 256 pixels.

    The vocabulary is the codes, then the classes, then the unconditional token, as in a [`SequenceLayout`] with one
    scale. A model for captions has one class, "with its caption".

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
        **kwargs: Further fields of [`~transformers.LlamaConfig`]. `vocab_size` is at least the codes, the classes and
            one. `head_dim`, `max_position_embeddings` and `num_key_value_heads` are computed.

    Raises:
        ValueError: The heads do not divide the channels, or do not have a multiple of 4 channels each.
    """

    model_type = "llamagen"
    default_theta = 10_000.0

    def __init__(
        self,
        codebook_size: int = 16384,
        num_classes: int = 1000,
        grid_size: int = 16,
        num_condition_tokens: int = 1,
        caption_dim: int | None = None,
        codebook_fingerprint: str | None = None,
        hidden_size: int = 768,
        intermediate_size: int = 2048,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        **kwargs: Any,
    ):
        if hidden_size % (4 * num_attention_heads):
            raise ValueError(
                f"`num_attention_heads` must divide the {hidden_size} channels into heads of a multiple of 4 "
                f"channels, got {num_attention_heads}."
            )
        self.codebook_size = codebook_size
        self.num_classes = num_classes
        self.grid_size = grid_size
        self.num_condition_tokens = num_condition_tokens
        self.caption_dim = caption_dim
        self.codebook_fingerprint = codebook_fingerprint
        computed = {
            "vocab_size": max(kwargs.get("vocab_size") or 0, codebook_size + num_classes + 1),
            "head_dim": hidden_size // num_attention_heads,
            "max_position_embeddings": num_condition_tokens + grid_size**2,
            "num_key_value_heads": num_attention_heads,
        }
        defaults = {"rms_norm_eps": 1e-5, "tie_word_embeddings": False}
        no_special_tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        super().__init__(
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            **(defaults | no_special_tokens | kwargs | computed),
        )

    @property
    def unconditional_token(self) -> int:
        """Token for no class or no caption."""
        return self.codebook_size + self.num_classes
