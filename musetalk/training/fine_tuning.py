"""The end of a fine-tuning: the best validation, when to stop after it, and how to compare the result with its base."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from musetalk.models.trained_unet import read_unet_contract


@dataclass
class Best:
    """The validation with the lowest `lmd` so far.

    Not the highest r: a mouth may follow the audio ever better while the face gets worse, which `lmd` notices.
    """

    step: int = 0  # of the validation; 0: there was none
    lmd: float = math.inf
    validations_since: int = 0

    def update(self, step: int, lmd: float) -> bool:
        """Records a validation. Returns whether it is the best so far, as the first one always is.

        lmd: nan if no validation clip has it.
        """
        better = not self.step or lmd < self.lmd
        if better:
            self.step, self.lmd, self.validations_since = step, math.inf if math.isnan(lmd) else lmd, 0
        else:
            self.validations_since += 1
        return better

    def exhausted(self, patience: int) -> bool:
        """Whether so many validations in a row were not better; never if `patience` is 0."""
        return 0 < patience <= self.validations_since


def table_command(
    base: Path, result: Path, *, cache: Path, models_dir: Path, contract: str, clips: Sequence[str]
) -> str:
    """A command that compares two files of weights on clips of a cache; users put in the folder of its videos.

    contract: of the base, if its file carries none.
    """
    command = ["python", "-m", "musetalk.evaluate", "--truth", "path/to/videos", "--cache", str(cache)]
    command += ["--models-dir", str(models_dir), "--checkpoint", str(base), str(result)]
    if read_unet_contract(base) is None:
        command += ["--contract", contract]
    return shlex.join([*command, "--names", *clips])
