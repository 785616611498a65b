"""How well the histograms of oriented gradients of hidden blocks are predicted, beside guesses that learn little.

B batch, T tokens, R rows of cells, C cells in a row, u cells in a token's side, v cells in a mask cell's side
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mimfast.data.sources import Source
from mimfast.mask import Mask
from mimfast.ops.hog import hog
from mimfast.recipes import Recipe
from mimfast.report import views
from mimfast.report.reconstruct import first_minimum
from mimfast.report.views import KEPT

MODEL, MEAN, PLACE, NEAREST, ZERO = (
    "model",
    "mean HOG of the training images",
    "the same, place by place",
    "nearest visible block's HOG",
    "zero",
)
CELL = 8


@dataclass(frozen=True)
class Gradients:
    """Errors on held-out images, and a few of the pictures.

    Attributes:
        mse: name of the guess -> mean squared error over the hidden cells and their 27 values.
        images: held-out images used.
        views: crops, each with its own mask, of every image.
        shown: (original, hidden, target, predicted) of n views: uint8 (n, 3, H, W), bool (n, rows, columns) of the
            mask, and twice (n, 27, R, C).
    """

    mse: dict[str, float]
    images: int
    views: int
    shown: tuple[Tensor, Tensor, Tensor, Tensor]


@torch.no_grad()
def score(
    method: Any, train: Source, held_out: Source, recipe: Recipe, device: torch.device, workers: int = 0
) -> Gradients:
    """HOG of hidden blocks of held-out images: crops as in training, masks by the run's seed, so it repeats.

    Args:
        method: offers sample_mask, predict and a HOG target.
        train: images whose mean is one of the guesses.
        held_out: images that were not trained on.
        recipe: of the run.
        device: where the method is.
        workers: loader threads.
    """
    u = method.target.patch // CELL
    place_27RC = _mean(method, train, recipe, device, workers)
    mean_27uu = place_27RC.unflatten(2, (-1, u)).unflatten(1, (-1, u)).mean((1, 3))
    total = dict.fromkeys((MODEL, MEAN, PLACE, NEAREST, ZERO), 0.0)
    counted = 0.0
    pictures: list[tuple[Tensor, ...]] = []
    for img, ids, mask in views.masked(method, held_out, recipe, device, workers):
        real = _target(method, img)
        rows, columns = real.shape[-2:]
        guesses = {
            MODEL: as_cells(method.predict(img, mask).float(), (rows // u, columns // u)),
            MEAN: mean_27uu.repeat(1, rows // u, columns // u).expand_as(real),
            PLACE: place_27RC.expand_as(real),
            NEAREST: nearest(real, mask),
            ZERO: torch.zeros_like(real),
        }
        hidden_B1RC = over_cells(mask, (rows, columns))
        counted += 27 * float(hidden_B1RC.sum())
        for name, guess in guesses.items():
            total[name] += float(((guess - real).square() * hidden_B1RC).sum())
        if sum(len(part[0]) for part in pictures) < KEPT:
            order = ids.argsort()
            parts = (img, mask.hidden.view(-1, *mask.grid), real, guesses[MODEL])
            pictures.append(tuple(part[order].cpu() for part in parts))
    original, hidden, target, predicted = (torch.cat(parts)[:KEPT] for parts in zip(*pictures))
    mse = {name: value / counted for name, value in total.items()}
    shown = (original, hidden, target, predicted)
    return Gradients(mse, views.count(held_out, recipe), recipe.score.views, shown)


def _target(method: Any, img: Tensor) -> Tensor:
    """(B, 27, R, C), the values that the method's target has."""
    target = method.target
    return hog(img, cell=CELL, normalize=target.normalize, gaussian_window=target.gaussian_window)


def _mean(method: Any, train: Source, recipe: Recipe, device: torch.device, workers: int) -> Tensor:
    """(27, R, C): the histograms of crops of the training images, averaged at each place of the crop."""
    parts = [_target(method, img).mean(0) for img, _ids, _mask in views.masked(method, train, recipe, device, workers)]
    return torch.stack(parts).mean(0)


def as_cells(pred: Tensor, grid: tuple[int, int]) -> Tensor:
    """Predictions of tokens as a picture of cells.

    Args:
        pred: (B, T, 27 u u), values in (histogram, cell row, cell column) order.
        grid: (rows, columns) of tokens.
    Returns:
        (B, 27, rows u, columns u).
    """
    u = round((pred.shape[-1] // 27) ** 0.5)
    parts = pred.unflatten(2, (27, u, u)).unflatten(1, grid)
    return parts.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def over_cells(mask: Mask, grid: tuple[int, int]) -> Tensor:
    """The hidden map blown up to histogram cells: (B, 1, R, C) bool. grid: (R, C)."""
    hidden_B1RC = mask.hidden.view(-1, 1, *mask.grid)
    return hidden_B1RC.repeat_interleave(grid[0] // mask.grid[0], 2).repeat_interleave(grid[1] // mask.grid[1], 3)


def nearest(real: Tensor, mask: Mask) -> Tensor:
    """Every mask cell's histograms replaced by those of the nearest visible mask cell, cell for cell.

    Distances are Euclidean between centres; the first in row-major order counts among equals.

    Args:
        real: (B, 27, R, C).
        mask: over a grid of cells of v x v histograms.
    """
    rows, columns = mask.grid
    v = real.shape[2] // rows
    index = torch.arange(rows * columns, device=real.device)
    place_L2 = torch.stack([index // columns, index % columns], dim=-1)
    away_LL = (place_L2[:, None] - place_L2).square().sum(-1)
    # a hidden one is farther than any visible one
    away_BLL = away_LL + mask.hidden[:, None] * (rows**2 + columns**2)
    blocks = real.unflatten(3, (columns, v)).unflatten(2, (rows, v)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    source_BL = first_minimum(away_BLL)
    taken = blocks.gather(1, source_BL[:, :, None, None, None].expand_as(blocks))
    return taken.unflatten(1, mask.grid).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
