"""Relative position bias of a sequence with a class token: BEiT, arXiv:2106.08254.

The table has a row for each difference of two places of the grid, (2 rows - 1) x (2 columns - 1), the row difference
first, and three more: class token to patch, patch to class token, class token to itself.
r c rows and columns of the grid, L = r c patches, T = 1 + L tokens, h heads
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimfast.encoders.tables import matrix_on

EXTRA = 3  # rows for the class token
NAME = "relative_position_bias_table"


def entries(grid: tuple[int, int]) -> int:
    """Rows of the table of a grid."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + EXTRA


def bias_of(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """What is added to the scores: (h, T, T), the query in the second dimension.

    Made of views, not of indices: the gradient of a table entry is then one sum in a fixed order.

    Args:
        table: (entries(grid), h).
        grid: (rows, columns).
    """
    (rows, columns), heads = grid, table.shape[1]
    offsets_hab = table[:-EXTRA].mT.unflatten(1, (2 * rows - 1, 2 * columns - 1))
    # query (i, j) and key (k, l) meet at offset (i - k + rows - 1, j - l + columns - 1): windows, keys backwards
    patches_hLL = offsets_hab.unfold(1, rows, 1).unfold(2, columns, 1).flip(3, 4).reshape(heads, rows * columns, -1)
    to_patch_h1L, to_class_hL1, itself_h11 = (row.view(heads, 1, 1) for row in table[-EXTRA:])
    first_h1T = torch.cat([itself_h11, to_patch_h1L.expand(-1, -1, rows * columns)], dim=2)
    others_hLT = torch.cat([to_class_hL1.expand(-1, rows * columns, -1), patches_hLL], dim=2)
    return torch.cat([first_h1T, others_hLT], dim=1)


def resized(table: Tensor, grid: tuple[int, int], other: tuple[int, int]) -> Tensor:
    """The table for another grid: a spline over geometrically growing distances, the class token's rows kept.

    Args:
        table: (entries(grid), h).
        grid: (rows, columns) that it is for.
        other: (rows, columns) wanted.
    Returns:
        (entries(other), h) in the dtype of `table`; the gradient reaches `table`.
    """
    wide = torch.promote_types(table.dtype, torch.float32)
    by_row, by_column = (matrix_on(a, b, table.device, wide) for a, b in zip(grid, other, strict=True))
    offsets_abh = table[:-EXTRA].to(wide).unflatten(0, (2 * grid[0] - 1, 2 * grid[1] - 1))
    new_nh = torch.einsum("ya,xb,abh->yxh", by_row, by_column, offsets_abh).flatten(0, 1)
    return torch.cat([new_nh.to(table.dtype), table[-EXTRA:]])


def attend(qkv: Tensor, heads: int, bias: Tensor | None) -> Tensor:
    """Attention with a bias that all images share.

    Args:
        qkv: (B, T, 3D), packed [q | k | v].
        heads: h.
        bias: (h, T, T), added to the scaled scores; or None.
    Returns:
        (B, T, D), heads merged.
    """
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    shared = None if bias is None else bias.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=shared).transpose(1, 2).flatten(2)


class Table(nn.Module):
    """Owner of a table that every block adds; it begins at zero."""

    def __init__(self, grid: tuple[int, int], heads: int) -> None:
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros(entries(grid), heads))
