import re

import pytest
import torch
from tiny_language_models import FAMILIES, load_extended

from svqvae_hf.language.grammar import ImageGrammar, grammar_lark, grammar_regex
from svqvae_hf.language.image_vocabulary import ImageVocabulary

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


@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_sequences_match_the_regular_expression(family):
    model, processor = load_extended(family)
    vocabulary = processor.vocabulary
    pattern = re.compile(grammar_regex(vocabulary))
    tokens = sample(ImageGrammar(model.config), torch.full((100, 1), 70), 40, torch.Generator().manual_seed(0))
    for sequence in tokens:
        is_whole = len(vocabulary.split(sequence)) // 2 == (sequence == vocabulary.begin).sum()
        assert bool(pattern.fullmatch(processor.tokenizer.decode(sequence))) == is_whole


@pytest.mark.parametrize("codebook_size", [1, 64, 100, 4096, 16384])
def test_regular_expression_takes_every_code_and_no_other(codebook_size):
    vocabulary = ImageVocabulary(0, codebook_size, "", 4, [(1, 1)])
    pattern = re.compile(grammar_regex(vocabulary))
    for code in (0, codebook_size // 2, codebook_size - 1, codebook_size, codebook_size + 100, 99999):
        text = f"<|image_begin|><|image_1x1|><|image_{code:05}|><|image_end|>"
        assert bool(pattern.fullmatch(text)) == (code < codebook_size)


def test_grammar_of_llguidance():
    vocabulary = ImageVocabulary(100, 64, "", 4, [(1, 2), (2, 2)])
    assert grammar_lark(vocabulary) == (  # llguidance 1.9.1 takes it, and its masks are those of `ImageGrammar`
        "start: (TEXT | image)*\n"
        "image: <[164]> (<[167]> <[100-163]>{2} | <[168]> <[100-163]>{4}) <[165]>\n"
        "TEXT: /(.|\\n)+/\n"
    )


def test_image_tokens_outside_an_image_have_probability_zero():
    model, processor = load_extended("qwen")
    vocabulary = processor.vocabulary
    scores = torch.zeros(1, model.config.vocab_size)
    probabilities = ImageGrammar(model.config)(torch.tensor([[5]]), scores).softmax(-1)[0]
    barred = [*range(vocabulary.first_token, vocabulary.begin), *range(vocabulary.begin + 1, model.config.vocab_size)]
    assert (probabilities[barred] == 0).all()
    assert (probabilities[: vocabulary.first_token] > 0).all()


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True},
        {"num_beams": 3},
        {"cache_implementation": "static", "do_sample": True},
        {"num_return_sequences": 2, "do_sample": True},
    ],
)
def test_generate_makes_images_only(options):
    torch.manual_seed(0)
    model, processor = load_extended("qwen")
    processor.tokenizer.padding_side = "left"
    texts = [f"{text}{processor.begin_image((2, 3))}" for text in ("a", "a cat left of a pear")]
    inputs = processor(text=texts, padding=True, return_tensors="pt")
    grammar = ImageGrammar(model.config)
    tokens = model.generate(**inputs, max_new_tokens=7, logits_processor=[grammar], **options)
    for parts in processor.post_process_multimodal_output(tokens):
        assert [getattr(part, "size", part) for part in parts][1] == (12, 8)


@pytest.mark.slow
def test_the_grammar_compiles():
    model, processor = load_extended()
    grammar = ImageGrammar(model.config)
    compiled = torch.compile(grammar.__call__, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (3, 4, 9):
        tokens = left_padded([[5], [5, processor.vocabulary.begin], processor.vocabulary.begin_image((2, 2))])
        tokens = torch.cat([tokens, tokens[:, -1:].repeat(1, length)], dim=1)
        scores = torch.randn(3, model.config.vocab_size)
        assert torch.equal(compiled(tokens, scores), grammar(tokens, scores))
