"""Vision Transformer whose masked forward embeds and encodes the visible patches only.

ViT, arXiv:2010.11929; MAE, arXiv:2111.06377, sec. 3. State-dict names are timm's and the official MAE encoder's.
B batch, L patches of the grid, K kept patches, D width, H W pixels, T tokens (1 class token + patches, or all packed)
"""

import copy
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mimfast._check import fail
from mimfast.encoders.block import EPS, Block, check_heads, init_mae
from mimfast.encoders.embed import PatchEmbedVisible
from mimfast.encoders.fill import full, painted, replaced
from mimfast.encoders.inputs import Size, check_image, check_mask, sizes
from mimfast.encoders.positions import at_grid, resized, sincos_2d
from mimfast.mask import Mask

Positions = Literal["sincos", "learned"]


class Packed(NamedTuple):
    """Sequences of different lengths, one after the other.

    Attributes:
        tokens: (T, D).
        cu_seqlens: (G + 1) int32: where each sequence begins, and where the last ends.
    """

    tokens: Tensor
    cu_seqlens: Tensor


class ViT(nn.Module):
    """Vision Transformer with a class token.

    Without a mask it is the plain backbone. With one, hidden patches are never embedded: mode "drop" encodes the
    visible ones only, mode "replace" puts a learned token in their places and encodes the full sequence (MaskFeat),
    mode "paint" does the same with the embedding of a patch of one colour (FastMIM).

    Args:
        img_size: of the square input in pixels, or (height, width).
        patch: side of a patch in pixels.
        dim: width D.
        depth: number of blocks.
        heads: attention heads. (FastMIM pre-trains its ViT-B with 6 and fine-tunes it with 12.)
        mlp_ratio: width of the MLP over D.
        mask_token: whether there is a `mask_token`, which mode "replace" needs.
        positions: "sincos", a fixed table (MAE, FastMIM), or "learned", a trained one (MaskFeat).
    Attributes:
        stride: pixels per token side (= patch).
        grid: (rows, columns) in patches.
        prefix: tokens before the patches in what `forward` returns.
        mask_modes: what `mode` may be: "drop", "paint", and with a mask token "replace".
    """

    prefix = 1
    pos_embed: Tensor
    mask_token: nn.Parameter | None
    mask_modes: frozenset[str]

    def __init__(
        self,
        img_size: Size = 224,
        patch: int = 16,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_ratio: float = 4.0,
        mask_token: bool = False,
        positions: Positions = "sincos",
    ) -> None:
        super().__init__()
        self.img_size, self.grid = sizes("ViT", img_size, patch)
        check_heads("ViT", dim, heads)
        if positions not in ("sincos", "learned"):
            fail("ViT", "positions", repr(positions), "'sincos' or 'learned'", "the table is computed or trained")
        self.patch, self.stride, self.dim, self.depth = patch, patch, dim, depth
        self.heads, self.mlp_ratio, self.positions = heads, mlp_ratio, positions
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        if positions == "learned":
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid[0] * self.grid[1], dim))
        else:  # a parameter, not a buffer, to keep its place among the names of timm; never trained
            self.pos_embed = nn.Parameter(sincos_2d(dim, self.grid), requires_grad=False)
        self._tables: dict[tuple[int, int], tuple[Any, nn.Parameter]] = {}
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim)) if mask_token else None
        self.mask_modes = frozenset({"drop", "paint", "replace"} if mask_token else {"drop", "paint"})
        self.patch_embed = PatchEmbedVisible(patch, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=EPS)
        init_mae(self)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))
        nn.init.normal_(self.cls_token, std=0.02)
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=0.02)
        if positions == "learned":
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    @property
    def config(self) -> dict[str, Any]:
        """The plain arguments that build this encoder again; written beside its weights."""
        return {
            "img_size": list(self.img_size),
            "patch": self.patch,
            "dim": self.dim,
            "depth": self.depth,
            "heads": self.heads,
            "mlp_ratio": self.mlp_ratio,
            **({} if self.mask_token is None else {"mask_token": True}),
            **({} if self.positions == "sincos" else {"positions": self.positions}),
        }

    def at(self, img_size: Size) -> "ViT":
        """The same encoder for images of another size: every weight is shared, the positions are made anew.

        Fixed sine-cosine positions are computed for the new grid; any other table is interpolated (bicubic), a learned
        one with its gradient, so that it has to be asked for again after a step of the optimiser.

        Args:
            img_size: pixels, or (height, width), multiples of the patch.
        """
        other = copy.copy(self)
        other._parameters, other._buffers, other._tables = dict(self._parameters), dict(self._buffers), {}
        other.img_size, other.grid = sizes("ViT", img_size, self.patch)
        if other.grid != self.grid:
            if self.positions == "learned":  # not a leaf, so no parameter
                other._parameters.pop("pos_embed", None)
                other.register_buffer("pos_embed", resized(self.pos_embed, self.grid, other.grid))
            else:
                other._parameters["pos_embed"] = self._table(other.grid)
        return other

    def _table(self, grid: tuple[int, int]) -> nn.Parameter:
        """The fixed positions of another grid, kept: telling what the own table is waits for the device."""
        table = self.pos_embed.detach()
        if table.is_inference() or torch.is_inference_mode_enabled():  # such tensors have no version and stay here
            return nn.Parameter(at_grid(table, self.grid, grid), requires_grad=False)
        stamp = (self.pos_embed._version, table.device, table.dtype)
        known, made = self._tables.get(grid, (None, None))
        if made is None or known != stamp:
            made = nn.Parameter(at_grid(table, self.grid, grid), requires_grad=False)
            self._tables[grid] = (stamp, made)
        return made

    def forward(
        self, img: Tensor, mask: Mask | None = None, mode: str = "drop", *, colour: Tensor | None = None
    ) -> Tensor:
        """Encode the visible patches, or all of them without a mask.

        Args:
            img: (B, 3, H, W), uint8 (normalised inside, ImageNet statistics) or floating point, normalised already.
            mask: over this encoder's grid, or None. For "paint" over any grid whose cells are whole square pixels; for
                "paint" and "replace" images may show different numbers of patches (a packed mask).
            mode: "drop": hidden tokens are left out. "replace": a mask token stands for each. "paint": every pixel of a
                hidden cell has the colour.
            colour: (1, 3, 1, 1) in normalised colour space, for "paint".
        Returns:
            (B, 1 + K, D): the class token, then the visible patches in image order, after the final norm; (B, 1 + L, D)
            for "replace", "paint" or without a mask. With "drop" and a packed mask `forward_packed` is the one to call.
        Raises:
            UserError: an image, a mask or a colour of another shape, dtype or device; a mode that is not offered.
        """
        x_BTD = self.embed(img, mask, mode, colour=colour)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.norm(x_BTD)

    def features(
        self, img: Tensor, mask: Mask | None = None, mode: str = "drop", *, colour: Tensor | None = None
    ) -> list[Tensor]:
        """The input of the first block and the output of every block, each (B, 1 + K, D), without the final norm."""
        found = [self.embed(img, mask, mode, colour=colour)]
        for block in self.blocks:
            found.append(block(found[-1]))
        return found

    def embed(
        self, img: Tensor, mask: Mask | None = None, mode: str = "drop", *, colour: Tensor | None = None
    ) -> Tensor:
        """The sequence that goes into the blocks: class token, embedded patches, positions; as `forward` otherwise."""
        self._check(img, mask, mode)
        if mask is None:
            return full(self.patch_embed, img, self.cls_token, self.pos_embed)
        if mode == "paint":
            return painted(self.patch_embed, img, mask, colour, self.cls_token, self.pos_embed)
        if mode == "replace":
            assert self.mask_token is not None  # or the mode would have been refused
            return replaced(self.patch_embed, img, mask, self.mask_token, self.cls_token, self.pos_embed)
        if mask.cu_seqlens is not None:
            found, wanted = "different numbers of visible tokens", "the same number in each image"
            reason = "forward makes one rectangular tensor; forward_packed takes packed masks"
            fail("ViT", "mask", found, wanted, reason)
        x_BKD = self.patch_embed(img, mask.keep) + self.pos_embed[0, 1:][mask.keep]
        cls_B1D = (self.cls_token + self.pos_embed[:, :1]).expand(img.shape[0], -1, -1)
        return torch.cat([cls_B1D, x_BKD], dim=1)

    def forward_packed(self, imgs: Sequence[Tensor], masks: Sequence[Mask | None] | None = None) -> Packed:
        """Encode image batches of several sizes, or with different numbers of visible tokens, as one.

        Every product runs once over all tokens; attention stays inside each image. Sizes other than the encoder's own
        get the positions of `at`. Packed masks are trimmed to what they hold, for which the host waits for the device.

        Args:
            imgs: batches (B_i, 3, H_i, W_i), as in `forward`.
            masks: one for each batch, over its grid, packed or not; or None.
        Returns:
            The sequences of all images, batch after batch: class token, then visible patches, after the final norm.
        Raises:
            UserError: no batch, another number of masks, and what `forward` refuses.
        """
        masks = [None] * len(imgs) if masks is None else masks
        if not imgs or len(imgs) != len(masks):
            found, wanted = f"{len(masks)} masks for {len(imgs)} batches", "one mask for each, and one batch at least"
            fail("ViT", "masks", found, wanted, "they go together in order")
        parts, lengths, longest = [], [], 0
        for img, mask in zip(imgs, masks):
            size = (int(img.shape[-2]), int(img.shape[-1]))
            tokens_TD, lengths_B, length = (self if size == self.img_size else self.at(size))._packed(img, mask)
            parts.append(tokens_TD)
            lengths.append(lengths_B)
            longest = max(longest, length)
        cu_seqlens = nn.functional.pad(torch.cat(lengths).cumsum(0), (1, 0)).to(torch.int32)
        x_TD = torch.cat(parts)
        for block in self.blocks:
            x_TD = block(x_TD, cu_seqlens=cu_seqlens, max_seqlen=longest)
        return Packed(self.norm(x_TD), cu_seqlens)

    def _packed(self, img: Tensor, mask: Mask | None) -> tuple[Tensor, Tensor, int]:
        """The embedded sequences of one batch, (T, D), their lengths, (B,), and the longest."""
        if mask is None or mask.cu_seqlens is None:
            x_BTD = self.embed(img, mask)
            length = x_BTD.shape[1]
            return x_BTD.flatten(0, 1), torch.full((x_BTD.shape[0],), length, device=img.device), length
        self._check(img, mask, "drop")
        cu_seqlens = mask.cu_seqlens.long()
        lengths_B = cu_seqlens.diff() + 1
        total, length = int(cu_seqlens[-1]), int(lengths_B.max())
        keep_K = mask.keep[:total]
        x_KD = self.patch_embed(img, keep_K, cu_seqlens=mask.cu_seqlens)
        x_KD = x_KD + self.pos_embed[0, 1:][keep_K]
        # image b has b + 1 class tokens before its first patch
        begin_B, place_K = cu_seqlens[:-1], torch.arange(total, device=img.device)
        image_K = torch.searchsorted(cu_seqlens[1:], place_K, right=True)
        cls_BD = (self.cls_token + self.pos_embed[:, :1])[0].expand(img.shape[0], -1).to(x_KD.dtype)
        order_T = torch.cat([begin_B + torch.arange(img.shape[0], device=img.device), place_K + image_K + 1]).argsort()
        return torch.cat([cls_BD, x_KD])[order_T], lengths_B, length

    def _check(self, img: Tensor, mask: Mask | None, mode: str) -> None:
        check_image("ViT", img, self.img_size, self.grid)
        if mode not in self.mask_modes:
            reason = "ViT(mask_token=True) adds 'replace'" if mode == "replace" else "a ViT has no other way"
            fail("ViT", "mode", repr(mode), f"one of {sorted(self.mask_modes)}", reason)
        if mask is not None and mode != "paint":  # which takes other grids
            check_mask("ViT", mask, self.grid, img)

    # the sizes; each default may be replaced

    @classmethod
    def ti16(cls, img_size: Size = 224, patch: int = 16, dim: int = 192, depth: int = 12, heads: int = 3) -> "ViT":
        """ViT-Ti."""
        return cls(img_size, patch, dim, depth, heads)

    @classmethod
    def s16(cls, img_size: Size = 224, patch: int = 16, dim: int = 384, depth: int = 12, heads: int = 6) -> "ViT":
        """ViT-S."""
        return cls(img_size, patch, dim, depth, heads)

    @classmethod
    def b16(cls, img_size: Size = 224, patch: int = 16, dim: int = 768, depth: int = 12, heads: int = 12) -> "ViT":
        """ViT-B."""
        return cls(img_size, patch, dim, depth, heads)

    @classmethod
    def l16(cls, img_size: Size = 224, patch: int = 16, dim: int = 1024, depth: int = 24, heads: int = 16) -> "ViT":
        """ViT-L."""
        return cls(img_size, patch, dim, depth, heads)

    @classmethod
    def h14(cls, img_size: Size = 224, patch: int = 14, dim: int = 1280, depth: int = 32, heads: int = 16) -> "ViT":
        """ViT-H."""
        return cls(img_size, patch, dim, depth, heads)

    @classmethod
    def nano4(cls, img_size: Size = 32, patch: int = 4, dim: int = 128, depth: int = 4, heads: int = 2) -> "ViT":
        """For 32 px on a CPU."""
        return cls(img_size, patch, dim, depth, heads)

    @classmethod
    def nano8(cls, img_size: Size = 64, patch: int = 8, dim: int = 128, depth: int = 4, heads: int = 2) -> "ViT":
        """For 64..96 px on a CPU."""
        return cls(img_size, patch, dim, depth, heads)

    @classmethod
    def micro4(cls, img_size: Size = 32, patch: int = 4, dim: int = 192, depth: int = 6, heads: int = 3) -> "ViT":
        """For 32 px."""
        return cls(img_size, patch, dim, depth, heads)

    @classmethod
    def micro8(cls, img_size: Size = 96, patch: int = 8, dim: int = 192, depth: int = 6, heads: int = 3) -> "ViT":
        """For 64..96 px."""
        return cls(img_size, patch, dim, depth, heads)

    @classmethod
    def mini4(cls, img_size: Size = 32, patch: int = 4, dim: int = 256, depth: int = 6, heads: int = 4) -> "ViT":
        """For 32 px."""
        return cls(img_size, patch, dim, depth, heads)

    @classmethod
    def mini8(cls, img_size: Size = 96, patch: int = 8, dim: int = 256, depth: int = 6, heads: int = 4) -> "ViT":
        """For 64..96 px."""
        return cls(img_size, patch, dim, depth, heads)
