import re

import pytest
import torch
from conftest import make_tiny
from transformers import LlamaConfig, LlamaForCausalLM

from svqvae_hf.pipelines.sequences import INTEGER_TYPES, LayoutLogitsProcessor, SequenceLayout

LAYOUTS = [
    SequenceLayout(64, 4, 32, 32),
    SequenceLayout(64, 4, 32, 24, (0.25, 0.5, 1.0), 3),
    SequenceLayout(64, 4, 30, 17, (0.3, 1.0, 1.5), 10),
    SequenceLayout(64, 8, 1, 1, (0.5, 1.0)),
    SequenceLayout(2**17, 16, 48, 32, (1.0,), 1000),
]
SMALL = SequenceLayout(64, 4, 16, 12, (0.25, 0.5, 1.0), 3)

pytestmark = pytest.mark.usefixtures("no_grad")


def random_ids(layout, *batch):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(layout.codebook_size, (*batch, *size), generator=generator) for size in layout.grids]


def tiny_llama(layout):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=layout.vocab_size,
        max_position_embeddings=layout.length,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_decoding_a_sequence_returns_ids_and_labels(layout, batch):
    ids = random_ids(layout, *batch)
    labels = torch.arange(torch.Size(batch).numel()).reshape(batch) % (layout.num_classes + 1)
    sequences = layout.encode(ids, labels)
    assert sequences.shape == (*batch, layout.length)
    decoded, decoded_labels = layout.decode(sequences)
    assert all(map(torch.equal, decoded, ids))
    assert torch.equal(decoded_labels, labels)
    assert torch.equal(layout.encode(decoded, decoded_labels), sequences)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_prefix_of_whole_scales_is_the_sequence_of_a_smaller_image(layout):
    ids = random_ids(layout, 2)
    sequences = layout.encode(ids)
    for count in range(1, len(layout.scales) + 1):
        first = SequenceLayout(
            layout.codebook_size, layout.f, layout.height, layout.width, layout.scales[:count], layout.num_classes
        )
        prefix = layout.encode(ids[:count])
        assert torch.equal(prefix, first.encode(ids[:count]))
        assert torch.equal(prefix, sequences[:, : first.length])
        assert all(map(torch.equal, layout.decode(prefix)[0], ids[:count]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_token_of_the_vocabulary_has_one_meaning(layout):
    ranges = {layout.allowed(position) for position in range(layout.length)}
    assert sorted(token for tokens in ranges for token in tokens) == list(range(layout.vocab_size))
    assert layout.allowed(0)[-1] == layout.unconditional_token


def test_one_scale_is_the_class_and_then_the_ids_row_by_row():
    layout = SequenceLayout(codebook_size=64, f=4, height=8, width=12, num_classes=10)
    ids = torch.tensor([[1, 2, 3], [4, 5, 63]])
    assert layout.encode([ids], 7).tolist() == [64 + 7, 1, 2, 3, 4, 5, 63]
    assert layout.encode([ids]).tolist() == [64 + 10, 1, 2, 3, 4, 5, 63]


def test_several_scales_go_from_coarse_to_fine_with_separators():
    layout = SequenceLayout(codebook_size=64, f=4, height=8, width=12, scales=[0.5, 1], num_classes=10)
    coarse, fine = torch.tensor([[9, 8]]), torch.tensor([[1, 2, 3], [4, 5, 63]])
    assert layout.encode([coarse, fine], 0).tolist() == [64, 9, 8, 64 + 10 + 1, 1, 2, 3, 4, 5, 63]


def test_ids_of_the_model_at_any_size():
    model = make_tiny()
    for height, width in [(16, 16), (19, 33), (1, 5)]:
        layout = SequenceLayout(64, model.f, height, width, (0.3, 0.5, 1.0, 1.7))
        ids = model.encode_tokens(torch.rand(2, 3, height, width), layout.scales)
        assert all(map(torch.equal, layout.decode(layout.encode(ids))[0], ids))


def test_integers_of_any_type():
    ids, labels = random_ids(SMALL, 2), torch.tensor([0, 3])
    sequences = SMALL.encode(ids, labels)
    for dtype in INTEGER_TYPES:
        assert torch.equal(SMALL.encode([grid.to(dtype) for grid in ids], labels.to(dtype)), sequences)
        decoded, decoded_labels = SMALL.decode(sequences.to(dtype))
        assert all(map(torch.equal, decoded, ids))
        assert torch.equal(decoded_labels, labels)


def test_other_types_than_integer_tensors_raise():
    ids, labels = random_ids(SMALL, 2), torch.tensor([0, 3])
    for name, call in {
        "ids": lambda: SMALL.encode([ids[0], ids[1].bool()], labels),
        "labels": lambda: SMALL.encode(ids, labels.bool()),
        "sequences": lambda: SMALL.decode(SMALL.encode(ids, labels).bool()),
    }.items():
        message = f"`{name}` must be tensors of integers, got torch.bool. Pass int64 tensors."
        with pytest.raises(TypeError, match=re.escape(message)):
            call()
    with pytest.raises(TypeError, match="`ids` must be tensors of integers, got ndarray"):
        SMALL.encode([grid.numpy() for grid in ids], labels)


def test_labels_may_be_a_list_or_an_array():
    ids, labels = random_ids(SMALL, 2), torch.tensor([0, 3])
    expected = SMALL.encode(ids, labels)
    for same in ([0, 3], (0, 3), labels.numpy()):
        assert torch.equal(SMALL.encode(ids, same), expected)


def test_all_samples_of_an_untrained_model_decode():
    prompt = torch.full((1000, 1), SMALL.unconditional_token)
    torch.manual_seed(0)
    sequences = tiny_llama(SMALL).generate(
        prompt,
        logits_processor=[LayoutLogitsProcessor(SMALL)],
        max_new_tokens=SMALL.length - 1,
        do_sample=True,
        top_k=0,
    )
    ids, labels = SMALL.decode(sequences)
    assert (labels == SMALL.num_classes).all()
    assert all(len(grid.unique()) == 64 for grid in ids)


def test_the_processor_keeps_the_scores_of_allowed_tokens():
    scores = torch.randn(2, SMALL.vocab_size)
    for position in range(SMALL.length):
        masked = LayoutLogitsProcessor(SMALL)(torch.zeros(2, position, dtype=torch.long), scores)
        allowed = list(SMALL.allowed(position))
        assert torch.equal(masked[:, allowed], scores[:, allowed])
        assert torch.isfinite(masked).sum() == 2 * len(allowed)


def test_layouts_out_of_range_raise():
    valid = {"codebook_size": 64, "f": 4, "height": 8, "width": 8}
    for scales in ((1.0, 0.5), (0.5, 0.5), (), (0.0, 1.0), (1.0, float("inf")), (float("nan"),)):
        message = f"`scales` must be above 0, finite and ascending, got {scales}. Pass a sorted list."
        with pytest.raises(ValueError, match=re.escape(message)):
            SequenceLayout(**valid, scales=scales)
    for name, value, least in (("num_classes", -1, 0), ("height", 2.5, 1), ("codebook_size", 0, 1)):
        with pytest.raises(ValueError, match=f"`{name}` must be an integer of at least {least}, got {value}"):
            SequenceLayout(**valid | {name: value})


def test_ids_and_labels_that_do_not_match_the_layout_raise():
    ids = random_ids(SMALL, 2)
    faults = [
        (([], None), "`ids` must have one grid per scale of [0.25, 0.5, 1.0], got 0"),
        ((ids[::-1], None), "the ids of scale 0.25 must have shape (2, 1, 1), got (2, 4, 3)"),
        (([ids[0], ids[1][:1]], None), "the ids of scale 0.5 must have shape (2, 2, 2), got (1, 2, 2)"),
        (([ids[0] + 64], None), "`ids` must be in [0, 64)"),
        (([ids[0] - 64], None), "`ids` must be in [0, 64)"),
        ((ids, 4), "`labels` must be in [0, 4)"),
        ((ids, -1), "`labels` must be in [0, 4)"),
        ((ids, torch.tensor([0, 1, 2])), "`labels` must have shape (2,), one per image, got (3,)"),
    ]
    for arguments, message in faults:
        with pytest.raises(ValueError, match=re.escape(message)):
            SMALL.encode(*arguments)


def test_sequences_that_do_not_match_the_layout_raise():
    sequence = SMALL.encode(random_ids(SMALL), 1)
    with pytest.raises(ValueError, match=re.escape("must end with a scale, after [2, 7, 20] tokens, got 19")):
        SMALL.decode(sequence[:-1])
    for position, token in [(0, 63), (0, 68), (1, 64), (2, 69), (6, 68), (19, 69), (19, -1)]:
        broken = sequence.clone()
        broken[position] = token
        with pytest.raises(ValueError, match="tokens must be in"):
            SMALL.decode(broken)
    with pytest.raises(ValueError, match=re.escape("`position` must be in [0, 20), the length of a sequence")):
        SMALL.allowed(20)
