"""Cases of hog, for its test and its benchmark.   B batch, C colours, H W pixels, M rows of hidden tokens"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Case(NamedTuple):
    batch: int
    height: int
    width: int
    picture: str = "smooth"  # or a key of PICTURES
    cell: int = 8
    stride: int | None = None
    rows: int | None = None  # of hidden; None: without
    normalize: bool = True
    window: int = 0
    dtype: str = "fp32"
    layout: str = "plain"  # or a key of LAYOUTS

    def __str__(self) -> str:
        size = f"{self.batch}x{self.height}x{self.width}/{self.cell}"
        tokens = f"-s{self.stride}" if self.stride else ""
        rows = "" if self.rows is None else f"-m{self.rows}"
        rest = f"{self.dtype}-{'norm' if self.normalize else 'raw'}-{self.layout}"
        return f"{size}{tokens}{rows}-w{self.window}-{self.picture}-{rest}"


def smooth(B: int, H: int, W: int) -> Tensor:
    """Neighbouring pixels resemble each other, as in photographs."""
    coarse = torch.randint(0, 256, (B, 3, -(-H // 4) + 2, -(-W // 4) + 2)).float()
    img = F.interpolate(coarse, (H, W), mode="bilinear")
    return (img + 8 * torch.randn_like(img)).clamp(0, 255).to(torch.uint8)


def checkers(B: int, H: int, W: int) -> Tensor:
    """0 and 255 in squares of 1 to 3 pixels, by colour: the steepest gradients there are, and equal opposite ones."""
    y, x = torch.arange(H)[:, None], torch.arange(W)
    return torch.stack([((y // n + x // n) % 2 * 255).to(torch.uint8) for n in (1, 2, 3)]).expand(B, -1, -1, -1)


def flat(B: int, H: int, W: int) -> Tensor:
    return torch.tensor([0, 255, 77], dtype=torch.uint8).view(1, 3, 1, 1).expand(B, -1, H, W)


def edges(B: int, H: int, W: int) -> Tensor:
    """Ramps whose gradients lie on and beside the edges of the bins."""
    y, x = torch.arange(H)[:, None], torch.arange(W)
    slopes = [(0, 1), (1, 0), (1, 1), (1, -1), (1, 3), (-4, 5), (7, 4), (-6, 1), (3, -8), (0, 0)]
    ramps = [(a * x + b * y) % 256 for a, b in slopes]
    return (
        torch.stack([ramps[(3 * b + c) % len(ramps)] for b in range(B) for c in range(3)])
        .to(torch.uint8)
        .view(B, 3, H, W)
    )


def noise(B: int, H: int, W: int) -> Tensor:
    return torch.randint(0, 256, (B, 3, H, W), dtype=torch.uint8)


def black_and_white(B: int, H: int, W: int) -> Tensor:
    return (torch.randint(0, 2, (B, 3, H, W)) * 255).to(torch.uint8)


PICTURES = {f.__name__: f for f in (smooth, checkers, flat, edges, noise, black_and_white)}
LAYOUTS = {
    "plain": lambda img: img.contiguous(),
    "channels_last": lambda img: img.contiguous(memory_format=torch.channels_last),
    "shifted": lambda img: torch.cat([img.flatten()[:3], img.flatten()])[3:].view(img.shape),  # not aligned
    "cropped": lambda img: F.pad(img, (3, 5, 2, 1), value=255)[:, :, 2:-1, 3:-5],
    "every_other": lambda img: img.repeat_interleave(2, 3)[..., ::2],
    "expanded": lambda img: img[:1].expand_as(img),
}

CASES = [Case(1, 24, 40, picture) for picture in PICTURES] + [Case(4, 16, 32, "edges", normalize=False)]
CASES += [Case(1, 24, 40, picture, normalize=False) for picture in ("smooth", "checkers", "noise")]
CASES += [Case(2, 16, 24, "noise", layout=layout) for layout in LAYOUTS]
CASES += [
    Case(2, 32, 64, "smooth", stride=s, rows=m, dtype=d) for s in (8, 16, 32) for m, d in ((None, "fp32"), (1, "bf16"))
]
CASES += [
    Case(1, 48, 32, stride=16, rows=4), Case(1, 48, 32, stride=16, rows=9, normalize=False, layout="channels_last"),
    Case(1, 32, 32, window=16), Case(1, 32, 48, "noise", window=16, normalize=False), Case(1, 24, 24, window=12),
    Case(1, 32, 48, "black_and_white", window=2), Case(1, 64, 32, window=32, stride=16, rows=3, layout="cropped"),
    Case(2, 16, 24, "noise", cell=4, stride=8), Case(1, 28, 21, "noise", cell=7), Case(1, 32, 48, "noise", cell=16),
    Case(1, 6, 4, "noise", cell=2, normalize=False), Case(1, 14, 28, cell=7, stride=14, rows=2, window=7),
    Case(1, 8, 8, "noise"), Case(1, 8, 8, "noise", stride=8, rows=1), Case(1, 16, 312, "noise"),
    Case(2, 16, 16, dtype="bf16"), Case(1, 48, 48, "noise", cell=24, dtype="bf16"), Case(0, 16, 16),
    Case(2, 16, 16, stride=8, rows=0), Case(0, 16, 16, stride=8, rows=2),
]  # fmt: skip
BENCH = [Case(256, 224, 224, stride=16, rows=78, dtype="bf16"), Case(256, 224, 224), Case(512, 128, 128, stride=16)]
BENCH_CPU = [Case(32, 224, 224), Case(32, 224, 224, stride=16, rows=78), Case(32, 224, 224, window=16)]


def layer(img: Tensor, cell: int = 8, bins: int = 9, window: int = 0, norm: bool = True) -> Tensor:
    """What is usual on normalised floats: grouped convolutions, an angle, one-hot bins by scatter, unfolded sums."""
    sobel = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]], dtype=img.dtype, device=img.device)
    padded = F.pad(img, (1, 1, 1, 1), mode="reflect")
    gx, gy = (F.conv2d(padded, k.expand(3, 1, 3, 3), groups=3) for k in (sobel, sobel.T))
    size = torch.stack([gx, gy]).norm(dim=0)
    if window:
        n = torch.arange(window, dtype=img.dtype, device=img.device)
        line = torch.exp(-0.5 * ((n - n.mean()) / (window // 2)) ** 2)
        wide = torch.outer(line, line)
        size = size * (wide / wide.sum()).repeat(img.shape[2] // window, img.shape[3] // window)
    index = (torch.atan2(gx, gy) / math.pi * bins).floor().to(torch.int64) % bins
    one_hot = torch.zeros(*size.shape[:2], bins, *size.shape[2:], dtype=img.dtype, device=img.device)
    one_hot.scatter_add_(2, index.unsqueeze(2), size.unsqueeze(2))
    hist = one_hot.unfold(3, cell, cell).unfold(4, cell, cell).sum((-1, -2))
    return (F.normalize(hist, dim=2) if norm else hist).flatten(1, 2)


def make(case: Case, device: str = "cpu") -> dict[str, Any]:
    """The arguments of hog for one case."""
    img = PICTURES[case.picture](case.batch, case.height, case.width)
    hidden = None
    if case.rows is not None and case.stride is not None:
        T = (case.height // case.stride) * (case.width // case.stride)
        hidden = torch.rand(case.batch, max(T, case.rows)).argsort(-1)[:, : case.rows]  # some beyond T
    return {
        "img": LAYOUTS[case.layout](img.to(device)),
        "cell": case.cell,
        "normalize": case.normalize,
        "stride": case.stride,
        "hidden": None if hidden is None else hidden.to(device),
        "gaussian_window": case.window,
        "dtype": DTYPES[case.dtype],
    }
