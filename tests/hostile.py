"""Helpers of tests that read broken, corrupted and malicious files."""

from __future__ import annotations

import struct
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


class Call:
    """An object whose unpickling calls a function: `torch.save` writes it as the call that `torch.load` would make."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


# A value of any type to put in place of a value in a JSON file.
UNUSUAL = (10**9, 2**63, 10**400, -1, 0, 1.5, float("nan"), float("inf"), True, None, "", "x" * 9999, "\n\x00\ud800")
any_value = st.recursive(
    st.sampled_from(UNUSUAL) | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def corrupted(draw: st.DrawFn, content: bytes) -> bytes:
    """Flips bits, overwrites, cuts, inserts and duplicates bytes, more often in the first 2000."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        if not content:
            break
        start = draw(st.integers(0, len(content) - 1) | st.integers(0, min(len(content), 2000) - 1))
        stop = min(len(content), start + draw(st.sampled_from([1, 8, 100, 10_000])))
        match draw(st.sampled_from(["flip", "overwrite", "cut", "insert", "duplicate"])):
            case "flip":
                content[start] ^= 1 << draw(st.integers(0, 7))
            case "overwrite":
                content[start : start + 8] = draw(st.binary(min_size=1, max_size=8))
            case "cut":
                del content[start:stop]
            case "insert":
                number = draw(st.integers(-(2**63), 2**63 - 1))
                content[start:start] = struct.pack("<q", number)
            case "duplicate":
                content[start:start] = content[start:stop]
    return bytes(content)
