"""Fair races: contestants in one process, in turns, cold cache."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch


class Times(NamedTuple):
    """Microseconds per call."""

    median_us: float
    p95_us: float
    rounds: int


def race(contestants: dict[str, Callable[[], object]], rounds: int = 30, warmup: int = 3) -> dict[str, Times]:
    """Time contestants in turns, so that heat and neighbours hit all alike.

    On a GPU each call is timed by events after the L2 cache was overwritten; on a CPU by the clock.
    """
    for fn in contestants.values():
        for _ in range(warmup):
            fn()
    once = _cuda_timer() if torch.cuda.is_available() else _clock
    samples: dict[str, list[Callable[[], float]]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, fn in contestants.items():
            samples[name].append(once(fn))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return {name: _times([read() for read in reads]) for name, reads in samples.items()}


def _clock(fn: Callable[[], object]) -> Callable[[], float]:
    start = time.perf_counter()
    fn()
    took = 1e6 * (time.perf_counter() - start)
    return lambda: took


def _cuda_timer() -> Callable[[Callable[[], object]], Callable[[], float]]:
    # twice the cache; the overwrite also keeps the GPU busy while the CPU queues the call, so launch gaps count less
    flush = torch.empty(2 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.uint8, device="cuda")

    def once(fn: Callable[[], object]) -> Callable[[], float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        fn()
        end.record()
        return lambda: 1e3 * start.elapsed_time(end)

    return once


def _times(us: list[float]) -> Times:
    ordered = sorted(us)
    return Times(statistics.median(ordered), ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))], len(ordered))


def as_graph(fn: Callable[[], object]) -> Callable[[], object]:
    """The replay of `fn` captured in a CUDA graph; `fn` itself without a GPU or, saying so, when capture fails."""
    if not torch.cuda.is_available():
        return fn
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            fn()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            fn()
    except RuntimeError as error:
        print(f"launched, not replayed, because CUDA-graph capture failed: {str(error).splitlines()[0]}")
        return fn
    return graph.replay
