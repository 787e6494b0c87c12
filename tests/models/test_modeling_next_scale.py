"""The next-scale transformer, against the original code and by its properties."""

import pytest
import torch
from conftest import gradients_with_checkpointing, make_tiny, offload
from diffusers.models.attention_dispatch import attention_backend
from next_scale_golden import GOLDEN, NO_CLASS, OUTPUTS, SIZES, Golden, make_codes, make_transformer
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache

from svqvae_hf import NextScaleTransformer

pytestmark = pytest.mark.usefixtures("no_grad")
LABELS = torch.tensor([2, 3])
LENGTHS = [height * width for height, width in SIZES]


def run_steps(transformer, labels, codes, sizes):
    """Logits of one step per scale, with a cache."""
    cache = DynamicCache()
    steps = [transformer(labels, codes[:0], sizes[:1], cache).logits]
    for before, size in zip(codes[:-1], sizes[1:], strict=True):
        steps.append(transformer(labels, [before], [size], cache).logits)
    return torch.cat(steps, dim=1)


@pytest.mark.parametrize("name", ["trained", "longer", "larger"])
def test_logits_are_those_of_the_original(name):
    transformer, golden = NextScaleTransformer.from_single_file(GOLDEN), Golden(name)
    expected = OUTPUTS[f"{name}.teacher_forced.logits"]
    logits = transformer(OUTPUTS["class_labels"], golden.codes[:-1], golden.sizes).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    steps = run_steps(transformer, OUTPUTS["class_labels"], golden.codes, golden.sizes)
    torch.testing.assert_close(steps, expected, atol=1e-5, rtol=0)


def test_logits_without_a_class_are_those_of_the_original():
    transformer, golden = NextScaleTransformer.from_single_file(GOLDEN), Golden("trained")
    logits = transformer(torch.full((2,), NO_CLASS), golden.codes[:-1], golden.sizes).logits
    torch.testing.assert_close(logits, OUTPUTS["trained.teacher_forced.unconditional_logits"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("sizes", [SIZES, [(2, 3), (2, 5), (7, 9)], [(4, 4)]])
def test_steps_with_a_cache_give_the_logits_of_one_pass(sizes):
    transformer = make_transformer()
    codes = make_codes(transformer, sizes)
    expected = transformer(LABELS, codes[:-1], sizes).logits
    assert expected.shape == (2, sum(height * width for height, width in sizes), 64)
    torch.testing.assert_close(run_steps(transformer, LABELS, codes, sizes), expected, atol=1e-5, rtol=1e-5)


def test_a_caption_stands_before_the_first_scale():
    transformer = make_transformer(num_classes=0, vocab_size=9, max_text_length=3)
    labels, text, codes = torch.zeros(2).long(), torch.tensor([[4, 5, 0], [8, 0, 0]]), make_codes(transformer)
    expected = transformer(labels, codes[:-1], SIZES, text=text).logits
    assert expected.shape == (2, sum(LENGTHS), 64)
    cache = DynamicCache()
    steps = [transformer(labels, [], SIZES[:1], cache, text).logits]
    steps += [transformer(labels, [b], [s], cache, text).logits for b, s in zip(codes[:-1], SIZES[1:], strict=True)]
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, atol=1e-5, rtol=1e-5)
    other = transformer(labels, codes[:-1], SIZES, text=text.flip(1)).logits
    assert ((other - expected).abs().amax(2) > 1e-5).all()
    for wrong in (None, text[:, :2]):
        with pytest.raises(ValueError, match="must be captions of 3 tokens"):
            transformer(labels, codes[:-1], SIZES, text=wrong)
    with pytest.raises(ValueError, match="`max_text_length` must be"):
        make_transformer(vocab_size=9)


def test_logits_depend_on_the_scales_before_and_on_no_later_one():
    transformer = make_transformer()
    codes = make_codes(transformer)[:-1]
    logits = transformer(LABELS, codes, SIZES).logits.split(LENGTHS, dim=1)
    for changed in range(len(codes)):
        others = [-grid if index == changed else grid for index, grid in enumerate(codes)]
        for scale, part in enumerate(transformer(LABELS, others, SIZES).logits.split(LENGTHS, dim=1)):
            differs = (part - logits[scale]).abs().amax((0, 2)) > 1e-3
            assert differs.all() if scale > changed else not differs.any()


def test_attention_needs_no_mask():
    transformer = make_transformer()
    codes = make_codes(transformer)[:-1]
    expected = transformer(LABELS, codes, SIZES).logits
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # fails with a mask that has values for each pair of tokens
        torch.testing.assert_close(transformer(LABELS, codes, SIZES).logits, expected)


def test_attention_runs_on_the_backend_that_is_set():
    transformer, vqvae, image = make_transformer(), make_tiny(), torch.rand(1, 3, 16, 16)
    with attention_backend("native"):  # restores diffusers' global backend, which `set_attention_backend` sets, too
        transformer.set_attention_backend("_native_efficient")
        with pytest.raises(RuntimeError, match="No viable backend"):  # on a CPU
            transformer(LABELS, make_codes(transformer)[:-1], SIZES)
        vqvae(image)
        vqvae.set_attention_backend("_native_efficient")
        with pytest.raises(RuntimeError, match="No viable backend"):
            vqvae(image)


def test_bfloat16_is_close_to_float32():
    transformer = make_transformer()
    codes = make_codes(transformer)[:-1]
    expected = transformer(LABELS, codes, SIZES).logits
    logits = transformer.to(torch.bfloat16)(LABELS, codes, SIZES).logits
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().mean() < 0.03 * expected.abs().mean()


@torch.enable_grad()
def test_every_parameter_gets_a_gradient_with_checkpointing_or_without():
    def loss(transformer):
        return transformer(LABELS, make_codes(transformer)[:-1], SIZES).logits.square().mean()

    gradients, recomputed = gradients_with_checkpointing(make_transformer, loss)
    assert recomputed == 2
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())


