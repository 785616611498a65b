"""The images that could not be read."""

import threading


class BadImages:
    """The images that could not be read: id -> (name, reason), each tried once and never again."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[str, str]] = {}
        self._lock = threading.Lock()

    def add(self, sample_id: int, name: str, reason: str) -> None:
        with self._lock:
            self._found.setdefault(sample_id, (name, reason))

    def __contains__(self, sample_id: int) -> bool:
        return sample_id in self._found

    def __len__(self) -> int:
        return len(self._found)

    @property
    def count(self) -> int:
        return len(self._found)

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.items()]

    @property
    def reasons(self) -> list[str]:
        return [reason for _, reason in self.items()]

    def items(self) -> list[tuple[str, str]]:
        """(name, reason) in order of sample id, the same for any number of workers."""
        with self._lock:
            return [self._found[i] for i in sorted(self._found)]
