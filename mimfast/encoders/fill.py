"""The full sequence of a masked image: only visible patches are embedded, one row stands for all hidden ones.

SimMIM, arXiv:2111.09886, section 3.1, puts a learned token there. FastMIM, arXiv:2212.06593, paints the hidden pixels
in one colour, and every painted patch has the same embedding: it is computed once, not as a product for each patch.
B batch, L patches, D width, T = 1 + L tokens
"""

import torch
from torch import Tensor

from mimfast.encoders.embed import PatchEmbedVisible
from mimfast.encoders.paint import cell_of, checked_colour, paint
from mimfast.mask import Mask
from mimfast.ops.mask_pack import mask_pack
from mimfast.ops.patch_unshuffle import patch_unshuffle


def full(embed: PatchEmbedVisible, img: Tensor, cls_token: Tensor, pos: Tensor | None) -> Tensor:
    """The sequence of an image without a mask.

    Args:
        embed: the patch embedding.
        img: (B, 3, H, W).
        cls_token: (1, 1, D), put in front.
        pos: (1, T, D), added; or None.
    Returns:
        (B, T, D).
    """
    x_BLD, cls_11D = embed(img), cls_token
    if pos is not None:
        x_BLD, cls_11D = x_BLD + pos[0, 1:], cls_token + pos[:, :1]
    return torch.cat([cls_11D.expand(img.shape[0], -1, -1), x_BLD], dim=1)


def replaced(
    embed: PatchEmbedVisible, img: Tensor, mask: Mask, row: Tensor, cls_token: Tensor, pos: Tensor | None
) -> Tensor:
    """The sequence with `row` in the place of every hidden patch.

    Args:
        mask: over the grid of the patches, or one whose cells are whole numbers of patches; packed or not.
        row: (D,) or (1, 1, D).
        embed, img, cls_token, pos: as in `full`.
    Returns:
        (B, T, D), in the dtype that torch gives the sum of embedding, row and positions.
    """
    keep, inverse_BL = lists(mask, img.shape[2] // mask.grid[0] // embed.proj.kernel_size[0])
    x_BKD = embed(img, keep)
    x_BTD = torch.cat([cls_token.to(x_BKD.dtype).expand(img.shape[0], -1, -1), x_BKD], dim=1)
    return patch_unshuffle(x_BTD, row, inverse_BL, pos)


def painted(
    embed: PatchEmbedVisible, img: Tensor, mask: Mask, colour: Tensor | None, cls_token: Tensor, pos: Tensor | None
) -> Tensor:
    """The sequence of the image whose hidden cells are painted over.

    Args:
        mask: over any grid whose cells are whole square pixels; those of whole patches are not painted but replaced.
        colour: (1, 3, 1, 1), in normalised colour space.
        embed, img, cls_token, pos: as in `full`.
    Returns:
        (B, T, D).
    Raises:
        UserError: as `mimfast.encoders.paint.paint`.
    """
    colour = checked_colour("paint", colour, img)
    if cell_of(img, mask) % embed.proj.kernel_size[0]:  # a patch may be painted in part
        return full(embed, paint(img, mask, colour, mean=embed.mean, std=embed.std), cls_token, pos)
    return replaced(embed, img, mask, embed.colour(colour), cls_token, pos)


def lists(mask: Mask, n: int) -> tuple[Tensor | None, Tensor]:
    """The patches to embed and where they go, for a mask whose cells are n patches wide; nothing waits for the device.

    Images that show different numbers of patches have all of them embedded: the product would have as many rows.
    """
    if mask.cu_seqlens is None and n == 1:
        return mask.keep, mask.inverse
    B, (rows, columns) = mask.hidden.shape[0], mask.grid
    hidden_BL = mask.hidden.view(B, rows, 1, columns, 1).expand(-1, -1, n, -1, n).reshape(B, -1)
    if mask.cu_seqlens is None:
        plan = mask_pack(hidden_BL, mask.visible * n * n)
        return plan.keep, plan.inverse
    place_L = torch.arange(hidden_BL.shape[1], device=hidden_BL.device)
    return None, torch.where(hidden_BL, -1, place_L)