@pytest.mark.slow
def test_compiles_without_graph_breaks():
    transformer = make_transformer()
    codes = make_codes(transformer)[:-1]
    compiled = torch.compile(transformer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(LABELS, codes, SIZES).logits, transformer(LABELS, codes, SIZES).logits)


@pytest.mark.parametrize("kind", ["leaf_level", "block_level", "sequential"])
def test_offloading_changes_no_logits(tmp_path, kind):
    transformer = make_transformer()
    codes = make_codes(transformer)
    expected = run_steps(transformer, LABELS, codes, SIZES)
    offload(transformer, kind, tmp_path)
    torch.testing.assert_close(run_steps(transformer, LABELS, codes, SIZES), expected)


def test_a_new_model_starts_near_uniform_logits():
    torch.manual_seed(0)
    transformer = NextScaleTransformer(2, 2, 32, num_classes=3, codebook_size=64, position_size=6)
    logits = transformer(LABELS, make_codes(transformer)[:-1], SIZES).logits
    assert 0 < logits.abs().max() < 0.1
    gates, others = transformer.blocks[0].ada_lin[1].weight.split([2 * 64, 4 * 64])
    assert (others.std() / gates.std()).item() == pytest.approx(500, rel=0.1)
    rows, columns = transformer.pos_1LC[0, ::2], transformer.pos_1LC[0, 1::2]
    assert torch.equal(rows, rows[:, :, :1].expand_as(rows))
    assert torch.equal(columns, columns[:, :1].expand_as(columns))


def test_wrong_arguments():
    transformer = make_transformer()
    with pytest.raises(ValueError, match=r"`codes` must .* each of the 4 scales but the first, got 4\."):
        transformer(LABELS, make_codes(transformer), SIZES)
    with pytest.raises(ValueError, match="`num_layers` must be an integer of at least 1 and .*, got 0"):
        make_transformer(num_layers=0)
    with pytest.raises(ValueError, match="The config must have at most 256 layers, got 100000"):
        make_transformer(num_layers=100_000)
