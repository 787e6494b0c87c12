"""Errors of the Hub in the words of a user."""

import pytest
from huggingface_hub import errors

from svqvae_files.hub import hub_reason


def test_the_reason_is_the_cause_that_is_known():
    error = OSError("wrapped")
    error.__cause__ = errors.EntryNotFoundError("no such file")
    assert hub_reason(error) == "the repository has no such file."


@pytest.mark.parametrize("known", [True, False])
def test_a_circle_of_causes_ends(known):
    """Libraries that raise an error again in the handler of its own wrapper make one."""
    first = OSError("first")
    second = errors.HTTPError("second") if known else OSError("second")
    first.__cause__ = second
    second.__cause__ = first
    expected = "the Hub cannot be reached." if known else "first."
    assert hub_reason(first).startswith(expected)
