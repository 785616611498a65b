"""Histograms of oriented gradients as pictures: in every cell a star of nine strokes, each along the edges it counts.

C cells in a row of cells, R rows, P side of a drawn cell in pixels
"""

import math

import torch
from torch import Tensor

BINS = 9
# parts of a drawn cell: half the length of the longest stroke, and half its width
_REACH, _THICK = 0.48, 0.05


def stars(hog: Tensor, cell: int) -> Tensor:
    """The ink of every pixel of a picture of histograms.

    Bin b counts gradients between 20 b and 20 (b + 1) degrees from the vertical axis. Its stroke lies across them, as
    the edge does that makes them: a picture of vertical stripes gives vertical strokes. Strokes lengthen and darken
    with their value; where strokes meet the darkest one counts.

    Args:
        hog: (27, R, C) values of the cells, colour by colour; each stroke shows the mean of the three colours, 1 being
            the longest, negative ones as 0.
        cell: P.
    Returns:
        (R * P, C * P) fp32 in [0, 1], 0 = paper; the edges of strokes are smooth.
    """
    value_9RC = hog.float().unflatten(0, (3, BINS)).mean(0).clamp(0, 1)
    place_P = (torch.arange(cell) + 0.5) - cell / 2
    y_PP, x_PP = torch.meshgrid(place_P, place_P, indexing="ij")
    ink_RCPP = torch.zeros(*value_9RC.shape[1:], cell, cell)
    for b in range(BINS):
        angle = math.radians((b + 0.5) * 180 / BINS)
        # the gradient points along (sin, cos) in (right, down), the edge along (cos, -sin)
        along_PP = (x_PP * math.cos(angle) - y_PP * math.sin(angle)).abs()
        across_PP = (x_PP * math.sin(angle) + y_PP * math.cos(angle)).abs()
        value_RC11 = value_9RC[b, :, :, None, None]
        reach_RC11 = cell * _REACH * value_RC11.sqrt()
        thick_RC11 = cell * _THICK * (0.5 + value_RC11)
        # a pixel is covered by the part of it that lies inside the stroke, taken from the distance to its border
        inside_RCPP = (reach_RC11 - along_PP + 0.5).clamp(0, 1) * (thick_RC11 - across_PP + 0.5).clamp(0, 1)
        ink_RCPP = torch.maximum(ink_RCPP, inside_RCPP * value_RC11)
    return ink_RCPP.permute(0, 2, 1, 3).reshape(value_9RC.shape[1] * cell, value_9RC.shape[2] * cell)
