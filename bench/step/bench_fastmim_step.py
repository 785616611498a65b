"""What the HOG target and its loss cost in a FastMIM training step, and what the step costs beside MAE's and SimMIM's.

    python bench/step/bench_fastmim_step.py [--json FILE] [--rounds N] [--threads N] [--batch N]

ViT-B/16: FastMIM at 128 px with 75 % painted, MAE at 224 px with 75 % dropped, SimMIM (BEiT's ViT) at 224 px with 60 %
replaced, as their recipes say. A step is mask, forward, backward and a fused AdamW on random uint8 images: on a CPU
batch 8 in fp32, on a GPU batch 256 in bf16 autocast. The share of the target is hog_loss alone, forward and backward,
on a prediction of the same shape, over the FastMIM step. Contestants take turns in one process.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import nn

from mimfast import recipes
from mimfast.ops import hog_loss
from mimfast.testing.record import machine, write_record

METHODS = {"fastmim": "fastmim_vit_b", "mae": "mae_vit_b", "simmim": "simmim_vit_b"}


def step_of(method: nn.Module, img: torch.Tensor) -> Callable[[], None]:
    weights = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=img.is_cuda):
            loss = method(img)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def target_of(method: Any, img: torch.Tensor) -> Callable[[], None]:
    """hog_loss of the hidden tokens, forward and backward, as the step calls it."""
    hidden = method.sample_mask(len(img), device=img.device).hide
    pred = torch.randn(*hidden.shape, method.target.dim, device=img.device, requires_grad=True)
    return lambda: hog_loss(pred, img, hidden, patch=method.target.patch).backward()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the record here")
    parser.add_argument("--rounds", type=int, default=20 if torch.cuda.is_available() else 5)
    parser.add_argument("--threads", type=int, help="of a CPU run")
    parser.add_argument("--batch", type=int, default=256 if torch.cuda.is_available() else 8)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device, where = "cuda" if torch.cuda.is_available() else "cpu", machine()
    torch.manual_seed(0)
    runs: dict[str, Callable[[], None]] = {}
    for name, recipe in METHODS.items():
        made = recipes.by_name(recipe)
        method = recipes.build(made).to(device).train()
        size = made.model.img_size
        img = torch.randint(0, 256, (options.batch, 3, size, size), dtype=torch.uint8, device=device)
        runs[name] = step_of(method, img)
        if name == "fastmim":
            runs["hog_loss"] = target_of(method, img)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(options.rounds + 2):
        for name, run in runs.items():
            began = _clock()
            run()
            if turn > 1:
                seconds[name].append(_clock() - began)
    medians = {name: statistics.median(seen) for name, seen in seconds.items()}
    print(f"ViT-B, batch {options.batch}, {where['device']}, {where['threads']} threads, medians of {options.rounds}")
    for name, median in medians.items():
        share = f"{100 * median / medians['fastmim']:.3f} % of the FastMIM step"
        rate = share if name == "hog_loss" else f"{options.batch / median:.2f} images/s"
        print(f"{name:10s}{1e3 * median:12.3f} ms   {rate}")
    if options.json:
        rows = [{"contestant": name, "median_s": median} for name, median in medians.items()]
        write_record(options.json, {"step": "fastmim", "batch": options.batch, "rows": rows})
    return 0


def _clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    sys.exit(main())
