"""The optimizer step that all trainers share: accumulate, average over processes, clip, check, update."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import torch
from accelerate.utils import gather_object, reduce

from musetalk.errors import TrainError
from musetalk.training.distributed import GradientAverage


class StepConfig(Protocol):
    """The constants of an optimizer step."""

    checkpoint_dir: Path
    learning_rate: float  # peak
    warmup_steps: int
    final_learning_rate: float
    num_steps: int
    grad_accum_steps: int
    max_grad_norm: float
    on_nonfinite: Literal["stop", "skip"]
    seed: int


class StepResult(NamedTuple):
    """The outcome of one optimizer step."""

    terms: dict[str, torch.Tensor]  # means over this process's samples, on the device
    grad_norm: torch.Tensor  # of the first optimizer's parameters before clipping, on the device
    learning_rate: float  # of the first optimizer
    skipped: str  # why no update was made; "" if one was


class OptimizerStep:
    """Collects the micro steps of one optimizer step, then updates.

    step = OptimizerStep(state.step, config, [optimizer])
    for batch in step.micro_batches(batches):
        ...  # losses; one backward pass, of their sum divided by grad_accum_steps
        step.add(terms)
    result = step.update()
    """

    def __init__(self, step: int, config: StepConfig, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """step: optimizer updates made before this one."""
        self.step, self.config, self.optimizers = step, config, optimizers
        self.parameters = [[p for group in x.param_groups for p in group["params"]] for x in optimizers]
        self.average: GradientAverage | None = None  # from the last micro step on
        self.terms: dict[str, torch.Tensor] = {}
        self.sample_ids: list[str] = []

    def micro_batches(self, batches: Iterator[dict]) -> Iterator[dict]:
        """Yields the batches of this step. Seeds torch by the step number, so that a resumed run is exact."""
        torch.manual_seed(self.config.seed + self.step)
        count = self.config.grad_accum_steps
        for micro_step, batch in enumerate(islice(batches, count), 1):
            self.sample_ids += batch["where"]
            if micro_step == count:
                self.average = GradientAverage(chain(*reversed(self.parameters)))
            yield batch

    def add(self, terms: dict[str, torch.Tensor]) -> None:
        """Adds the detached terms of one micro step to the means."""
        for name, value in terms.items():
            self.terms[name] = self.terms.get(name, 0) + value / self.config.grad_accum_steps

    def update(self) -> StepResult:
        """Averages gradients over processes, clips each optimizer's to `max_grad_norm`, and updates all or none.

        The learning rate schedule is that of the first optimizer. If a gradient is not finite, no parameter changes:
        with `on_nonfinite` "skip" the result says why, with "stop" TrainError is raised. Clears the gradients.
        """
        rate = scheduled_rate(self.step, self.config)
        if self.average:
            self.average.finish()
        norms = [torch.nn.utils.clip_grad_norm_(group, self.config.max_grad_norm) for group in self.parameters]
        finite = bool(torch.stack(norms).isfinite().all())  # the only host read in a step
        if finite:
            self.optimizers[0].param_groups[0]["lr"] = rate
            for optimizer in self.optimizers:
                optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return StepResult(self.terms, norms[0], rate, "" if finite else self._nonfinite())

    def _nonfinite(self) -> str:
        """A sentence naming the terms and samples of a step with a non-finite gradient; TrainError on "stop"."""
        terms, sample_ids = reduce(self.terms, "mean"), gather_object(self.sample_ids)
        broken = [name for name, value in terms.items() if not value.isfinite()]
        message = (
            f"step {self.step + 1}: the gradient is not finite (terms not finite: {', '.join(broken) or 'none'}); "
            f"no update was made. Samples of this step: {'; '.join(sample_ids)}. The last training state is in "
            f"{self.config.checkpoint_dir}; lower learning_rate, or set on_nonfinite to skip"
        )
        if self.config.on_nonfinite == "stop":
            raise TrainError(message)
        return message


def scheduled_rate(step: int, config: StepConfig) -> float:
    """The learning rate of the update after `step` others: linear warm-up, then half a cosine to the final rate."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.num_steps - config.warmup_steps)
    decay = 1 + math.cos(math.pi * min(1, progress))  # from 2 to 0
    return config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * decay / 2
