"""Schedules as functions of the optimiser's step, and DINO's form of them, an array of all values."""
import math
from collections.abc import Callable

import numpy as np

Schedule = Callable[[int], float]


def cosine_schedule(base: float, final: float, steps: int, warmup_steps: int = 0, start: float = 0.0) -> Schedule:
    """A linear warm-up from start to base, then half a cosine from base towards final.

    The warm-up ends on base and the cosine begins on it, so the peak occurs twice, as in DINO. Values are plain floats:
    the optimizer's state keeps them, and weights_only loading refuses numpy's.

    Args:
        base, final: values after the warm-up and towards the end.
        steps: length of the run; the cosine would reach final at this step.
        warmup_steps: how many of the steps are the warm-up.
    """
    def value(step: int) -> float:
        if step < warmup_steps:
            return float(start + (base - start) * step / max(warmup_steps - 1, 1))
        phase = (step - warmup_steps) / max(steps - warmup_steps, 1)
        return float(final + 0.5 * (base - final) * (1 + math.cos(math.pi * phase)))
    return value


def cosine_scheduler(base_value: float, final_value: float, epochs: int, niter_per_ep: int,
                     warmup_epochs: int = 0, start_warmup_value: float = 0) -> np.ndarray:
    """DINO's form of cosine_schedule: one value per iteration, [epochs · niter_per_ep]."""
    steps = epochs * niter_per_ep
    schedule = cosine_schedule(base_value, final_value, steps, warmup_epochs * niter_per_ep, start_warmup_value)
    return np.array([schedule(step) for step in range(steps)])
