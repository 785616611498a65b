"""timm: the attention of Swin, Swin V2 and ViT blocks.   B images, H W map in tokens, N tokens, C width"""

from typing import Any

import torch
from torch import Tensor, nn

from mimfast.dropin.kind import Kind, Swapped, drops, hooked
from mimfast.encoders.linear import linear
from mimfast.ops import short_attention, window_attention, window_attention_v2


def named(module: nn.Module, path: str, name: str) -> bool:
    """By name, so that timm need not be imported; subclasses count."""
    return any(cls.__module__ == path and cls.__name__ == name for cls in type(module).__mro__)


class Swin(Swapped):
    """timm.models.swin_transformer.SwinTransformerBlock: rolls first, then pads."""

    def _attn(self: Any, x_BHWC: Tensor) -> Tensor:
        attn = self.attn
        if hooked(attn) or drops(attn, "attn_drop"):
            return super()._attn(x_BHWC)  # type: ignore[misc]
        y = window_attention(
            attn.qkv(x_BHWC),
            attn.relative_position_bias_table,
            tuple(self.window_size),
            tuple(self.shift_size),
            attn.num_heads,
            scale=attn.scale,
            pad="roll_then_pad",
            qkv_bias=attn.qkv.bias,
        )
        return attn.proj_drop(attn.proj(y))


class SwinV2(Swapped):
    """timm.models.swin_transformer_v2.SwinTransformerV2Block."""

    def _attn(self: Any, x_BHWC: Tensor) -> Tensor:
        attn = self.attn
        if hooked(attn) or drops(attn, "attn_drop"):
            return super()._attn(x_BHWC)  # type: ignore[misc]
        bias = None if attn.q_bias is None else torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        table = 16 * torch.sigmoid(attn.cpb_mlp(attn.relative_coords_table).flatten(0, -2))
        y = window_attention_v2(
            linear(x_BHWC, attn.qkv.weight, bias),
            table,
            attn.logit_scale,
            tuple(self.window_size),
            tuple(self.shift_size),
            attn.num_heads,
            pad="roll_then_pad",
            qkv_bias=bias,
        )
        return attn.proj_drop(attn.proj(y))


class ViT(Swapped):
    """timm.layers.attention.Attention, the one of VisionTransformer."""

    def forward(self: Any, x_BNC: Tensor, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        if attn_mask is not None or any(kwargs.values()) or drops(self, "attn_drop"):
            return super().forward(x_BNC, attn_mask=attn_mask, **kwargs)  # type: ignore[misc]
        y = short_attention(self.qkv(x_BNC), self.num_heads, scale=self.scale)
        return self.proj_drop(self.proj(getattr(self, "norm", nn.Identity())(y)))


def _map_example(block: Any, batch: int, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    return (torch.randn(batch, *block.input_resolution, block.dim, device=device, dtype=dtype),)


def _vit_why_not(attn: Any) -> str | None:
    if not all(isinstance(getattr(attn, name, None), nn.Identity | None) for name in ("q_norm", "k_norm")):
        return "it normalises queries and keys, which the op does not"
    if getattr(attn, "gate", None) is not None:
        return "its output is gated, which the op does not do"
    return None


def _nothing(_module: nn.Module) -> None:
    return None


def _vit_example(attn: Any, batch: int, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    return (torch.randn(batch, 197, attn.qkv.in_features, device=device, dtype=dtype),)


KINDS = (
    Kind(
        "timm SwinTransformerBlock",
        "window_attention",
        lambda m: named(m, "timm.models.swin_transformer", "SwinTransformerBlock"),
        _nothing,
        Swin,
        _map_example,
    ),
    Kind(
        "timm SwinTransformerV2Block",
        "window_attention_v2",
        lambda m: named(m, "timm.models.swin_transformer_v2", "SwinTransformerV2Block"),
        _nothing,
        SwinV2,
        _map_example,
    ),
    Kind(
        "timm Attention (ViT)",
        "short_attention",
        lambda m: (
            named(m, "timm.layers.attention", "Attention") or named(m, "timm.models.vision_transformer", "Attention")
        ),
        _vit_why_not,
        ViT,
        _vit_example,
    ),
)
