"""How well hidden patches are predicted, in pixels, beside fills that learn nothing.

B batch, L patches of the grid, C channels, H W pixels, S statistics per patch
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mimfast._images import IMAGENET_MEAN, IMAGENET_STD, normalize, per_channel
from mimfast.data.sources import Source
from mimfast.mask import Mask
from mimfast.recipes import Recipe
from mimfast.report import views
from mimfast.report.views import KEPT

MODEL, MEAN, NEAREST, LINEAR = (
    "model",
    "mean colour of the visible patches",
    "nearest visible patch's mean colour",
    "linear interpolation",
)


@dataclass(frozen=True)
class Reconstruction:
    """Errors on held-out images, and a few of the pictures.

    Attributes:
        mse: name of the fill -> mean squared error over the hidden pixels, of values in [0, 1].
        images: held-out images used.
        views: crops, each with its own mask, of every image.
        shown: (original, seen, predicted, hidden), each (n, ...) for the sheet: two uint8-valued float pictures (n,
            3, H, W) in [0, 1], the prediction pasted with the visible patches, and hidden bool (n, rows, columns).
    """

    mse: dict[str, float]
    images: int
    views: int
    shown: tuple[Tensor, Tensor, Tensor]


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error of values in [0, 1]."""
    return -10 * math.log10(mse) if mse > 0 else math.inf


@torch.no_grad()
def score(method: Any, held_out: Source, recipe: Recipe, device: torch.device, workers: int = 0) -> Reconstruction:
    """Masked reconstruction on held-out images: crops as in training, masks by the run's seed, so it repeats.

    Args:
        method: offers sample_mask, predict, target and encoder, as MAE does.
        held_out: images that were not trained on; at most recipe.score.images of them, evenly spaced, are used.
        recipe: of the run.
        device: where the method is.
        workers: loader threads.
    """
    total = dict.fromkeys((MODEL, MEAN, NEAREST, LINEAR), 0.0)
    pictures: list[tuple[Tensor, Tensor, Tensor]] = []
    batches = 0
    for img, ids, mask in views.masked(method, held_out, recipe, device, workers):
        real = img.float() / 255
        hidden_B1HW = over_pixels(mask, img.shape[-2:])
        guesses = {MODEL: predict_pixels(method, img, mask), **fills(real, mask)}
        for name, guess in guesses.items():
            wrong = (guess - real).square() * hidden_B1HW
            total[name] += float(wrong.sum() / (3 * hidden_B1HW.sum()))
        batches += 1
        if sum(len(part[0]) for part in pictures) < KEPT:
            order = ids.argsort()
            pasted = torch.where(hidden_B1HW, guesses[MODEL], real)
            hidden_BRC = mask.hidden.view(-1, *mask.grid)
            pictures.append((real[order].cpu(), pasted[order].cpu(), hidden_BRC[order].cpu()))
    total = {name: value / batches for name, value in total.items()}
    originals, pasteds, hiddens = (torch.cat(parts)[:KEPT] for parts in zip(*pictures))
    return Reconstruction(total, views.count(held_out, recipe), recipe.score.views, (originals, pasteds, hiddens))


