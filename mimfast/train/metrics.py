"""Numbers of a run: kept on the device, read one logging interval late, written as one JSON object per line."""

import json
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimfast.data.clock import StageClock
from mimfast.train.parallel import World

# what a vector of device numbers holds, in order: sums over the interval, then counters over the run
_SLOTS = ("loss", "grad_norm", "steps", "skipped", "skipped_in_a_row", "stop")
LOSS, NORM, STEPS, SKIPPED, IN_A_ROW, STOP = range(6)


class Meter:
    """Collects losses without waiting for the device.

    Every `add` is a few tiny device operations. `flush` starts a copy of the sums to the host and returns the
    previous interval's numbers, whose copy finished long ago, so the host is never more than one interval ahead of
    the device.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.sums = torch.zeros(len(_SLOTS), dtype=torch.float64, device=world.device)
        self._waiting: tuple[dict[str, Any], Tensor, torch.cuda.Event | None] | None = None
        self._since = time.perf_counter()
        self.images = 0
        self.waited = 0.0  # share of the interval that ended last
        self.watch(StageClock())

    def watch(self, clock: StageClock) -> None:
        """From now on tell with each line where the time of this clock's loader goes."""
        self.clock, self._spent = clock, clock.snapshot()

    def add(self, loss: Tensor, norm: Tensor, skipped: Tensor, images: int) -> None:
        """Count one step: its loss, gradient norm and skip flag (device scalars) and the images of all ranks."""
        kept = 1 - skipped
        # a skipped step's loss and norm may be NaN; they would poison the mean of the steps that count
        step = torch.stack(
            [torch.where(kept > 0, loss.detach().float(), 0.0), torch.where(kept > 0, norm.float(), 0.0), kept, skipped]
        )
        self.sums[:IN_A_ROW] += step
        self.sums[IN_A_ROW] = (self.sums[IN_A_ROW] + 1) * skipped
        self.images += images

    def flush(self, about: dict[str, Any], stop: bool = False) -> dict[str, Any] | None:
        """End an interval; returns the line of the interval before, or None after the first one.

        Args:
            about: what is known on the host already (step, epoch, lr, ...).
            stop: this rank wants to stop; the returned line's "stop" is true once any rank wanted to.
        """
        done = self.take()
        now = time.perf_counter()
        took = max(now - self._since, 1e-9)
        spent = self.clock.snapshot()
        data = {stage: seconds - self._spent[stage][0] for stage, (seconds, _) in spent.items()}
        self.waited = min(data.pop("wait") / took, 1.0)
        about = {**about, "images_per_second": self.images / took, "data_wait": self.waited}
        about |= {f"data_{stage}_s": round(seconds, 4) for stage, seconds in data.items()}
        self.sums[STOP] = float(stop)
        sums = self.world.sum(self.sums)
        event = None
        if sums.is_cuda:
            sums = sums.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        else:
            sums = sums.clone()
        self._waiting = (about, sums, event)
        self.sums[:SKIPPED] = 0
        self._since, self._spent, self.images = now, spent, 0
        return done

    def take(self) -> dict[str, Any] | None:
        """The line that is still on its way, waiting for it if need be; None when there is none."""
        if self._waiting is None:
            return None
        about, sums, event = self._waiting
        self._waiting = None
        if event is not None:
            event.synchronize()
        values = sums.tolist()
        steps = values[STEPS]
        ranks = self.world.size
        return {
            **about,
            "loss": values[LOSS] / steps if steps else math.nan,
            "grad_norm": values[NORM] / steps if steps else math.nan,
            "skipped": round(values[SKIPPED] / ranks),
            "skipped_in_a_row": round(values[IN_A_ROW] / ranks),
            "memory": memory_bytes(self.world.device),
            "stop": values[STOP] > 0,
        }

    def state(self) -> Tensor:
        """The sums of the unfinished interval, so that a resumed run logs the same means."""
        return self.sums.cpu()

    def restore(self, sums: Tensor) -> None:
        """Continue the interval that `state` described."""
        self.sums.copy_(sums)


def memory_bytes(device: torch.device) -> int:
    """Peak memory of the run so far: allocated on the GPU, or resident for the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Log:
    """metrics.jsonl and, when the package is installed and wanted, TensorBoard events."""

    def __init__(self, folder: Path, tensorboard: bool, after_step: int = 0) -> None:
        self.path = folder / "metrics.jsonl"
        kept = [line for line in read(self.path) if line["step"] <= after_step]
        self._file = open(self.path, "w", encoding="utf-8")  # noqa: SIM115
        for line in kept:
            self._put(line)
        self._events = _tensorboard(folder, after_step) if tensorboard else None

    def write(self, line: dict[str, Any]) -> None:
        """Append one line; it is in the file when this returns."""
        self._put(line)
        if self._events is not None:
            for key, value in line.items():
                if key != "step" and not isinstance(value, str):
                    self._events.add_scalar(key, value, line["step"])

    def _put(self, line: dict[str, Any]) -> None:
        # NaN is no JSON; a reader in another language would stumble over it
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._events is not None:
            self._events.close()


def _tensorboard(folder: Path, after_step: int) -> Any:
    # TensorFlow, when it is installed too, would otherwise announce itself on stderr
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=after_step + 1 if after_step else None)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that a killed run left unfinished is dropped."""
    lines: list[dict[str, Any]] = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
    return lines
