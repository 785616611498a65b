"""Decoders: from visible tokens to a prediction for every patch.

B batch, L patches, K kept patches, M hidden patches, D decoder width, T tokens (class token + patches), P target values
"""

from typing import Any

import torch
from torch import Tensor, nn

from mimfast._check import check_shape
from mimfast.encoders.positions import sincos_2d
from mimfast.encoders.vit import EPS, Block, check_heads, check_mask, init_mae
from mimfast.mask import Mask


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
    Attributes:
        out_dim: P.
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
        self.mlp_ratio, self.out_dim = mlp_ratio, patch * patch * 3
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_2d(dim, grid), requires_grad=False)
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

    def forward(self, tokens: Tensor, mask: Mask) -> Tensor:
        """Predict every patch, visible ones too.

        Args:
            tokens: (B, 1 + K, encoder_dim), class token first, then the visible patches ascending.
            mask: the one the encoder saw.
        Returns:
            (B, L, P), in image order.
        Raises:
            UserError: tokens of another shape, a mask over another grid, batch or device.
        """
        kept = mask.visible
        check_shape(
            "ViTDecoder",
            "tokens",
            tokens,
            (None, 1 + kept, self.encoder_dim),
            f"one class token and {kept} visible patches",
        )
        check_mask("ViTDecoder", mask, self.grid, tokens)
        x_BKD = self.embed(tokens)
        hidden_BMD = self.mask_token.to(x_BKD.dtype).expand(x_BKD.shape[0], mask.inverse.shape[1] - kept, -1)
        # one gather by a permutation: its gradient adds nothing up, so it is deterministic
        pool_BLD = torch.cat([x_BKD[:, 1:], hidden_BMD], dim=1)
        x_BLD = pool_BLD.gather(1, mask.inverse[:, :, None].expand(-1, -1, self.dim))
        x_BTD = torch.cat([x_BKD[:, :1], x_BLD], dim=1) + self.pos_embed
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.pred(self.norm(x_BTD))[:, 1:]
