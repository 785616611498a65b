import collections
import gc
import os
import threading
import time

import numpy as np
import pytest
import torch

from mimfast._check import UserError
from mimfast.data import decoders
from mimfast.data.crop import CropConfig
from mimfast.data.decode import decode
from mimfast.data.loader import BadImages, Change, Loader, load_all
from mimfast.data.order import sample_at
from mimfast.data.sources import Folder
from mimfast.testing.images import encode, noise, odd_images, picture, write_folder


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Two classes of small noise images, one of which also holds every odd image."""
    root = tmp_path_factory.mktemp("mixed")
    for i in range(20):
        path = root / "ab"[i % 2] / f"{i:02d}.{('jpg', 'png')[i % 3 == 0]}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(noise(40 + i, 30 + 2 * i, i), "PNG" if i % 3 == 0 else "JPEG"))
    write_folder(root / "b" / "odd")
    return root


@pytest.fixture
def source(mixed):
    return Folder(mixed)


@pytest.fixture
def small(tmp_path):
    for i in range(7):
        (tmp_path / f"{i}.png").write_bytes(encode(noise(24, 24, i), "PNG"))
    return Folder(tmp_path)


def take(source, n, size=24, batch_size=12, seed=3, **options):
    with Loader(source, size, batch_size, seed, **options) as loader:
        return [next(loader) for _ in range(n)]


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second):
        for x, y in zip(a, b):
            assert (x is None and y is None) or torch.equal(x, y)


def test_shapes(source, small):
    (batch,) = take(source, 1)
    assert batch.img.shape == (12, 3, 24, 24)
    assert batch.img.dtype == torch.uint8
    for field in batch[1:]:
        assert field.shape == (12,)
        assert field.dtype == torch.int64
    assert batch.labels.tolist() == [source.label(i) for i in batch.sample_ids.tolist()]
    assert take(small, 1)[0].labels is None


@pytest.mark.parametrize(
    "options",
    [
        {"workers": 1},
        {"workers": 4},
        {"workers": 2, "prefetch": 0},
        {"cache_bytes": 0},
        {"workers": 3, "prefetch": 7, "cache_bytes": 30_000},
    ],
)
def test_batches_do_not_depend_on_how_they_are_made(source, options):
    assert_same(take(source, 15), take(source, 15, **options))


def test_order_is_the_keyed_permutation(small):
    batches = take(small, 7, batch_size=3)
    epochs, ids = sample_at(np.arange(21), 7, 3)
    assert torch.cat([batch.sample_ids for batch in batches]).tolist() == ids.tolist()
    assert torch.cat([batch.epochs for batch in batches]).tolist() == epochs.tolist()


def test_pixels_are_crops_of_the_named_image(small):
    """With a box that is the whole image at its own size, a batch holds the decoded files."""
    crop = CropConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=False)
    (batch,) = take(small, 1, crop=crop)
    for img, i in zip(batch.img, batch.sample_ids.tolist()):
        np.testing.assert_array_equal(img.permute(1, 2, 0).numpy(), decode(small.read(i)))


def test_crops_change_from_epoch_to_epoch_but_not_with_the_batch_size(small):
    def by_sample(batches):
        return {(e, i): img for b in batches for e, i, img in zip(b.epochs.tolist(), b.sample_ids.tolist(), b.img)}

    fine, coarse = by_sample(take(small, 14, batch_size=2)), by_sample(take(small, 4, batch_size=7))
    assert len(fine) == len(coarse) == 28
    assert all(torch.equal(fine[key], coarse[key]) for key in fine)
    assert not torch.equal(fine[0, 3], fine[1, 3])


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_one_integer(source, workers):
    whole = take(source, 12, workers=workers)
    assert_same(whole[5:], take(source, 7, start=5 * 12, workers=workers))
    with Loader(source, 24, 12, 3, workers=workers) as loader:
        for _ in range(5):
            next(loader)
        assert loader.position == 5 * 12


CHANGES = (Change(36, 16, 6), Change(60, 32, 12))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_change_of_size_neither_loses_nor_repeats_a_sample(source, workers):
    batches = take(source, 10, workers=workers, changes=CHANGES)
    assert [tuple(batch.img.shape) for batch in batches] == [
        *3 * [(12, 3, 24, 24)], *4 * [(6, 3, 16, 16)], *3 * [(12, 3, 32, 32)],
    ]  # fmt: skip
    at_one_size = take(source, 8)
    for field in (1, 2, 3):
        assert torch.equal(*(torch.cat([batch[field] for batch in run]) for run in (batches, at_one_size)))
    # a size alone decides the pixels of a sample, whatever came before
    assert_same(batches[3:7], take(source, 4, size=16, batch_size=6, start=36))
    assert_same(batches[7:], take(source, 3, size=32, start=60))


@pytest.mark.parametrize("done", [1, 3, 4, 7, 9])
def test_resume_before_at_and_after_a_change(source, done):
    whole = take(source, 12, changes=CHANGES)
    start = sum(len(batch.img) for batch in whole[:done])
    assert_same(whole[done:], take(source, 12 - done, start=start, workers=2, changes=CHANGES))
    with Loader(source, 24, 12, 3, changes=CHANGES) as loader:
        for _ in range(done):
            next(loader)
        assert loader.position == start


def test_processes_share_the_batches_across_a_change(source):
    halves = [Change(at, size, batch // 2) for at, size, batch in CHANGES]
    alone = take(source, 10, changes=CHANGES)
    ranks = [take(source, 10, batch_size=6, rank=rank, world=2, changes=halves) for rank in range(2)]
    for step, whole in enumerate(alone):
        assert_same([whole], [[torch.cat(fields) for fields in zip(*(rank[step] for rank in ranks))]])


def test_bad_images_stay_known_across_a_change(source):
    with Loader(source, 24, 12, 3, changes=[Change(3 * len(source) // 12 * 12, 16, 12)]) as loader:
        for _ in range(3 * len(source) // 12):
            next(loader)
        before = loader.bad.items()
        assert before
        next(loader)
        assert loader.bad.items() == before


@pytest.mark.parametrize("world", [2, 3, 4])
def test_processes_share_the_same_global_batch(source, world):
    alone = take(source, 6)
    ranks = [take(source, 6, batch_size=12 // world, rank=rank, world=world) for rank in range(world)]
    for step, whole in enumerate(alone):
        parts = [ranks[rank][step] for rank in range(world)]
        assert_same([whole], [[torch.cat(fields) for fields in zip(*parts)]])


@pytest.mark.parametrize("workers", [0, 4])
def test_bad_images_are_named_and_replaced(source, workers):
    refused = {f"b/odd/{case.name}" for case in odd_images() if case.pixels is None}
    with Loader(source, 24, 16, 8, workers=workers) as loader:
        batches = [next(loader) for _ in range(3 * len(source) // 16)]
        assert set(loader.bad.names) == refused
        assert loader.bad.count == len(refused)
        assert all(loader.bad.reasons)
        assert dict(loader.bad.items())["b/odd/empty.jpg"] == "the file is empty"
    ids = torch.cat([batch.sample_ids for batch in batches])
    assert {len(batch.img) for batch in batches} == {16}
    assert not refused & {source.name(i) for i in ids.tolist()}
    # A replacement is cropped as it would be in its own place: all rows of one epoch and id are equal.
    crops = {}
    for batch in batches:
        for epoch, i, img in zip(batch.epochs.tolist(), batch.sample_ids.tolist(), batch.img):
            assert torch.equal(crops.setdefault((epoch, i), img), img)
    assert len(crops) < len(ids)
    # Replacements are spread out, not always the same neighbour: nobody is drawn much more than its 3 epochs.
    assert collections.Counter(ids.tolist()).most_common(1)[0][1] <= 10


def test_bad_images_are_tried_once(source):
    reads = collections.Counter()

    class Counting(Folder):
        def read(self, i):
            reads[i] += 1
            return super().read(i)

    with Loader(Counting(source.path), 24, 16, 8, cache_bytes=0) as loader:
        for _ in range(20):
            next(loader)
        bad = set(loader.bad.names)
    assert bad
    assert {reads[i] for i in reads if source.name(i) in bad} == {1}
    assert max(reads.values()) > 1


def test_file_that_goes_away(small):
    os.unlink(small.path / "3.png")
    with Loader(small, 24, 7, 1, workers=2) as loader:
        batches = [next(loader) for _ in range(3)]
        assert loader.bad.items() == [("3.png", "cannot be read: No such file or directory")]
    assert 3 not in torch.cat([batch.sample_ids for batch in batches])


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("n", [1, 60])
def test_nothing_readable(tmp_path, workers, n):
    for i in range(n):
        (tmp_path / f"{i:02d}.jpg").write_bytes(b"no image")
    with Loader(Folder(tmp_path), 24, 4, 1, workers=workers) as loader:
        for _ in range(2):
            with pytest.raises(
                UserError, match=rf"no readable image among \d+ tried of {n} .*the first: '\d+.jpg', not an image"
            ):
                next(loader)


def test_one_good_image_among_many_bad_is_found(tmp_path):
    for i in range(300):
        (tmp_path / f"{i:03d}.jpg").write_bytes(b"no image")
    (tmp_path / "150.jpg").write_bytes(encode(picture(), "JPEG"))
    first, second = take(Folder(tmp_path), 2, workers=2), take(Folder(tmp_path), 2)
    assert_same(first, second)
    assert set(first[0].sample_ids.tolist()) == {150}


@pytest.mark.parametrize("workers", [0, 2])
def test_other_errors_reach_the_consumer(small, workers):
    class Broken(Folder):
        def read(self, i):
            raise RuntimeError("a mistake in the program")

    message = pytest.raises(RuntimeError, match="a mistake in the program")
    with Loader(Broken(small.path), 24, 4, 1, workers=workers) as loader, message:
        next(loader)


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("mimfast-loa")]


def test_close_ends_the_threads(small):
    loader = Loader(small, 24, 4, 1, workers=3)
    next(loader)
    assert loader_threads()
    loader.close()
    assert not loader_threads()
    loader.close()
    with pytest.raises(RuntimeError, match="loader: it is closed"):
        next(loader)


def test_forgotten_loader_ends_its_threads(small):
    loader = Loader(small, 24, 4, 1, workers=3)
    next(loader)
    del loader
    gc.collect()
    deadline = time.monotonic() + 5
    while loader_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not loader_threads()


def test_wait_is_measured_and_prefetch_hides_it(small):
    class Slow(Folder):
        def read(self, i):
            time.sleep(0.01)
            return super().read(i)

    def waited(**options):
        with Loader(Slow(small.path), 24, 4, 1, cache_bytes=0, **options) as loader:
            next(loader)
            before = loader.wait_seconds
            for _ in range(4):
                time.sleep(0.08)
                next(loader)
            return loader.wait_seconds - before

    in_the_caller = waited()
    assert in_the_caller >= 0.16
    assert waited(workers=2) < in_the_caller / 2


def test_threads_work_at_the_same_time(small):
    """Four reads meet at a barrier, which only threads that run together can pass."""
    barrier = threading.Barrier(4, timeout=10)

    class Meeting(Folder):
        def read(self, i):
            barrier.wait()
            return super().read(i)

    assert len(take(Meeting(small.path), 1, batch_size=4, workers=4, prefetch=0, cache_bytes=0)) == 1


def test_cache_keeps_to_its_budget_and_saves_decoding(small, monkeypatch):
    calls = []
    monkeypatch.setattr(decoders, "decode", lambda *a: calls.append(1) or decode(*a))
    take(small, 10, batch_size=7)
    assert len(calls) == 7
    calls.clear()
    one = 3 * 24 * 24 + 512
    with Loader(small, 24, 7, 3, cache_bytes=3 * one + 10) as loader:
        for _ in range(10):
            next(loader)
        assert loader._reader._cache._used == 3 * one
    assert 35 < len(calls) < 70


def test_load_all(source):
    bad = BadImages()
    img, labels = load_all(source, 16, bad=bad)
    refused = sum(case.pixels is None for case in odd_images())
    assert img.shape == (len(source) - refused, 3, 16, 16)
    assert img.dtype == torch.uint8
    assert bad.count == refused
    kept = [i for i in range(len(source)) if i not in bad]
    assert labels.tolist() == [source.label(i) for i in kept]
    at = kept.index(next(i for i in kept if source.name(i) == "b/odd/rgb16.png"))
    # Centre cut of a 64x48 picture: the four quadrants are still in the corners.
    assert img[at, :, 0, 0].tolist() == picture()[0, 0].tolist()
    assert img[at, :, -1, -1].tolist() == picture()[-1, -1].tolist()
    threaded = load_all(source, 16, workers=3)
    assert torch.equal(img, threaded[0])
    assert torch.equal(labels, threaded[1])
    assert not loader_threads()


def test_load_all_without_labels_or_images(small, tmp_path):
    assert load_all(small, 8)[1] is None
    for i in range(7):
        (tmp_path / f"{i}.png").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"load_all: source has no readable image among 7 \(the first: '0.png', the file is empty\)"
    ):
        load_all(small, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "loader: size has 0, expected at least 1"),
        ({"batch_size": 0}, "loader: batch_size has 0, expected at least 1"),
        ({"start": -1}, "loader: start has -1, expected at least 0"),
        ({"workers": -2}, "loader: workers has -2, expected at least 0"),
        ({"prefetch": -1}, "loader: prefetch has -1"),
        ({"repeat": 0}, "loader: repeat has 0, expected at least 1"),
        ({"decoder": "guess"}, "loader: decoder has 'guess', expected 'auto' or 'pillow'"),
        ({"rank": 2, "world": 2}, "loader: rank has 2, expected 0 to 1 because world is 2"),
        ({"seed": -5}, "loader: seed has -5"),
        ({"changes": [Change(4, 0, 2)]}, r"loader: changes has \(4, 0, 2\), expected sizes of at least 1"),
        ({"changes": [Change(4, 8, 2), Change(3, 8, 2)]}, "loader: changes has 3 after 4, expected ascending"),
    ],
)
def test_wrong_arguments(small, options, message):
    with pytest.raises(UserError, match=message):
        Loader(small, **{"size": 8, "batch_size": 2, "seed": 1, **options})
