"""Decoders: from visible tokens to a prediction for patches.

B batch, L patches, K kept, M predicted patches, D decoder width, E encoder width, P target values, F feature maps
"""

from typing import Any

import torch
from torch import Tensor, nn

from mimfast._check import check_dtype, check_shape, fail
from mimfast.encoders.block import EPS, Block, Mlp, check_heads, cross, init_mae, take
from mimfast.encoders.inputs import check_mask
from mimfast.encoders.linear import linear
from mimfast.encoders.positions import sincos_2d
from mimfast.mask import Mask
from mimfast.ops.patch_unshuffle import patch_unshuffle


class ViTDecoder(nn.Module):
    """MAE's decoder: mask tokens in their places, fixed positions, blocks, linear prediction. arXiv:2111.06377, sec. 3.

    Args:
        encoder_dim: width of the incoming tokens.
        grid: (rows, columns) in patches.
        patch: side of a patch in pixels; P = patch * patch * 3.
        dim: width D.
        depth: number of blocks.
        heads: attention heads.
        mlp_ratio: width of the MLP over D.
        class_token: whether a class token comes before the visible patches.
    Attributes:
        out_dim: P.
        wants_features: False: it takes the encoder's result.
    """

    wants_features = False

    def __init__(
        self,
        encoder_dim: int,
        grid: tuple[int, int],
        patch: int,
        dim: int = 512,
        depth: int = 8,
        heads: int = 16,
        mlp_ratio: float = 4.0,
        class_token: bool = True,
    ) -> None:
        super().__init__()
        check_heads("ViTDecoder", dim, heads)
        self.encoder_dim, self.grid, self.patch, self.dim, self.depth, self.heads = (
            encoder_dim,
            grid,
            patch,
            dim,
            depth,
            heads,
        )
        self.mlp_ratio, self.out_dim, self.prefix = mlp_ratio, patch * patch * 3, int(class_token)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_2d(dim, grid)[:, 1 - self.prefix :], requires_grad=False)
        self.embed = nn.Linear(encoder_dim, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.pred = nn.Linear(dim, self.out_dim)
        init_mae(self)
        nn.init.normal_(self.mask_token, std=0.02)

    @property
    def config(self) -> dict[str, Any]:
        """The plain arguments that, with the encoder's, build this decoder again."""
        return {"dim": self.dim, "depth": self.depth, "heads": self.heads, "mlp_ratio": self.mlp_ratio}

    def rows(self, mask: Mask) -> Tensor | None:
        """The patches that training needs: (B, M) int64, all hidden ones; None when nothing is hidden."""
        return mask.hide if mask.hide.shape[1] else None

    def forward(self, tokens: Tensor, mask: Mask, rows: Tensor | None = None) -> Tensor:
        """Predict every patch, or the given ones.

        The last block computes the given patches only: nothing after it looks at the others. The result is the same.

        Args:
            tokens: (B, 1 + K, encoder_dim), class token first, then the visible patches ascending; (B, K, encoder_dim)
                without a class token.
            mask: the one the encoder saw.
            rows: (B, M) int64, distinct patches, or None for all.
        Returns:
            (B, L, P), in image order, or (B, M, P), in the order of `rows`.
        Raises:
            UserError: tokens of another shape, a mask over another grid, batch or device.
        """
        check_mask("ViTDecoder", mask, self.grid, tokens)
        reason = f"{'one class token and ' if self.prefix else ''}{mask.visible} visible patches"
        check_shape("ViTDecoder", "tokens", tokens, (None, self.prefix + mask.visible, self.encoder_dim), reason)
        x_BKD = linear(tokens, self.embed.weight, self.embed.bias)
        x_BTD = patch_unshuffle(x_BKD, self.mask_token, mask.inverse, self.pos_embed, prefix=self.prefix)
        rows = None if rows is None else rows + self.prefix
        if rows is not None and len(self.blocks) == 0:
            x_BTD = take(x_BTD, rows)
        for i, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, rows=rows if i == len(self.blocks) - 1 else None)
        if rows is None:
            x_BTD = x_BTD[:, self.prefix :]
        return self.head(x_BTD)

    def head(self, x: Tensor) -> Tensor:
        """The prediction from what the blocks give, (..., D) to (..., P)."""
        return linear(self.norm(x), self.pred.weight, self.pred.bias)


