"""The stream of batches: one and the same however it is made, whole, steady, and without a trace in memory."""

import collections
import gc
import threading
import time
import tracemalloc

import pytest
import torch

from mimfast._check import UserError
from mimfast.data import loader as loader_module
from mimfast.data.loader import Loader
from mimfast.data.prep import PrepConfig, prep
from mimfast.data.sources import Folder
from mimfast.data.store import Store
from mimfast.testing.images import encode, noise, write_folder

GOOD = 29


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Class folders of small images, one with every odd image, unreadable ones included."""
    root = tmp_path_factory.mktemp("folder")
    for i in range(GOOD):
        path = root / "ab"[i % 2] / f"{i:02d}.{('jpg', 'png')[i % 3 == 0]}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(noise(40 + i, 30 + 2 * i, i), "PNG" if i % 3 == 0 else "JPEG"))
    write_folder(root / "b" / "odd")
    return root


def damaged_store(folder, out, format):
    """A store of the folder in which three records no longer fit their checksums."""
    prep(Folder(folder), out, PrepConfig(32, format))
    store = Store(out)
    with open(out / "data.mim", "r+b") as file:
        for i in (0, 7, len(store) - 1):
            file.seek(int(store.offsets[i]) + 11)
            byte = file.read(1)[0]
            file.seek(int(store.offsets[i]) + 11)
            file.write(bytes([byte ^ 1]))


@pytest.fixture(scope="module")
def places(folder, tmp_path_factory):
    """name -> how to open it anew, so that no run profits from what another has found out."""
    stores = tmp_path_factory.mktemp("stores")
    for format in ("jpeg", "raw"):
        damaged_store(folder, stores / format, format)
    return {
        "folder": lambda: Folder(folder),
        "jpeg store": lambda: Store(stores / "jpeg"),
        "raw store": lambda: Store(stores / "raw"),
    }


def take(source, n, batch_size=12, **options):
    with Loader(source, 24, batch_size, 3, **options) as loader:
        return [next(loader) for _ in range(n)], loader.bad.items()


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def alone(places):
    """name -> 16 batches of 12, made by one process without threads."""
    return {name: take(make(), 16) for name, make in places.items()}


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 1, 2, 4])
@pytest.mark.parametrize("name", ["folder", "jpeg store", "raw store"])
def test_any_number_of_workers_and_ranks_gives_the_same_stream(places, alone, name, workers, world):
    batches, bad = alone[name]
    options = {"batch_size": 12 // world, "workers": workers, "world": world}
    parts = [take(places[name](), 16, rank=rank, **options) for rank in range(world)]
    assert_same(batches, [[torch.cat(x) for x in zip(*part)] for part in zip(*(batches for batches, _ in parts))])
    assert len(bad) >= 3
    if world == 1 and not workers:
        assert parts[0][1] == bad
    # one that prefetches, or knows part of the batches only, finds some of them sooner and others not yet
    known = set(bad) | set(take(places[name](), 24)[1])
    assert set().union(*(found for _, found in parts)) <= known


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize(("world", "batch_size", "repeat"), [(1, 7, 1), (2, 4, 1), (3, 5, 1), (2, 3, 2)])
def test_no_sample_is_lost_or_repeated_in_an_epoch(tmp_path, workers, world, batch_size, repeat):
    for i in range(GOOD):
        (tmp_path / f"{i}.png").write_bytes(encode(noise(24, 24, i), "PNG"))
    source, epochs = Folder(tmp_path), 3
    steps = -(-epochs * GOOD * repeat // (batch_size * world))
    seen = collections.Counter()
    for rank in range(world):
        options = {"rank": rank, "world": world, "workers": workers, "repeat": repeat}
        for batch in take(source, steps, batch_size, **options)[0]:
            seen.update(zip(batch.epochs.tolist(), batch.sample_ids.tolist()))
    wanted = {(epoch, i) for epoch in range(epochs * repeat) for i in range(GOOD)}
    assert wanted <= seen.keys()
    assert set(seen.values()) == {1}
    assert seen.total() == steps * batch_size * world


class Counted:
    """Images in memory; counts what is read."""

    classes = None

    def __init__(self, n):
        self.n, self.reads = n, 0
        self.file = encode(noise(16, 16, 0), "PNG")
        self.changed = threading.Condition()

    def __len__(self):
        return self.n

    def read(self, i):
        with self.changed:
            self.reads += 1
            self.changed.notify_all()
        return self.file

    def name(self, i):
        return str(i)

    def label(self, i):
        return None


@pytest.mark.parametrize("planned", [1, 8, 2048])
def test_an_epoch_edge_is_no_edge_to_the_threads(monkeypatch, planned):
    """At every batch, those around the ends of epochs included, the threads are as many batches ahead as ever."""
    monkeypatch.setattr(loader_module, "_PLANNED", planned)
    source = Counted(10)
    with Loader(source, 8, 4, 1, workers=2, prefetch=3, cache_bytes=0) as loader:
        for step in range(40):
            next(loader)
            ahead = 4 * (step + 1 + 3)
            with source.changed:
                assert source.changed.wait_for(lambda ahead=ahead: source.reads >= ahead, timeout=10)
                assert source.reads == ahead


def test_ten_million_images_cost_a_loader_nothing():
    source = Counted(10_000_000)
    take(source, 1)
    tracemalloc.start()
    batches, _ = take(source, 3, start=9_999_990, workers=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert torch.cat([batch.epochs for batch in batches]).tolist() == [0] * 10 + [1] * 26
    assert peak < 8 << 20


def rss():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.slow
@pytest.mark.parametrize("name", ["folder", "raw store"])
def test_memory_does_not_grow_over_20000_batches(places, name):
    """Bad images, a cache that overflows and many epochs; the process and its Python objects stay as they were."""
    with Loader(places[name](), 8, 4, 3, workers=2, cache_bytes=40_000) as loader:
        for _ in range(4000):
            next(loader)
        gc.collect()
        memory, objects = rss(), len(gc.get_objects())
        for _ in range(20_000):
            next(loader)
        gc.collect()
        grown, more = rss() - memory, len(gc.get_objects()) - objects
    assert loader.bad.count >= 3
    assert more < 200
    assert grown < 4 << 20


def test_resize_changes_the_threads_and_not_the_stream(places, alone):
    batches, _ = alone["folder"]
    with Loader(places["folder"](), 24, 12, 3, workers=1) as loader:
        found = []
        for step in range(16):
            if step in (2, 3, 9):
                loader.resize({2: 4, 3: 2, 9: 1}[step])
            found.append(next(loader))
    assert_same(batches, found)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mimfast-loa")]


def test_resize_lets_as_many_threads_read_at_a_time():
    class Watched(Counted):
        inside = most = 0

        def read(self, i):
            with self.changed:
                self.inside += 1
                self.most = max(self.most, self.inside)
            time.sleep(0.002)
            with self.changed:
                self.inside -= 1
            return super().read(i)

    source = Watched(50)
    with Loader(source, 8, 16, 1, workers=1, prefetch=0, cache_bytes=0) as loader:
        for workers in (1, 3, 2):
            loader.resize(workers)
            source.most = 0
            for _ in range(4):
                next(loader)
            assert source.most == loader.workers == workers
        with pytest.raises(UserError, match="loader: workers has 0, expected at least 1"):
            loader.resize(0)
    loader.resize(2)
    with Loader(source, 8, 16, 1) as loader:
        loader.resize(3)
        assert loader.workers == 0
        next(loader)


def test_close_after_resize_ends_all_threads():
    class Slow(Counted):
        def read(self, i):
            time.sleep(0.01)
            return super().read(i)

    source = Slow(50)
    loader = Loader(source, 8, 16, 1, workers=1, cache_bytes=0)
    next(loader)
    loader.resize(2)
    loader.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mimfast-loa")]
    assert source.reads < 3 * 16  # what was still to be read is dropped
