"""Parts of the drawings that the bundled model is trained on."""

from random import Random

import pytest
from prepare_drawings import split_groups


@pytest.mark.parametrize("seed", range(5))
def test_parts_share_no_group_and_hold_at_most_the_cap_of_each(seed):
    random = Random(seed)
    groups = [[10 * number + index for index in range(random.randrange(1, 9))] for number in range(200)]
    parts = split_groups(groups, every=20, cap=3)
    for group in groups:
        held = [len({*group} & {*part}) for part in parts.values()]
        assert sorted(held) == [0, 0, min(3, len(group))]
    assert [sum(10 * (index // 10) == index for index in part) for part in parts.values()] == [180, 10, 10]
