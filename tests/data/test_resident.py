"""The cache of pixels: what it keeps, where, how much of it, and that batches do not depend on it."""

import threading
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from mimfast._check import UserError
from mimfast.data import resident as resident_module
from mimfast.data.arrays import Arrays
from mimfast.data.decode import decode
from mimfast.data.memory import Memory
from mimfast.data.prep import PrepConfig, prep
from mimfast.data.resident import Plan, Resident, check_plan, open_resident, plan, square_boxes, square_copy
from mimfast.data.sources import Folder, Subset, open_source, pixels_at, shapes_of
from mimfast.data.store import Store
from mimfast.ops import crop_resize
from mimfast.testing.images import encode, noise

SIZES = [(80, 60), (60, 80), (31, 100), (32, 32), (20, 25), (64, 64), (97, 41), (33, 33)]
ROOMY = Memory("here", 1 << 40, 0, "others")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of many sizes and one file that is none."""
    root = tmp_path_factory.mktemp("images")
    for i, (width, height) in enumerate(SIZES):
        (root / f"{i:02d}.png").write_bytes(encode(noise(width, height, i), "PNG"))
    (root / "99.png").write_bytes(b"not an image")
    return root


@pytest.fixture(scope="module")
def stores(folder, tmp_path_factory):
    """format -> a store of the folder's images, short side 24 at most."""
    root = tmp_path_factory.mktemp("stores")
    for kind in ("jpeg", "raw"):
        prep(Folder(folder), root / kind, PrepConfig(size=24, format=kind), origin="test", workers=1)
    return {kind: root / kind for kind in ("jpeg", "raw")}


def pixels_of(source, i, min_side=None):
    pixels = pixels_at(source, i)
    return decode(source.read(i), min_side) if pixels is None else pixels


def some_boxes(sizes, seed=0):
    """int32 (n, 4), top, left, height, width inside images of these (width, height)."""
    rng = np.random.default_rng(seed)
    rows = []
    for width, height in sizes:
        wide, tall = rng.integers(1, width + 1), rng.integers(1, height + 1)
        rows.append([rng.integers(0, height - tall + 1), rng.integers(0, width - wide + 1), tall, wide])
    return np.array(rows, np.int32)


def direct(pixels, box, flip, size, filter="bicubic"):
    """The crop out of an image by itself."""
    img, boxes = torch.from_numpy(np.array(pixels))[None], torch.from_numpy(box[None])
    return crop_resize(img, boxes, torch.tensor([bool(flip)]), size, filter=filter)[0]


# -- sizes that are known before anything is read


@pytest.mark.parametrize("min_side", [None, 100, 12, 7, 3, 1])
def test_a_store_knows_the_sizes_of_its_images_as_they_are_decoded(stores, min_side):
    for path in stores.values():
        source = Store(path)
        found = shapes_of(source, min_side)
        assert found.dtype == np.int32
        wanted = [pixels_of(source, i, min_side).shape[:2] for i in range(len(source))]
        assert [tuple(row) for row in found.tolist()] == wanted


def test_jpegs_of_odd_sides_are_reduced_as_foreseen(tmp_path):
    shapes = [(37, 91), (64, 64), (65, 129), (800, 801), (1, 5), (16, 300)]
    root = tmp_path / "odd"
    root.mkdir()
    for i, (height, width) in enumerate(shapes):
        (root / f"{i}.jpg").write_bytes(encode(noise(width, height, i), "JPEG"))
    prep(Folder(root), tmp_path / "store", PrepConfig(size=10_000), origin="test", workers=1)
    source = Store(tmp_path / "store")
    for min_side in (1, 2, 8, 16, 32, 64, 100, 400, 5000):
        wanted = [decode(source.read(i), min_side).shape[:2] for i in range(len(source))]
        assert [tuple(row) for row in shapes_of(source, min_side).tolist()] == wanted


def test_arrays_and_parts_of_a_source_know_their_sizes(stores):
    arrays = Arrays(np.zeros((5, 3, 7, 9), np.uint8))
    assert shapes_of(arrays).tolist() == [[7, 9]] * 5
    source = Store(stores["raw"])
    part = Subset(source, np.array([4, 1]))
    assert shapes_of(part).tolist() == shapes_of(source)[[4, 1]].tolist()


