"""Mask cells that cover several patches: the lists of a mask at the resolution of the patches.

B batch, K kept cells, L patches in row-major order, k patches per cell side
"""

import torch
from torch import Tensor

from mimfast.mask import Mask


def keep_of(mask: Mask, k: int) -> Tensor:
    """(B, K k k) int64: the patches of the visible cells, cell after cell, row by row inside each."""
    columns = mask.grid[1]
    corner_BK = mask.keep // columns * (k * k * columns) + mask.keep % columns * k
    side = torch.arange(k, device=corner_BK.device)
    return (corner_BK[:, :, None, None] + side[:, None] * (k * columns) + side).flatten(1)


def inverse_of(mask: Mask, k: int) -> Tensor:
    """(B, L) int64: the place of each patch in `keep_of`, and beyond its end for hidden ones."""
    (rows, columns), B = mask.grid, mask.inverse.shape[0]
    inside = torch.arange(k * k, device=mask.inverse.device).view(1, 1, k, 1, k)
    return (mask.inverse.view(B, rows, 1, columns, 1) * (k * k) + inside).flatten(1)


def hidden_of(mask: Mask, k: int) -> Tensor:
    """(B, L) bool: whether each patch is hidden."""
    (rows, columns), B = mask.grid, mask.hidden.shape[0]
    return mask.hidden.view(B, rows, 1, columns, 1).expand(B, rows, k, columns, k).flatten(1)
