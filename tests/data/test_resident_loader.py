"""Batches do not depend on the cache: the same bits from no cache, from the memory of the machine, and by the way that
pixels take to a GPU, for one cache_side each."""

import numpy as np
import pytest
import torch

from mimfast.data.arrays import Arrays
from mimfast.data.crop import CropConfig
from mimfast.data.loader import Change, Loader
from mimfast.data.prep import PrepConfig, prep
from mimfast.data.resident import Resident
from mimfast.data.sources import Folder
from mimfast.data.store import Store
from mimfast.testing import skip_unless
from mimfast.testing.images import encode, noise, write_folder

CACHES = ["host", "staged", "gpu"]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Two classes of noise images, one of which also holds every odd image, good and bad."""
    root = tmp_path_factory.mktemp("mixed")
    for i in range(16):
        path = root / "ab"[i % 2] / f"{i:02d}.{('jpg', 'png')[i % 3 == 0]}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(noise(40 + 7 * i, 100 - 3 * i, i), "PNG" if i % 3 == 0 else "JPEG"))
    write_folder(root / "b" / "odd")
    return root


@pytest.fixture(scope="module")
def stores(mixed, tmp_path_factory):
    root = tmp_path_factory.mktemp("stores")
    for kind in ("jpeg", "raw"):
        prep(Folder(mixed), root / kind, PrepConfig(size=72, format=kind), origin="test", workers=1)
    return {kind: root / kind for kind in ("jpeg", "raw")}


def resident_of(source, cache, side=None, min_side=None):
    if cache == "none":
        return None if side is None else Resident(source, None, side)
    if cache == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        skip_unless("cuda", "cuda")
        return Resident(source, "cuda", side, min_side)
    return Resident(source, "cpu", side, min_side, staged=cache == "staged")


def take(source, n, size=24, batch_size=12, seed=3, resident=None, **options):
    pin = resident is not None and resident.on_device and torch.cuda.is_available()
    with Loader(source, size, batch_size, seed, resident=resident, pin=pin, **options) as loader:
        return [next(loader) for _ in range(n)], loader


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second):
        for x, y in zip(a, b):
            assert (x is None and y is None) or torch.equal(x, y.cpu())


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("kind", ["jpeg", "raw"])
def test_a_store_gives_the_same_batches(stores, kind, cache, workers):
    """Three epochs and a bit: one that fills the cache and those that come from it."""
    source = Store(stores[kind])
    batches = 3 * len(source) // 12 + 1
    plain, _ = take(source, batches)
    resident = resident_of(source, cache)
    found, _ = take(source, batches, workers=workers, resident=resident)
    assert resident.count == len(source)
    assert_same(plain, found)


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("cache", CACHES)
def test_copies_of_any_source_give_the_same_batches(mixed, cache, workers):
    """Bad images are counted and replaced as ever, and never kept."""
    source = Folder(mixed)
    batches = 3 * len(source) // 12 + 1
    plain, loader = take(source, batches, resident=resident_of(source, "none", 32))
    resident = resident_of(source, cache, 32)
    found, again = take(source, batches, workers=workers, resident=resident)
    assert_same(plain, found)
    assert loader.bad.count > 0
    assert loader.bad.items() == again.bad.items()
    assert resident.count == len(source) - loader.bad.count
    assert not any(resident.has(i) for i in range(len(source)) if i in loader.bad)


def test_a_copy_changes_the_crops_from_the_first_batch_on(stores):
    source = Store(stores["raw"])
    (plain,), _ = take(source, 1)
    (copies,), _ = take(source, 1, resident=resident_of(source, "none", 32))
    assert torch.equal(plain.sample_ids, copies.sample_ids)
    assert not torch.equal(plain.img, copies.img)


@pytest.mark.parametrize("side", [None, 40])
@pytest.mark.parametrize("cache", CACHES)
def test_restart_with_an_empty_cache(stores, cache, side):
    source = Store(stores["jpeg"])
    plain, _ = take(source, 9, resident=resident_of(source, "none", side))
    resident = resident_of(source, cache, side)
    found, _ = take(source, 5, resident=resident, workers=2)
    assert_same(plain[:5], found)
    rest, _ = take(source, 4, start=5 * 12, resident=resident_of(source, cache, side))
    assert_same(plain[5:], rest)
    warm, _ = take(source, 4, start=5 * 12, resident=resident)
    assert_same(plain[5:], warm)


@pytest.mark.parametrize("side", [None, 24])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("kind", ["jpeg", "raw"])
def test_sizes_that_change_while_the_run_lasts(stores, kind, cache, side):
    """Small crops come from JPEG files decoded at half the size, large ones from whole ones: both are right, though
    only one of them can be kept."""
    source = Store(stores[kind])
    crop = CropConfig(scale=(0.5, 1.0))
    options = {"crop": crop, "changes": (Change(48, 16, 12), Change(96, 40, 6))}
    plain, _ = take(source, 22, resident=resident_of(source, "none", side), **options)
    resident = resident_of(source, cache, side, min_side=57)
    assert (resident.usable(23) is not None) == (kind == "jpeg" and side is None)
    found, _ = take(source, 22, workers=2, resident=resident, **options)
    assert_same(plain, found)
    assert {batch.img.shape[-1] for batch in found} == {24, 16, 40}


@pytest.mark.parametrize("cache", CACHES)
def test_views_and_ranks(stores, cache):
    source = Store(stores["jpeg"])
    for rank in range(2):
        options = {"rank": rank, "world": 2, "repeat": 3}
        plain, _ = take(source, 12, **options)
        found, _ = take(source, 12, workers=2, resident=resident_of(source, cache), **options)
        assert_same(plain, found)


@pytest.mark.parametrize("cache", CACHES)
def test_arrays_of_one_size(cache):
    source = Arrays(np.random.default_rng(0).integers(0, 256, (30, 3, 32, 32), np.uint8), np.arange(30) % 3)
    plain, _ = take(source, 8)
    found, _ = take(source, 8, workers=2, resident=resident_of(source, cache))
    assert_same(plain, found)


def test_later_epochs_neither_read_nor_decode(stores, monkeypatch):
    source = Store(stores["jpeg"])
    resident = resident_of(source, "host")
    epoch = -(-len(source) // 12)
    take(source, epoch, resident=resident)
    assert resident.count == len(source)
    monkeypatch.setattr(source, "read", None)
    found, loader = take(source, epoch, resident=resident, start=epoch * 12)
    assert len(found) == epoch
    assert loader.clock.images["read"] == loader.clock.images["decode"] == 0
    assert loader.clock.images["crop"] == epoch * 12


def test_a_loader_with_a_cache_of_its_own_keeps_nothing_else(stores):
    source = Store(stores["jpeg"])
    _, loader = take(source, 2, resident=resident_of(source, "host"))
    assert loader._cache_bytes == 0
    _, loader = take(source, 2, resident=resident_of(source, "none", 16))
    assert loader._cache_bytes > 0
