"""Light decoders of methods whose encoder returns every token: blocks without mask tokens, and linear heads.

B batch, T patch tokens, S tokens before them, M predicted tokens, E encoder width, D decoder width, P target values
"""

from typing import Any

from torch import Tensor, nn

from mimfast._check import check_shape, fail
from mimfast.encoders.block import EPS, Block, check_heads, init_mae, take
from mimfast.encoders.linear import linear


class TokenDecoder(nn.Module):
    """FastMIM's decoder: linear, blocks over all tokens, norm, linear. arXiv:2212.06593, and the authors' code.

    No positions and no mask tokens of its own: the encoder has seen every token. A class token goes through the blocks
    and is dropped at the end.

    Args:
        encoder_dim: width E of the incoming tokens.
        out_dim: values P predicted per token: the target's `dim`.
        dim: width D.
        depth: number of blocks. With 0 there is no linear layer before the head, so D must be E.
        heads: attention heads; None: heads of 32 channels.
        mlp_ratio: width of the MLP over D.
        eps: of the layer norms: 1e-6 over a ViT, 1e-5 over a Swin or PVT.
    """

    def __init__(
        self,
        encoder_dim: int,
        out_dim: int,
        dim: int = 256,
        depth: int = 1,
        heads: int | None = None,
        mlp_ratio: float = 4.0,
        eps: float = EPS,
    ) -> None:
        super().__init__()
        heads = max(1, dim // 32) if heads is None else heads
        check_heads("TokenDecoder", dim, heads)
        if depth == 0 and dim != encoder_dim:
            reason = f"without blocks the head reads the encoder's tokens, which are {encoder_dim} wide"
            fail("TokenDecoder", "dim", dim, f"{encoder_dim}, or depth 1 or more", reason)
        self.encoder_dim, self.out_dim, self.dim, self.depth, self.heads = encoder_dim, out_dim, dim, depth, heads
        self.mlp_ratio, self.eps = mlp_ratio, eps
        self.embed = nn.Linear(encoder_dim, dim) if depth else None
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.pred = nn.Linear(dim, out_dim)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = eps
        init_mae(self)

    @property
    def config(self) -> dict[str, Any]:
        """The plain arguments that, with the encoder's width and the target's, build this decoder again."""
        sizes = {"dim": self.dim, "depth": self.depth, "heads": self.heads, "mlp_ratio": self.mlp_ratio}
        return {**sizes, "eps": self.eps}

    def forward(self, tokens: Tensor, rows: Tensor | None = None, prefix: int = 0) -> Tensor:
        """Predict every token, or the given ones.

        The last block computes the given tokens only: nothing after it looks at the others. The result is the same.

        Args:
            tokens: (B, S + T, E).
            rows: (B, M) int64, distinct patch tokens, or None for all.
            prefix: S, the tokens before the patches.
        Returns:
            (B, T, P), or (B, M, P) in the order of `rows`.
        Raises:
            UserError: tokens of another width.
        """
        check_shape("TokenDecoder", "tokens", tokens, (None, None, self.encoder_dim), "it is built for this width")
        if self.embed is None:
            x_BTD = tokens[:, prefix:] if rows is None else take(tokens, rows + prefix)
        else:
            x_BTD = linear(tokens, self.embed.weight, self.embed.bias)
            for block in self.blocks[:-1]:
                x_BTD = block(x_BTD)
            x_BTD = self.blocks[-1](x_BTD, rows=None if rows is None else rows + prefix)
            x_BTD = x_BTD[:, prefix:] if rows is None else x_BTD
        return linear(self.norm(x_BTD), self.pred.weight, self.pred.bias)


class PixelHead(nn.Sequential):
    """SimMIM's head: a 1x1 convolution to the pixels of a token, colour first. arXiv:2111.09886.

    The PixelShuffle that follows it in the authors' code only moves values; the target reads them where they are. The
    convolution is computed as a product; it keeps the name and the initialisation of theirs ("0", torch's default).

    Args:
        encoder_dim: width E of the incoming tokens.
        out_dim: values P predicted per token.
    """

    def __init__(self, encoder_dim: int, out_dim: int) -> None:
        super().__init__(nn.Conv2d(encoder_dim, out_dim, 1))
        self.encoder_dim, self.out_dim = encoder_dim, out_dim

    def forward(self, tokens: Tensor, rows: Tensor | None = None, prefix: int = 0) -> Tensor:
        """As `TokenDecoder.forward`."""
        x_BTE, conv = tokens[:, prefix:] if rows is None else take(tokens, rows + prefix), self.get_submodule("0")
        assert isinstance(conv, nn.Conv2d)
        return linear(x_BTE, conv.weight.flatten(1), conv.bias)


class HOGHead(nn.Module):
    """MaskFeat's head: the last layer norm and a linear layer. arXiv:2112.09133, and the authors' code.

    Its names are theirs: `transforms.0.0` is the norm, `projections.0` the linear layer.

    Args:
        encoder_dim: width E of the incoming tokens.
        out_dim: values P predicted per token.
    """

    def __init__(self, encoder_dim: int, out_dim: int) -> None:
        super().__init__()
        self.encoder_dim, self.out_dim = encoder_dim, out_dim
        self.transforms = nn.ModuleList([nn.Sequential(nn.LayerNorm(encoder_dim, eps=EPS))])
        linear_ = nn.Linear(encoder_dim, out_dim)
        nn.init.trunc_normal_(linear_.weight, std=0.02)
        nn.init.zeros_(linear_.bias)
        self.projections = nn.ModuleList([linear_])

    def forward(self, tokens: Tensor, rows: Tensor | None = None, prefix: int = 0) -> Tensor:
        """As `TokenDecoder.forward`."""
        x_BTE = tokens[:, prefix:] if rows is None else take(tokens, rows + prefix)
        linear_: Any = self.projections[0]
        return linear(self.transforms[0](x_BTE), linear_.weight, linear_.bias)
