"""Schedules of next-scale generation."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svqvae_hf.pipelines.schedules import fit_schedule, guidance_per_step, make_schedule


@given(st.tuples(st.integers(1, 80), st.integers(1, 80)), st.data())
def test_made_schedules_rise_to_the_size_in_the_number_of_steps(size, data):
    steps = data.draw(st.integers(1, max(size)))
    schedule = make_schedule(size, steps)
    assert len(schedule) == steps
    assert fit_schedule(schedule, size) == schedule
    assert steps == 1 or max(schedule[0]) == 1


def test_ten_steps_are_those_of_flexvar():
    assert [height for height, _ in make_schedule((16, 16), 10)] == [1, 2, 3, 4, 5, 6, 8, 10, 13, 16]


def test_sides_keep_the_aspect_ratio():
    assert fit_schedule([1, 2, 5, 10], (5, 10)) == [(1, 1), (1, 2), (3, 5), (5, 10)]
    assert make_schedule((16, 8), 3) == [(1, 1), (4, 2), (16, 8)]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ([1, 4, 3, 8], r"`schedule` must rise, but 3 x 3 follows 4 x 4\."),
        ([(2, 1), (1, 2), 8], r"`schedule` must rise, but 1 x 2 follows 2 x 1\."),
        ([1, 4], r"must end with 8 x 8, the ids of the image, got 1 x 1, 4 x 4\."),
        ([], r"must end with 8 x 8, the ids of the image, got no scale\."),
        ([1, 2.5, 8], "integers above 0, got 2.5"),
        ([(1, 2, 3), 8], r"pairs \(height, width\), integers above 0, got \(1, 2, 3\)"),
    ],
)
def test_wrong_schedules(schedule, message):
    with pytest.raises(ValueError, match=message):
        fit_schedule(schedule, (8, 8))


def test_guidance_per_step():
    sizes = make_schedule((16, 16), 12)
    assert guidance_per_step(4.0, "constant", sizes, (16, 16)) == [4.0] * 12
    rising = guidance_per_step(4.0, "rising", sizes, (16, 16))
    assert rising == pytest.approx([1 + step / 3 for step in range(12)])
    assert rising[9] == pytest.approx(4.0)
    assert guidance_per_step(4.0, "rising", sizes, (12, 14))[-1] == 4.0
    assert guidance_per_step(4.0, "rising", [(1, 1), (2, 2), (4, 4)], (4, 4)) == [1, 2.5, 4]
    assert guidance_per_step(4.0, "rising", [(4, 4)], (4, 4)) == [1]
