"""The learning rate schedule of the small networks."""

from __future__ import annotations

import math


def learning_rate_factor(step: int, num_warmup_steps: int, num_steps: int) -> float:
    """Linear warmup, then cosine decay to 0.001."""
    warmup = min(1.0, (step + 1) / num_warmup_steps)
    return warmup * (0.5 + 0.5 * math.cos(math.pi * step / num_steps)) + 1e-3
