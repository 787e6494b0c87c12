"""Makes a small language model that knows the words of scenes and has learned nothing: `make_scene_words.py OUT`."""

import re
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from make_scenes import GROUNDS, OBJECTS, WORDINGS
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from svqvae_hf.trainer.scripts import one_line_errors, script_parser

SPECIAL = ["<unk>", "<s>", "</s>"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def list_words(part: Any = WORDINGS) -> list[str]:
    """Words of the wordings."""
    if isinstance(part, dict):
        part = [*part.values()]
    return re.findall(r"(?<!{)\b[a-z0-9]+\b(?!})", part) if isinstance(part, str) else [*chain(*map(list_words, part))]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Makes a tokenizer of whole words, which ignores case and punctuation. A plural is two tokens."""
    tokens = [*SPECIAL, "##s", "##es", *dict.fromkeys([*OBJECTS, *GROUNDS, *list_words(), "are"])]  # of "there are"
    tokenizer = Tokenizer(models.WordPiece({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    strip = [normalizers.Replace(Regex(pattern), by) for pattern, by in ((r"['’]", ""), (r"[^\p{L}\p{N}]+", " "))]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *strip])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    unknown, begin, end = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unknown,
        bos_token=begin,
        eos_token=end,
        pad_token=end,
        chat_template=TEMPLATE,
    )


def main() -> None:
    """Reads the arguments and writes the folder."""
    parser = script_parser(__doc__)
    parser.add_argument("out", type=Path, help="folder to write")
    out = parser.parse_args().out
    out.mkdir(parents=True)
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    with one_line_errors():
        main()
