"""Vision Transformer with relative positions: the encoder of BEiT, SimMIM (ViT) and ConMIM.

BEiT, arXiv:2106.08254; SimMIM, arXiv:2111.09886, sec. 4. State-dict names are those of the official code and of timm.
B batch, L patches of the grid, D width, T = 1 + L tokens, h heads
"""

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mimfast._check import fail
from mimfast.encoders.block import EPS, Mlp, check_heads
from mimfast.encoders.embed import PatchEmbedVisible
from mimfast.encoders.fill import full, painted, replaced
from mimfast.encoders.inputs import Size, check_image, check_mask, sizes
from mimfast.encoders.linear import linear
from mimfast.encoders.positions import resized as positions_resized
from mimfast.encoders.relative import NAME, Table, attend, bias_of, entries, resized
from mimfast.mask import Mask

Relative = Literal["shared", "block", "none"]
Absolute = Literal["learned", "none"]


class Attention(nn.Module):
    """Self-attention whose queries and values have a bias and whose keys have none; with its own table or without."""

    relative_position_bias_table: Tensor

    def __init__(self, dim: int, heads: int, grid: tuple[int, int] | None) -> None:
        super().__init__()
        self.heads = heads
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        if grid is not None:
            self.relative_position_bias_table = nn.Parameter(torch.zeros(entries(grid), heads))
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(B, T, D) of (B, T, D); bias (h, T, T) or None."""
        # a key's bias moves every score of a query alike, which the softmax takes out again
        qkv = linear(x, self.qkv.weight, torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]))
        return linear(attend(qkv, self.heads, bias), self.proj.weight, self.proj.bias)


class Block(nn.Module):
    """Pre-norm transformer block; each branch is scaled per channel and, in training, left out for some images."""

    def __init__(
        self, dim: int, heads: int, mlp_ratio: float, layer_scale: float, drop_path: float, grid: tuple[int, int] | None
    ) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = Attention(dim, heads, grid)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.gamma_1 = nn.Parameter(torch.full((dim,), layer_scale))
        self.gamma_2 = nn.Parameter(torch.full((dim,), layer_scale))

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(B, T, D) of (B, T, D); bias (h, T, T) or None."""
        x = torch.addcmul(x, self.gamma_1, self._dropped(self.attn(self.norm1(x), bias)))
        return torch.addcmul(x, self.gamma_2, self._dropped(self.mlp(self.norm2(x))))

    def _dropped(self, branch_BTD: Tensor) -> Tensor:
        """The branch, zero for a random share of the images and larger for the others (arXiv:1603.09382)."""
        if not self.training or self.drop_path == 0:
            return branch_BTD
        keep = 1 - self.drop_path
        return branch_BTD * (branch_BTD.new_empty(len(branch_BTD), 1, 1).bernoulli_(keep) / keep)


