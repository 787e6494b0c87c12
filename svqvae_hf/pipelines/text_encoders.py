"""Loading of the text encoders of LlamaGen's models for captions."""

import torch
import transformers
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from svqvae_hf.hub.repositories import from_hub
from svqvae_hf.loaders.folder_checks import check_vocabulary_file


def load_text_encoder(source: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a text encoder in bfloat16, as LlamaGen does, and its tokenizer.

    Args:
        source (`str`): Folder or Hub id of a T5 encoder, such as `google/flan-t5-xl`.

    Raises:
        OSError: If the text encoder does not exist or cannot be downloaded.
        ValueError: It is not a T5 encoder, or its tokenizer has no words.
    """
    encoder_class = transformers.T5EncoderModel  # transformers imports its module here, which is slow
    encoder, info = from_hub(
        encoder_class.from_pretrained,
        source,
        dtype=torch.bfloat16,
        use_safetensors=True,
        output_loading_info=True,
    )
    missing_keys = info["missing_keys"]
    if missing_keys:
        raise ValueError(f"`text_encoder` must be a T5 encoder, but `{source}` lacks {min(missing_keys)}.")
    tokenizer = from_hub(AutoTokenizer.from_pretrained, source)
    check_vocabulary_file(source, tokenizer)
    return encoder.eval(), tokenizer
