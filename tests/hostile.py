"""Helpers of tests that read broken, corrupted and malicious files."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import strategies as st

from musetalk.errors import UserError


def refusal(read: Callable[[], object], name: str) -> str:
    """Returns the message of the UserError that `read` raises: one line that contains `name`."""
    with pytest.raises(UserError) as caught:
        read()
    message = str(caught.value)
    assert name in message and len(message.splitlines()) == 1
    return message


def read_or_refuse(read: Callable[[], object], name: str) -> None:
    """Checks that `read` succeeds, or raises UserError with a message of one line that contains `name`."""
    try:
        read()
    except UserError as error:
        assert name in str(error) and len(str(error).splitlines()) == 1


# A value of any type to put in place of a value in a JSON file.
UNUSUAL = (10**9, 2**63, 10**400, -1, 0, 1.5, float("nan"), float("inf"), True, None, "", "x" * 9999, "\n\x00\ud800")
any_value = st.recursive(
    st.sampled_from(UNUSUAL) | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def corrupted(draw: st.DrawFn, content: bytes) -> bytes:
    """Replaces slices of the content by random bytes, most often in the first 2000."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)) | st.integers(0, min(len(content), 2000)))
        length = draw(st.sampled_from([0, 1, 8, 100, 10_000]))
        content = content[:start] + draw(st.binary(max_size=16)) + content[start + length :]
    return content
