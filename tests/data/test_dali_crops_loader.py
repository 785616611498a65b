"""The loader with batches made by DALI, here on the CPU; the same on a GPU is skipped without one."""

import gc
import os
import threading
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from mimfast import settings
from mimfast._check import UserError
from mimfast.data import dali, fill_dali_crops
from mimfast.data import loader as module
from mimfast.data.crop import CropConfig
from mimfast.data.fill_dali_crops import _plain
from mimfast.data.loader import Change, Loader
from mimfast.data.resident import Resident
from mimfast.data.sources import Folder
from mimfast.testing.images import encode, noise, odd_images, smooth, write_folder
from mimfast.testing.runs import tiny_recipe, write_images
from mimfast.train import loop, parallel

BAD = {case.name for case in odd_images() if case.pixels is None}
needs_dali = pytest.mark.skipif(dali.why_not() is not None, reason="nvidia.dali cannot be imported")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
# as in test_dali.py: mean absolute error over a batch of photographs, and over one
WHOLE, ONE = 0.3, 0.5


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Two classes of images of many kinds, one of which also holds every odd image."""
    root = tmp_path_factory.mktemp("mixed")
    for i in range(30):
        path = root / "ab"[i % 2] / f"{i:02d}.jpg"
        path.parent.mkdir(exist_ok=True)
        image = smooth(60 + 7 * i, 70 + 5 * i, i)
        path.write_bytes(encode(image, "PNG") if i % 6 == 5 else encode(image, "JPEG", quality=90))
    write_folder(root / "b" / "odd")
    return root


@pytest.fixture
def source(mixed):
    return Folder(mixed)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    skimage = pytest.importorskip("skimage.data")
    root = tmp_path_factory.mktemp("photographs")
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        image = np.asarray(getattr(skimage, name)())[..., :3]
        (root / f"{name}.jpg").write_bytes(encode(image, "JPEG", quality=90))
    return root


def open_loader(source, size=32, batch_size=12, seed=3, decoder="dali_gpu", **options):
    options = {"cache_bytes": 0, **options}
    return Loader(source, size, batch_size, seed, decoder=decoder, _dali_on_cpu=True, **options)


def take(source, n, **options):
    with open_loader(source, **options) as loader:
        return [next(loader) for _ in range(n)], loader.bad.items()


def difference(a, b):
    return (a.img.float().cpu() - b.img.float()).abs().mean((1, 2, 3))


def assert_same(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        for x, y in zip(a, b):
            assert torch.equal(x, y)


def assert_near(found, wanted, most):
    """The same images, labels and epochs, and pixels that differ by `most` gray levels on average. Threads may have
    looked further ahead: all bad images of `wanted` and perhaps more."""
    for a, b in zip(found[0], wanted[0], strict=True):
        assert a.img.shape == b.img.shape
        for x, y in zip(a[1:], b[1:]):
            assert torch.equal(x, y)
        assert difference(a, b).mean() <= most
    assert set(found[1]) >= set(wanted[1])
    assert {os.path.basename(name) for name, _ in found[1]} <= BAD


@needs_dali
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repeat": 3},
        {"cache_bytes": 1 << 20},
        {"start": 36, "rank": 1, "world": 2},
        {"changes": (Change(24, 40, 12), Change(48, 24, 6))},
    ],
    ids=["plain", "repeat", "cache", "ranks", "changes"],
)
def test_the_rows_of_the_portable_loader(source, options):
    """Every odd image is among them; so are images that the portable decoder reduces."""
    wanted = take(source, 14, decoder="pillow", **options)
    assert wanted[1]
    found = [take(source, 14, workers=workers, **options) for workers in (0, 2)]
    for each in found:
        assert_near(each, wanted, 2)
    assert_same(found[0][0], found[1][0])


@needs_dali
@pytest.mark.parametrize("filter", ["bicubic", "bilinear"])
def test_photographs_are_near(photographs, filter):
    options = {"size": 224, "batch_size": 8, "crop": CropConfig(filter=filter)}
    found, wanted = (take(Folder(photographs), 3, decoder=name, **options)[0] for name in ("dali_gpu", "pillow"))
    error = torch.cat([difference(a, b) for a, b in zip(found, wanted)])
    assert error.mean() <= WHOLE
    assert error.max() <= ONE


@needs_dali
def test_boxes_and_flips_where_the_portable_decoder_reduces(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.jpg").write_bytes(encode(smooth(401 + i, 303 + i, i), "JPEG", quality=95, subsampling=0))
    found, wanted = (take(Folder(tmp_path), 6, decoder=name, batch_size=4)[0] for name in ("dali_gpu", "pillow"))
    # a flip or a box that is not the same costs tens of gray levels
    assert max(difference(a, b).max() for a, b in zip(found, wanted)) <= 3


@needs_dali
@pytest.mark.parametrize("workers", [0, 2])
def test_the_pipeline_lives_after_every_bad_image(source, monkeypatch, workers):
    """Files that look whole and are not: DALI is asked once, refuses, and the portable decoder decides."""
    monkeypatch.setattr(fill_dali_crops, "_plain", lambda data, _: fill_dali_crops._Plain(data, 64, 48, 1))
    built = []
    guilty = dali._Line._guilty
    monkeypatch.setattr(dali._Line, "_guilty", lambda *a: built.append(1) or guilty(*a))
    wanted = take(source, 20, decoder="pillow")
    with open_loader(source, workers=workers) as loader:
        found = [next(loader) for _ in range(20)]
        assert {os.path.basename(name) for name in loader.bad.names} == BAD
        rebuilt = len(built)
        for _ in range(20):
            next(loader)
        assert len(built) == rebuilt
        assert len({id(batch.img) for batch in found}) == 20
    for batch, other in zip(found, wanted[0]):
        assert torch.equal(batch.sample_ids, other.sample_ids)
        assert torch.equal(batch.labels, other.labels)
        assert batch.img.shape == (12, 3, 32, 32)


@needs_dali
def test_a_batch_without_any_file_for_dali(source, monkeypatch):
    monkeypatch.setattr(fill_dali_crops, "_plain", lambda *_: None)
    assert_same(take(source, 4, workers=2)[0], take(source, 4, decoder="pillow")[0])


@needs_dali
@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_anywhere_it_goes_on(source, workers):
    """Also where the list of bad images and the cache are empty again."""
    with open_loader(source, workers=workers, cache_bytes=1 << 22) as loader:
        whole = []
        for _ in range(14):
            assert loader.position == 12 * len(whole)
            whole.append(next(loader))
    assert_same(take(source, 5, start=9 * 12, workers=workers)[0], whole[9:])


@needs_dali
def test_one_pipeline_for_each_size(source, monkeypatch):
    made = []
    init = dali.DaliCrops.__init__
    monkeypatch.setattr(dali.DaliCrops, "__init__", lambda self, *a: made.append(a[:2]) or init(self, *a))
    changes = (Change(36, 48, 12), Change(60, 48, 6))
    found, _ = take(source, 9, workers=2, prefetch=1, changes=changes)
    assert [tuple(batch.img.shape) for batch in found[2:6]] == [
        (12, 3, 32, 32), (12, 3, 48, 48), (12, 3, 48, 48), (6, 3, 48, 48),
    ]  # fmt: skip
    assert made == [(32, 12), (48, 12), (48, 6)]


@needs_dali
def test_the_next_batch_is_under_way_while_one_is_used(source):
    with open_loader(source, workers=2) as loader:
        next(loader)
        filler = loader._filler
        for work in loader._queue:
            for future in work.futures:
                future.result()
        filler._feeder.submit(int).result()  # what was before it is done
        fed = [job.crops is not None for job in filler._jobs.values()]
        assert fed == [True, True]
        assert filler._crops._line.waiting == 2


@needs_dali
def test_threads_end_with_the_loader(source):
    take(source, 2, workers=2)
    gc.collect()

    def threads():
        with open("/proc/self/status") as status:
            return int(dict(line.split(":", 1) for line in status)["Threads"])

    before = threads()
    for _ in range(3):
        take(source, 2, workers=2)
        loader = open_loader(source, workers=2)  # forgotten
        next(loader)
        del loader
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("mimfast"):
            thread.join(10)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mimfast")]
    end = time.monotonic() + 10
    while threads() > before and time.monotonic() < end:  # the system lists a thread for a while after its join
        time.sleep(0.01)
    assert threads() <= before


@needs_dali
def test_close_twice_and_before_the_first_batch(source):
    loader = open_loader(source, workers=2)
    loader.close()
    loader.close()
    with pytest.raises(RuntimeError, match="it is closed"):
        next(loader)


@needs_dali
@pytest.mark.parametrize("ask_dali", [False, True])
def test_no_readable_image(tmp_path, monkeypatch, ask_dali):
    if ask_dali:
        monkeypatch.setattr(fill_dali_crops, "_plain", lambda data, _: fill_dali_crops._Plain(data, 64, 48, 1))
    for case in odd_images():
        if case.pixels is None:
            (tmp_path / case.name).write_bytes(case.data)
    for workers in (0, 2):
        with open_loader(Folder(tmp_path), batch_size=4, workers=workers) as loader:
            for _ in range(2):
                with pytest.raises(UserError, match="no readable"):
                    next(loader)


@needs_dali
def test_clock_counts_every_image(source):
    with open_loader(source, workers=2, prefetch=1) as loader:
        for _ in range(6):
            next(loader)
    found = loader.clock.snapshot()
    for stage in ("read", "decode", "crop"):
        assert found[stage][0] > 0
        assert found[stage][1] >= 72
    assert found["wait"][1] == 72


def test_what_is_for_dali():
    jpeg, png = (encode(noise(300, 200), kind) for kind in ("JPEG", "PNG"))
    assert _plain(jpeg, 101)[1:] == (300, 200, 1)
    assert _plain(jpeg, 50)[1:] == (300, 200, 4)
    assert _plain(png, 50)[1:] == (300, 200, 1)
    assert _plain(jpeg[:-2], 101) is None
    assert _plain(b"", 101) is None
    assert _plain(encode(np.zeros((1, 70_000, 3), np.uint8), "PNG"), 8) is None
    assert _plain(encode(np.zeros((4000, 4000, 3), np.uint8), "PNG"), 8) is None


def test_a_gpu_is_needed(source, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="decoder 'dali_gpu' needs DALI and a CUDA GPU, torch sees no GPU here"):
        Loader(source, 8, 4, 0, decoder="dali_gpu")
    monkeypatch.setattr(module, "why_not", lambda _: None)
    with pytest.raises(UserError, match="decoder has 'dali_gpu', expected another one on cpu because it works on the"):
        Loader(source, 8, 4, 0, decoder="dali_gpu", device=torch.device("cpu"))
    with pytest.raises(UserError, match="decoder has 'dali_gpu', expected another one with a cache because it makes"):
        Loader(source, 8, 4, 0, decoder="dali_gpu", resident=Resident(source, "cpu", 16))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"cache": "host"}, "data.cache has 'host', expected 'none' because data.decoder 'dali_gpu' makes crops"),
        ({"cache_side": 64}, "data.cache_side has 64, expected none because data.decoder 'dali_gpu' makes crops"),
        ({}, "data.decoder has 'dali_gpu', expected another one with train.device cpu because it works on the GPU"),
    ],
)
def test_settings_that_do_not_go_together(data, message):
    recipe = tiny_recipe("images", "out")
    recipe = replace(recipe, data=replace(recipe.data, decoder="dali_gpu", **data))
    recipe = replace(recipe, train=replace(recipe.train, device="auto" if data else "cpu"))
    with pytest.raises(UserError, match=message):
        settings.check(recipe)


@needs_dali
def test_a_run_through_it(tmp_path, monkeypatch):
    recipe = tiny_recipe(write_images(tmp_path / "images"), tmp_path / "run", device="auto")
    recipe = replace(recipe, data=replace(recipe.data, decoder="dali_gpu", workers=2))
    monkeypatch.setattr(parallel, "_device", lambda *_: torch.device("cpu"))
    made = []
    run = dali.DaliCrops.collect
    monkeypatch.setattr(dali.DaliCrops, "collect", lambda self: made.append(1) or run(self))
    monkeypatch.setattr(loop, "Loader", partial(Loader, _dali_on_cpu=True))
    assert loop.pretrain(recipe).step == 6
    assert len(made) == 6


def test_a_run_resumed_with_other_pixels_is_told():
    recipe = tiny_recipe("images", "out")
    marks = {
        name: settings.fingerprint(replace(recipe, data=replace(recipe.data, decoder=name)))
        for name in ("auto", "pillow", "dali", "dali_gpu")
    }
    assert marks["auto"] == marks["pillow"] == marks["dali"] != marks["dali_gpu"]
    other = replace(recipe, data=replace(recipe.data, decoder="dali_gpu"))
    assert settings.changed(recipe, other) == ["data.decoder: another -> dali_gpu"]
    assert settings.changed(other, recipe) == ["data.decoder: dali_gpu -> another"]


@needs_dali
@needs_gpu
class TestGpu:
    @pytest.mark.parametrize("workers", [0, 4])
    def test_batches_on_the_device(self, source, photographs, workers):
        for where, size, most in ((source, 32, 4), (Folder(photographs), 224, 2)):
            with Loader(where, size, 12, 3, workers=workers, decoder="dali_gpu", cache_bytes=0) as loader:
                found = [next(loader) for _ in range(14)], loader.bad.items()
            assert all(batch.img.is_cuda for batch in found[0])
            assert_near(found, take(where, 14, size=size, decoder="pillow"), most)

    def test_the_host_does_not_wait(self, source):
        with Loader(source, 32, 12, 3, workers=2, decoder="dali_gpu", cache_bytes=0) as loader:
            next(loader)
            torch.cuda.set_sync_debug_mode("error")
            try:
                for _ in range(8):
                    next(loader)
            finally:
                torch.cuda.set_sync_debug_mode("default")
