"""Where a loader's time goes, stage by stage."""

import threading

# read: bytes from the disk or the archive. decode: bytes to pixels. crop: box, resampling, flip. All three are summed
# over threads. transfer: the consumer handed a batch to the device; the copy itself goes on beside its work. wait: the
# consumer had nothing to do.
STAGES = ("read", "decode", "crop", "transfer", "wait")


class Tally:
    """Seconds and images of each stage, for one thread."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.images = dict.fromkeys(STAGES, 0)

    def add(self, stage: str, seconds: float, images: int = 1) -> None:
        self.seconds[stage] += seconds
        self.images[stage] += images


class StageClock(Tally):
    """The same for any number of threads, which `merge` what each has counted."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()

    def add(self, stage: str, seconds: float, images: int = 1) -> None:
        with self._lock:
            super().add(stage, seconds, images)

    def merge(self, tally: Tally) -> None:
        """Add what `tally` holds. A tally is merged once."""
        with self._lock:
            for stage in STAGES:
                self.seconds[stage] += tally.seconds[stage]
                self.images[stage] += tally.images[stage]

    def snapshot(self) -> dict[str, tuple[float, int]]:
        """stage -> (seconds, images) so far."""
        with self._lock:
            return {stage: (self.seconds[stage], self.images[stage]) for stage in STAGES}
