"""What a user can mend, in one sentence."""

from __future__ import annotations

import unicodedata


class UserError(ValueError):
    """Something a user can mend. The message is one sentence: the file or constant, what is wrong, what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """The text in one line that any terminal shows: control characters, line ends and undecodable bytes as escapes."""
    return "".join(
        char if unicodedata.category(char) not in ("Cc", "Cs", "Zl", "Zp") else char.encode("unicode_escape").decode()
        for char in text
    )


class TrainError(UserError):
    """Training cannot start or go on."""
