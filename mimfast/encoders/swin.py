"""Swin Transformer with masks inside: hidden patches are not embedded, one vector stands for all of them.

Swin, arXiv:2103.14030; mode "replace": SimMIM, arXiv:2111.09886; "paint": FastMIM, arXiv:2212.06593; "drop": GreenMIM,
arXiv:2205.13515. State-dict names are those of the official code, whose buffers are left out and timm's names
understood when weights are loaded.
B batch, H W sides in pixels or tokens, L tokens of a map, C width
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mimfast._check import fail
from mimfast.encoders.block import Mlp, check_heads
from mimfast.encoders.embed import PatchEmbedVisible
from mimfast.encoders.fill import lists
from mimfast.encoders.inputs import Size, check_mask
from mimfast.encoders.linear import linear
from mimfast.encoders.paint import cell_of, check_image, checked_colour, paint
from mimfast.encoders.swin_names import official_names
from mimfast.encoders.tables import geometric_resize
from mimfast.encoders.visible import Groups, Place, PlannedMask, attend_in_groups, plan
from mimfast.encoders.windows import window_of
from mimfast.mask import Mask
from mimfast.ops.patch_unshuffle import patch_unshuffle
from mimfast.ops.window_attention import window_attention

EPS = 1e-5  # of every layer norm
PATCH = 4


class Wiring(NamedTuple):
    """What the blocks of a stage share in one forward."""

    place: Place
    group: Tensor | None = None  # (H, W) or (B, H, W): a token sees only those with its number
    visible: tuple[Groups, Groups | None] | None = None  # without and with shift, when hidden tokens are left out


class PatchEmbed(PatchEmbedVisible):
    """4 x 4 patches, then a layer norm; also of a patch of one colour."""

    def __init__(self, dim: int) -> None:
        super().__init__(PATCH, dim)
        self.norm = nn.LayerNorm(dim, eps=EPS)

    def forward(
        self, img: Tensor, keep: Tensor | None = None, flip: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        return self.norm(super().forward(img, keep, flip, cu_seqlens))

    def colour(self, colour: Tensor) -> Tensor:
        return self.norm(super().colour(colour))


class WindowAttention(nn.Module):
    """Attention inside windows with a learned bias for each relative position.

    Args:
        dim: width C.
        heads: attention heads.
        window: side of the window that the bias table is made for.
    """

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, wiring: Wiring, shifted: bool, add: Tensor | None = None) -> Tensor:
        """(B, L, C) in image order, or the visible tokens in theirs; `add` is a residual for the result."""
        size, window, shift = wiring.place
        qkv, table = linear(x, self.qkv.weight, self.qkv.bias), self.table(window)
        if wiring.visible is not None:
            groups = wiring.visible[shifted]
            assert groups is not None  # every stage with shifted blocks has both
            y = attend_in_groups(qkv, table, groups)
        else:
            shift = shift if shifted else 0
            y = window_attention(qkv.unflatten(1, size), table, window, shift, self.heads, group=wiring.group)
            y = y.flatten(1, 2)
        return linear(y, self.proj.weight, self.proj.bias, add)

    def table(self, window: int) -> Tensor:
        """((2 window - 1)^2, heads): the bias of each offset, resized to the window in use."""
        return geometric_resize(self.relative_position_bias_table, self.window, window)


class SwinBlock(nn.Module):
    """Pre-norm block: attention and MLP, each with a residual and drop path."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = drop_path

    def forward(self, x: Tensor, wiring: Wiring, shifted: bool) -> Tensor:
        if not (self.training and self.drop_path):
            x = self.attn(self.norm1(x), wiring, shifted, x)
            return self.mlp(self.norm2(x), x)
        x = x + self.dropped(self.attn(self.norm1(x), wiring, shifted))
        return x + self.dropped(self.mlp(self.norm2(x)))

    def dropped(self, y: Tensor) -> Tensor:
        """`y` without the branches of some images, the others scaled up (drop path); as it is in evaluation."""
        if not (self.training and self.drop_path):
            return y
        keep = 1 - self.drop_path
        return y * y.new_empty(y.shape[0], 1, 1).bernoulli_(keep).div_(keep)