class BEiT(nn.Module):
    """Vision Transformer with relative position bias, layer scale and a class token.

    Without a mask it is the plain backbone. With one, the full sequence is encoded and hidden patches are never
    embedded: mode "replace" puts a learned token in their places, mode "paint" the embedding of a patch of one colour.
    uint8 images are normalised with ImageNet's statistics, as SimMIM does; BEiT's own weights want (0.5, 0.5, 0.5) for
    both, to be set as `patch_embed.mean` and `patch_embed.std`.

    Args:
        img_size: of the square input in pixels, or (height, width).
        patch: side of a patch in pixels.
        dim: width D.
        depth: number of blocks.
        heads: attention heads.
        mlp_ratio: width of the MLP over D.
        relative: "shared", one table of relative position bias for all blocks (pre-training); "block", one for each
            (fine-tuning); "none".
        positions: "learned" adds a table of absolute positions; BEiT, SimMIM and ConMIM have none.
        layer_scale: initial scale of every branch.
        drop_path: share of images that leave out a branch of the last block, in training; 0 in the first, linear
            between. (SimMIM pre-trains with 0.1.)
        mask_token: whether there is a `mask_token`, which mode "replace" needs.
    Attributes:
        stride: pixels per token side (= patch).
        grid: (rows, columns) in patches.
        prefix: tokens before the patches in what `forward` returns.
        mask_modes: what `mode` may be: "paint", and with a mask token "replace".
    """

    prefix = 1
    blocks: Any  # a list of Block
    rel_pos_bias: Table | None
    pos_embed: Tensor | None
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
        *,
        relative: Relative = "shared",
        positions: Absolute = "none",
        layer_scale: float = 0.1,
        drop_path: float = 0.0,
        mask_token: bool = True,
    ) -> None:
        super().__init__()
        self.img_size, self.grid = sizes("BEiT", img_size, patch)
        check_heads("BEiT", dim, heads)
        _check_options(relative, positions, drop_path)
        self.patch, self.stride, self.dim, self.depth, self.heads = patch, patch, dim, depth, heads
        self.mlp_ratio, self.relative, self.positions = mlp_ratio, relative, positions
        self.layer_scale, self.drop_path = layer_scale, drop_path
        self.mask_modes = frozenset({"paint", "replace"} if mask_token else {"paint"})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim)) if mask_token else None
        tokens = 1 + self.grid[0] * self.grid[1]
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, dim)) if positions == "learned" else None
        self.patch_embed = PatchEmbedVisible(patch, dim)
        self.rel_pos_bias = Table(self.grid, heads) if relative == "shared" else None
        own = self.grid if relative == "block" else None
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio, layer_scale, rate, own) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=EPS)
        _init(self)

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
            "relative": self.relative,
            "positions": self.positions,
            "layer_scale": self.layer_scale,
            "drop_path": self.drop_path,
            "mask_token": self.mask_token is not None,
        }

    def at(self, img_size: Size) -> "BEiT":
        """The same encoder for images of another size: every weight is shared, what belongs to a grid is resized.

        Tables of relative bias by a spline over geometrically growing distances, absolute positions bicubically, both
        with their gradient, so that it has to be asked for again after a step of the optimiser.

        Args:
            img_size: pixels, or (height, width), multiples of the patch.
        """
        img_size, grid = sizes("BEiT", img_size, self.patch)
        other = _copy(self)
        other.img_size, other.grid = img_size, grid
        if grid == self.grid:
            return other
        if self.pos_embed is not None:
            _put(other, "pos_embed", positions_resized(self.pos_embed, self.grid, grid))
        if self.rel_pos_bias is not None:
            other.rel_pos_bias = self._with_table(self.rel_pos_bias, grid)
        if self.relative == "block":
            blocks = []
            for block in self.blocks:
                blocks.append(_copy(block))
                blocks[-1].attn = self._with_table(block.attn, grid)
            other.blocks = nn.ModuleList(blocks)
        return other

    def _with_table(self, owner: Any, grid: tuple[int, int]) -> Any:
        other = _copy(owner)
        _put(other, NAME, resized(owner.relative_position_bias_table, self.grid, grid))
        return other

    def forward(
        self, img: Tensor, mask: Mask | None = None, mode: str = "replace", *, colour: Tensor | None = None
    ) -> Tensor:
        """Encode the image.

        Args:
            img: (B, 3, H, W), uint8 (normalised inside) or floating point, normalised already.
            mask: over this encoder's grid, or None. For "paint" over any grid whose cells are whole square pixels.
                Images may hide different numbers of patches (a packed mask).
            mode: "replace": a mask token stands for each hidden patch. "paint": every pixel of a hidden cell has the
                colour.
            colour: (1, 3, 1, 1) in normalised colour space, for "paint".
        Returns:
            (B, 1 + L, D): the class token, then the patches in image order, after the final norm.
        Raises:
            UserError: an image, a mask or a colour of another shape, dtype or device; a mode that is not offered.
        """
        x_BTD = self.embed(img, mask, mode, colour=colour)
        for block, bias_hTT in zip(self.blocks, self._biases(), strict=True):
            x_BTD = block(x_BTD, bias_hTT)
        return self.norm(x_BTD)

    def features(
        self, img: Tensor, mask: Mask | None = None, mode: str = "replace", *, colour: Tensor | None = None
    ) -> list[Tensor]:
        """The input of the first block and the output of every block, each (B, 1 + L, D), without the final norm."""
        found = [self.embed(img, mask, mode, colour=colour)]
        for block, bias_hTT in zip(self.blocks, self._biases(), strict=True):
            found.append(block(found[-1], bias_hTT))
        return found

    def _biases(self) -> list[Tensor] | list[None]:
        """What each block adds to its scores."""
        if self.relative == "block":
            return [bias_of(block.attn.relative_position_bias_table, self.grid) for block in self.blocks]
        if self.rel_pos_bias is None:
            return [None] * self.depth
        return [bias_of(self.rel_pos_bias.relative_position_bias_table, self.grid)] * self.depth

    def embed(
        self, img: Tensor, mask: Mask | None = None, mode: str = "replace", *, colour: Tensor | None = None
    ) -> Tensor:
        """The sequence that goes into the blocks; as `forward` otherwise."""
        check_image("BEiT", img, self.img_size, self.grid)
        if mask is None:
            return full(self.patch_embed, img, self.cls_token, self.pos_embed)
        if mode not in self.mask_modes:
            reason = "BEiT(mask_token=True) adds 'replace'" if mode == "replace" else "a BEiT has no other way"
            fail("BEiT", "mode", repr(mode), f"one of {sorted(self.mask_modes)}", reason)
        if mode == "paint":
            return painted(self.patch_embed, img, mask, colour, self.cls_token, self.pos_embed)
        check_mask("BEiT", mask, self.grid, img)
        assert self.mask_token is not None  # or the mode would have been refused
        return replaced(self.patch_embed, img, mask, self.mask_token, self.cls_token, self.pos_embed)

    # the sizes; each default may be replaced

    @classmethod
    def b16(cls, img_size: Size = 224, patch: int = 16, dim: int = 768, depth: int = 12, heads: int = 12) -> "BEiT":
        """BEiT-B, and SimMIM's ViT-B."""
        return cls(img_size, patch, dim, depth, heads)

    @classmethod
    def l16(
        cls, img_size: Size = 224, patch: int = 16, dim: int = 1024, depth: int = 24, heads: int = 16,
        layer_scale: float = 1e-5,
    ) -> "BEiT":  # fmt: skip
        """BEiT-L."""
        return cls(img_size, patch, dim, depth, heads, layer_scale=layer_scale)

    @classmethod
    def nano(cls, img_size: Size = 64, patch: int = 8, dim: int = 128, depth: int = 4, heads: int = 2) -> "BEiT":
        """For 64..96 px on a CPU."""
        return cls(img_size, patch, dim, depth, heads)


