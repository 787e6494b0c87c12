"""Makes a small language model that knows the words of scenes and has learned nothing: `make_scene_words.py OUT`."""

import argparse
from pathlib import Path

import torch
from make_scenes import GROUNDS, OBJECTS, RELATIONS
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from svqvae_hf.trainer.scripts import one_line_errors

RELATION_WORDS = " ".join(word for wordings in RELATIONS.values() for each in wordings for word in each).split()
WORDS = [*OBJECTS, *GROUNDS, *RELATION_WORDS, *"small large two three a an on ground".split()]
SPECIAL = ["<unk>", "<s>", "</s>"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Makes a tokenizer of whole words, which ignores case, and punctuation except commas. A plural is two tokens."""
    tokens = [*SPECIAL, ",", "##s", "##es", *dict.fromkeys(WORDS)]
    tokenizer = Tokenizer(models.WordPiece({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    strip = normalizers.Replace(Regex(r"[^\p{L}\p{N},]+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), strip])
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
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__)
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
