"""Position tables: fixed two-dimensional sines and cosines (MAE, arXiv:2111.06377, appendix A.1), and resizing.

L tokens, D width
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from mimfast._check import fail


def sincos_2d(dim: int, grid: tuple[int, int]) -> Tensor:
    """The table of a class token and a grid of patches, row-major.

    The first half of the channels encodes the column, the second half the row; each half is [sin(x w_k), cos(x w_k)]
    with w_k = 10000^(-k / (dim / 4)), k = 0..dim/4-1. (The paper does not say which half is which; the published
    weights have the column first.) The class token's row is zero. Computed in fp64.

    Args:
        dim: width D, a multiple of 4.
        grid: (rows, columns) in patches.
    Returns:
        (1, 1 + rows * columns, D) float32.
    """
    if dim % 4:
        fail(
            "sincos_2d",
            "dim",
            dim,
            "a multiple of 4",
            f"the width is split into sine and cosine of row and column: {dim} / 4",
        )
    rows, columns = grid
    omega_F = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row_LF = torch.arange(rows, dtype=torch.float64).repeat_interleave(columns)[:, None] * omega_F
    column_LF = torch.arange(columns, dtype=torch.float64).repeat(rows)[:, None] * omega_F
    table_LD = torch.cat([column_LF.sin(), column_LF.cos(), row_LF.sin(), row_LF.cos()], dim=1)
    return torch.cat([torch.zeros(1, dim, dtype=torch.float64), table_LD])[None].float()


def at_grid(table: Tensor, grid: tuple[int, int], other: tuple[int, int]) -> Tensor:
    """A position table for another grid.

    Args:
        table: (1, 1 + rows * columns, D) with a class token's row first.
        grid: (rows, columns) that it is for.
        other: (rows, columns) wanted.
    Returns:
        (1, 1 + rows * columns, D) in the dtype and on the device of `table`: the sine-cosine table when `table` is one,
        else the bicubic interpolation of its patches, class row kept.
    """
    if torch.allclose(table.float().cpu(), sincos_2d(table.shape[-1], grid), atol=1e-5):
        return sincos_2d(table.shape[-1], other).to(table)
    return resized(table, grid, other)


def resized(table: Tensor, grid: tuple[int, int], other: tuple[int, int]) -> Tensor:
    """The bicubic interpolation of a position table, class row kept; arguments and result as in `at_grid`."""
    patches_1DL = table[:, 1:].float().mT.unflatten(-1, grid)
    patches_1LD = F.interpolate(patches_1DL, other, mode="bicubic", antialias=True).flatten(2).mT
    return torch.cat([table[:, :1], patches_1LD.to(table.dtype)], dim=1)