def test_a_folder_does_not_know_its_sizes(folder):
    assert shapes_of(Folder(folder)) is None
    assert shapes_of(Subset(Folder(folder), np.array([0]))) is None
    wanted = "cache: data.path has images whose sizes are not known before they are read, expected data.cache_side "
    with pytest.raises(UserError, match=wanted):
        Resident(Folder(folder), "cpu")
    with pytest.raises(UserError, match="or a store made by mimfast prep because memory is set aside"):
        plan(Folder(folder), ROOMY)


# -- what is kept


@pytest.mark.parametrize("staged", [False, True], ids=["host", "staged"])
@pytest.mark.parametrize("kind", ["jpeg", "raw"])
def test_crops_are_those_of_the_images(stores, kind, staged):
    source = Store(stores[kind])
    resident = Resident(source, "cpu", staged=staged)
    assert resident.buffer.numel() == 3 * sum(height * width for height, width in shapes_of(source).tolist())
    sizes = []
    for i in range(len(source)):
        assert not resident.has(i)
        assert resident.get(i) is None
        pixels = pixels_of(source, i)
        kept = resident.put(i, pixels)
        assert kept.pixels is pixels
        assert resident.has(i)
        assert resident.sizes(i) == (kept.width, kept.height) == pixels.shape[1::-1]
        sizes.append(resident.sizes(i))
        view = resident.get(i)
        assert (view.width, view.height) == sizes[-1]
        assert view.pixels is None if staged else (view.pixels == pixels).all()
    assert resident.count == len(source)
    ids = np.array([3, 0, 7, 3, 5, 1])
    boxes = some_boxes([sizes[i] for i in ids])
    flip = np.array([True, False, False, True, True, False])
    found = resident.crop(ids, boxes, flip, 18, "bicubic")
    for row, i in enumerate(ids):
        assert torch.equal(found[row], direct(pixels_of(source, i), boxes[row], flip[row], 18))
    out = torch.empty_like(found)
    assert resident.crop(ids, boxes, flip, 18, "bicubic", out=out) is out
    assert torch.equal(out, found)


@pytest.mark.parametrize("staged", [False, True], ids=["host", "staged"])
def test_crops_of_copies(folder, staged):
    """Any source will do; the sizes are those of the originals, the bytes 3 S^2 an image."""
    source = Subset(Folder(folder), np.arange(len(SIZES)))
    resident = Resident(source, "cpu", 16, staged=staged)
    assert resident.min_side == 16
    assert resident.buffer.numel() == resident.nbytes == 3 * 16 * 16 * len(SIZES)
    for i in range(len(SIZES)):
        pixels = pixels_of(source, i)
        kept = resident.put(i, pixels)
        assert (kept.pixels == square_copy(pixels, 16)).all()
        assert (kept.width, kept.height) == resident.sizes(i) == SIZES[i]
    ids, flip = np.array([5, 2, 2, 0]), np.array([False, True, False, True])
    boxes = some_boxes([SIZES[i] for i in ids])
    found = resident.crop(ids, boxes, flip, 12, "bilinear")
    widths, heights = np.array([SIZES[i] for i in ids]).T
    mapped = square_boxes(boxes, widths, heights, 16)
    assert (resident.place(boxes, widths, heights) == mapped).all()
    for row, i in enumerate(ids):
        copy = square_copy(pixels_of(source, i), 16)
        assert torch.equal(found[row], direct(copy, mapped[row], flip[row], 12, "bilinear"))


def test_without_a_device_it_only_makes_copies(folder):
    resident = Resident(Folder(folder), None, 16)
    pixels = noise(40, 30)
    kept = resident.put(0, pixels)
    assert (kept.pixels == square_copy(pixels, 16)).all()
    assert (kept.width, kept.height) == (40, 30)
    assert not resident.has(0)
    assert resident.get(0) is None
    assert resident.count == 0


def test_an_image_of_another_size_than_foreseen_is_not_kept(stores):
    source = Store(stores["raw"])
    resident = Resident(source, "cpu")
    odd = noise(5, 9)
    kept = resident.put(0, odd)
    assert kept.pixels is odd
    assert not resident.has(0)
    with pytest.raises(UserError, match="cache: ids has an image that was never put"):
        resident.crop(np.array([0]), np.array([[0, 0, 1, 1]], np.int32), np.zeros(1, bool), 4, "bicubic")


def test_which_images_another_size_of_crops_could_use(stores):
    source = Store(stores["jpeg"])
    resident = Resident(source, "cpu", min_side=100)
    assert resident.usable(100) is None
    assert resident.usable(30) is None  # too small to be reduced for either
    shapes, reduced = shapes_of(source, 100), shapes_of(source, 12)
    assert resident.usable(12).tolist() == (shapes == reduced).all(1).tolist()
    assert 0 < resident.usable(12).sum() < len(source)
    assert Resident(source, "cpu", 16).usable(12) is None
    assert Resident(source, None, 16).usable(12) is None


