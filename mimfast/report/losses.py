"""The loss on held-out images, for targets that are no picture."""

from dataclasses import dataclass
from typing import Any

import torch

from mimfast.data.sources import Source
from mimfast.recipes import Recipe
from mimfast.report import views

MODEL, ZERO = "model", "zero"


@dataclass(frozen=True)
class Losses:
    """Losses on held-out images.

    Attributes:
        loss: "model" and "zero" (a prediction of zeros) -> the target's loss over hidden patches.
        images: held-out images used.
        views: crops, each with its own mask, of every image.
    """

    loss: dict[str, float]
    images: int
    views: int


@torch.no_grad()
def score(method: Any, held_out: Source, recipe: Recipe, device: torch.device, workers: int = 0) -> Losses:
    """The target's loss of the method's predictions, and of zeros, on views of held-out images; it repeats.

    Args:
        method: offers sample_mask, predict and target.
        held_out: images that were not trained on.
        recipe: of the run.
        device: where the method is.
        workers: loader threads.
    """
    total, batches = {MODEL: 0.0, ZERO: 0.0}, 0
    for img, _ids, mask in views.masked(method, held_out, recipe, device, workers):
        pred = method.predict(img, mask).float()
        for name, guess in {MODEL: pred, ZERO: torch.zeros_like(pred)}.items():
            total[name] += float(method.target.loss(guess, img, mask))
        batches += 1
    mean = {name: value / batches for name, value in total.items()}
    return Losses(mean, views.count(held_out, recipe), recipe.score.views)
