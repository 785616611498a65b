"""Cases of crop_resize, for its test and its benchmark.   B batch, H W pixels, S side of the result"""

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

PIL_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class Case(NamedTuple):
    batch: int
    height: int
    width: int
    size: int
    box: str = "random"  # or "whole", "pixel", "same" (as large as the result), "wild" (not inside the image)
    filter: str = "bicubic"
    layout: str = "nhwc"  # or "nchw", "cropped" (a window of a larger image), "strided" (every other), "packed"

    def __str__(self) -> str:
        return f"{self.batch}x{self.height}x{self.width}-{self.size}-{self.box}-{self.filter}-{self.layout}"


CASES = [Case(3, 61, 83, 32, box, f) for f in ("bilinear", "bicubic") for box in ("random", "whole", "pixel", "wild")]
CASES += [Case(3, 47, 35, 21, layout=layout) for layout in ("nchw", "cropped", "strided", "packed")]
CASES += [Case(2, 40, 56, 24, "wild", "bilinear", "packed"), Case(2, 60, 40, 33, "same"), Case(0, 8, 8, 4)]
CASES += [Case(2, 9, 13, 50, "whole", f) for f in ("bilinear", "bicubic")]  # larger than the source
CASES += [Case(1, 300, 410, 7, "whole", f) for f in ("bilinear", "bicubic")]  # more than 40 times smaller
CASES += [Case(1, 1, 1, 1), Case(1, 1, 40, 16, "whole"), Case(1, 40, 1, 17, "whole"), Case(1, 5, 3, 1, "whole")]
CASES += [Case(1, 90, 400, 1, "whole")]
BENCH = [Case(b, 375, 500, 224, filter=f) for b in (64, 256) for f in ("bicubic", "bilinear")]
BENCH_CPU = [Case(16, 375, 500, 224, filter=f, layout="packed") for f in ("bicubic", "bilinear")]


def make(case: Case, device: str = "cpu") -> dict[str, Any]:
    """The arguments of crop_resize for one case."""
    B, H, W = case.batch, case.height, case.width
    pad = 5 if case.layout == "cropped" else 0
    step = 2 if case.layout == "strided" else 1
    img = smooth(B, step * H + 2 * pad, step * W + 2 * pad).to(device)[:, :, pad:, pad:]
    img = img[:, :, : step * H : step, : step * W : step]
    if case.layout in ("nhwc", "packed"):
        img = img.permute(0, 2, 3, 1).contiguous()
    flip = torch.arange(B, device=device) % 2 == 1
    args = {"img": img, "boxes": boxes_of(case).to(device), "flip": flip, "size": case.size, "filter": case.filter}
    return args | _packed(img) if case.layout == "packed" else args


def smooth(batch: int, height: int, width: int) -> Tensor:
    """(B, 3, H, W) uint8 whose neighbouring pixels resemble each other, as in photographs."""
    if batch == 0:
        return torch.empty(0, 3, height, width, dtype=torch.uint8)
    coarse = torch.randint(0, 256, (batch, 3, height // 8 + 2, width // 8 + 2)).float()
    img = F.interpolate(coarse, (height, width), mode="bilinear") + 8 * torch.randn(batch, 3, height, width)
    return img.clamp(0, 255).to(torch.uint8)


def boxes_of(case: Case) -> Tensor:
    """(B, 4) int32; random ones have an area share and an aspect ratio as in pre-training."""
    B, H, W = case.batch, case.height, case.width
    if case.box == "whole":
        return torch.tensor([[0, 0, H, W]], dtype=torch.int32).expand(B, 4)
    if case.box == "wild":
        return torch.tensor([[-3, 2, H, W], [H + 9, W, 5, 5], [4, -(2**31), 2**31 - 1, 0]], dtype=torch.int32)[:B]
    area, ratio = torch.empty(B).uniform_(0.2, 1), torch.empty(B).uniform_(0.75, 1.333)
    sides = torch.stack([(area * H * W / ratio).sqrt(), (area * H * W * ratio).sqrt()], 1).long()
    sides = torch.minimum(sides.clamp(min=1), torch.tensor([H, W]))
    if case.box != "random":
        sides = torch.full((B, 2), case.size if case.box == "same" else 1)
    free = torch.tensor([H, W]) - sides
    return torch.cat([(torch.rand(B, 2) * (free + 1)).long(), sides], 1).int()


def _packed(img: Tensor) -> dict[str, Tensor]:
    B, H, W, _ = img.shape
    gap = torch.zeros(B, 7, dtype=torch.uint8, device=img.device)
    buffer = torch.cat([gap, img.flatten(1)], 1).flatten()
    shapes = torch.tensor([[H, W]], dtype=torch.int32, device=img.device).repeat(B, 1)
    offsets = torch.arange(B, device=img.device) * (7 + 3 * H * W) + 7
    return {"img": buffer, "offsets": offsets, "shapes": shapes}


def images_of(args: dict[str, Any]) -> list[np.ndarray]:
    """Each image as (height, width, 3), for boxes that are inside, whatever the layout."""
    img = args["img"].cpu()
    if "offsets" in args:
        pairs = zip(args["offsets"].tolist(), args["shapes"].tolist())
        return [img[o : o + 3 * h * w].view(h, w, 3).numpy() for o, (h, w) in pairs]
    return list((img.permute(0, 2, 3, 1) if img.shape[1] == 3 else img).numpy())


def pillow(args: dict[str, Any]) -> Tensor:
    """Pillow's crop, then resize."""
    found = []
    for image, (top, left, height, width), flip in zip(images_of(args), args["boxes"].tolist(), args["flip"].tolist()):
        box = Image.fromarray(np.ascontiguousarray(image)).crop((left, top, left + width, top + height))
        square = np.asarray(box.resize((args["size"], args["size"]), PIL_FILTERS[args["filter"]]))
        found.append(torch.from_numpy((square[:, ::-1] if flip else square).transpose(2, 0, 1).copy()))
    return torch.stack(found) if found else torch.empty(0, 3, args["size"], args["size"], dtype=torch.uint8)


def torchvision(args: dict[str, Any]) -> Tensor:
    """torchvision v2: crop, then resize with antialias."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional as V

    mode, size, found = InterpolationMode(args["filter"]), args["size"], []
    for image, (top, left, height, width), flip in zip(images_of(args), args["boxes"].tolist(), args["flip"].tolist()):
        x = torch.from_numpy(image).permute(2, 0, 1)
        x = V.resized_crop(x, top, left, height, width, [size, size], interpolation=mode, antialias=True)
        found.append(x.flip(2) if flip else x)
    return torch.stack(found) if found else torch.empty(0, 3, size, size, dtype=torch.uint8)
