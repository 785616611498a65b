"""Cases of crop_gather, for its test and its benchmark.   B batch, H W pixels, S side of the square, K kept patches"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mimfast.ops.crop_resize import crop_resize
from mimfast.ops.patch_gather import patch_gather
from mimfast.testing import crop_resize as crops
from mimfast.testing.patch_gather import DTYPES


class Case(NamedTuple):
    crop: crops.Case  # the boxes
    patch: int
    kept: float = 0.25  # share of the patches, at least one; above 1 also indices twice and outside, in any order
    order: str = "pqc"
    out: str = "fp32"

    def __str__(self) -> str:
        return f"{self.crop}-p{self.patch}-{self.kept}-{self.order}-{self.out}"


def _case(patch: int, *crop: Any, layout: str = "nhwc", **rest: Any) -> Case:
    return Case(crops.Case(*crop)._replace(layout=layout), patch, **rest)


# both filters x boxes, every layout, types and orders, sides of patches that fill vectors and that do not, few and all
CASES = [_case(8, 3, 61, 83, 32, box, f) for f in crops.PIL_FILTERS for box in ("random", "whole", "pixel", "wild")]
CASES += [_case(7, 3, 47, 35, 21, layout=layout) for layout in ("nchw", "cropped", "strided", "packed")]
CASES += [_case(4, 2, 33, 30, 24, order=o, out=t) for o in ("pqc", "cpq") for t in ("fp32", "bf16", "fp16")]
CASES += [_case(16, 2, 70, 90, 48, kept=k, order=o) for k in (0.0, 1.0, 1.5) for o in ("pqc", "cpq")]
CASES += [
    _case(32, 2, 90, 70, 64, order="cpq", out="fp16"),
    _case(14, 2, 99, 60, 42, kept=0.5),
    _case(40, 1, 50, 60, 80),
]
CASES += [_case(2, 2, 9, 13, 50, "whole", f, kept=0.3) for f in crops.PIL_FILTERS]  # larger than the source
CASES += [_case(7, 1, 300, 410, 14, "whole", f) for f in crops.PIL_FILTERS]  # more than 20 times smaller
CASES += [
    _case(1, 2, 20, 30, 5, kept=0.5),
    _case(1, 1, 1, 1, 1),
    _case(17, 1, 40, 1, 17, "whole"),
    _case(4, 0, 8, 8, 8),
]
CASES += [_case(4, 2, 40, 56, 24, "wild", "bilinear", layout="packed", kept=1.5)]
# a raw store of 256 x 256 squares, and photographs; MAE keeps a quarter
BENCH = [
    _case(16, 64, h, w, 224, "random", f, layout="packed", kept=kept)
    for h, w, kept in ((256, 256, 0.25), (375, 500, 0.25), (256, 256, 1.0))
    for f in ("bicubic", "bilinear")
]


def make(case: Case, device: str = "cpu") -> dict[str, Any]:
    """The arguments of crop_gather for one case; `keep` ascends, but where indices come twice or are outside."""
    L = (case.crop.size // case.patch) ** 2
    keep = torch.rand(case.crop.batch, L).argsort(-1)[:, : max(1, round(min(case.kept, 1) * L))].sort(-1).values
    if case.kept > 1:
        keep = torch.randint(-1, L + 1, (case.crop.batch, round(case.kept * L)))
    rows = {"keep": keep.to(device), "patch": case.patch, "order": case.order, "dtype": DTYPES[case.out]}
    return crops.make(case.crop, device) | rows


def composed(
    img: Tensor, boxes: Tensor, flip: Tensor | None, size: int, keep: Tensor, patch: int, filter: Any = "bicubic",
    offsets: Tensor | None = None, shapes: Tensor | None = None, impl: Any = "auto", **rest: Any,
) -> Tensor:  # fmt: skip
    """What crop_gather stands for: crop_resize of everything, then patch_gather."""
    square = crop_resize(img, boxes, flip, size, filter=filter, offsets=offsets, shapes=shapes, impl=impl)
    return patch_gather(square, keep, patch=patch, **{"order": "pqc"} | rest, impl=impl)
