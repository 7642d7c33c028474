"""How a script ends when its user can mend what is wrong: one sentence, exit code 2, no traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

Config = TypeVar("Config")


class UserError(ValueError):
    """Something a user can mend. The message is one sentence: the file or constant, what is wrong, what to do."""


def run_script(main: Callable[[Config], None], config: Config) -> None:
    """Run a script's main. Leaves with exit code 2 for what its user can mend, 130 when interrupted."""
    try:
        main(config)
    except UserError as error:
        sys.exit(_leave(str(error), 2))
    except OSError as error:
        if error.filename is None:
            raise
        sys.exit(_leave(f"{error.filename}: {error.strerror}", 2))
    except KeyboardInterrupt:
        sys.exit(_leave("interrupted; run the same command again to go on", 130))


def _leave(message: str, code: int) -> int:
    print(f"\n{message}", file=sys.stderr)
    return code
