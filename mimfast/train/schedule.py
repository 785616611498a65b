"""Learning rate as a closed form of the step: nothing to save, nothing to get out of step after a resume."""

import math


def lr_at(step: int, steps: int, peak: float, low: float = 0.0, warmup: float = 0.0) -> float:
    """Learning rate of a step: linear from 0 to `peak`, then half a cosine down to `low` (MAE, arXiv:2111.06377,
    appendix A).

    Args:
        step: counted from 0; fractional epochs become fractions of the run, so the rate moves every step.
        steps: length of the run.
        peak: highest rate.
        low: rate at the end.
        warmup: fraction of the run before the peak.
    """
    progress = step / steps
    if progress < warmup:
        # the first step of a short warm-up must move the weights too, hence + 1
        return peak * min(1.0, (step + 1) / (warmup * steps))
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / max(1 - warmup, 1e-12)))
