import re

import pytest
import torch

from svqvae_hf.pipelines.sequences import SequenceLayout

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
def test_each_token_of_the_vocabulary_has_one_meaning(layout):
    ranges = {layout.allowed(position) for position in range(layout.length)}
    assert sorted(token for tokens in ranges for token in tokens) == list(range(layout.vocab_size))
    assert layout.allowed(0)[-1] == layout.unconditional_token


def test_several_scales_go_from_coarse_to_fine_with_separators():
    layout = SequenceLayout(codebook_size=64, f=4, height=8, width=12, scales=[0.5, 1], num_classes=10)
    coarse, fine = torch.tensor([[9, 8]]), torch.tensor([[1, 2, 3], [4, 5, 63]])
    assert layout.encode([coarse, fine], 0).tolist() == [64, 9, 8, 64 + 10 + 1, 1, 2, 3, 4, 5, 63]


def test_layouts_out_of_range_raise():
    valid = {"codebook_size": 64, "f": 4, "height": 8, "width": 8}
    for scales in ((1.0, 0.5), (), (1.0, float("inf"))):
        message = f"`scales` must be above 0, finite and ascending, got {scales}. Pass a sorted list."
        with pytest.raises(ValueError, match=re.escape(message)):
            SequenceLayout(**valid, scales=scales)
    for name, value, least in (("num_classes", -1, 0), ("height", 2.5, 1), ("codebook_size", 0, 1)):
        with pytest.raises(ValueError, match=f"`{name}` must be an integer of at least {least} and .*, got {value}"):
            SequenceLayout(**valid | {name: value})


def test_ids_and_labels_that_do_not_match_the_layout_raise():
    ids = random_ids(SMALL, 2)
    faults = [
        (([], None), "`ids` must have one grid per scale of [0.25, 0.5, 1.0], got 0"),
        ((ids[::-1], None), "the ids of scale 0.25 must have shape (2, 1, 1), got (2, 4, 3)"),
        (([ids[0], ids[1][:1]], None), "the ids of scale 0.5 must have shape (2, 2, 2), got (1, 2, 2)"),
        (([ids[0] + 64], None), "`ids` must be in [0, 64)"),
        ((ids, 4), "`labels` must be in [0, 4)"),
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
