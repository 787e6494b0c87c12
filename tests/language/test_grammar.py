import re

import pytest
import torch
from tiny_language_models import load_extended

from svqvae_hf.language.grammar import ImageGrammar, grammar_lark, grammar_regex
from svqvae_hf.models.image_vocabulary import ImageVocabulary

SAMPLES = 2000  # the command in docs/language_models.md takes 100,000


def sample(grammar, prompts, length, generator):
    """Samples tokens from random logits under the grammar."""
    tokens, vocab_size = prompts, grammar.bias.shape[1]
    for _ in range(length):
        logits = torch.randn(len(tokens), vocab_size, generator=generator)
        logits[:, grammar.begin] += 6  # images often begin
        scores = grammar(tokens, logits)
        tokens = torch.cat([tokens, scores.softmax(-1).multinomial(1, generator=generator)], dim=1)
    return tokens


def left_padded(sequences):
    length = max(map(len, sequences))
    return torch.tensor([[0] * (length - len(sequence)) + sequence for sequence in sequences])


@pytest.mark.slow
def test_random_logits_make_no_malformed_image():
    model, processor = load_extended("qwen")  # whose padded rows are barred, too
    vocabulary = processor.vocabulary
    image = vocabulary.encode(torch.zeros(2, 3))
    starts = [[5], [5, 6], [5, vocabulary.begin], [5, *vocabulary.begin_image((4, 4))], [*image, 5], image[:5]]
    prompts = left_padded(starts).repeat(-(-SAMPLES // len(starts)), 1)
    tokens = sample(ImageGrammar(model.config), prompts, 40, torch.Generator().manual_seed(0))
    images = 0
    for sequence in tokens:
        images += len(vocabulary.split(sequence)) // 2
    assert images > 2 * SAMPLES


@pytest.mark.parametrize("codebook_size", [1, 64, 100, 4096, 16384, 100_000])
def test_regular_expression_takes_every_code_and_no_other(codebook_size):
    vocabulary = ImageVocabulary(0, codebook_size, "", 4, [(1, 2)])
    pattern = re.compile(grammar_regex(vocabulary, (1, 2)))
    for code in (0, codebook_size // 2, codebook_size - 1, codebook_size, codebook_size + 100, 99999):
        answer = f"<|image_00000|><|image_{code:05}|><|image_end|>"
        assert bool(pattern.fullmatch(answer)) == (code < codebook_size)
        for wrong in (f"a{answer}", answer[15:], f"{answer}<|no_condition|>", answer.removesuffix("<|image_end|>")):
            assert not pattern.fullmatch(wrong)


def test_grammar_of_llguidance():
    vocabulary = ImageVocabulary(100, 64, "", 4, [(1, 2), (2, 2)])
    assert grammar_lark(vocabulary) == (  # llguidance 1.9.1 takes it, and its masks are those of `ImageGrammar`
        "start: (TEXT | image)*\n"
        "image: <[164]> (<[167]> <[100-163]>{2} | <[168]> <[100-163]>{4}) <[165]>\n"
        "TEXT: /(.|\\n)+/\n"
    )


OPTIONS = [{"num_beams": 3}, {"cache_implementation": "static", "do_sample": True}]


@pytest.mark.parametrize("options", [*OPTIONS, {"num_return_sequences": 2, "do_sample": True}])
def test_generate_makes_images_only(options):
    torch.manual_seed(0)
    model, processor = load_extended("qwen")
    texts = [f"{text}{processor.begin_image((2, 3))}" for text in ("a", "a cat left of a pear")]
    inputs = processor(text=texts, padding=True, padding_side="left", return_tensors="pt")
    grammar = ImageGrammar(model.config)
    tokens = model.generate(**inputs, max_new_tokens=7, logits_processor=[grammar], **options)
    for parts in processor.post_process_multimodal_output(tokens, generation_mode="mixed"):
        assert [getattr(part, "size", part) for part in parts][1] == (12, 8)
