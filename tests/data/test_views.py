"""Several views of an image in one batch, and the clock of the loader."""

import numpy as np
import pytest
import torch

from mimfast.data import decoders
from mimfast.data.decode import decode
from mimfast.data.loader import Loader
from mimfast.data.order import sample_at
from mimfast.data.sources import Folder
from mimfast.testing.images import encode, noise, write_folder


@pytest.fixture
def small(tmp_path):
    for i in range(7):
        (tmp_path / f"{i}.png").write_bytes(encode(noise(24, 24, i), "PNG"))
    return Folder(tmp_path)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Two classes, one with odd images too."""
    root = tmp_path_factory.mktemp("mixed")
    (root / "a").mkdir()
    for i in range(20):
        (root / "a" / f"{i:02d}.png").write_bytes(encode(noise(40 + i, 30 + 2 * i, i), "PNG"))
    write_folder(root / "odd")
    return Folder(root)


def take(source, n, size=24, batch_size=12, seed=3, **options):
    with Loader(source, size, batch_size, seed, **options) as loader:
        return [next(loader) for _ in range(n)]


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        for x, y in zip(a, b):
            assert (x is None and y is None) or torch.equal(x, y)


@pytest.mark.parametrize("workers", [0, 2])
def test_repeat_gives_views_of_each_image_and_decodes_it_once(small, workers, monkeypatch):
    calls = []
    monkeypatch.setattr(decoders, "decode", lambda *a: calls.append(1) or decode(*a))
    batches = take(small, 7, batch_size=6, repeat=3, workers=workers, cache_bytes=0)
    ids, epochs, img = (torch.cat([batch[k] for batch in batches]) for k in (1, 2, 0))
    assert ids.view(-1, 3).eq(ids[::3, None]).all()
    assert ids[::3].tolist() == sample_at(np.arange(14), 7, 3)[1].tolist()
    assert epochs.view(2, 7, 3).tolist() == [[[0, 1, 2]] * 7, [[3, 4, 5]] * 7]
    assert not any(torch.equal(img[row], img[row + 1]) for row in range(41))
    assert len(calls) <= 14 + 2 * workers * 3  # and what is prefetched
    # a view is what a run without repeat shows at that epoch
    views = {(e, i): x for e, i, x in zip(epochs.tolist(), ids.tolist(), img)}
    for batch in take(small, 6, batch_size=7):
        for epoch, i, x in zip(batch.epochs.tolist(), batch.sample_ids.tolist(), batch.img):
            assert torch.equal(views[epoch, i], x)
    assert_same(batches[3:], take(small, 4, batch_size=6, repeat=3, start=18, workers=workers))


def test_repeat_shares_among_processes_and_replaces_bad_images(source):
    alone = take(source, 20, repeat=4, workers=2)
    ranks = [take(source, 20, batch_size=6, rank=rank, world=2, repeat=4) for rank in range(2)]
    for step, whole in enumerate(alone):
        assert_same([whole], [[torch.cat(fields) for fields in zip(*(rank[step] for rank in ranks))]])


def test_clock_counts_every_stage(small):
    with Loader(small, 24, 7, 1, workers=2, cache_bytes=0) as loader:
        for _ in range(3):
            next(loader)
        found = loader.clock.snapshot()
    assert set(found) == {"read", "decode", "crop", "transfer", "wait"}
    assert found["wait"][1] == 21
    for stage in ("read", "decode", "crop"):
        seconds, images = found[stage]
        assert seconds > 0
        assert images >= 21
    assert found["transfer"] == (0.0, 0)


def test_an_image_too_long_to_crop_is_bad(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(encode(noise(24, 24, i), "PNG"))
    (tmp_path / "long.png").write_bytes(encode(np.zeros((1, 70_000, 3), np.uint8), "PNG"))
    with Loader(Folder(tmp_path), 8, 4, 1) as loader:
        next(loader)
        assert loader.bad.items() == [("long.png", "70000x1 has a side of more than 65536 pixels")]
