"""Cases of local_norm, for its test and its benchmark.   B batch, H W pixels"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mimfast._images import normalize

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "uint8": torch.uint8}


class Case(NamedTuple):
    batch: int
    height: int
    width: int
    window: int = 47
    img: str = "uint8"
    layout: str = "nchw"  # or "nhwc", "cropped" (a window of a larger image), "expanded" (one image many times)
    flat: bool = False  # all of one value but for a few pixels

    def __str__(self) -> str:
        flat = "-flat" if self.flat else ""
        return f"{self.batch}x{self.height}x{self.width}-{self.window}-{self.img}-{self.layout}{flat}"


CASES = [Case(2, 37, 51, window, img) for window in (1, 3, 47, 255) for img in ("uint8", "fp32")]
CASES += [Case(2, 40, 33, 7, img, layout) for img in ("uint8", "fp32") for layout in ("nhwc", "cropped", "expanded")]
CASES += [Case(2, 40, 33, 9, img) for img in ("bf16", "fp16")]
CASES += [Case(2, 70, 66, 47, img, flat=True) for img in ("uint8", "fp32")]
CASES += [
    Case(1, 1, 1), Case(1, 1, 9, 3), Case(1, 9, 1, 5), Case(1, 2, 2), Case(0, 8, 8, 3), Case(1, 5, 300, 31),
    Case(1, 300, 5, 31), Case(1, 3, 1024, 255), Case(1, 16, 16, 1001, "fp32"), Case(1, 33, 64, 7), Case(3, 65, 32, 5),
]  # fmt: skip
BENCH = [Case(b, 192, 192, 47, img) for b in (64, 256) for img in ("uint8", "fp32")]
BENCH_CPU = [Case(8, 192, 192, 47, img) for img in ("uint8", "fp32")]


def make(case: Case, device: str = "cpu") -> dict[str, Any]:
    """The arguments of local_norm for one case."""
    pad = 3 if case.layout == "cropped" else 0
    count = 1 if case.layout == "expanded" else case.batch
    size = (case.height + 2 * pad, case.width + 2 * pad)
    if case.flat:
        img = torch.full((count, 3, *size), 200.0)
        img = torch.where(torch.rand(img.shape) < 1e-3, 201.0, img)
    else:  # smooth enough that neighbouring pixels resemble each other, as in photographs
        coarse = torch.randint(0, 256, (count, 3, size[0] // 8 + 2, size[1] // 8 + 2)).float()
        img = F.interpolate(coarse, size, mode="bilinear") + 8 * torch.randn(count, 3, *size) if count else coarse
    img = img.clamp(0, 255).to(torch.uint8).view(count, 3, *size) if count else torch.empty(0, 3, *size).byte()
    return {"img": _laid_out(case, img.to(device), pad), "window": case.window}


def _laid_out(case: Case, img: Tensor, pad: int) -> Tensor:
    if case.img != "uint8":
        img = normalize(img, dtype=DTYPES[case.img])
    if case.layout == "nhwc":
        return img.contiguous(memory_format=torch.channels_last)
    if case.layout == "expanded":
        return img.expand(case.batch, -1, -1, -1)
    return img[:, :, pad : pad + case.height, pad : pad + case.width]


def pooled(img: Tensor, window: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What SimMIM's users run: three average poolings of the normalised image, in `dtype`."""
    x = normalize(img, dtype=dtype).to(dtype)
    pad = window // 2
    mean = F.avg_pool2d(x, window, 1, pad, count_include_pad=False)
    squares = F.avg_pool2d(x * x, window, 1, pad, count_include_pad=False)
    count = F.avg_pool2d(torch.ones_like(x[:1, :1]), window, 1, pad, count_include_pad=True) * window**2
    variance = ((squares - mean * mean) * count / (count - 1).clamp(min=1)).clamp(min=0)
    return (x - mean) / (variance + 1e-6).sqrt()
