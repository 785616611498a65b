"""Cases of window_attention, for its test and its benchmark, and the chain of torch calls it replaces.

B images, H W map in tokens, E = 3C width of qkv, h heads of d values, w windows of n tokens
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FIRST, LAST = "pad_then_roll", "roll_then_pad"


class Case(NamedTuple):
    batch: int
    rows: int
    cols: int
    heads: int
    head: int
    window: int | tuple[int, int]
    shift: int | tuple[int, int] = 0
    dtype: str = "fp32"
    pad: str | None = None
    groups: int = 0  # ids per token; 0 for none
    shared: bool = False  # groups of the batch instead of each image
    table: str = "fp32"  # its dtype, or "none"
    bias: bool = False
    # or "sliced" (part of a larger tensor), "offset" (storage not aligned), "strided" (last dimension not dense),
    # "turned" (rows and columns exchanged in memory), "expanded" (one image seen `batch` times)
    layout: str = "plain"

    def __str__(self) -> str:
        window, shift = (s if isinstance(s, int) else f"{s[0]},{s[1]}" for s in (self.window, self.shift))
        extras = [self.pad, self.groups and f"{self.groups} groups", self.shared and "shared", self.bias and "bias"]
        extras += [self.table != "fp32" and f"table {self.table}", self.layout != "plain" and self.layout]
        size = f"{self.batch}x{self.rows}x{self.cols}-{self.heads}x{self.head}-w{window}-s{shift}-{self.dtype}"
        return "-".join([size, *(str(e) for e in extras if e)])


# windows on both sides of every tile, head dims with and without padding, H != W; then padding, groups, layouts
CASES = [
    Case(1, 8, 4, 3, 16, 4, 2), Case(1, 12, 6, 1, 24, 6, 3), Case(1, 14, 7, 2, 32, 7, 3), Case(1, 7, 7, 1, 32, 7),
    Case(1, 8, 16, 1, 48, 8, 4), Case(1, 12, 12, 1, 16, 12, 6), Case(1, 12, 12, 1, 32, 12, 6, "fp16"),
    Case(1, 14, 14, 1, 32, 14, 7, "fp16", groups=2), Case(1, 16, 16, 1, 16, 16, 0, "fp16"),
    Case(1, 6, 10, 1, 24, (3, 5), (1, 2)), Case(1, 8, 14, 2, 16, (8, 7), (0, 3)), Case(3, 1, 2, 1, 16, 1),
    Case(1, 7, 14, 2, 32, 7, 3, "fp16"), Case(1, 8, 4, 2, 24, 4, 2, "fp16"), Case(1, 7, 7, 1, 64, 7, 0, "fp16"),
    Case(1, 14, 7, 1, 64, 7, 3, "bf16"), Case(1, 16, 8, 1, 48, 8, 4, "bf16", table="bf16"),
    Case(1, 4, 8, 1, 16, 4, 2, table="none"),
]  # fmt: skip
CASES += [Case(1, 6, 9, 1, 16, 4, 2, pad=pad, bias=bias) for pad, bias in ((FIRST, True), (LAST, True), (FIRST, False))]
CASES += [
    Case(1, 5, 6, 1, 32, 7, 3, pad=FIRST, bias=True), Case(1, 6, 15, 1, 24, (6, 7), (3, 2), "fp16", LAST, bias=True),
    Case(2, 4, 8, 1, 16, 4, 2, groups=2), Case(2, 7, 7, 1, 32, 7, 3, groups=3, shared=True),
    Case(1, 5, 6, 1, 16, 4, 1, pad=FIRST, groups=2, bias=True), Case(1, 8, 4, 1, 32, 4, 2, "fp16", groups=2),
]  # fmt: skip
LAYOUTS = ("sliced", "offset", "strided", "turned", "expanded")
CASES += [Case(2, 2, 4, 1, 24, 2, 1, layout=name) for name in LAYOUTS]
# what csrc/window_attention.cu takes: sizes on both sides of the ends of its tiles, odd numbers of heads and images
HALF = [
    Case(3, 7, 14, 3, 32, 7, 3, "bf16"), Case(1, 14, 7, 2, 32, 7, 0, "fp16"), Case(1, 8, 16, 3, 32, 8, 4, "fp16"),
    Case(2, 4, 8, 3, 32, 4, 2, "bf16"), Case(1, 10, 5, 2, 32, 5, 2, "fp16"), Case(1, 6, 12, 1, 32, 6, 3, "bf16"),
    Case(2, 16, 8, 3, 16, 8, 4, "bf16"), Case(1, 7, 7, 2, 16, 7, 3, "fp16"), Case(1, 14, 7, 3, 24, 7, 3, "bf16"),
    Case(1, 8, 8, 1, 24, 4, 2, "fp16"), Case(1, 8, 16, 2, 48, 8, 4, "bf16"), Case(2, 7, 7, 3, 48, 7, 3, "fp16"),
    Case(1, 16, 8, 2, 64, 8, 4, "fp16"), Case(3, 7, 7, 1, 64, 7, 0, "bf16"), Case(1, 8, 8, 1, 40, 4, 0, "bf16"),
    Case(1, 6, 10, 2, 32, (3, 5), (1, 2), "bf16"), Case(2, 1, 50, 1, 32, (1, 50), (0, 7), "bf16"),
    Case(1, 16, 8, 2, 32, (16, 4), (8, 0), "fp16"), Case(1, 2, 3, 1, 32, 1, 0, "bf16"),
    Case(1, 17, 1, 1, 16, (17, 1), (3, 0), "fp16"), Case(1, 7, 14, 2, 32, 7, 3, "bf16", table="none"),
    Case(1, 7, 14, 2, 32, 7, 3, "bf16", table="bf16"),
    *(Case(2, 9, 6, 3, 32, 7, 3, "bf16", pad=pad, bias=True) for pad in (FIRST, LAST)),
    Case(1, 5, 6, 1, 32, 7, 3, "fp16", FIRST, bias=True), Case(1, 6, 9, 2, 16, 4, 2, "fp16", LAST),
    Case(1, 5, 9, 1, 64, 8, 4, "bf16", FIRST, bias=True), Case(3, 7, 14, 2, 32, 7, 3, "bf16", groups=2),
    Case(2, 7, 7, 3, 24, 7, 3, "fp16", groups=3, shared=True),
    Case(2, 5, 6, 2, 32, 4, 1, "bf16", FIRST, groups=2, bias=True),
    *(Case(2, 4, 8, 1, 24, 4, 1, "bf16", layout=name) for name in LAYOUTS),
]  # fmt: skip
# too slow interpreted, or too large for the kernel
BIG = [
    Case(1, 24, 24, 1, 32, 24), Case(1, 16, 16, 1, 16, 16), Case(2, 14, 21, 3, 32, 7, 3),
    Case(3, 9, 13, 2, 16, 4, 2, pad=LAST, bias=True), Case(1, 14, 14, 1, 64, 14, 7, "fp16"),
    Case(129, 4, 8, 3, 16, 4, 2), Case(3, 24, 12, 2, 32, 12, 6),
]  # fmt: skip
# Swin-B at 224 px and batch 128, Swin-B at 384 px
BENCH = [
    Case(128, 56, 56, 4, 32, 7, 3, "bf16"), Case(128, 28, 28, 8, 32, 7, 3, "bf16"),
    Case(128, 14, 14, 16, 32, 7, 3, "bf16"), Case(32, 96, 96, 4, 32, 12, 6, "bf16"),
]  # fmt: skip


def make(case: Case, device: str = "cpu") -> dict[str, Any]:
    """The arguments of window_attention for one case: random; qkv, table and qkv_bias require a gradient."""
    width = 3 * case.heads * case.head
    wh, ww = (case.window,) * 2 if isinstance(case.window, int) else case.window
    args: dict[str, Any] = {"qkv": _qkv((case.batch, case.rows, case.cols, width), case).to(device).requires_grad_()}
    table = None if case.table == "none" else torch.randn((2 * wh - 1) * (2 * ww - 1), case.heads)
    args["table"] = table if table is None else table.to(device, DTYPES[case.table]).requires_grad_()
    args |= {"window": case.window, "shift": case.shift, "heads": case.heads, "pad": case.pad}
    if case.bias:
        args["qkv_bias"] = torch.randn(width).to(device).requires_grad_()
    if case.groups:
        images = () if case.shared else (case.batch,)
        args["group"] = torch.randint(0, case.groups, (*images, case.rows, case.cols)).to(device)
    return args


def _qkv(shape: tuple[int, ...], case: Case) -> Tensor:
    (B, H, W, E), kind = shape, DTYPES[case.dtype]
    if case.layout == "strided":
        return torch.randn(B, E, H, W).to(kind).permute(0, 2, 3, 1)
    if case.layout == "sliced":
        return torch.randn(B, H + 1, W + 2, E + 5).to(kind)[:, 1:, :-2, 2:-3]
    if case.layout == "offset":
        return torch.randn(1 + B * H * W * E).to(kind)[1:].view(shape)
    if case.layout == "turned":
        return torch.randn(B, W, H, E).to(kind).transpose(1, 2)
    if case.layout == "expanded":
        return torch.randn(1, H, W, E).to(kind).expand(shape)
    return torch.randn(shape).to(kind)


def eager(
    qkv: Tensor, table: Tensor | None, window: int | tuple[int, int], shift: int | tuple[int, int], heads: int,
    scale: float | None = None, pad: str | None = None, qkv_bias: Tensor | None = None, group: Tensor | None = None,
    mask_value: float = -100.0, logit_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What a model without a fused kernel does, step by step in the dtype of qkv: every copy and score is stored.

    With `logit_scale` the cosine form of Swin V2.
    """
    (B, H, W, E), (wh, ww), (sh, sw) = qkv.shape, _pair(window), _pair(shift)
    Hp, Wp = -(-H // wh) * wh, -(-W // ww) * ww
    filler = qkv.new_zeros(E) if qkv_bias is None else qkv_bias.to(qkv.dtype)

    def fill_and_roll(x_BHWX: Tensor, value: Tensor) -> Tensor:
        whole = (x_BHWX.shape[0], Hp, Wp, x_BHWX.shape[-1])
        if pad == LAST:
            x_BHWX = x_BHWX.roll((-sh, -sw), (1, 2))
        inside = torch.zeros(Hp, Wp, 1, dtype=torch.bool, device=qkv.device)
        inside[:H, :W] = True
        grown = torch.nn.functional.pad(x_BHWX, (0, 0, 0, Wp - W, 0, Hp - H))
        grown = torch.where(inside, grown, value.expand(whole))
        return grown if pad == LAST else grown.roll((-sh, -sw), (1, 2))

    def cut(x_BHWX: Tensor) -> Tensor:
        tiles = x_BHWX.reshape(x_BHWX.shape[0], Hp // wh, wh, Wp // ww, ww, -1)
        return tiles.transpose(2, 3).reshape(x_BHWX.shape[0], -1, wh * ww, x_BHWX.shape[-1])

    q, k, v = cut(fill_and_roll(qkv, filler)).unflatten(-1, (3, heads, -1)).permute(3, 0, 1, 4, 2, 5).unbind(0)
    if logit_scale is None:
        score_Bwhnn = q * (q.shape[-1] ** -0.5 if scale is None else scale) @ k.mT
    else:
        factor_h11 = logit_scale.clamp(max=math.log(100.0)).exp().view(heads, 1, 1)
        score_Bwhnn = (
            torch.nn.functional.normalize(q, dim=-1) @ torch.nn.functional.normalize(k, dim=-1).mT * factor_h11
        )
    if table is not None:
        score_Bwhnn = score_Bwhnn + table[_offsets(wh, ww).to(qkv.device)].permute(2, 0, 1)
    label_1wn = cut(_painted(Hp, Wp, (wh, ww), (sh, sw)).to(qkv.device)).squeeze(-1)
    apart_1w1nn = (label_1wn[..., :, None] != label_1wn[..., None, :])[:, :, None]
    score_Bwhnn = torch.where(apart_1w1nn, score_Bwhnn + mask_value, score_Bwhnn)
    if group is not None:
        id_Bwn = cut(fill_and_roll(group.reshape(-1, H, W, 1), group.new_full((), -1))).squeeze(-1)
        known = (id_Bwn[..., :, None] >= 0) & (id_Bwn[..., None, :] >= 0)
        apart = known & (id_Bwn[..., :, None] != id_Bwn[..., None, :])
        score_Bwhnn = score_Bwhnn.masked_fill(apart[:, :, None], float("-inf"))
    out = (score_Bwhnn.softmax(-1).to(v.dtype) @ v).transpose(2, 3).reshape(B, Hp // wh, Wp // ww, wh, ww, E // 3)
    out = out.transpose(2, 3).reshape(B, Hp, Wp, E // 3)
    if pad == LAST:
        return out[:, :H, :W].roll((sh, sw), (1, 2))
    return out.roll((sh, sw), (1, 2))[:, :H, :W]


def _pair(side: int | tuple[int, int]) -> tuple[int, int]:
    return (side, side) if isinstance(side, int) else side


def _painted(Hp: int, Wp: int, window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """(1, Hp, Wp, 1) regions of the rolled map, painted one over the other."""
    label = torch.zeros(1, Hp, Wp, 1, dtype=torch.int64)
    for number, axis in ((1, 1), (3, 2)):
        size, w, s = label.shape[axis], window[axis - 1], shift[axis - 1]
        label.narrow(axis, size - w, w).add_(number)
        label.narrow(axis, size - s, s).add_(number)
    return label


def _offsets(wh: int, ww: int) -> Tensor:
    """(n, n) row of the table for query and key."""
    place = torch.stack(torch.meshgrid(torch.arange(wh), torch.arange(ww), indexing="ij"), -1).flatten(0, 1)
    dy, dx = (place[:, None] - place[None]).unbind(-1)
    return (dy + wh - 1) * (2 * ww - 1) + dx + ww - 1
