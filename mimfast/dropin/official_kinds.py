"""microsoft/Swin-Transformer's blocks, known by their structure: that repository is copied, not installed.

B images, L = H * W tokens, C width
"""

from typing import Any

import torch
from torch import Tensor, nn

from mimfast.dropin.kind import Kind, Swapped, drops, hooked
from mimfast.encoders.linear import linear
from mimfast.ops import window_attention, window_attention_v2

_BLOCK = ("attn", "norm1", "norm2", "mlp", "drop_path", "window_size", "shift_size", "input_resolution")
_ATTENTION = ("qkv", "proj", "num_heads", "attn_drop", "proj_drop", "relative_position_index")


def _has(module: Any, *names: str) -> bool:
    return all(hasattr(module, name) for name in names)


def _is_block(module: nn.Module, *own: str) -> bool:
    return _has(module, *_BLOCK) and _has(module.attn, *_ATTENTION, *own)


class Swin(Swapped):
    """SwinTransformerBlock of Swin: (B, L, C), norm before attention, maps of whole windows."""

    def forward(self: Any, x: Tensor) -> Tensor:
        attn = self.attn
        if hooked(attn) or drops(attn, "attn_drop"):
            return super().forward(x)  # type: ignore[misc]
        y = window_attention(
            attn.qkv(self.norm1(x).unflatten(1, tuple(self.input_resolution))),
            attn.relative_position_bias_table,
            self.window_size,
            self.shift_size,
            attn.num_heads,
            scale=attn.scale,
        )
        x = x + self.drop_path(attn.proj_drop(attn.proj(y)).flatten(1, 2))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class SwinV2(Swapped):
    """SwinTransformerBlock of Swin V2: (B, L, C), cosine attention, norms behind the branches."""

    def forward(self: Any, x: Tensor) -> Tensor:
        attn = self.attn
        if hooked(attn) or drops(attn, "attn_drop"):
            return super().forward(x)  # type: ignore[misc]
        bias = None
        if attn.q_bias is not None:
            bias = torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
        y = window_attention_v2(
            linear(x.unflatten(1, tuple(self.input_resolution)), attn.qkv.weight, bias),
            16 * torch.sigmoid(attn.cpb_mlp(attn.relative_coords_table).flatten(0, -2)),
            attn.logit_scale,
            self.window_size,
            self.shift_size,
            attn.num_heads,
        )
        x = x + self.drop_path(self.norm1(attn.proj_drop(attn.proj(y)).flatten(1, 2)))
        return x + self.drop_path(self.norm2(self.mlp(x)))


def _example(block: Any, batch: int, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    rows, cols = block.input_resolution
    return (torch.randn(batch, rows * cols, block.attn.proj.in_features, device=device, dtype=dtype),)


def _why_not(block: Any) -> str | None:
    rows, cols = block.input_resolution
    if rows % block.window_size or cols % block.window_size:
        return f"its map of {rows} x {cols} tokens is not whole windows of {block.window_size}"
    return None


KINDS = (
    Kind(
        "Swin-Transformer block",
        "window_attention",
        lambda m: _is_block(m, "relative_position_bias_table", "scale"),
        _why_not,
        Swin,
        _example,
    ),
    Kind(
        "Swin-Transformer V2 block",
        "window_attention_v2",
        lambda m: _is_block(m, "logit_scale", "cpb_mlp", "relative_coords_table", "q_bias"),
        _why_not,
        SwinV2,
        _example,
    ),
)
