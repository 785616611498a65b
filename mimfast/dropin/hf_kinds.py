"""transformers: the layers of Swin and Swin V2, the attention of ViTMAE.   B images, H W map in tokens, C width"""

from typing import Any

import torch
from torch import Tensor, nn

from mimfast.dropin.kind import Kind, Swapped, drops, hooked, project
from mimfast.dropin.timm_kinds import named
from mimfast.ops import short_attention, window_attention, window_attention_v2

_SWIN = "transformers.models.swin.modeling_swin"
_SWINV2 = "transformers.models.swinv2.modeling_swinv2"
_VIT_MAE = "transformers.models.vit_mae.modeling_vit_mae"


def _asks_weights(module: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the caller wants the attention weights, which the fused op never holds."""
    return bool(kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False))


class Swin(Swapped):
    """SwinLayer: pads first, then rolls."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        input_dimensions: tuple[int, int],
        always_partition: bool = False,
        **kwargs: Any,
    ) -> Any:
        attn = self.attention
        if hooked(attn) or drops(attn, "attention_dropout") or _asks_weights(attn, kwargs):
            return super().forward(hidden_states, input_dimensions, always_partition=always_partition, **kwargs)  # type: ignore[misc]
        if not always_partition:
            self.set_shift_and_window_size(input_dimensions)
        map_BHWC = self.layernorm_before(hidden_states).unflatten(1, tuple(input_dimensions))
        qkv, bias = project(map_BHWC, attn.q_proj, attn.k_proj, attn.v_proj)
        y = window_attention(
            qkv,
            attn.relative_position_bias.relative_position_bias_table,
            self.window_size,
            self.shift_size,
            attn.num_attention_heads,
            scale=attn.scaling,
            pad="pad_then_roll",
            qkv_bias=bias,
        )
        y = self.dropout(attn.o_proj(y)).flatten(1, 2)
        hidden_states = hidden_states + self.drop_path(y)
        y = self.dropout(self.mlp(self.layernorm_after(hidden_states)))
        return y + hidden_states, None


class SwinV2(Swapped):
    """Swinv2Layer: cosine attention, norms behind the branches; pads first, then rolls."""

    def forward(
        self: Any, hidden_states: Tensor, input_dimensions: tuple[int, int], output_attentions: bool | None = False
    ) -> Any:
        attn, out = self.attention.self, self.attention.output
        if hooked(attn) or hooked(self.attention) or drops(attn, "dropout") or output_attentions:
            return super().forward(hidden_states, input_dimensions, output_attentions)  # type: ignore[misc]
        map_BHWC = hidden_states.unflatten(1, tuple(input_dimensions))
        qkv, bias = project(map_BHWC, attn.query, attn.key, attn.value)
        table = 16 * torch.sigmoid(attn.continuous_position_bias_mlp(attn.relative_coords_table).flatten(0, -2))
        y = window_attention_v2(
            qkv,
            table,
            attn.logit_scale,
            self.window_size,
            self.shift_size,
            attn.num_attention_heads,
            pad="pad_then_roll",
            qkv_bias=bias,
        )
        y = out(y, map_BHWC).flatten(1, 2)
        hidden_states = hidden_states + self.drop_path(self.layernorm_before(y))
        y = self.output(self.intermediate(hidden_states))
        return (hidden_states + self.drop_path(self.layernorm_after(y)),)


class ViTMAE(Swapped):
    """ViTMAEAttention, in the encoder and in the decoder."""

    def forward(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        if attention_mask is not None or drops(self, "attention_dropout") or _asks_weights(self, kwargs):
            return super().forward(hidden_states, attention_mask, **kwargs)  # type: ignore[misc]
        qkv, _ = project(hidden_states, self.q_proj, self.k_proj, self.v_proj)
        return self.o_proj(short_attention(qkv, self.num_attention_heads, scale=self.scaling)), None


def _map_example(layer: Any, batch: int, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    rows, cols = layer.input_resolution
    tokens = torch.randn(batch, rows * cols, layer.layernorm_before.normalized_shape[0], device=device, dtype=dtype)
    return tokens, (rows, cols)


def _token_example(attn: Any, batch: int, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    return (torch.randn(batch, 50, attn.q_proj.in_features, device=device, dtype=dtype),)


def _nothing(_module: nn.Module) -> None:
    return None


KINDS = (
    Kind(
        "transformers SwinLayer",
        "window_attention",
        lambda m: named(m, _SWIN, "SwinLayer"),
        _nothing,
        Swin,
        _map_example,
    ),
    Kind(
        "transformers Swinv2Layer",
        "window_attention_v2",
        lambda m: named(m, _SWINV2, "Swinv2Layer"),
        _nothing,
        SwinV2,
        _map_example,
    ),
    Kind(
        "transformers ViTMAEAttention",
        "short_attention",
        lambda m: named(m, _VIT_MAE, "ViTMAEAttention"),
        _nothing,
        ViTMAE,
        _token_example,
    ),
)