@pytest.mark.parametrize("staged", [False, True], ids=["host", "staged"])
def test_filled_by_many_threads(staged):
    """Every image is whole from the moment `has` says so, and threads that put the same one do no harm."""
    n, side = 400, 24
    images = np.random.default_rng(1).integers(0, 256, (n, side, side, 3), np.uint8)
    resident = Resident(Arrays(images), "cpu", staged=staged)
    wrong: list[int] = []

    def work(seed: int) -> None:
        for i in np.random.default_rng(seed).permutation(n).tolist():
            if not resident.has(i):
                resident.put(i, images[i])
            at = i * 3 * side * side
            if not (resident.buffer[at : at + 3 * side * side].numpy() == images[i].reshape(-1)).all():
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert resident.count == n
    assert (resident.buffer.numpy() == images.reshape(-1)).all()


def test_memory_is_the_buffer(monkeypatch):
    """Only the planned bytes are asked for, in one piece."""
    asked = []
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: asked.append(size) or real(*size, **options))
    images = np.zeros((50, 8, 8, 3), np.uint8)
    resident = Resident(Arrays(images), "cpu")
    for i in range(50):
        resident.put(i, images[i])
    assert asked == [(50 * 3 * 64,)]
    assert plan(Arrays(images), ROOMY).need == resident.nbytes == 50 * 3 * 64


def test_small_arrays_travel_together(stores):
    resident = Resident(Store(stores["raw"]), "cpu")
    arrays = np.arange(3), np.arange(12, dtype=np.int32).reshape(3, 4), np.array([True, False, True])
    moved = resident.move(*arrays)
    assert [t.dtype for t in moved] == [torch.int64, torch.int32, torch.bool]
    assert all((t.numpy() == array).all() for t, array in zip(moved, arrays))


# -- copies and boxes


def test_a_copy_of_its_own_size_is_the_image():
    pixels = noise(16, 16)
    assert square_copy(pixels, 16) is pixels


def test_boxes_on_copies_stay_inside_and_are_half_a_pixel_off_at_most():
    rng = np.random.default_rng(3)
    for side in (1, 7, 128):
        sizes = np.concatenate([rng.integers(1, 3000, (500, 2)), [[1, 1], [2, 3000], [3000, 1]]])
        boxes = some_boxes(sizes.tolist(), side)
        found = square_boxes(boxes, sizes[:, 0], sizes[:, 1], side)
        assert found.dtype == np.int32
        for whole, first, length in ((sizes[:, 1], 0, 2), (sizes[:, 0], 1, 3)):
            begin, end = found[:, first], found[:, first] + found[:, length]
            assert (begin >= 0).all()
            assert (end > begin).all()
            assert (end <= side).all()
            exact = boxes[:, first] * side / whole, (boxes[:, first] + boxes[:, length]) * side / whole
            thin = exact[1] - exact[0] < 1  # widened to a pixel
            assert (np.abs(begin - exact[0])[~thin] <= 0.5).all()
            assert (np.abs(end - exact[1])[~thin] <= 0.5).all()
            assert (np.abs(begin - exact[0]) <= 1).all()


def test_the_whole_image_is_the_whole_copy():
    sizes = np.array([[500, 375], [3, 2], [64, 64]])
    whole = np.stack([np.zeros(3), np.zeros(3), sizes[:, 1], sizes[:, 0]], 1).astype(np.int32)
    assert square_boxes(whole, sizes[:, 0], sizes[:, 1], 64).tolist() == [[0, 0, 64, 64]] * 3


def test_crops_of_a_copy_look_like_those_of_the_image():
    """Of a smooth picture, out of a copy that is no coarser than the crop, within 2 grey levels on average and 8 at
    most; half a pixel of the copy is what the box may be off."""
    y, x = np.mgrid[0:375, 0:500]
    waves = [120 + 100 * np.sin(x / 60 + k) * np.cos(y / 45 - k) for k in range(3)]
    pixels = np.stack(waves, 2).astype(np.uint8)
    rng = np.random.default_rng(0)
    copy = square_copy(pixels, 128)
    for _ in range(20):
        tall, wide = rng.integers(170, 376), rng.integers(220, 501)
        box = np.array([[rng.integers(0, 376 - tall), rng.integers(0, 501 - wide), tall, wide]], np.int32)
        mapped = square_boxes(box, np.array([500]), np.array([375]), 128)
        near, exact = direct(copy, mapped[0], False, 64), direct(pixels, box[0], False, 64)
        error = (near.float() - exact.float()).abs()
        assert error.mean() < 2
        assert error.max() <= 8