class DualDecoder(ViTDecoder):
    """MixMIM's decoder: both images of a mixture from their own tokens. arXiv:2205.13137, section 3.2.

    Two sequences come from a mixture: in the first a mask token stands for every hidden token, in the second for every
    visible one. Of each only what comes from mask tokens is predicted, and so every patch of every image once: image i
    from the first sequence of mixture i where mask i hides it, and from the second of mixture B - 1 - i elsewhere.

    Args:
        encoder_dim, grid, patch, dim, depth, heads, mlp_ratio: as of `ViTDecoder`.
    """

    def __init__(
        self,
        encoder_dim: int,
        grid: tuple[int, int],
        patch: int,
        dim: int = 512,
        depth: int = 8,
        heads: int = 16,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__(encoder_dim, grid, patch, dim, depth, heads, mlp_ratio, class_token=False)

    def rows(self, mask: Mask) -> Tensor:
        """(B, L) int64: the patches of each image in the order in which `forward` predicts them."""
        if mask.cu_seqlens is not None:
            because = "both sequences of a batch have one length"
            fail("DualDecoder", "mask", "images that hide different numbers of patches", "equal numbers", because)
        return torch.cat([mask.hide, mask.keep.flip(0)], 1)

    def forward(self, tokens: Tensor, mask: Mask, rows: Tensor | None = None) -> Tensor:
        """Predict every patch of every image.

        Args:
            tokens: (B, L, encoder_dim), mixtures as `MixSwin` gives them.
            mask: the one the encoder saw, with row B - 1 - i equal to row i: they are two mixtures of the same images.
            rows: None for image order, or what `rows` gives, which is faster: the last block computes only what is
                predicted.
        Returns:
            (B, L, P).
        Raises:
            UserError: tokens of another shape, a mask over another grid, batch or device.
        """
        check_mask("DualDecoder", mask, self.grid, tokens)
        L = self.grid[0] * self.grid[1]
        check_shape("DualDecoder", "tokens", tokens, (None, L, self.encoder_dim), "each patch has one, of either image")
        x_BLD = linear(tokens, self.embed.weight, self.embed.bias)
        hidden_BL1, token_11D = mask.hidden[..., None], self.mask_token.to(x_BLD.dtype)
        pair = [torch.where(hidden_BL1, token_11D, x_BLD), torch.where(hidden_BL1, x_BLD, token_11D)]
        x_2BLD = torch.cat(pair) + self.pos_embed
        for block in self.blocks if rows is None else self.blocks[:-1]:
            x_2BLD = block(x_2BLD)
        first_BLD, second_BLD = x_2BLD.chunk(2)
        if rows is None:
            return self.head(torch.where(hidden_BL1, first_BLD, second_BLD.flip(0)))
        last: Any = self.blocks[-1] if self.blocks else take
        M = mask.hide.shape[1]
        first_BMD, second_BKD = last(first_BLD, rows[:, :M]), last(second_BLD, rows[:, M:].flip(0))
        return self.head(torch.cat([first_BMD, second_BKD.flip(0)], 1))


class CrossBlock(nn.Module):
    """Cross-attention from mask tokens to encoder features, then the MLP, pre-norm. No self-attention."""

    def __init__(self, encoder_dim: int, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(encoder_dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x_BMD: Tensor, feature_BKE: Tensor) -> Tensor:
        k, v = linear(feature_BKE, self.kv.weight, self.kv.bias).chunk(2, dim=-1)
        y = cross(linear(self.norm1(x_BMD), self.q.weight, self.q.bias), k, v, self.heads)
        x_BMD = linear(y, self.proj.weight, self.proj.bias, x_BMD)
        return self.mlp(self.norm2(x_BMD), x_BMD)


class CrossDecoder(nn.Module):
    """CrossMAE's decoder: mask tokens look at encoder features and never at each other. arXiv:2401.14391, sec. 3.

    Without self-attention a patch's prediction does not depend on which others are predicted, so that training may
    predict a part of the hidden patches. Each block reads its own learned mixture of the encoder's feature maps.

    Args:
        encoder_dim: width of the features.
        features: F, number of feature maps: the encoder's depth + 1 (the input of its first block counts).
        grid: (rows, columns) in patches.
        patch: side of a patch in pixels; P = patch * patch * 3.
        dim: width D.
        depth: number of blocks.
        heads: attention heads.
        mlp_ratio: width of the MLP over D.
        share: patches predicted in training over all patches of the image, in (0, 1]; never more than are hidden.
    Attributes:
        out_dim: P.
        wants_features: True: it takes the list that the encoder's `features` gives.
    """

    wants_features = True

    def __init__(
        self,
        encoder_dim: int,
        features: int,
        grid: tuple[int, int],
        patch: int,
        dim: int = 512,
        depth: int = 12,
        heads: int = 16,
        mlp_ratio: float = 4.0,
        share: float = 0.25,
    ) -> None:
        super().__init__()
        check_heads("CrossDecoder", dim, heads)
        if not 0 < share <= 1:
            fail("CrossDecoder", "share", share, "a number in (0, 1]", "it is the share of patches that are predicted")
        self.encoder_dim, self.features, self.grid, self.patch = encoder_dim, features, grid, patch
        self.dim, self.depth, self.heads, self.mlp_ratio, self.share = dim, depth, heads, mlp_ratio, share
        self.out_dim = patch * patch * 3
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_2d(dim, grid), requires_grad=False)
        self.mix = nn.Linear(features, depth, bias=False)
        self.mix_norms = nn.ModuleList(nn.LayerNorm(encoder_dim, eps=EPS) for _ in range(depth))
        self.blocks = nn.ModuleList(CrossBlock(encoder_dim, dim, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.pred = nn.Linear(dim, self.out_dim)
        init_mae(self)
        nn.init.normal_(self.mix.weight, std=features**-0.5)
        nn.init.normal_(self.mask_token, std=0.02)

    @property
    def config(self) -> dict[str, Any]:
        """The plain arguments that, with the encoder's, build this decoder again."""
        sizes = {"dim": self.dim, "depth": self.depth, "heads": self.heads, "mlp_ratio": self.mlp_ratio}
        return {"type": "CrossDecoder", "features": self.features, **sizes, "share": self.share}

    def rows(self, mask: Mask) -> Tensor | None:
        """A fresh random choice of hidden patches from torch's generator, (B, M) int64 ascending; None without any."""
        hide_BM = mask.hide
        wanted = min(max(1, int(mask.inverse.shape[1] * self.share)), hide_BM.shape[1])
        if wanted == hide_BM.shape[1]:
            return hide_BM if wanted else None
        noise_BM = torch.rand(hide_BM.shape, device=hide_BM.device)
        return hide_BM.gather(1, noise_BM.argsort(1)[:, :wanted].sort(1).values)

    def forward(self, features: list[Tensor], mask: Mask, rows: Tensor | None = None) -> Tensor:
        """Predict every patch, or the given ones.

        Args:
            features: F maps of (B, 1 + K, encoder_dim), as the encoder's `features` gives.
            mask: the one the encoder saw.
            rows: (B, M) int64, distinct patches, or None for all.
        Returns:
            (B, L, P), in image order, or (B, M, P), in the order of `rows`.
        Raises:
            UserError: another number or shape of features, a mask over another grid, batch or device.
        """
        if len(features) != self.features:
            reason = "each block mixes the input of the first encoder block and the output of every one"
            fail("CrossDecoder", "features", f"{len(features)} maps", self.features, reason)
        check_mask("CrossDecoder", mask, self.grid, features[0])
        reason = f"one class token and {mask.visible} visible patches"
        for feature in features:
            check_shape("CrossDecoder", "features", feature, (None, 1 + mask.visible, self.encoder_dim), reason)
        pos_LD = self.pos_embed[0, 1:]
        if rows is None:
            pos_BMD = pos_LD.expand(features[0].shape[0], -1, -1)
        else:
            check_dtype("CrossDecoder", "rows", rows, (torch.int64,), "it holds indices of patches")
            pos_BMD = pos_LD[rows]
        x_BMD = self.mask_token + pos_BMD
        stack_BKEF = torch.stack(features, dim=-1)
        for block, norm, weight_F in zip(self.blocks, self.mix_norms, self.mix.weight):
            x_BMD = block(x_BMD, norm(stack_BKEF @ weight_F.to(stack_BKEF.dtype)))
        return linear(self.norm(x_BMD), self.pred.weight, self.pred.bias)


Decoder = ViTDecoder | CrossDecoder