def over_pixels(mask: Mask, size: tuple[int, int] | torch.Size) -> Tensor:
    """The hidden map blown up to pixels: (B, 1, H, W) bool."""
    rows, columns = mask.grid
    hidden_B1RC = mask.hidden.view(-1, 1, rows, columns)
    return hidden_B1RC.repeat_interleave(size[0] // rows, 2).repeat_interleave(size[1] // columns, 3)


def predict_pixels(method: Any, img: Tensor, mask: Mask) -> Tensor:
    """The method's prediction as pixels in [0, 1], (B, 3, H, W), for a uint8 image.

    A target that is standardised per patch leaves the patch's mean and deviation open. Those of a hidden patch are
    not looked up, which would tell the answer: they are interpolated from the visible patches.
    """
    patches_BLP = _patches(normalize(img), mask.grid)
    pred_BLP = method.predict(img, mask).float()
    if method.target.order == "cpq":
        side = method.target.patch
        pred_BLP = pred_BLP.unflatten(-1, (3, side, side)).movedim(2, -1).flatten(2)
    if method.target.norm:
        stats_BLS = torch.stack([patches_BLP.mean(-1), patches_BLP.std(-1)], dim=-1)
        mean_BL1, std_BL1 = interpolate(stats_BLS, mask).split(1, dim=-1)
        pred_BLP = pred_BLP * std_BL1 + mean_BL1
    pixels = _image(pred_BLP, mask.grid, img.shape[-2:])
    mean, std = (per_channel(values, img.device, torch.float32) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels * std + mean).clamp(0, 1)


def fills(real: Tensor, mask: Mask) -> dict[str, Tensor]:
    """Three ways to fill hidden patches without learning, from the visible pixels of (B, 3, H, W) pictures in [0, 1].

    - the mean colour of all visible patches;
    - the mean colour of the nearest visible patch (Euclidean distance between centres, the first in row-major order
      among equals);
    - linear interpolation: the visible patches' mean colours are spread to hidden ones by `interpolate`, then drawn
      as a bilinear
      surface through the patch centres.
    """
    height, width = real.shape[-2:]
    rows, columns = mask.grid
    colour_BLC = _patches(real, mask.grid).unflatten(-1, (-1, 3)).mean(2)
    seen_BKC = colour_BLC.gather(1, mask.keep[..., None].expand(-1, -1, 3))
    mean_BCHW = seen_BKC.mean(1)[:, :, None, None].expand(-1, -1, height, width)

    index = torch.arange(rows * columns, device=real.device)
    place_L2 = torch.stack([index // columns, index % columns], dim=-1)
    # integers, so that equal distances are equal and argmin's choice does not hang on rounding
    away_BLK = (place_L2[None, :, None] - place_L2[mask.keep][:, None]).square().sum(-1)
    nearest_BL = first_minimum(away_BLK)
    nearest_BLC = seen_BKC.gather(1, nearest_BL[..., None].expand(-1, -1, 3))

    smooth_BCRC = interpolate(colour_BLC, mask).transpose(1, 2).unflatten(2, (rows, columns))
    return {
        MEAN: mean_BCHW,
        NEAREST: _blow_up(nearest_BLC, mask.grid, height, width),
        LINEAR: F.interpolate(smooth_BCRC, size=(height, width), mode="bilinear", align_corners=False),
    }


def first_minimum(values: Tensor) -> Tensor:
    """Index of the smallest integer along the last dimension, the first among equals (argmin may take any)."""
    count = values.shape[-1]
    return (values * count + torch.arange(count, device=values.device)).argmin(-1)


def interpolate(values: Tensor, mask: Mask) -> Tensor:
    """Spread values of visible patches over the hidden ones: every hidden patch is the mean of its neighbours
    (Laplace's equation).

    In one dimension this is linear interpolation; in two it is the smoothest surface through the visible values, with
    free edges.

    Args:
        values: (B, L, S); those of hidden patches are not used.
        mask: over L patches.
    Returns:
        (B, L, S), the visible ones unchanged.
    """
    rows, columns = mask.grid
    index = torch.arange(rows * columns, device=values.device)
    place_L2 = torch.stack([index // columns, index % columns], dim=-1)
    touch_LL = ((place_L2[:, None] - place_L2[None]).abs().sum(-1) == 1).double()
    laplace_LL = torch.diag(touch_LL.sum(1)) - touch_LL
    fixed_LL = torch.eye(rows * columns, dtype=torch.float64, device=values.device)
    system_BLL = torch.where(mask.hidden[..., None], laplace_LL, fixed_LL)
    right_BLS = torch.where(mask.hidden[..., None], 0.0, values.double())
    return torch.linalg.solve(system_BLL, right_BLS).to(values.dtype)


def _patches(img: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, 3, H, W) -> (B, L, P) with P in (py, px, c) order."""
    (rows, columns), (height, width) = grid, img.shape[-2:]
    parts = img.unflatten(3, (columns, width // columns)).unflatten(2, (rows, height // rows))
    return parts.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def _image(patches: Tensor, grid: tuple[int, int], size: tuple[int, int] | torch.Size) -> Tensor:
    """The inverse of `_patches`."""
    (rows, columns), (height, width) = grid, size
    parts = patches.view(-1, rows, columns, height // rows, width // columns, 3)
    return parts.permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, height, width)


def _blow_up(colour_BLC: Tensor, grid: tuple[int, int], height: int, width: int) -> Tensor:
    return F.interpolate(colour_BLC.transpose(1, 2).unflatten(2, grid), size=(height, width), mode="nearest")
