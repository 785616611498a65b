"""Reading a store, finding damage in it, and training from it."""

import json
import os
import pickle
import threading

import numpy as np
import pytest
from PIL import Image

from mimfast._check import UserError
from mimfast.data import columns
from mimfast.data import store as store_module
from mimfast.data.decode import decode, decode_image
from mimfast.data.loader import Loader
from mimfast.data.prep import PrepConfig, prep
from mimfast.data.sources import Folder, Subset, open_source, pixels_at, split
from mimfast.data.store import BAD, DATA, Store
from mimfast.data.verify import verify
from mimfast.testing.images import encode, noise

SIZES = [(80, 60), (60, 80), (31, 100), (32, 32), (20, 25), (64, 64)]


@pytest.fixture(autouse=True)
def check_what_is_read(monkeypatch):
    """Also where the native core is missing and checksums are slow."""
    monkeypatch.setattr(store_module, "is_fast", lambda: True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve images in two classes, half of them JPEG."""
    root = tmp_path_factory.mktemp("images")
    for i, (width, height) in enumerate(SIZES * 2):
        kind = ("JPEG", "PNG")[i % 2]
        path = root / f"class{i % 2}" / f"{i:02d}-naïve.{kind.lower()}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(noise(width, height, i), kind))
    return root


def make(folder, out, **config):
    prep(Folder(folder), out, PrepConfig(size=32, **config), origin="test", workers=2)
    return Store(out)


@pytest.fixture
def raw(folder, tmp_path):
    return make(folder, tmp_path / "raw", format="raw")


@pytest.fixture
def jpeg(folder, tmp_path):
    return make(folder, tmp_path / "jpeg")


def damage(path, at, bit=3):
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


def test_names_labels_and_split_survive(folder, raw, jpeg):
    source = Folder(folder)
    for store in (raw, jpeg, open_source(str(raw.path))):
        assert len(store) == 12
        assert store.classes == source.classes == ["class0", "class1"]
        for i in range(12):
            assert (store.name(i), store.label(i)) == (source.name(i), source.label(i))
        assert [part.indices.tolist() for part in split(store, 3)] == [
            part.indices.tolist() for part in split(source, 3)
        ]


def test_held_out_names_survive(folder, tmp_path):
    source = Folder(folder, held_out=("class0/00-naïve.jpeg",))
    prep(source, tmp_path / "s", PrepConfig(size=8))
    assert [split(Store(tmp_path / "s"))[1].name(0)] == ["class0/00-naïve.jpeg"]


def test_raw_pixels_are_the_resized_image(folder, raw):
    source = Folder(folder)
    for i in range(12):
        image = decode_image(source.read(i))
        short = min(image.size)
        if short > 32:
            wanted = [max(32, round(side * 32 / short)) for side in image.size]
            image = image.resize(wanted, Image.Resampling.BICUBIC, reducing_gap=3.0)
        pixels = raw.pixels(i)
        assert np.array_equal(pixels, np.asarray(image))
        assert (raw.heights[i], raw.widths[i]) == pixels.shape[:2]
        assert np.shares_memory(pixels, raw.data)
        assert not pixels.flags.writeable
        assert np.array_equal(decode(raw.read(i)), pixels)
        assert raw.offsets[i] % 64 == 0


def test_jpeg_records(folder, jpeg):
    source = Folder(folder)
    for i in range(12):
        width, height = decode_image(source.read(i)).size
        image = decode_image(jpeg.read(i))
        assert min(image.size) == min(32, width, height)
        assert image.size == (jpeg.widths[i], jpeg.heights[i])
        assert jpeg.pixels(i) is None
        assert jpeg.record(i).tobytes() == jpeg.read(i)
        if min(width, height) <= 32 and source.name(i).endswith("jpeg"):
            assert jpeg.read(i) == source.read(i)  # as it was, not encoded again


def test_square_records_have_one_shape(folder, tmp_path):
    store = make(folder, tmp_path / "s", format="raw", square=True)
    assert set(store.heights.tolist()) == set(store.widths.tolist()) == {32}
    for i in range(12):
        image = decode_image(Folder(folder).read(i))
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.resize((32, 32), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
        assert np.array_equal(store.pixels(i), np.asarray(square))


def test_subset_passes_pixels_on(raw, jpeg):
    assert np.array_equal(pixels_at(Subset(raw, np.array([3])), 0), raw.pixels(3))
    assert pixels_at(Subset(jpeg, np.array([3])), 0) is None


def test_header(raw, jpeg):
    kept = ("format", "version", "records", "size", "square", "filter", "quality", "source", "images", "bad")
    assert [raw.meta[key] for key in kept] == ["mimfast store", 1, "raw", 32, False, "bicubic", None, "test", 12, 0]
    assert [jpeg.meta[key] for key in kept[2:7]] == ["jpeg", 32, False, "bicubic", 90]
    assert raw.meta["colour"].startswith("RGB")
    assert raw.meta["software"].startswith("Pillow")
    assert not (raw.path / BAD).exists()


def test_other_processes_and_threads(raw):
    copy = pickle.loads(pickle.dumps(raw))
    assert np.array_equal(copy.pixels(5), raw.pixels(5))
    raw.will_need(np.arange(12))
    failures = []

    def use():
        for i in list(range(12)) * 20:
            if decode(copy.read(i)).tobytes() != raw.record(i).tobytes():
                failures.append(i)

    threads = [threading.Thread(target=use) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not failures


@pytest.mark.parametrize("kind", ["raw", "jpeg"])
def test_a_flipped_bit_is_found_and_named(kind, request):
    store = request.getfixturevalue(kind)
    assert verify(store.path) == []
    for i in (0, 7, 11):
        at = int(store.offsets[i] + store.sizes[i] // 2)
        damage(store.path / DATA, at)
        (problem,) = verify(store.path)
        first, last = int(store.offsets[i]), int(store.offsets[i] + store.sizes[i] - 1)
        assert problem.startswith(f"record {i} (bytes {first} to {last} of data.mim) has CRC-32C ")
        assert problem.endswith(f": '{store.name(i)}'")
        fresh = Store(store.path)
        for read in (fresh.read, fresh.record):
            with pytest.raises(OSError, match=rf"record {i} \(bytes {first} to {last} of data.mim\) has CRC-32C"):
                read(i)
        damage(store.path / DATA, at)
    assert verify(store.path) == []


def test_a_damaged_record_does_not_stop_training(raw):
    damage(raw.path / DATA, int(raw.offsets[4]) + 100)
    with Loader(Store(raw.path), 16, 6, seed=0, workers=2) as loader:
        for _ in range(4):
            batch = next(loader)
            assert batch.img.shape == (6, 3, 16, 16)
            assert 4 not in batch.sample_ids.tolist()
        assert loader.bad.names == [raw.name(4)]
        assert "record 4 (bytes" in loader.bad.reasons[0]


def test_a_flipped_bit_in_the_index(raw):
    path = raw.path / "index.mim"
    size = path.stat().st_size
    damage(path, size - 20)  # within the last column, the names
    assert any("index.mim: the checksum of column names does not fit" in problem for problem in verify(raw.path))
    damage(path, size - 20)
    damage(path, 200)
    with pytest.raises(UserError, match=r"store: '.*index\.mim' is damaged: the checksum of its header does not fit"):
        Store(raw.path)


def test_damage_outside_the_records(raw):
    damage(raw.path / DATA, 10)
    assert verify(raw.path) == ["data.mim: its header is damaged, or it belongs to another store"]
    with pytest.raises(UserError, match="is the data of another store"):
        Store(raw.path)


def test_cut_short(raw):
    size = os.path.getsize(raw.path / DATA)
    os.truncate(raw.path / DATA, int(raw.offsets[10]) + 5)
    problems = verify(raw.path)
    assert problems[0] == f"data.mim has {int(raw.offsets[10]) + 5} bytes, expected {size}"
    assert [text.split(" (")[0] for text in problems[1:]] == ["record 10", "record 11"]
    assert f"is cut off after 5 bytes: '{raw.name(10)}'" in problems[1]
    with pytest.raises(UserError, match=rf"data\.mim' has \d+ bytes, expected {size}: it was cut short or added to"):
        Store(raw.path)
    os.truncate(raw.path / DATA, 20)
    assert len(verify(raw.path)) == 13
    with pytest.raises(UserError, match=r"has 20 bytes"):
        Store(raw.path)
    index = raw.path / "index.mim"
    os.truncate(index, index.stat().st_size - 300)
    with pytest.raises(
        UserError, match=r"index\.mim' is damaged: it has \d+ bytes, expected \d+ or more: it is cut short"
    ):
        Store(raw.path)
    os.unlink(raw.path / DATA)
    with pytest.raises(UserError, match=r"index\.mim' is damaged"):
        verify(raw.path)


def test_data_of_another_store(raw, folder, tmp_path):
    other = make(folder, tmp_path / "other", format="raw", filter="lanczos")
    os.replace(other.path / DATA, raw.path / DATA)
    with pytest.raises(UserError, match=r"data\.mim' is the data of another store"):
        Store(raw.path)


def rewrite(path, **changes):
    meta, every = columns.load(path / "index.mim")
    every = {name: np.array(column) for name, column in every.items()}
    with open(path / "index.mim", "wb") as file:
        columns.save(file, {**meta, **changes}, every)


def test_another_version(raw):
    rewrite(raw.path, version=7)
    with pytest.raises(UserError, match=r"store: '.*' has version 7, expected 1 because this mimfast reads no other"):
        open_source(str(raw.path))


def test_columns_that_contradict_the_header(raw):
    rewrite(raw.path, images=13)
    with pytest.raises(UserError, match=r"is damaged: its column offset is not as the header says"):
        Store(raw.path)


def test_missing_parts(raw, tmp_path):
    with pytest.raises(UserError, match=r"'.*nowhere' does not exist"):
        Store(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"store: '.*empty' has no index\.mim, expected a folder that mimfast prep has"):
        Store(tmp_path / "empty")
    os.unlink(raw.path / DATA)
    with pytest.raises(UserError, match=r"data\.mim' cannot be read \(No such file"):
        Store(raw.path)
    assert verify(raw.path) == ["data.mim cannot be read (No such file or directory)"]


def test_unreadable(raw, monkeypatch):
    real = os.open

    def refuse(path, *args, **options):
        if os.fspath(path).endswith(DATA):
            raise PermissionError(13, "Permission denied")
        return real(path, *args, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match=r"data\.mim' cannot be read \(Permission denied\), expected the records"):
        Store(raw.path)


def test_the_loader_sees_the_same_crops_in_raw_records_as_in_png_files(raw, tmp_path):
    for i in range(12):
        path = tmp_path / "png" / raw.name(i).replace("jpeg", "png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(raw.pixels(i)).save(path)
    with Loader(raw, 16, 8, seed=3, workers=2) as ours, Loader(Folder(tmp_path / "png"), 16, 8, seed=3) as theirs:
        for _ in range(4):
            a, b = next(ours), next(theirs)
            assert np.array_equal(a.img, b.img)
            assert np.array_equal(a.labels, b.labels)


def test_a_store_of_a_store(jpeg, tmp_path):
    again = tmp_path / "again"
    prep(jpeg, again, PrepConfig(size=32))
    assert (again / DATA).read_bytes()[64:] == (jpeg.path / DATA).read_bytes()[64:]
    assert json.loads(json.dumps(Store(again).meta["classes"])) == ["class0", "class1"]
