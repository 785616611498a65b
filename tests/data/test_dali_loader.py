import collections
import gc
import os
import sys
import threading

import numpy as np
import pytest
import torch

from mimfast._check import UserError
from mimfast.data import dali, fill_dali
from mimfast.data.loader import Change, Loader
from mimfast.data.prep import PrepConfig, prep
from mimfast.data.resident import Resident
from mimfast.data.sources import Folder
from mimfast.data.store import Store
from mimfast.testing.images import encode, noise, odd_images, smooth, write_folder

BAD = {case.name for case in odd_images() if case.pixels is None}
needs_dali = pytest.mark.skipif(dali.why_not() is not None, reason="nvidia.dali cannot be imported")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Two classes of images of many kinds, one of which also holds every odd image."""
    root = tmp_path_factory.mktemp("mixed")
    for i in range(30):
        path = root / "ab"[i % 2] / f"{i:02d}.jpg"
        path.parent.mkdir(exist_ok=True)
        image = smooth(40 + 7 * i, 60 + 5 * i, i)
        if i % 6 == 5:
            path.write_bytes(encode(image, "PNG"))
        else:
            sampling = ("4:2:0", "4:4:4", "4:2:2", "4:1:1")[i % 4]
            path.write_bytes(encode(image, "JPEG", quality=75 + i % 20, subsampling=sampling, progressive=i % 5 == 0))
    write_folder(root / "b" / "odd")
    return root


@pytest.fixture
def source(mixed):
    return Folder(mixed)


def take(source, n, size=24, batch_size=12, seed=3, decoder="dali", **options):
    with Loader(source, size, batch_size, seed, decoder=decoder, **options) as loader:
        return [next(loader) for _ in range(n)], loader.bad.items()


def assert_same(found, wanted):
    """The same batches. Threads may have looked further ahead: all bad images of `wanted` and perhaps more."""
    for a, b in zip(found[0], wanted[0], strict=True):
        for x, y in zip(a, b):
            assert (x is None and y is None) or torch.equal(x, y)
    assert set(found[1]) >= set(wanted[1])
    assert {os.path.basename(name) for name, _ in found[1]} <= BAD


@needs_dali
@pytest.mark.parametrize(
    "options",
    [
        {"cache_bytes": 0},
        {"cache_bytes": 0, "size": 64},
        {"cache_bytes": 0, "repeat": 3},
        {"cache_bytes": 200_000},
        {},
        {"cache_bytes": 0, "start": 36, "rank": 1, "world": 2},
        {"cache_bytes": 0, "changes": (Change(24, 40, 12), Change(48, 24, 6))},
    ],
    ids=["plain", "large", "repeat", "small_cache", "cache", "ranks", "changes"],
)
def test_the_batches_and_bad_images_of_the_portable_loader(source, options):
    """Every odd image is among them; so are images large enough to be decoded at reduced size."""
    wanted = take(source, 14, decoder="pillow", **options)
    assert wanted[1]
    for workers in (0, 1, 3):
        assert_same(take(source, 14, workers=workers, **options), wanted)


@needs_dali
@pytest.mark.parametrize("side", [None, 40])
def test_with_a_resident_cache(mixed, tmp_path, side):
    source = Folder(mixed)
    if side is None:
        prep(source, tmp_path / "store", PrepConfig(size=72, format="jpeg"), origin="test", workers=1)
        source = Store(tmp_path / "store")
    wanted = take(source, 14, decoder="pillow", resident=Resident(source, "cpu", side))
    assert_same(take(source, 14, workers=2, resident=Resident(source, "cpu", side)), wanted)


@needs_dali
def test_the_pipelines_live_after_every_bad_image(source, monkeypatch):
    """Files that look whole and are not: DALI is asked, refuses, and the portable decoder decides."""
    monkeypatch.setattr(fill_dali, "_size", lambda data, min_side: (64, 48))
    wanted = take(source, 20, decoder="pillow", cache_bytes=0)
    with Loader(source, 24, 12, 3, decoder="dali", cache_bytes=0, workers=1) as loader:
        found = [next(loader) for _ in range(20)]
        names = [os.path.basename(name) for name in loader.bad.names]
    assert set(names) == BAD
    for batch, other in zip(found, wanted[0]):
        assert torch.equal(batch.sample_ids, other.sample_ids)
        assert batch.img.shape == (12, 3, 24, 24)


@needs_dali
def test_dali_decodes_what_it_should(source, monkeypatch):
    """Each plain image that is not to be reduced, once; of the others, and with a warm cache, nothing."""
    calls = []
    run = dali.DaliParts.run
    monkeypatch.setattr(dali.DaliParts, "run", lambda *a: calls.append((len(a[1]), a[2].copy())) or run(*a))
    with Loader(source, 24, len(source), 3, decoder="dali") as loader:
        next(loader)
        first = sum(count for count, _ in calls)
        calls.clear()
        next(loader)
        assert calls == []  # all decoded images are in the cache
    with Loader(source, 24, len(source), 3, decoder="dali", cache_bytes=0) as loader:
        next(loader)
    assert 20 < first == sum(count for count, _ in calls) < len(source) - 20
    with Loader(source, 24, 12, 3, decoder="dali", cache_bytes=0, repeat=4) as loader:
        calls.clear()
        next(loader)
    assert sum(count for count, _ in calls) <= 3


@needs_dali
def test_parts_are_decoded_only_as_far_as_crops_need_them(tmp_path, monkeypatch):
    path = tmp_path / "one.png"
    path.write_bytes(encode(noise(90, 70), "PNG"))
    boxes = []
    run = dali.DaliParts.run
    monkeypatch.setattr(dali.DaliParts, "run", lambda *a: boxes.append(a[2].copy()) or run(*a))
    take(Folder(tmp_path), 8, batch_size=1, cache_bytes=0)
    areas = np.concatenate(boxes)[:, 2:].prod(1)
    assert areas.min() < 0.5 * 90 * 70
    boxes.clear()
    take(Folder(tmp_path), 8, batch_size=1)
    assert np.concatenate(boxes).tolist() == [[0, 0, 70, 90]]


@needs_dali
def test_clock_counts_every_image(source):
    with Loader(source, 24, 12, 1, workers=2, cache_bytes=0, decoder="dali", prefetch=1) as loader:
        for _ in range(6):
            next(loader)
    found = loader.clock.snapshot()
    for stage in ("read", "decode", "crop"):
        assert found[stage][0] > 0
        assert found[stage][1] >= 72
    assert found["wait"][1] == 72


@needs_dali
def test_no_readable_image(tmp_path):
    for case in odd_images():
        if case.pixels is None:
            (tmp_path / case.name).write_bytes(case.data)
    with Loader(Folder(tmp_path), 8, 4, 1, decoder="dali") as loader, pytest.raises(UserError, match="no readable"):
        next(loader)


@needs_dali
def test_threads_end_with_the_loader(source):
    take(source, 2)
    gc.collect()

    def threads():
        with open("/proc/self/status") as status:
            return int(dict(line.split(":", 1) for line in status)["Threads"])

    before = threads()
    for _ in range(3):
        take(source, 2, workers=2, cache_bytes=0)
    gc.collect()
    assert threads() <= before
    assert not [t for t in threading.enumerate() if t.name.startswith("mimfast")]


@pytest.mark.slow
@needs_dali
def test_memory_does_not_grow(source):
    def resident_mib():
        gc.collect()
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    seen = collections.deque(maxlen=5)
    with Loader(source, 24, 48, 3, workers=2, cache_bytes=0, decoder="dali") as loader:
        for step in range(600):
            next(loader)
            if step % 100 == 99:
                seen.append(resident_mib())
    assert seen[-1] - seen[0] < 24, list(seen)


def test_not_installed(source, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(UserError, match=r"install it with pip install 'mimfast\[dali\]'"):
        Loader(source, 8, 4, 1, decoder="dali")
