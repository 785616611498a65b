"""Packed groups of tokens to groups padded with zeros, and back.   G groups, N slots of each, T rows

Traceable and without a look at the lengths. Lengths that lie give wrong rows, never a read outside.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def pad_maps(cu_seqlens: Tensor, tokens: int, longest: int) -> tuple[Tensor, Tensor, Tensor]:
    """How packed groups map to groups padded to `longest` = N.

    Args:
        cu_seqlens: (G + 1) where groups begin and the last one ends.
        tokens: T, rows of the packed tensor.
        longest: N, slots of a padded group.
    Returns:
        (G * N) the row in each slot; (T) the slot of each row; both -1 for none. (G, N) bool, which slots may be
        attended to: those with a row, and the first one of an empty group, whose softmax would be 0 / 0 otherwise.
    """
    cu, slot_N = cu_seqlens.long(), torch.arange(longest, device=cu_seqlens.device)
    first_G1, length_G1 = cu[:-1, None], cu.diff()[:, None]
    there_GN = torch.where(slot_N < length_G1, first_G1 + slot_N, -1)
    row_T = torch.arange(tokens, device=cu.device)
    group_T = torch.searchsorted(cu[1:].contiguous(), row_T, right=True)
    owned_T, group_T = group_T < cu.shape[0] - 1, group_T.clamp(max=cu.shape[0] - 2)
    back_T = torch.where(owned_T, group_T * longest + row_T - cu[group_T], -1)
    return there_GN.flatten(), back_T, slot_N < length_G1.clamp(min=1)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (2-d); 0 where the index is -1, by a row of zeros appended to x."""
    return F.pad(x, (0, 0, 0, 1)).index_select(0, index % (x.shape[0] + 1))


class Rows(torch.autograd.Function):
    """`take` whose gradient is a gather as well, by the inverse map, instead of an accumulating scatter."""

    @staticmethod
    def forward(ctx, x, index, inverse):
        ctx.save_for_backward(inverse)
        return take(x, index)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return take(grad, *ctx.saved_tensors), None, None
