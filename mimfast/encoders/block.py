"""The pre-norm transformer block of ViT and of MAE's decoder. ViT, arXiv:2010.11929; MAE, arXiv:2111.06377, sec. 3.

B batch, T tokens of a sequence (or of all sequences, packed), M tokens that are asked for, D width, N heads, d = D / N
"""

from torch import Tensor, nn
from torch.nn import functional as F

from mimfast._check import fail
from mimfast.encoders.linear import linear
from mimfast.ops.short_attention import short_attention

EPS = 1e-6  # of every layer norm, as in timm and MAE (Hugging Face's ViTMAE says 1e-12)


class Attention(nn.Module):
    """Multi-head self-attention with one fused, biased qkv projection."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, add: Tensor | None = None, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None
    ) -> Tensor:
        """(B, T, D), or with `cu_seqlens` (G + 1) int32 packed (T, D); `add` is a residual for the result."""
        qkv = linear(x, self.qkv.weight, self.qkv.bias)
        y = short_attention(qkv, self.heads, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        return linear(y, self.proj.weight, self.proj.bias, add)

    def some(self, x_BTD: Tensor, rows_BMD: Tensor, add_BMD: Tensor) -> Tensor:
        """Queries of the given rows over the keys and values of all tokens: (B, M, D)."""
        D = x_BTD.shape[-1]
        weight, bias = self.qkv.weight, self.qkv.bias
        q = linear(rows_BMD, weight[:D], bias[:D])
        k, v = linear(x_BTD, weight[D:], bias[D:]).split(D, dim=-1)
        return linear(cross(q, k, v, self.heads), self.proj.weight, self.proj.bias, add_BMD)


class Mlp(nn.Module):
    """Two linear layers with the exact GELU between them."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        return linear(F.gelu(linear(x, self.fc1.weight, self.fc1.bias)), self.fc2.weight, self.fc2.bias, add)


class Block(nn.Module):
    """Pre-norm transformer block; no dropout, drop path or layer scale (MAE pre-training has none)."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(
        self,
        x: Tensor,
        rows: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """Run the block.

        Args:
            x: (B, T, D), or (T, D) with `cu_seqlens`.
            rows: (B, M) int64, distinct tokens to compute; the others are only looked at. For a last block.
            cu_seqlens: (G + 1) int32: where each sequence begins in `x`, and where the last ends.
            max_seqlen: at least the longest of these, known on the host.
        Returns:
            The shape of `x`, or (B, M, D).
        """
        if rows is None:
            x = self.attn(self.norm1(x), x, cu_seqlens, max_seqlen)
        else:
            normed = self.norm1(x)
            x = self.attn.some(normed, take(normed, rows), take(x, rows))
        return self.mlp(self.norm2(x), x)


def take(x_BTD: Tensor, rows_BM: Tensor) -> Tensor:
    """The given tokens of each sequence, (B, M, D). Distinct rows: nothing is added up in the gradient."""
    return x_BTD.gather(1, rows_BM[:, :, None].expand(-1, -1, x_BTD.shape[-1]))


def cross(q_BMD: Tensor, k_BTD: Tensor, v_BTD: Tensor, heads: int) -> Tensor:
    """Attention of M queries over T keys, (B, M, D)."""
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q_BMD, k_BTD, v_BTD))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(q_BMD.shape)


def init_mae(module: nn.Module) -> None:
    """MAE's initialisation: Xavier-uniform for every Linear (the fused qkv counts as one matrix) and zero biases."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.xavier_uniform_(child.weight)
            if child.bias is not None:
                nn.init.zeros_(child.bias)


def check_heads(op: str, dim: int, heads: int) -> None:
    """Raise unless the heads divide the width."""
    if heads < 1 or dim % heads:
        fail(op, "heads", heads, f"a divisor of {dim}", f"the width {dim} is split evenly among the heads")