class PatchMerging(nn.Module):
    """Four neighbours become one token of twice the width: norm, then a linear layer without bias."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim, eps=EPS)

    def forward(self, x: Tensor, size: tuple[int, int] | None) -> Tensor:
        return linear(self.norm(four(x, size)), self.reduction.weight)


def four(x: Tensor, size: tuple[int, int] | None) -> Tensor:
    """(B, L, C) to (B, L / 4, 4 C): the neighbours column by column, (row, column) = (0,0), (1,0), (0,1), (1,1).

    Without a size they are visible tokens in the order of `mimfast.encoders.visible`: neighbours beside each other.
    """
    if size is None:
        return x.unflatten(1, (-1, 4)).flatten(2)
    x_BhrwcC = x.unflatten(1, (size[0] // 2, 2, size[1] // 2, 2))
    return x_BhrwcC.permute(0, 1, 3, 4, 2, 5).flatten(3, 5).flatten(1, 2)


class Stage(nn.Module):
    """Blocks of one width, every second one with shifted windows, then the merging of neighbours if there is one."""

    def __init__(self, blocks: list[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(
        self,
        x: Tensor,
        place: Place,
        group: Tensor | None = None,
        visible: tuple[Groups, Groups | None] | None = None,
    ) -> Tensor:
        """(B, L, C) in image order to (B, L / 4, 2 C), or (B, L, C) from the last stage; or visible tokens."""
        wiring = Wiring(place, group, visible)
        for j, block in enumerate(self.blocks):
            x = block(x, wiring, bool(place.shift and j % 2))
        return x if self.downsample is None else self.downsample(x, None if visible else place.size)


class Swin(nn.Module):
    """Swin Transformer; without a mask it is the plain backbone.

    Args:
        img_size: of the square input in pixels, or (height, width), multiples of the stride.
        embed_dim: width of the first stage; each of the next is twice as wide.
        depths: blocks of each stage.
        heads: attention heads of each stage.
        window: side of the attention window in tokens; None: shorter image side / stride, so that it follows the size.
            A map not larger than its window is attended to as a whole.
        mlp_ratio: width of the MLPs over the stage's.
        drop_path: share of dropped residual branches in the last block in training, growing linearly from 0.
        mask_token: whether there is a `mask_token`, which mode "replace" needs.
    Attributes:
        stride: pixels per token side of the last map: 4 * 2^(stages - 1).
        dim: width of the last stage.
        prefix: 0.
        grid: (rows, columns) of the last map.
        places: map, window and shift of each stage.
        mask_modes: {"drop", "paint"}, and "replace" with a mask token.
    Raises:
        UserError: stages, heads, sizes or windows that do not fit.
    """

    prefix = 0
    own_modes = frozenset({"drop", "paint"})
    mask_token: nn.Parameter | None
    # published, and "nano" and "micro" for a CPU
    sizes: Mapping[str, dict[str, Any]] = {
        "t": {"embed_dim": 96, "depths": (2, 2, 6, 2), "heads": (3, 6, 12, 24)},
        "s": {"embed_dim": 96, "depths": (2, 2, 18, 2), "heads": (3, 6, 12, 24)},
        "b": {"embed_dim": 128, "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32)},
        "l": {"embed_dim": 192, "depths": (2, 2, 18, 2), "heads": (6, 12, 24, 48)},
        "nano": {"embed_dim": 32, "depths": (2, 2, 2, 2), "heads": (1, 2, 4, 8)},
        "micro": {"embed_dim": 64, "depths": (2, 2, 2), "heads": (2, 4, 8)},
    }

    def __init__(
        self,
        img_size: Size = 224,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        heads: Sequence[int] = (3, 6, 12, 24),
        window: int | None = None,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        mask_token: bool = False,
    ) -> None:
        super().__init__()
        self.name = type(self).__name__
        _check_stages(self.name, embed_dim, depths, heads)
        self.embed_dim, self.depths, self.heads = embed_dim, tuple(depths), tuple(heads)
        self.window, self.mlp_ratio, self.drop_path = window, mlp_ratio, drop_path
        scale = 2 ** (len(depths) - 1)
        self.stride, self.dim = PATCH * scale, embed_dim * scale
        self.img_size, self.grid, self.places = self._sizes(img_size)
        self.patch_embed = PatchEmbed(embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if mask_token else None
        self.mask_modes = self.own_modes | ({"replace"} if mask_token else set())
        self.layers = nn.ModuleList(self._stage(i) for i in range(len(depths)))
        self.norm = nn.LayerNorm(self.dim, eps=EPS)
        self._init()
        self.register_load_state_dict_pre_hook(_to_official_names)

    def _stage(self, i: int) -> Stage:
        dim, last = self.embed_dim * 2**i, i == len(self.depths) - 1
        rates = torch.linspace(0, self.drop_path, sum(self.depths), device="cpu").tolist()
        first = sum(self.depths[:i])
        blocks = [self._block(i, dim, rate) for rate in rates[first : first + self.depths[i]]]
        return Stage(blocks, None if last else self._merging(dim))

    def _block(self, i: int, dim: int, drop_path: float) -> nn.Module:
        return SwinBlock(dim, WindowAttention(dim, self.heads[i], self.places[i].window), self.mlp_ratio, drop_path)

    def _merging(self, dim: int) -> nn.Module:
        return PatchMerging(dim)

    def _init(self) -> None:
        """Linear layers, bias tables and the mask token normal with deviation 0.02, biases 0, as published."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, WindowAttention):
                nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02)
        if self.mask_token is not None:
            nn.init.trunc_normal_(self.mask_token, std=0.02)

    @property
    def config(self) -> dict[str, Any]:
        """The plain arguments that build this encoder again; written beside its weights."""
        return {
            "name": self.name.lower(),
            "img_size": list(self.img_size),
            "embed_dim": self.embed_dim,
            "depths": list(self.depths),
            "heads": list(self.heads),
            "window": self.window,
            "mlp_ratio": self.mlp_ratio,
            "drop_path": self.drop_path,
            "mask_token": self.mask_token is not None,
        }

    def at(self, img_size: Size) -> "Swin":
        """The same encoder for images of another size; every weight is shared.

        A window that was not given follows the size, and the bias tables are resized in every forward (see
        `mimfast.encoders.tables`), so that the gradient reaches the one table there is.

        Args:
            img_size: pixels, or (height, width), multiples of the stride.
        """
        other = copy.copy(self)
        other.img_size, other.grid, other.places = self._sizes(img_size)
        return other

    def forward(
        self, img: Tensor, mask: Mask | None = None, mode: str = "paint", *, colour: Tensor | None = None
    ) -> Tensor:
        """Encode the images, all tokens of them.

        Args:
            img: (B, 3, H, W), uint8 (normalised inside, ImageNet statistics) or floating point, normalised already.
            mask: over a grid of square cells: of whole pixels for "paint", of whole patches for "replace", over the
                last map for "drop"; or None.
            mode: "drop": hidden tokens are left out of every map; the mask is one for all images, from `plan`, or
                planned here when it is on the CPU. "paint": the pixels of hidden cells are of one colour. "replace":
                `mask_token` stands for their patches, put in after the norm of the patch embedding. Only read with a
                mask.
            colour: (1, 3, 1, 1) in normalised colour space, for "paint".
        Returns:
            (B, T, dim), the tokens of the last map in row-major order, after the final norm; the visible ones of them
            for "drop".
        Raises:
            UserError: an image, a mask or a colour that does not fit; a mode that is not offered.
        """
        if mask is not None and mode == "drop":
            return self._visible(img, mask)
        return self._stages(self._embed(img, mask, mode, colour))

    def plan(self, mask: Mask) -> PlannedMask:
        """The mask with the plan that mode "drop" needs; `to(device)` of it moves both.

        Args:
            mask: on the CPU, over the last map, the same for every image (`Mask.expand`).
        Raises:
            UserError: another grid or device, rows that differ.
        """
        return plan(self.name, mask, self.places, self.depths, self.heads)

    def _visible(self, img: Tensor, mask: Mask) -> Tensor:
        """(B, K, dim): the visible tokens alone, through all stages."""
        self._check(img, mask, "drop")
        check_mask(self.name, mask, self.grid, img)
        planned = mask if isinstance(mask, PlannedMask) else self.plan(mask)
        if planned.places != tuple(self.places):
            because = "groups are those of the maps and windows they were planned for"
            fail(self.name, "mask", "a plan for other maps or windows", "one of plan() of this encoder", because)
        assert planned.patches is not None  # plan() sets it
        x = self.patch_embed(img, planned.patches.expand(img.shape[0], -1).contiguous())
        for stage, place, groups in zip(self.layers, self.places, planned.groups):
            x = stage(x, place, visible=groups)
        return self.norm(x)

    def _stages(self, x: Tensor, groups: Sequence[Tensor | None] | None = None) -> Tensor:
        """(B, L, C) in image order to (B, T, dim); `groups` has one map of group ids for each stage."""
        for stage, place, group in zip(self.layers, self.places, groups or [None] * len(self.places)):
            x = stage(x, place, group)
        return self.norm(x)

    def _embed(self, img: Tensor, mask: Mask | None, mode: str, colour: Tensor | None) -> Tensor:
        """(B, L, C): embedded patches, with one vector in place of the hidden ones."""
        self._check(img, mask, mode)
        if mask is None:
            return self.patch_embed(img)
        cell = cell_of(img, mask, self.name)
        if mode == "replace":
            if cell % PATCH:
                because = f"a mask token stands for a whole patch of {PATCH} px"
                fail(self.name, "mask", f"cells of {cell} px", f"a multiple of {PATCH} px", because)
            assert self.mask_token is not None  # or the mode would have been refused
            row = self.mask_token.flatten()
        else:
            colour = checked_colour(self.name, colour, img)
            if cell % PATCH:  # a patch may be hidden in part
                return self.patch_embed(paint(img, mask, colour))
            row = self.patch_embed.colour(colour)
        keep, inverse_BL = lists(mask, cell // PATCH)
        return patch_unshuffle(self.patch_embed(img, keep), row, inverse_BL, prefix=0)

    def _check(self, img: Tensor, mask: Mask | None, mode: str) -> None:
        check_image(self.name, img)
        if tuple(img.shape[2:]) != self.img_size:
            height, width = self.img_size
            because = "windows are laid out for that size; at(size) gives the encoder for another"
            fail(self.name, "img", f"size {img.shape[2]}x{img.shape[3]}", f"{height}x{width}", because)
        if mask is not None and mode not in self.mask_modes:
            known = f"{self.name}(mask_token=True) adds 'replace'"
            because = known if mode == "replace" else f"{self.name} has no other way with hidden tokens; {known}"
            fail(self.name, "mode", repr(mode), f"one of {sorted(self.mask_modes)}", because)

    def _sizes(self, img_size: Size) -> tuple[tuple[int, int], tuple[int, int], list[Place]]:
        """(height, width), the last grid, and where each stage works."""
        height, width = (img_size, img_size) if isinstance(img_size, int) else (int(img_size[0]), int(img_size[1]))
        for side in (height, width):
            if side < self.stride or side % self.stride:
                because = f"{len(self.depths)} stages halve a map of {PATCH} px patches down to {self.stride} px"
                fail(self.name, "img_size", side, f"a multiple of {self.stride}", because)
        last = (height // self.stride, width // self.stride)
        return (height, width), last, self._places((height // PATCH, width // PATCH), last)

    def _places(self, size: tuple[int, int], last: tuple[int, int]) -> list[Place]:
        """Where each stage works, of the sizes of the first and the last map in tokens."""
        window = min(last) if self.window is None else self.window
        maps = [(size[0] >> i, size[1] >> i) for i in range(len(self.depths))]
        return [Place(map_size, *window_of(self.name, map_size, window)) for map_size in maps]


def _check_stages(op: str, embed_dim: int, depths: Sequence[int], heads: Sequence[int]) -> None:
    if not depths or min(depths) < 0 or len(heads) != len(depths):
        found = f"depths {tuple(depths)} and heads {tuple(heads)}"
        fail(op, "stages", found, "one number of each", "a stage has blocks, and heads in them")
    for i, count in enumerate(heads):
        check_heads(op, embed_dim * 2**i, count)


def _to_official_names(_module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    found = official_names(state, prefix)
    state.clear()
    state.update(found)
