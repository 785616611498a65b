"""Swin Transformer V2: cosine attention, a bias computed from coordinates, norms behind the branches.

arXiv:2111.09883. Masks, sizes and names of weights are those of `Swin`; "replace" is SimMIM's use of it.
B batch, L tokens of a map, C width, N heads, d = C / N, w window side, n tokens of a window
"""

from collections.abc import Sequence
from math import log
from typing import Any

import torch
from torch import Tensor, nn

from mimfast._check import fail
from mimfast.encoders.inputs import Size
from mimfast.encoders.linear import linear
from mimfast.encoders.swin import EPS, Swin, SwinBlock, Wiring, four
from mimfast.ops.window_attention_v2 import window_attention_v2

CPB_HIDDEN = 512


class CosineAttention(nn.Module):
    """Attention inside windows: cosine of query and key times a learned factor, plus a bias from relative coordinates.

    Norms, scores and bias are float32 also under autocast: the factor goes up to 100, where bfloat16 steps by half.

    Args:
        dim: width C.
        heads: attention heads N.
        window: side that relative coordinates are measured in: that of the window the weights are trained with.
    """

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.logit_scale = nn.Parameter(torch.full((heads, 1, 1), log(10)))
        self.cpb_mlp = nn.Sequential(
            nn.Linear(2, CPB_HIDDEN), nn.ReLU(inplace=True), nn.Linear(CPB_HIDDEN, heads, bias=False)
        )
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))  # keys have none: it would cancel before the norm only
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, wiring: Wiring, shifted: bool) -> Tensor:
        """(B, L, C) in image order."""
        size, window, shift = wiring.place
        bias_3C = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = linear(x, self.qkv.weight, bias_3C).unflatten(1, size)
        shift = shift if shifted else 0
        y = window_attention_v2(
            qkv, self.table(window), self.logit_scale, window, shift, self.heads, group=wiring.group
        )
        return linear(y.flatten(1, 2), self.proj.weight, self.proj.bias)

    def table(self, window: int) -> Tensor:
        """((2 window - 1)^2, N): 16 times the sigmoid of what the MLP makes of the logarithm of each offset."""
        weight: Any = self.cpb_mlp[0].weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        at = torch.arange(1 - window, window, device=weight.device).to(wide) * (8 / max(self.window - 1, 1))
        at = at.sign() * (at.abs() + 1).log2() / 3
        table_tt2 = torch.stack(torch.meshgrid(at, at, indexing="ij"), -1)
        with torch.autocast(weight.device.type, enabled=False):
            return 16 * self.cpb_mlp(table_tt2.to(weight.dtype)).flatten(0, 1).sigmoid()


class SwinV2Block(SwinBlock):
    """Residual block with the norms behind attention and MLP, which begin as zero."""

    def forward(self, x: Tensor, wiring: Wiring, shifted: bool) -> Tensor:
        x = x + self.dropped(self.norm1(self.attn(x, wiring, shifted)))
        return x + self.dropped(self.norm2(self.mlp(x)))


class PatchMergingV2(nn.Module):
    """Four neighbours become one token of twice the width: a linear layer without bias, then the norm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim, eps=EPS)

    def forward(self, x: Tensor, size: tuple[int, int] | None) -> Tensor:
        return self.norm(linear(four(x, size), self.reduction.weight))


class SwinV2(Swin):
    """Swin Transformer V2; without a mask it is the plain backbone.

    At another size the bias is computed for the window there, with coordinates in the measure of the window that the
    encoder was built with.

    Args:
        img_size, embed_dim, depths, heads, window, mlp_ratio, drop_path, mask_token: as of `Swin`.
        pretrained_windows: for each stage the window that its weights were trained with, where that is another; 0 for
            the stage's own.
    Attributes: those of `Swin`.
    Raises:
        UserError: stages, heads, sizes or windows that do not fit.
    """

    own_modes = frozenset({"paint"})

    def __init__(
        self,
        img_size: Size = 256,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        heads: Sequence[int] = (3, 6, 12, 24),
        window: int | None = None,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        mask_token: bool = False,
        pretrained_windows: Sequence[int] = (0, 0, 0, 0),
    ) -> None:
        self.pretrained_windows = tuple(pretrained_windows)
        if len(pretrained_windows) < len(depths) or min(pretrained_windows) < 0:
            because = f"there are {len(depths)} stages, and 0 stands for a stage's own window"
            fail("SwinV2", "pretrained_windows", self.pretrained_windows, "one number for each stage", because)
        super().__init__(img_size, embed_dim, depths, heads, window, mlp_ratio, drop_path, mask_token)

    def _block(self, i: int, dim: int, drop_path: float) -> nn.Module:
        window = self.pretrained_windows[i] or self.places[i].window
        return SwinV2Block(dim, CosineAttention(dim, self.heads[i], window), self.mlp_ratio, drop_path)

    def _merging(self, dim: int) -> nn.Module:
        return PatchMergingV2(dim)

    def _init(self) -> None:
        super()._init()
        for module in self.modules():
            if isinstance(module, SwinV2Block):
                for norm in (module.norm1, module.norm2):
                    nn.init.zeros_(norm.weight)

    @property
    def config(self) -> dict[str, Any]:
        return {**super().config, "pretrained_windows": list(self.pretrained_windows)}
