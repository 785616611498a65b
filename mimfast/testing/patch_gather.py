"""Cases of patch_gather, for its test and its benchmark.   B batch, H W pixels, L patches, K kept, T packed rows"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mimfast._images import normalize

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "uint8": torch.uint8}


class Case(NamedTuple):
    batch: int
    height: int
    width: int
    patch: int
    img: str = "uint8"
    out: str = "fp32"
    order: str = "cpq"
    layout: str = "nchw"  # or "nhwc", "cropped" (a window of a larger image, so misaligned), "expanded" (one image)
    rows: str = "kept"  # or "all" (no indices), "packed" (another count in every image)
    flip: bool = False
    kept: float = 0.4  # share of the patches

    def __str__(self) -> str:
        size = f"{self.batch}x{self.height}x{self.width}/{self.patch}"
        what = f"{self.img}-{self.out}-{self.order}-{self.layout}-{self.rows}"
        return f"{size}-{what}" + ("-flip" if self.flip else "")


# every pair of types on one tiny shape, every layout x order x flip x choice of rows, then odd sizes and empty ones
CASES = [Case(2, 8, 12, 4, img, out) for img in DTYPES for out in ("fp32", "bf16", "fp16")]
CASES += [
    Case(3, 12, 8, 4, img, "fp32", order, layout, rows, flip)
    for img, layout in (("uint8", "nchw"), ("uint8", "nhwc"), ("bf16", "cropped"), ("uint8", "expanded"))
    for order in ("cpq", "pqc")
    for rows in ("kept", "all", "packed")
    for flip in (False, True)
]
CASES += [
    Case(1, 4, 6, 2), Case(3, 10, 5, 5), Case(2, 28, 14, 14, order="pqc"), Case(2, 32, 48, 16, out="bf16"),
    Case(2, 32, 48, 16, layout="nhwc", order="pqc", flip=True), Case(1, 64, 32, 32, "fp32"), Case(2, 3, 5, 1),
    Case(0, 8, 8, 4), Case(0, 8, 8, 4, rows="packed"), Case(2, 8, 8, 4, kept=0.0), Case(5, 8, 8, 2, rows="packed"),
]  # fmt: skip
BENCH = [
    Case(b, 224, 224, 16, img, out, layout=layout, kept=0.25)
    for b, img, out, layout in (
        (64, "uint8", "fp32", "nchw"),
        (64, "uint8", "fp32", "nhwc"),
        (64, "fp32", "fp32", "nchw"),
        (256, "uint8", "bf16", "nchw"),
    )
]


def make(case: Case, device: str = "cpu") -> dict[str, Any]:
    """The arguments of patch_gather for one case, random; `keep` ascends, but in packed cases, where it is shuffled."""
    L = (case.height // case.patch) * (case.width // case.patch)
    args: dict[str, Any] = {"img": _img(case, device), "patch": case.patch, "order": case.order}
    args["dtype"] = DTYPES[case.out]
    if case.rows == "kept":
        args["keep"] = torch.rand(case.batch, L).argsort(-1)[:, : round(case.kept * L)].sort(-1).values.to(device)
    elif case.rows == "packed":
        counts = torch.randint(0, L + 1, (case.batch,))
        kept = [torch.randperm(L)[: int(count)] for count in counts]
        args["keep"] = torch.cat([torch.empty(0, dtype=torch.int64), *kept]).to(device)
        args["cu_seqlens"] = torch.cat([torch.zeros(1), counts.cumsum(0)]).to(torch.int32).to(device)
    if case.flip:
        args["flip"] = (torch.arange(case.batch) % 2 == 0).to(device)
    return args


def _img(case: Case, device: str) -> Tensor:
    pad = 3 if case.layout == "cropped" else 0
    count = min(case.batch, 1) if case.layout == "expanded" else case.batch
    img = torch.randint(0, 256, (count, 3, case.height + 2 * pad, case.width + 2 * pad), dtype=torch.uint8)
    img = img.to(device)
    if case.img != "uint8":
        img = normalize(img, dtype=DTYPES[case.img])
    if case.layout == "nhwc":
        return img.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    if case.layout == "expanded":
        return img.expand(case.batch, -1, -1, -1)
    return img[:, :, pad : pad + case.height, pad : pad + case.width] if pad else img
