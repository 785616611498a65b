"""Vision Transformer whose masked forward embeds and encodes the visible patches only.

ViT, arXiv:2010.11929; MAE, arXiv:2111.06377, sec. 3. State-dict names are timm's and the official MAE encoder's.
B batch, L patches of the grid, K kept patches, D width, E = 3 p p values of a patch in (c, py, px) order, C channels,
H W pixels, N heads, T tokens of a sequence (1 class token + patches)
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimfast._check import check_same_device, fail
from mimfast._images import normalize
from mimfast.encoders.positions import sincos_2d
from mimfast.mask import Mask

Size = int | tuple[int, int]

EPS = 1e-6  # of every layer norm, as in timm and MAE (Hugging Face's ViTMAE says 1e-12)


class Attention(nn.Module):
    """Multi-head self-attention with one fused, biased qkv projection."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        batch, tokens, dim = x_BTD.shape
        qkv = self.qkv(x_BTD).view(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        y_BNTd = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return self.proj(y_BNTd.transpose(1, 2).reshape(batch, tokens, dim))


class Mlp(nn.Module):
    """Two linear layers with the exact GELU between them."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_BTD)))


class Block(nn.Module):
    """Pre-norm transformer block; no dropout, drop path or layer scale (MAE pre-training has none)."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attn(self.norm1(x_BTD))
        return x_BTD + self.mlp(self.norm2(x_BTD))


class PatchEmbed(nn.Module):
    """The patch convolution, applied as gather + matrix product so that hidden patches cost nothing."""

    def __init__(self, patch: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward(self, img_BCHW: Tensor, keep_BK: Tensor | None = None) -> Tensor:
        batch, channels, height, width = img_BCHW.shape
        patch, weight = self.proj.kernel_size[0], self.proj.weight
        rows, columns = height // patch, width // patch
        patches = img_BCHW.view(batch, channels, rows, patch, columns, patch).permute(0, 2, 4, 1, 3, 5)
        if keep_BK is None:
            patches = patches.reshape(batch, rows * columns, channels, patch, patch)
        else:
            image_B1 = torch.arange(batch, device=keep_BK.device)[:, None]
            patches = patches[image_B1, keep_BK // columns, keep_BK % columns]
        # uint8 is normalised here, after the gather: a quarter of the arithmetic at ratio 0.75
        patches_BKE = normalize(patches).flatten(2).to(weight.dtype)
        return F.linear(patches_BKE, weight.flatten(1), self.proj.bias)


class ViT(nn.Module):
    """Vision Transformer with a class token and fixed sine-cosine positions.

    Without a mask it is the plain backbone; with one, mode "drop" embeds and encodes the visible patches only.

    Args:
        img_size: of the square input in pixels, or (height, width).
        patch: side of a patch in pixels.
        dim: width D.
        depth: number of blocks.
        heads: attention heads.
        mlp_ratio: width of the MLP over D.
    Attributes:
        stride: pixels per token side (= patch).
        grid: (rows, columns) in patches.
        mask_modes: what `mode` may be: {"drop"}.
    """

    mask_modes = frozenset({"drop"})

    def __init__(
        self,
        img_size: Size = 224,
        patch: int = 16,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        self.img_size, self.grid = _sizes(img_size, patch)
        check_heads("ViT", dim, heads)
        self.patch, self.stride, self.dim, self.depth, self.heads, self.mlp_ratio = (
            patch,
            patch,
            dim,
            depth,
            heads,
            mlp_ratio,
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        # a parameter, not a buffer, to keep its place among the names of timm; never trained
        self.pos_embed = nn.Parameter(sincos_2d(dim, self.grid), requires_grad=False)
        self.patch_embed = PatchEmbed(patch, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=EPS)
        init_mae(self)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))
        nn.init.normal_(self.cls_token, std=0.02)

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
        }

    def forward(self, img: Tensor, mask: Mask | None = None, mode: str = "drop") -> Tensor:
        """Encode the visible patches, or all of them without a mask.

        Args:
            img: (B, 3, H, W), uint8 (normalised inside, ImageNet statistics) or floating point, normalised already.
            mask: over this encoder's grid, or None.
            mode: how hidden tokens are treated; a ViT offers "drop".
        Returns:
            (B, 1 + K, D): the class token, then the visible patches in image order, after the final norm.
        Raises:
            UserError: an image or a mask of another shape, dtype or device; a mode that is not offered.
        """
        self._check(img, mask, mode)
        if not img.is_contiguous():
            img = img.contiguous()
        pos_1LD = self.pos_embed[:, 1:]
        if mask is None:
            x_BKD = self.patch_embed(img) + pos_1LD
        else:
            x_BKD = self.patch_embed(img, mask.keep) + pos_1LD[0][mask.keep]
        cls_B1D = (self.cls_token + self.pos_embed[:, :1]).expand(img.shape[0], -1, -1)
        x_BTD = torch.cat([cls_B1D, x_BKD], dim=1)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.norm(x_BTD)

    def _check(self, img: Tensor, mask: Mask | None, mode: str) -> None:
        height, width = self.img_size
        if img.ndim != 4 or img.shape[1] != 3:
            fail(
                "ViT",
                "img",
                f"shape {tuple(img.shape)}",
                f"(batch, 3, {height}, {width})",
                "it takes batches of 3-channel images",
            )
        if img.shape[2] != height or img.shape[3] != width:
            rows, columns = self.grid
            fail(
                "ViT",
                "img",
                f"size {img.shape[2]}x{img.shape[3]}",
                f"{height}x{width}",
                f"this encoder has positions for {rows}x{columns} patches of {self.patch} px",
            )
        if img.dtype != torch.uint8 and not img.is_floating_point():
            fail(
                "ViT",
                "img",
                f"dtype {str(img.dtype)[6:]}",
                "uint8 or floating point",
                "uint8 means 0..255 and floats are normalised",
            )
        if mode not in self.mask_modes:
            fail(
                "ViT",
                "mode",
                repr(mode),
                f"one of {sorted(self.mask_modes)}",
                "a ViT treats hidden tokens in no other way",
            )
        if mask is not None:
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


def init_mae(module: nn.Module) -> None:
    """MAE's initialisation: Xavier-uniform for every Linear (the fused qkv counts as one matrix) and zero biases."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.xavier_uniform_(child.weight)
            nn.init.zeros_(child.bias)


def check_heads(op: str, dim: int, heads: int) -> None:
    """Raise unless the heads divide the width."""
    if heads < 1 or dim % heads:
        fail(op, "heads", heads, f"a divisor of {dim}", f"the width {dim} is split evenly among the heads")


def check_mask(op: str, mask: Mask, grid: tuple[int, int], tensor: Tensor) -> None:
    """Raise unless `mask` is over `grid` and goes with the batch and the device of `tensor`."""
    if mask.grid != grid:
        rows, columns = grid
        fail(
            op,
            "mask",
            f"grid {mask.grid[0]}x{mask.grid[1]}",
            f"{rows}x{columns}",
            f"the model has {rows}x{columns} tokens",
        )
    if mask.hidden.shape[0] != tensor.shape[0]:
        fail(op, "mask", f"batch {mask.hidden.shape[0]}", tensor.shape[0], f"the batch holds {tensor.shape[0]} images")
    check_same_device(op, img=tensor, mask=mask.keep)


def _sizes(img_size: Size, patch: int) -> tuple[tuple[int, int], tuple[int, int]]:
    height, width = (img_size, img_size) if isinstance(img_size, int) else (int(img_size[0]), int(img_size[1]))
    if patch < 1:
        fail("ViT", "patch", patch, "a positive number of pixels", "a patch holds at least one pixel")
    for size in (height, width):
        if size < patch or size % patch:
            reason = (
                f"it is cut into whole patches of {patch} px and {size} = {size // patch} * {patch} + {size % patch}"
            )
            fail("ViT", "img_size", size, f"a multiple of {patch}", reason)
    return (height, width), (height // patch, width // patch)
