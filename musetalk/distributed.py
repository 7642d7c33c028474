"""What the processes of a training agree on: through gloo, apart from the GPUs' work."""

from __future__ import annotations

import socket
from collections.abc import Callable
from datetime import timedelta

import torch

from musetalk.script import UserError

# Of every collective, on GPUs too: the other processes wait in one while the first validates, or saves to a slow disk.
TIMEOUT = timedelta(hours=2)


class Ranks:
    """The processes of a training; a single one agrees with itself. All of them must make each call."""

    def __init__(self) -> None:
        many = torch.distributed.is_initialized()
        self.group = torch.distributed.new_group(backend="gloo", timeout=TIMEOUT) if many else None

    def any(self, flag: bool) -> bool:
        """Returns whether a flag is set in any process."""
        if self.group is None:
            return flag
        flags = torch.tensor(int(flag))
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, self.group)
        return bool(flags)

    def wait(self) -> None:
        """Waits until all processes are here."""
        if self.group is not None:
            torch.distributed.barrier(self.group)

    def require_same(self, describe: Callable[[], dict[str, object]]) -> None:
        """Raises UserError, in all processes, where they do not describe what they have by the same values."""
        if self.group is None:
            return
        found = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, (socket.gethostname(), describe()), self.group)
        faults = []
        for name in found[0][1]:
            owners: dict[object, list[str]] = {}  # by value
            for rank, (host, values) in enumerate(found):
                owners.setdefault(values[name], []).append(f"{rank} on {host}")
            if len(owners) > 1:
                faults.append(f"{name} " + ", ".join(f"{value} (rank {', '.join(at)})" for value, at in owners.items()))
        if faults:
            raise UserError(
                f"the processes cannot train as one, since they differ in {'; '.join(faults)}; give all nodes the same "
                "cache, models_dir and checkpoint_dir, in a folder that they share or as copies"
            )
