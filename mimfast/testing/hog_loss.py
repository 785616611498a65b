"""Cases of hog_loss, for its test and its benchmark.   B batch, L tokens, D values of a token, H W pixels"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mimfast._images import normalize as normalized
from mimfast.testing.hog import LAYOUTS, PICTURES, layer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Case(NamedTuple):
    batch: int
    height: int
    width: int
    patch: int = 16
    pred: str = "fp32"
    kind: str = "mse"
    hidden: str = "map"  # or "compact", "parts" (a map of single cells), "halves" (of 2 x 2 parts of a token)
    picture: str = "smooth"
    cell: int = 8
    normalize: bool = True
    window: int = 0
    layout: str = "plain"  # of the image; "behind": the predictions lie behind a class token
    ratio: float = 0.75

    def __str__(self) -> str:
        size = f"{self.batch}x{self.height}x{self.width}/{self.patch}/{self.cell}"
        rest = f"{self.picture}-{'norm' if self.normalize else 'raw'}-w{self.window}-{self.layout}-{self.ratio}"
        return f"{size}-{self.pred}-{self.kind}-{self.hidden}-{rest}"


CASES = [
    Case(2, 32, 48, 16, pred, kind, hidden)
    for pred in ("fp32", "bf16")
    for kind in ("mse", "l1", "smooth_l1")
    for hidden in ("map", "compact", "parts")
]
CASES += [Case(2, 32, 64, 32, hidden=hidden, ratio=0.4) for hidden in ("map", "compact", "parts", "halves")]
CASES += [Case(1, 32, 48, 16, hidden=h, normalize=False, picture="noise") for h in ("map", "compact", "parts")]
CASES += [Case(2, 16, 24, 8, layout=layout, picture="noise") for layout in (*LAYOUTS, "behind")]
CASES += [
    Case(2, 48, 32, 16, layout="behind", hidden="compact"), Case(1, 8, 8, 8), Case(1, 24, 40, 8, ratio=1.0),
    Case(1, 48, 24, 24, hidden="parts"), Case(1, 28, 21, 7, cell=7), Case(2, 24, 16, 8, cell=4, hidden="parts"),
    Case(1, 64, 64, 16, window=16), Case(1, 32, 32, 16, window=16, normalize=False, hidden="compact"),
    Case(2, 32, 32, 16, ratio=0.0), Case(1, 32, 32, 16, ratio=0.0, hidden="compact"), Case(0, 32, 32),
    Case(0, 32, 32, hidden="compact"), Case(1, 40, 40, 40, "bf16", hidden="parts"), Case(1, 32, 32, picture="flat"),
    Case(3, 16, 176, 16, "bf16", "l1"), Case(1, 32, 48, 16, "bf16", hidden="compact", ratio=1.0),
]  # fmt: skip
BENCH = [Case(b, 128, 128, 16, "bf16", hidden=h) for b in (8, 64, 512) for h in ("map", "compact")]
BENCH += [Case(256, 224, 224, 16, "bf16", hidden="compact"), Case(128, 192, 192, 32, "bf16")]
BENCH_CPU = [Case(b, 128, 128, 16, "fp32", hidden=h) for b in (8, 64) for h in ("map", "compact")]
BENCH_CPU += [Case(32, 224, 224, 16, "fp32", hidden="compact"), Case(16, 192, 192, 32, "fp32", hidden="parts")]


def make(case: Case, device: str = "cpu") -> dict[str, Any]:
    """The arguments of hog_loss for one case: `pred` requires a gradient; as many hidden in every image."""
    img = PICTURES[case.picture](case.batch, case.height, case.width)
    u = case.patch // case.cell
    L, D = (case.height // case.patch) * (case.width // case.patch), 27 * u * u
    v = {"parts": u, "halves": 2}.get(case.hidden, 1)
    order = torch.rand(case.batch, L * v * v).argsort(-1)
    count = round(case.ratio * L * v * v)
    hidden = order.argsort(-1)[:, :count] if case.hidden == "compact" else order < count
    rows = count if case.hidden == "compact" else L
    size = 1.0 if case.normalize else 8.0
    pred = size * torch.randn(case.batch, rows + 1, D)
    pred = (pred[:, 1:] if case.layout == "behind" else pred[:, 1:].clone()).to(device, DTYPES[case.pred])
    return {
        "pred": pred.requires_grad_(),
        "img": LAYOUTS.get(case.layout, LAYOUTS["plain"])(img.to(device)),
        "hidden": hidden.to(device),
        "patch": case.patch,
        "cell": case.cell,
        "normalize": case.normalize,
        "kind": case.kind,
        "beta": 0.7,
        "gaussian_window": case.window,
    }


def as_cells(hidden: Tensor, grid: tuple[int, int], u: int) -> Tensor:
    """(B, L*v*v) bool, row-major on a grid v times finer than `grid`, as (B, L, u*u): the cells of each token."""
    B, (rows, cols) = len(hidden), grid
    v = round((hidden.shape[1] / (rows * cols)) ** 0.5)
    fine = hidden.view(B, rows * v, cols * v).repeat_interleave(u // v, 1).repeat_interleave(u // v, 2)
    return fine.view(B, rows, u, cols, u).transpose(2, 3).reshape(B, rows * cols, u * u)


def usual(pred: Tensor, img: Tensor, hidden: Tensor, patch: int, cell: int = 8, **rule: Any) -> Tensor:
    """What is usual: the layer on the normalised image, tokens, hidden ones picked, mean squared error."""
    u, grid = patch // cell, (img.shape[2] // patch, img.shape[3] // patch)
    target_BLD = _usual_target(img, patch, cell, **rule)
    if hidden.dtype == torch.int64:
        return (pred - target_BLD.gather(1, hidden[..., None].expand_as(pred))).square().mean()
    if hidden.shape[1] == pred.shape[1]:
        return (pred[hidden] - target_BLD[hidden]).square().mean()
    cells = as_cells(hidden, grid, u)
    split = [x.unflatten(2, (27, u * u)).transpose(2, 3)[cells] for x in (pred, target_BLD)]
    return (split[0] - split[1]).square().mean()


def usual_weighted(pred: Tensor, img: Tensor, hidden: Tensor, patch: int, cell: int = 8, **rule: Any) -> Tensor:
    """The same without a boolean index, which a compiler cannot take into its graph."""
    if hidden.dtype == torch.int64:
        return usual(pred, img, hidden, patch, cell, **rule)
    u, grid = patch // cell, (img.shape[2] // patch, img.shape[3] // patch)
    weight_BLD = as_cells(hidden, grid, u).repeat(1, 1, 27).to(torch.float32)
    return ((pred - _usual_target(img, patch, cell, **rule)).square() * weight_BLD).sum() / weight_BLD.sum()


@torch.no_grad()
def _usual_target(
    img: Tensor, patch: int, cell: int, normalize: bool = True, gaussian_window: int = 0, **_: object
) -> Tensor:  # fmt: skip
    u, grid = patch // cell, (img.shape[2] // patch, img.shape[3] // patch)
    dense = layer(normalized(img), cell, window=gaussian_window, norm=normalize)
    tiles = dense.unflatten(3, (grid[1], u)).unflatten(2, (grid[0], u))
    return tiles.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
