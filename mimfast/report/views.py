"""Crops of images with masks, as in training but without colour changes, for the final tables; they repeat."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mimfast import recipes
from mimfast.data.loader import Loader
from mimfast.data.sources import Source, Subset
from mimfast.mask import Mask
from mimfast.recipes import Recipe

# of this many views the pictures are kept, for the sheet
KEPT = 8


def count(source: Source, recipe: Recipe) -> int:
    """How many images of a source are viewed."""
    return min(len(source), recipe.score.images)


def masked(
    method: Any, source: Source, recipe: Recipe, device: torch.device, workers: int = 0
) -> Iterator[tuple[Tensor, Tensor, Mask]]:
    """Batches of (img, sample ids, mask): recipe.score.views crops of at most recipe.score.images images of `source`,
    evenly spaced, each crop with a mask of its own, all by the run's seed.

    img: uint8 (B, 3, S, S); sample ids: int64 (B,).
    """
    images = count(source, recipe)
    chosen = Subset(source, np.linspace(0, len(source) - 1, images).round().astype(np.int64))
    # a batch is one view of up to 32 images; an epoch of the loader shows every image once
    batch = next(n for n in range(min(images, 32), 0, -1) if images % n == 0)
    seed, crop = recipe.train.seed, recipes.crop(recipe)
    with Loader(chosen, recipe.model.img_size, batch, seed, workers=workers, crop=crop) as loader:
        for _ in range(recipe.score.views * (images // batch)):
            img, ids, epochs, _labels = next(loader)
            img, ids, epochs = img.to(device), ids.to(device), epochs.to(device)
            yield img, ids, method.sample_mask(len(ids), sample_ids=ids, seed=seed, epoch=epochs, device=device)
