"""The encoder of MixMIM: a Swin without shifts over mixtures of two images that never see each other.

MixMAE, arXiv:2205.13137, and the authors' code (there MixMIM). Mode "mix": image i and image B - 1 - i of a batch share
their places, image i the visible tokens of its mask and its partner the hidden ones, so that no mask token takes up
work. Inside a window a token attends to its own image only: group ids in the attention, no mask of pairs.
B batch, H W sides in pixels or tokens, L tokens of the first map, C its width
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mimfast._check import fail
from mimfast.encoders.block import init_mae
from mimfast.encoders.inputs import Size
from mimfast.encoders.paint import cell_of
from mimfast.encoders.positions import sincos_2d
from mimfast.encoders.swin import Swin
from mimfast.encoders.visible import Place
from mimfast.encoders.windows import window_of
from mimfast.mask import Mask


class MixSwin(Swin):
    """Swin without shifted windows, with fixed sine-cosine positions; without a mask it is the plain backbone.

    Args:
        img_size, embed_dim, depths, heads, mlp_ratio, drop_path, mask_token: as of `Swin`.
        window: side of the attention window in tokens, one for each stage; None: twice the shorter side of the last
            map, as published at 224 px (14, 14, 14, 7), so that it follows the size. The published models are
            fine-tuned at 384 px with (16, 16, 24, 12).
    Attributes:
        absolute_pos_embed: (1, L, C), fixed, added to the embedded patches.
        mask_modes: {"paint", "mix"}, and "replace" with a mask token.
        the others: those of `Swin`.
    Raises:
        UserError: stages, heads, sizes or windows that do not fit.
    """

    sizes: Mapping[str, dict[str, Any]] = {
        "b": {"embed_dim": 128, "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32)},
        "l": {"embed_dim": 192, "depths": (2, 2, 18, 2), "heads": (6, 12, 24, 48)},
        "h": {"embed_dim": 352, "depths": (2, 2, 18, 2), "heads": (11, 22, 44, 88)},
        "nano": {"embed_dim": 64, "depths": (2, 2, 2), "heads": (2, 4, 8)},
    }
    own_modes = frozenset({"paint", "mix"})

    def __init__(
        self,
        img_size: Size = 224,
        embed_dim: int = 128,
        depths: Sequence[int] = (2, 2, 18, 2),
        heads: Sequence[int] = (4, 8, 16, 32),
        window: Sequence[int] | None = None,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        mask_token: bool = False,
    ) -> None:
        self.windows = None if window is None else tuple(window)
        if self.windows is not None and len(self.windows) != len(depths):
            because = f"there are {len(depths)} stages"
            fail("MixSwin", "window", self.windows, "one number for each stage, or None", because)
        super().__init__(img_size, embed_dim, depths, heads, None, mlp_ratio, drop_path, mask_token)
        table = sincos_2d(embed_dim, self.places[0].size)[:, 1:]
        self.absolute_pos_embed = nn.Parameter(table, requires_grad=False)

    def _init(self) -> None:
        """Every Linear Xavier-uniform with zero biases, bias tables and the mask token normal, as published."""
        super()._init()
        init_mae(self)

    @property
    def config(self) -> dict[str, Any]:
        return {**super().config, "window": None if self.windows is None else list(self.windows)}

    def at(self, img_size: Size) -> "MixSwin":
        other = copy.copy(self)
        other._parameters = dict(self._parameters)
        other.img_size, other.grid, other.places = self._sizes(img_size)
        size, pos = other.places[0].size, self.absolute_pos_embed
        if size != self.places[0].size:
            table = sincos_2d(self.embed_dim, size)[:, 1:].to(pos)
            other._parameters["absolute_pos_embed"] = nn.Parameter(table, requires_grad=False)
        return other

    def forward(
        self, img: Tensor, mask: Mask | None = None, mode: str = "mix", *, colour: Tensor | None = None
    ) -> Tensor:
        """Encode the images, or mixtures of them, all tokens.

        Args:
            img: (B, 3, H, W), uint8 (normalised inside, ImageNet statistics) or floating point, normalised already.
            mask: for "mix" over cells that are whole tokens of the last map, the same for all images or for each its
                own; for other modes as of `Swin`; or None.
            mode: "mix": row i of the result has, where mask i is hidden, tokens of image B - 1 - i, and tokens of image
                i elsewhere; neither depends on the other. Else as of `Swin`.
            colour: as of `Swin`.
        Returns:
            (B, T, dim), the tokens of the last map in row-major order, after the final norm.
        Raises:
            UserError: an image, a mask or a colour that does not fit; a mode that is not offered.
        """
        if mask is None or mode != "mix":
            return super().forward(img, mask, mode, colour=colour)
        self._check(img, mask, mode)
        cell = cell_of(img, mask, self.name)
        if cell % self.stride:
            because = f"a token of the last map, {self.stride} px, belongs to one image"
            fail(self.name, "mask", f"cells of {cell} px", f"a multiple of {self.stride} px", because)
        groups = [group_of(mask, place.size) for place in self.places]
        x = self.patch_embed(img)
        x = torch.where(groups[0].flatten(-2)[..., None], x.flip(0), x) + self.absolute_pos_embed
        return self._stages(x, groups)

    def _embed(self, img: Tensor, mask: Mask | None, mode: str, colour: Tensor | None) -> Tensor:
        return super()._embed(img, mask, mode, colour) + self.absolute_pos_embed

    def _places(self, size: tuple[int, int], last: tuple[int, int]) -> list[Place]:
        places = []
        for i in range(len(self.depths)):
            map_size = (size[0] >> i, size[1] >> i)
            window = 2 * min(last) if self.windows is None else self.windows[i]
            places.append(Place(map_size, window_of(self.name, map_size, window)[0], 0))
        return places


def group_of(mask: Mask, size: tuple[int, int]) -> Tensor:
    """The mask over a finer map of tokens: (H, W) bool when all images share it (views of one row), else (B, H, W)."""
    hidden, (rows, columns) = mask.hidden, mask.grid
    row_BL = hidden[:1] if hidden.stride(0) == 0 else hidden
    n, m = size[0] // rows, size[1] // columns
    map_BHW = row_BL.view(-1, rows, 1, columns, 1).expand(-1, -1, n, -1, m).reshape(-1, *size)
    return map_BHW[0] if hidden.stride(0) == 0 else map_BHW
