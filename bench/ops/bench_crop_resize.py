"""Speed of crop_resize against Pillow and torchvision v2 (antialias) on the same boxes, per core.

`python bench/ops/bench_crop_resize.py [--json FILE] [--photos FOLDER]`: random boxes of MAE's area and aspect in 500 x
375 pixels, to 224. "level apart" is the share of pixels more than one grey level from Pillow; above .001 there is no
speed. On a CPU one thread; on a GPU torchvision stands alone, image by image.

With --photos (a folder of JPEG files, searched through) also whole loaders in turn, one process, one core: torch's
DataLoader with Pillow and torchvision's RandomResizedCrop and flip, against a raw file of the decoded photographs,
memory-mapped, with boxes drawn by Philox and crop_resize. Both bicubic, batches of 32, each photograph once.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mimfast.data.crop import CropConfig, crop_boxes, crop_words
from mimfast.ops._choice import why_not_on
from mimfast.ops.crop_resize import IMPLS, crop_resize
from mimfast.testing.crop_resize import BENCH, BENCH_CPU, Case, make, pillow, torchvision
from mimfast.testing.racing import as_graph, race
from mimfast.testing.record import machine, write_record

BATCH, SIZE, ALLOWED = 32, 224, 1e-3


def run_case(case: Case, device: str, rounds: int) -> list[dict[str, Any]]:
    """Judge the differences, race those that are right, print and return the rows."""
    torch.manual_seed(0)
    args = make(case, device)
    ours = [impl for impl in IMPLS if impl != "ref" and why_not_on(impl, device) is None]
    fns: dict[str, Callable[[], Tensor]] = {impl: partial(crop_resize, **args, impl=impl) for impl in ours}
    fns["torchvision"] = partial(torchvision, args)
    if device == "cpu":
        fns["pillow"] = partial(pillow, args)
    want = pillow(args).int()
    apart = {name: ((fn().cpu().int() - want).abs() > 1).float().mean().item() for name, fn in fns.items()}
    calls = {name: as_graph(fn) if name in ours else fn for name, fn in fns.items() if apart[name] <= ALLOWED}
    times = race(calls, rounds, warmup=1)
    print(f"\n{case}\n{'contestant':12s}{'us/image':>12s}{'images/s':>12s}{'x torchv.':>12s}  level apart")
    rows = []
    for name in fns:
        row: dict[str, Any] = {"case": str(case), "contestant": name, "error": apart[name], "allowed": ALLOWED}
        row |= {"pass": "fwd", "out_of_tolerance": name not in times}
        if name in times:
            us = times[name].median_us
            row |= {"median_us": us, "p95_us": times[name].p95_us, "us_per_image": us / case.batch}
            row["times_torchvision"] = times["torchvision"].median_us / us if "torchvision" in times else float("nan")
            print(
                f"{name:12s}{us / case.batch:12.1f}{1e6 * case.batch / us:12.0f}{row['times_torchvision']:12.2f}"
                f"  {apart[name]:.1e}"
            )
        else:
            print(f"{name:12s}{'no speed: out of tolerance':36s}  {apart[name]:.1e}")
        rows.append(row)
    return rows


class Photos(torch.utils.data.Dataset):
    """What users have today: Pillow decodes, torchvision crops and mirrors."""

    def __init__(self, files: list[Path]) -> None:
        from torchvision.transforms import InterpolationMode, v2

        crop = v2.RandomResizedCrop(SIZE, scale=(0.2, 1.0), interpolation=InterpolationMode.BICUBIC)
        self.files, self.transform = files, v2.Compose([crop, v2.RandomHorizontalFlip(), v2.PILToTensor()])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.files[index]) as image:
            return self.transform(image.convert("RGB"))


def raw_batches(file: Path, shapes: np.ndarray) -> Iterator[Tensor]:
    """Batches of crops from a file of images one after the other."""
    buffer = torch.from_numpy(np.memmap(file, np.uint8, "c"))
    offsets = np.concatenate([[0], (3 * shapes.astype(np.int64).prod(1)).cumsum()])[:-1]
    ids, config = np.random.default_rng(0).permutation(len(shapes)), CropConfig()
    for start in range(0, len(ids), BATCH):
        chosen = ids[start : start + BATCH]
        words = crop_words(0, np.zeros_like(chosen), chosen)
        boxes, flip = map(torch.from_numpy, crop_boxes(words, shapes[chosen, 1], shapes[chosen, 0], config))
        places = {"offsets": torch.from_numpy(offsets[chosen]), "shapes": torch.from_numpy(shapes[chosen])}
        yield crop_resize(buffer, boxes, flip, SIZE, **places)


def race_loaders(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Images a second of both loaders, and their ratio."""
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    loader = torch.utils.data.DataLoader(Photos(files), batch_size=BATCH, shuffle=True)
    with tempfile.TemporaryDirectory() as temporary:
        file, shapes = Path(temporary, "raw"), []
        with file.open("wb") as raw:
            for path in files:
                with Image.open(path) as image:
                    shapes.append((image.height, image.width))
                    raw.write(np.asarray(image.convert("RGB")).tobytes())
        ours = partial(raw_batches, file, np.array(shapes, dtype=np.int32))
        contestants = {"raw + crop_resize": lambda: sum(map(len, ours())), "DataLoader": lambda: sum(map(len, loader))}
        assert {fn() for fn in contestants.values()} == {len(files)}
        times = race(contestants, rounds, warmup=0)
    mean = np.mean(shapes, axis=0)
    print(f"\n{len(files)} photographs, on average {mean[1]:.0f} x {mean[0]:.0f}, to {SIZE}, every one once")
    rows = []
    for name, time in times.items():
        rate, ratio = 1e6 * len(files) / time.median_us, times["DataLoader"].median_us / time.median_us
        print(f"{name:20s}{rate:10.0f} images/s  {ratio:6.1f} x DataLoader")
        rows.append({"contestant": name, "images_per_s": rate, "times_dataloader": ratio, "photographs": len(files)})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the record here")
    parser.add_argument("--photos", type=Path, help="a folder of JPEG files: race whole loaders too")
    parser.add_argument("--rounds", type=int, default=30 if torch.cuda.is_available() else 7)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    where = machine()
    print(f"crop_resize on {where['device']}, 1 thread, torch {where['torch']}, {options.rounds} rounds")
    cases = BENCH if device == "cuda" else BENCH_CPU
    rows = [row for case in cases for row in run_case(case, device, options.rounds)]
    loaders = race_loaders(options.photos, min(options.rounds, 5)) if options.photos else []
    if options.json:
        write_record(options.json, {"op": "crop_resize", "rows": rows, "loaders": loaders})
    return 1 if any(row["out_of_tolerance"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