# -- whether it fits


def test_plan_of_imagenet_in_one_sentence():
    gpu = Memory("on the GPU", 139 * 10**9, 35 * 10**9, "the network")
    found = plan(range(1_281_167), gpu, side=128)
    assert found.need == 1_281_167 * 49_152
    assert found.fits
    assert found.sentence == (
        "cache: 1 281 167 images x 49 152 B = 63.0 GB, 139.0 GB free on the GPU, of which 35.0 GB stay free for the "
        "network: fits"
    )
    check_plan(found, "gpu", 128, None)


def test_plan_of_images_of_many_sizes(stores):
    source = Store(stores["raw"])
    sizes = [3 * height * width for height, width in shapes_of(source).tolist()]
    found = plan(source, ROOMY, processes=2)
    assert found == Plan(len(sizes), min(sizes), max(sizes), 2 * sum(sizes), 2, ROOMY)
    assert f"8 images of {min(sizes):,} to {max(sizes):,} B in 2 processes = ".replace(",", " ") in found.sentence


@pytest.mark.parametrize(
    ("cache", "side", "host", "wanted"),
    [
        ("gpu", 256, None, "'none' or data.cache_side 80"),
        ("gpu", 256, 10**12, "'none' or 'host' or data.cache_side 80"),
        ("host", 256, 10**12, "'none' or data.cache_side 80"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(cache, side, host, wanted):
    found = plan(range(1_281_167), Memory("on the GPU", 40 * 10**9, 10**10, "the network"), side=side)
    assert not found.fits
    assert found.sentence.endswith(": does not fit")
    host = None if host is None else Memory("in memory", host, 0, "others")
    with pytest.raises(UserError) as caught:
        check_plan(found, cache, side, host)
    assert str(caught.value) == (
        f"pretrain: data.cache has '{cache}', expected {wanted} because 1 281 167 images x 196 608 B = 251.9 GB, 40.0 "
        "GB free on the GPU, of which 10.0 GB stay free for the network"
    )
    smaller = plan(range(1_281_167), found.memory, side=80)
    larger = plan(range(1_281_167), found.memory, side=96)
    assert smaller.fits
    assert not larger.fits


def test_nothing_is_recommended_that_does_not_fit():
    found = plan(range(10**9), Memory("here", 10**9, 0, "others"), side=32)
    with pytest.raises(UserError, match="expected 'none' because"):
        check_plan(found, "host", 32, None)


def test_opening(stores, monkeypatch):
    source, cpu = Store(stores["raw"]), torch.device("cpu")
    assert open_resident(source, "none", None, None, cpu) is None
    copies = open_resident(source, "none", 16, None, cpu)
    assert (copies.side, copies.device, copies.plan) == (16, None, None)
    asked = Mock()
    kept = open_resident(source, "host", None, None, cpu, wait=asked)
    asked.assert_called_once_with()
    assert kept.nbytes == kept.plan.need
    assert not kept.on_device
    with pytest.raises(UserError, match=r"data\.cache has 'gpu', expected 'none' or 'host' because the run is on cpu"):
        open_resident(source, "gpu", None, None, cpu)
    monkeypatch.setattr(resident_module, "host_memory", lambda: Memory("here", 1000, 900, "others"))
    with pytest.raises(UserError, match="expected 'none' because 8 images of"):
        open_resident(source, "host", None, None, cpu)


def test_bad_arguments(stores):
    source = open_source(str(stores["raw"]))
    for side in (0, 65537):
        with pytest.raises(UserError, match=f"cache: side has {side}, expected 1 to 65536"):
            Resident(source, "cpu", side)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="cache: device has cuda:0, expected 'cpu' because"):
            Resident(source, "cuda:0")


def test_memory_that_the_system_refuses(monkeypatch):
    monkeypatch.setattr(torch, "empty", Mock(side_effect=RuntimeError("no such luck\nwith a trace")))
    with pytest.raises(UserError, match=r"cache: cpu has no 0.2 kB in one piece, expected .*\(no such luck\)"):
        Resident(Arrays(np.zeros((1, 8, 8, 3), np.uint8)), "cpu")