def _check_options(relative: str, positions: str, drop_path: float) -> None:
    if relative not in ("shared", "block", "none"):
        reason = "blocks share a table of relative position bias, have one each, or none"
        fail("BEiT", "relative", repr(relative), "'shared', 'block' or 'none'", reason)
    if positions not in ("learned", "none"):
        fail("BEiT", "positions", repr(positions), "'learned' or 'none'", "absolute positions are an addition here")
    if not 0 <= drop_path < 1:
        fail("BEiT", "drop_path", drop_path, "a number in [0, 1)", "it is the share of images that leave a branch out")


def _init(beit: BEiT) -> None:
    """BEiT's initialisation: normal, std 0.02, cut at one std; zero biases and tables; deep branches start smaller."""
    for child in beit.modules():
        if isinstance(child, nn.Linear | nn.Conv2d):
            _normal(child.weight)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
    for token in (beit.cls_token, beit.mask_token, beit.pos_embed):
        if token is not None:
            _normal(token)
    for layer, block in enumerate(beit.blocks, start=1):
        for last in (block.attn.proj, block.mlp.fc2):
            last.weight.data.div_((2 * layer) ** 0.5)


def _normal(tensor: Tensor) -> None:
    nn.init.trunc_normal_(tensor, std=0.02, a=-0.02, b=0.02)


def _copy(module: Any) -> Any:
    """The same module with lists of its own, so that one entry can be replaced."""
    other = copy.copy(module)
    for kind in ("_parameters", "_buffers", "_modules"):
        setattr(other, kind, dict(getattr(module, kind)))
    return other


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor that is no leaf, and so no parameter, in the place of one."""
    module._parameters.pop(name, None)
    module.register_buffer(name, tensor)
