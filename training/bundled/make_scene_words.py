"""Makes a small language model that knows words of captions and has learned nothing: `make_scene_words.py OUT`."""

from pathlib import Path
from random import Random

import torch
from make_scenes import Scene
from scene_captions import read_wordings
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from svqvae_hf.trainer.scripts import one_line_errors, script_parser

BEGIN, END, ANSWER = "<s>", "</s>", "<|assistant|>"
VOCABULARY = 1536
CAPTIONS = 20000  # from which the tokenizer learns
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}<|assistant|>{{ message.content }}{{ eos_token }}"
    "{% else %}{{ message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPELLED_OUT = {"[’‘`]": "'", "&|\\+": " and ", "\\bw/": "with ", "[\\s_]+": " "}


def make_tokenizer(texts: list[str], size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Makes a tokenizer of byte pairs, which ignores case. Every text has tokens.

    Args:
        texts (`list[str]`): Texts to learn from.
        size (`int`): Number of tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    spelled_out = [normalizers.Replace(Regex(pattern), text) for pattern, text in SPELLED_OUT.items()]
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase(), *spelled_out]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    without_prefix_space = decoders.Strip(content=" ", left=1, right=0)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), without_prefix_space])
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[BEGIN, END, ANSWER],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=END, chat_template=TEMPLATE
    )


def example_texts() -> list[str]:
    """Captions of scenes, and common words of English."""
    random = Random(0)
    captions = []
    for _ in range(CAPTIONS):
        scene = Scene.draw(random, held_out=False)
        captions.append(scene.caption(random))
    common_words = read_wordings("wordnet")["words"]
    return captions + common_words


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Makes a model with random weights. The last layer of each block is zero, so that the model learns faster."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def main() -> None:
    """Reads the arguments and writes the folder."""
    parser = script_parser(__doc__)
    parser.add_argument("out", type=Path, help="folder to write")
    out = parser.parse_args().out
    out.mkdir(parents=True)
    tokenizer = make_tokenizer(example_texts())
    make_model(tokenizer).save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    with one_line_errors():
        main()
