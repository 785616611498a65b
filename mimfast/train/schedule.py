"""Learning rate as a closed form of the step: nothing to save, nothing to get out of step after a resume."""

import math
from collections.abc import Sequence
from typing import Literal

Schedule = Literal["cosine", "multistep"]


def lr_at(
    step: float,
    steps: int,
    peak: float,
    low: float = 0.0,
    warmup: float = 0.0,
    start: float = 0.0,
    schedule: Schedule = "cosine",
    milestones: Sequence[float] = (),
) -> float:
    """Learning rate of a step: linear from `start` to `peak`, then half a cosine down to `low` (MAE, arXiv:2111.06377,
    appendix A), or a tenth at every milestone (SimMIM, arXiv:2111.09886, section 4.1).

    Args:
        step: counted from 0; fractional epochs become fractions of the run, so the rate moves every step.
        steps: length of the run.
        peak: highest rate.
        low: rate at the end of the cosine.
        warmup: fraction of the run before the peak.
        start: rate of the first step of the warm-up.
        schedule: "cosine", or "multistep".
        milestones: fractions of the run from which on the multistep rate is a tenth of what it was.
    """
    progress = step / steps
    if progress < warmup:
        # the first step of a short warm-up must move the weights too, hence + 1 when it would stand still
        done = step + 1 if start == 0 else step
        return start + (peak - start) * min(1.0, done / (warmup * steps))
    if schedule == "multistep":
        return peak * 0.1 ** sum(progress >= milestone for milestone in milestones)
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / max(1 - warmup, 1e-12)))
