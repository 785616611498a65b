"""Speed of pixel_loss against the eager chain a user writes today and torch.compile of it.

`python bench/ops/bench_pixel_loss.py [--json FILE]`. On a GPU: MAE ViT-B shapes, 224 px, patch 16, 75 % hidden, bf16
predictions. On a CPU: a batch of 64 in fp32. The goal there is 3 x eager, forward and backward.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from mimfast._images import IMAGENET_MEAN, IMAGENET_STD
from mimfast.ops._choice import why_not_on
from mimfast.ops.pixel_loss import IMPLS, pixel_loss, pixel_loss_ref
from mimfast.testing.bench import Args, Bench, Fn, main
from mimfast.testing.pixel_loss import BENCH, BENCH_CPU, make

CASES = BENCH if torch.cuda.is_available() else BENCH_CPU
MEAN, STD = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))


def eager(pred: Tensor, img: Tensor, hidden: Tensor, patch: int, norm: bool, **_: object) -> Tensor:
    """The usual chain over all patches, weighted by the mask at the end; compact: targets of all patches, then picked.

    Mean squared error and pqc order only.
    """
    if img.dtype == torch.uint8:
        img = (img.float() / 255 - MEAN.to(img.device)) / STD.to(img.device)
    img = img.float()
    rows, cols = img.shape[2] // patch, img.shape[3] // patch
    target = torch.einsum("bcypxq->byxpqc", img.reshape(-1, 3, rows, patch, cols, patch)).flatten(3).flatten(1, 2)
    if norm:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    if hidden.dtype == torch.int64:
        return ((pred - target.gather(1, hidden[..., None].expand_as(pred))) ** 2).mean()
    per_patch = ((pred - target) ** 2).mean(-1)
    weight = hidden.float()
    return (per_patch * weight).sum() / weight.sum()


def contestants(device: str) -> dict[str, Fn]:
    global MEAN, STD
    MEAN, STD = MEAN.to(device), STD.to(device)
    ours = {impl: partial(pixel_loss, impl=impl) for impl in IMPLS if why_not_on(impl, device) is None}
    return {
        "eager": eager,
        "compiled": torch.compile(eager, dynamic=False),
        "ref compiled": torch.compile(pixel_loss_ref, dynamic=False),
    } | ours


def bytes_moved(args: Args, with_gradient: bool) -> int:
    pred, img = args["pred"], args["img"]
    rows = args["hidden"].numel() if args["hidden"].dtype == torch.int64 else int(args["hidden"].sum())
    hidden = rows * pred.shape[-1]
    read = hidden * (pred.element_size() + img.element_size())
    return read + (pred.numel() * pred.element_size() if with_gradient else 0)


if __name__ == "__main__":
    sys.exit(main(Bench("pixel_loss", CASES, make, pixel_loss_ref, contestants, bytes_moved)))
