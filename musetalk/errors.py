"""Errors that a user can fix, each reported in one sentence."""

from __future__ import annotations

import unicodedata


class UserError(ValueError):
    """An error that a user can fix. The message is one sentence: the file or constant, what is wrong, what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """The text as one printable line: control characters, line ends and undecodable bytes become escapes."""
    return "".join(
        char if unicodedata.category(char) not in ("Cc", "Cs", "Zl", "Zp") else char.encode("unicode_escape").decode()
        for char in text
    )


class TrainError(UserError):
    """Training cannot start or continue."""
