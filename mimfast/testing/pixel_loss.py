"""Cases of pixel_loss, for its test and its benchmark.   B batch, L patches, D = patch*patch*3, H W pixels"""

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
    pred: str = "fp32"
    img: str = "uint8"
    kind: str = "mse"
    norm: bool = True
    layout: str = (
        "plain"  # or "channels_last", "cropped" (a window of a larger image, predictions behind a class token)
    )
    ratio: float = 0.75
    hidden: str = "map"  # or "compact" (predictions of the hidden patches only, beside their indices)
    order: str = "pqc"

    def __str__(self) -> str:
        norm = "norm" if self.norm else "plain"
        size = f"{self.batch}x{self.height}x{self.width}/{self.patch}"
        return f"{size}-{self.pred}-{self.img}-{self.kind}-{norm}-{self.layout}-{self.hidden}-{self.order}"


# every kind x norm x type of prediction and image on one tiny shape, then layouts, then odd sizes, then compact ones
CASES = [
    Case(2, 8, 12, 4, pred, img, kind, norm)
    for pred in ("fp32", "bf16", "fp16")
    for img in ("uint8", "fp32", "bf16")
    for kind in ("mse", "l1", "smooth_l1")
    for norm in (True, False)
]
CASES += [
    Case(2, 12, 8, 4, "fp32", img, layout=layout)
    for img in ("uint8", "fp32")
    for layout in ("channels_last", "cropped")
]
CASES += [
    Case(1, 4, 6, 2), Case(3, 10, 5, 5), Case(2, 28, 14, 14), Case(1, 32, 16, 16, "fp16"), Case(1, 32, 64, 32),
    Case(2, 8, 12, 4, ratio=1.0), Case(1, 14, 14, 7, ratio=0.0),
]  # fmt: skip
CASES += [
    Case(2, 8, 12, 4, pred, img, kind, norm, hidden="compact")
    for pred, img, kind, norm in (
        ("fp32", "uint8", "mse", True), ("bf16", "fp32", "l1", False), ("fp16", "bf16", "smooth_l1", True),
    )
]  # fmt: skip
CASES += [
    Case(2, 12, 8, 4, layout="cropped", hidden="compact"), Case(2, 28, 14, 14, "bf16", hidden="compact"),
    Case(2, 8, 12, 4, ratio=1.0, hidden="compact"), Case(1, 14, 14, 7, ratio=0.0, hidden="compact"),
    Case(1, 32, 32, 16, "fp32", "fp32", ratio=0.5, hidden="compact"), Case(0, 8, 12, 4),
    Case(0, 8, 8, 4, hidden="compact"),
]  # fmt: skip
CASES += [
    Case(2, 8, 12, 4, pred, img, kind, norm, hidden=hidden, order="cpq")
    for pred, img, kind, norm, hidden in (
        ("fp32", "uint8", "l1", False, "map"), ("bf16", "uint8", "mse", True, "compact"),
        ("fp16", "fp32", "smooth_l1", True, "map"),
    )
]  # fmt: skip
CASES += [
    Case(2, 28, 14, 14, layout="channels_last", order="cpq"), Case(1, 32, 64, 32, layout="cropped", order="cpq"),
    Case(1, 32, 16, 16, "bf16", "fp32", order="cpq"),
]  # fmt: skip
BENCH = [Case(b, 224, 224, 16, "bf16", img) for b in (64, 256) for img in ("uint8", "bf16")]
BENCH += [Case(256, 224, 224, 16, "bf16", "uint8", hidden="compact")]
BENCH_CPU = [Case(64, 224, 224, 16, "fp32", img, hidden=h) for h in ("map", "compact") for img in ("fp32", "uint8")]


def make(case: Case, device: str = "cpu") -> dict[str, Any]:
    """The arguments of pixel_loss for one case: random, `pred` requiring a gradient, as many hidden in every image."""
    L, D = (case.height // case.patch) * (case.width // case.patch), 3 * case.patch**2
    order_BL, M = torch.rand(case.batch, L).argsort(-1), round(case.ratio * L)
    hidden = order_BL < M if case.hidden == "map" else order_BL.argsort(-1)[:, :M]
    return {
        "pred": _pred(case, hidden.shape[1], D).to(device).requires_grad_(),
        "img": _img(case, device),
        "hidden": hidden.to(device),
        "patch": case.patch,
        "norm": case.norm,
        "kind": case.kind,
        "order": case.order,
        "beta": 0.7,
    }


def in_full(args: dict[str, Any]) -> dict[str, Any]:
    """The same call in the full layout: a map, and predictions scattered to the rows of their patches, else NaN."""
    pred, index_BM, img, patch = args["pred"].detach(), args["hidden"], args["img"], args["patch"]
    L = (img.shape[2] // patch) * (img.shape[3] // patch)
    map_BL = torch.zeros(len(pred), L, dtype=torch.bool, device=pred.device).scatter_(1, index_BM, True)
    rows_BLD = torch.full((len(pred), L, pred.shape[2]), float("nan"), dtype=pred.dtype, device=pred.device)
    rows_BLD.scatter_(1, index_BM[..., None].expand_as(pred), pred)
    return args | {"pred": rows_BLD.requires_grad_(), "hidden": map_BL}


def _pred(case: Case, rows: int, D: int) -> Tensor:
    if case.layout != "cropped":
        return torch.randn(case.batch, rows, D).to(DTYPES[case.pred])
    return torch.randn(case.batch, 1 + rows, 2 * D).to(DTYPES[case.pred])[:, 1:, ::2]


def _img(case: Case, device: str) -> Tensor:
    # smooth enough that neighbouring pixels resemble each other, as in photographs
    pad = 3 if case.layout == "cropped" else 0
    coarse = torch.randint(0, 256, (case.batch, 3, -(-case.height // 4) + 2, -(-case.width // 4) + 2)).float()
    size = (case.height + 2 * pad, case.width + 2 * pad)
    img = torch.nn.functional.interpolate(coarse, size, mode="bilinear")
    img = (img + 8 * torch.randn_like(img)).clamp(0, 255).to(torch.uint8).to(device)
    if case.img != "uint8":
        img = normalize(img, dtype=DTYPES[case.img])
    if case.layout == "channels_last":
        return img.to(memory_format=torch.channels_last)
    return img[:, :, pad : pad + case.height, pad : pad + case.width] if pad else img
