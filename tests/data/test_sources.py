import gc
import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import mimfast
from mimfast._check import UserError
from mimfast.data import index as index_module
from mimfast.data.sources import Folder, Subset, open_source, split
from mimfast.testing.images import encode, picture

PNG = encode(picture(8, 8), "PNG")


def fill(root, *names):
    for name in names:
        path = os.path.join(os.fsencode(root), name if isinstance(name, bytes) else name.encode())
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(PNG)
    return root


def names(source):
    return [source.name(i) for i in range(len(source))]


def age(root, seconds=60):
    """As if the folders had been left alone for a while: a fresh one is always scanned again."""
    then = time.time_ns() - seconds * 10**9
    for folder, _, _ in os.walk(root):
        os.utime(folder, ns=(then, then))


@pytest.fixture
def scans(monkeypatch):
    """Counts the scans of the file system."""
    calls = []
    scan = index_module.scan
    monkeypatch.setattr(index_module, "scan", lambda root: calls.append(root) or scan(root))
    return calls


def test_any_tree_in_a_fixed_order(tmp_path):
    fill(
        tmp_path,
        "z.png",
        "b/deep/er/2.JPG",
        "b/1.webp",
        "a/3.tiff",
        "notes.txt",
        ".hidden.png",
        ".git/4.png",
        "a/._mac.jpg",
    )
    source = Folder(tmp_path)
    assert names(source) == ["z.png", "a/3.tiff", "b/1.webp", "b/deep/er/2.JPG"]
    assert source.read(0) == PNG
    assert source.classes is None
    assert source.label(0) is None


def test_first_level_folders_are_classes(tmp_path):
    source = Folder(fill(tmp_path, "dog/1.png", "cat/x/2.png", "cat/3.png"))
    assert source.classes == ["cat", "dog"]
    assert [(source.name(i), source.label(i)) for i in range(3)] == [
        ("cat/3.png", 0),
        ("cat/x/2.png", 0),
        ("dog/1.png", 1),
    ]


@pytest.mark.parametrize(
    "files", [["one/1.png", "one/2.png"], ["cat/1.png", "dog/2.png", "3.png"], [f"{i}/1.png" for i in range(1001)]]
)
def test_no_classes(tmp_path, files):
    source = Folder(fill(tmp_path, *files))
    assert len(source) == len(files)
    assert source.classes is None
    assert {source.label(i) for i in range(len(source))} == {None}


def test_folder_without_images_is_no_class(tmp_path):
    fill(tmp_path, "cat/1.png", "dog/2.png")
    (tmp_path / "empty").mkdir()
    assert Folder(tmp_path).classes == ["cat", "dog"]


def test_names_that_are_not_utf8(tmp_path):
    try:
        fill(tmp_path, b"caf\xe9.png", "naïve 写真.png")
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    source = Folder(tmp_path)
    assert names(source) == ["caf\\xe9.png", "naïve 写真.png"]
    assert source.read(0) == source.read(1) == PNG
    print(names(source))  # printable although the name is not


def test_folder_named_like_an_image(tmp_path):
    source = Folder(fill(tmp_path, "x.jpg/1.png"))
    assert names(source) == ["x.jpg/1.png"]


def test_links(tmp_path):
    fill(tmp_path / "data", "a/1.png")
    fill(tmp_path / "elsewhere", "2.png")
    (tmp_path / "data" / "a" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    source = Folder(tmp_path / "data")
    assert names(source) == ["gone.png", "a/1.png", "again/2.png"]
    with pytest.raises(OSError):
        source.read(0)


def test_pipes_are_left_out(tmp_path):
    fill(tmp_path, "1.png")
    os.mkfifo(tmp_path / "pipe.png")
    assert names(Folder(tmp_path)) == ["1.png"]


def test_missing_folder(tmp_path):
    with pytest.raises(UserError, match=r"data: folder '.*nowhere' does not exist, expected a folder of images"):
        open_source(str(tmp_path / "nowhere"))


def test_file_in_place_of_a_folder(tmp_path):
    fill(tmp_path, "1.png")
    with pytest.raises(UserError, match=r"data: '.*1\.png' is a file, expected the folder that holds the images"):
        open_source(str(tmp_path / "1.png"))


def test_no_images(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("")
    (tmp_path / "b.mp4").write_text("")
    with pytest.raises(
        UserError, match=r"has no images \(2 other files in 2 folders were seen\), expected .* \.jpg .*\.png"
    ):
        Folder(tmp_path)


def test_folders_that_cannot_be_listed(tmp_path, monkeypatch):
    fill(tmp_path, "a/1.png", "secret/2.png")
    scandir = os.scandir

    def guarded(path):
        if path.rstrip(b"/").endswith(b"secret"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(index_module.os, "scandir", guarded)
    source = Folder(tmp_path)
    assert names(source) == ["a/1.png"]
    assert source.unreadable_folders == 1
    with pytest.raises(UserError, match=r"data: folder '.*secret' cannot be listed \(Permission denied\)"):
        Folder(tmp_path / "secret")


def test_index_is_cached_and_the_data_folder_untouched(tmp_path, cache, scans):
    fill(tmp_path, "a/1.png", "b/2.png")
    age(tmp_path)
    before = sorted(os.walk(tmp_path))
    first, second = Folder(tmp_path), Folder(tmp_path)
    assert len(scans) == 1
    assert names(first) == names(second)
    assert first.classes == second.classes == ["a", "b"]
    assert [second.label(i) for i in range(2)] == [0, 1]
    assert sorted(os.walk(tmp_path)) == before
    assert len(list((cache / "index").iterdir())) == 1


def test_added_and_removed_files_are_seen(tmp_path):
    fill(tmp_path, "a/1.png", "b/c/2.png")
    age(tmp_path)
    assert len(Folder(tmp_path)) == 2
    fill(tmp_path, "b/c/3.png")
    assert len(Folder(tmp_path)) == 3
    (tmp_path / "a" / "1.png").unlink()
    assert names(Folder(tmp_path)) == ["b/c/2.png", "b/c/3.png"]
    fill(tmp_path, "new/4.png")
    assert len(Folder(tmp_path)) == 3


def test_change_within_one_tick_of_the_clock_is_seen(tmp_path):
    """A file added without a new time stamp, as on file systems that count whole seconds."""
    fill(tmp_path, "1.png")
    stamp = os.stat(tmp_path).st_mtime_ns
    assert len(Folder(tmp_path)) == 1
    fill(tmp_path, "2.png")
    os.utime(tmp_path, ns=(stamp, stamp))
    assert len(Folder(tmp_path)) == 2


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", b"junk" * 100, "cut", "version"])
def test_damaged_cache_only_costs_a_scan(tmp_path, cache, scans, damage):
    fill(tmp_path, "1.png", "2.png")
    age(tmp_path)
    Folder(tmp_path)
    (file,) = (cache / "index").iterdir()
    if damage == "cut":
        np.save(file, np.load(file)[:-5])
    elif damage == "version":
        blob = np.load(file)
        blob[:8].view(np.int64)[0] += 1
        np.save(file, blob)
    else:
        file.write_bytes(damage)
    assert len(Folder(tmp_path)) == 2
    assert len(scans) == 2
    assert len(Folder(tmp_path)) == 2
    assert len(scans) == 2


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("MIMFAST_CACHE", str(blocked / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setenv("HOME", str(blocked))
    monkeypatch.setattr(index_module.tempfile, "gettempdir", lambda: str(tmp_path))
    assert index_module.cache_root().parent == tmp_path
    assert index_module.cache_root() == index_module.cache_root()
    assert len(Folder(fill(tmp_path / "data", "1.png"))) == 1


def test_cache_inside_the_data_folder_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setenv("MIMFAST_CACHE", str(tmp_path / "cache"))
    fill(tmp_path, "1.png")
    assert len(Folder(tmp_path)) == 1
    assert not (tmp_path / "cache" / "index").exists()


def test_index_is_compact(tmp_path):
    fill(tmp_path, *(f"{i % 10}/{i:05d}.png" for i in range(500)))
    blob = index_module.pack(index_module.scan(os.fsencode(tmp_path)))
    assert blob.nbytes < 500 * (11 + 8 + 2) + 1000
    again = index_module.unpack(blob)
    assert again.name(499) == b"9/00499.png"


def big_index(n):
    """An index of n images in folders of 1000, as the scan of such a tree leaves it."""
    folders = b"".join(b"n%08d" % i for i in range(n // 1000))
    row = np.frombuffer(b"n00000000/n00000000_00000.JPEG", np.uint8)
    names = np.tile(row, (n, 1))
    numbers = np.arange(n)
    for digit in range(8):
        names[:, 8 - digit] = names[:, 18 - digit] = 48 + numbers // 1000 // 10**digit % 10
    for digit in range(5):
        names[:, 24 - digit] = 48 + numbers % 1000 // 10**digit % 10
    return index_module.Index(
        name_ends=np.arange(n + 1, dtype=np.int64) * row.size,
        names=names.reshape(-1),
        labels=(numbers // 1000 % 1000).astype(np.int16),
        class_names=np.empty(0, np.uint8),
        folder_mtimes=np.zeros(n // 1000, np.int64),
        folder_ends=np.arange(n // 1000 + 1, dtype=np.int64) * 9,
        folders=np.frombuffer(folders, np.uint8),
        scanned_ns=0,
        other_files=0,
        unreadable=0,
    )


OPEN_BIG = """
import sys, time
import numpy as np
from mimfast.data.index import unpack
def memory():
    return dict(line.split(":") for line in open("/proc/self/status"))["RssAnon"].split()[0]
before, began = int(memory()), time.perf_counter()
index = unpack(np.load(sys.argv[1], mmap_mode="r"))
n = len(index.labels)
names = [index.name(i) for i in np.random.default_rng(0).integers(0, n, 1000).tolist()]
print(n, int(memory()) - before, time.perf_counter() - began, index.name(n - 1).decode())
"""


@pytest.mark.parametrize("n", [1_000_000, pytest.param(10_000_000, marks=pytest.mark.slow)])
def test_a_big_index_costs_no_memory(tmp_path, n):
    np.save(tmp_path / "index.npy", index_module.pack(big_index(n)))
    command = [sys.executable, "-c", OPEN_BIG, str(tmp_path / "index.npy")]
    env = {**os.environ, "PYTHONPATH": str(Path(mimfast.__file__).parent.parent)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.split()
    count, kilobytes, seconds, last = int(done[0]), int(done[1]), float(done[2]), done[3]
    assert (count, last) == (n, f"n{n // 1000 - 1:08d}/n{n // 1000 - 1:08d}_00999.JPEG")
    assert kilobytes < 4000  # pages of the file are shared and can be dropped; what is private is what counts
    assert seconds < 1


def test_scan_keeps_no_python_object_an_image(tmp_path):
    """What a scan adds to the memory of Python objects is a small part of one string an image."""
    fill(tmp_path, *(f"{i % 5}/{i:06d}.png" for i in range(2000)))
    index_module.scan(os.fsencode(tmp_path))
    gc.collect()
    tracemalloc.start()
    index = index_module.scan(os.fsencode(tmp_path))
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(index.labels) == 2000
    assert size < 2000 * (12 + 8 + 2) * 1.4


def test_subset():
    class Letters:
        classes = ("vowel", "other")

        def __len__(self):
            return 5

        def read(self, i):
            return b"abcde"[i : i + 1]

        def name(self, i):
            return "abcde"[i]

        def label(self, i):
            return int("abcde"[i] not in "ae")

    part = Subset(Letters(), np.array([4, 1]))
    assert len(part) == 2
    assert part.classes == ("vowel", "other")
    assert [(part.read(i), part.name(i), part.label(i)) for i in range(2)] == [(b"e", "e", 0), (b"b", "b", 1)]


def test_split_is_stable_when_files_are_added(tmp_path):
    fill(tmp_path, *(f"{i}.png" for i in range(200)))
    train, held = split(Folder(tmp_path), 0.2)
    assert sorted(names(train) + names(held)) == sorted(f"{i}.png" for i in range(200))
    assert 20 < len(held) < 60
    fill(tmp_path, *(f"more{i}.png" for i in range(50)))
    bigger_train, bigger_held = split(Folder(tmp_path), 0.2)
    assert set(names(held)) < set(names(bigger_held))
    assert set(names(train)) < set(names(bigger_train))


@pytest.mark.parametrize("count", [1, 7, 29])
def test_split_by_number(tmp_path, count):
    train, held = split(Folder(fill(tmp_path, *(f"{i}.png" for i in range(30)))), count)
    assert (len(train), len(held)) == (30 - count, count)


def test_split_keeps_the_share_of_each_class(tmp_path):
    files = [f"{name}/{i}.png" for name, n in (("a", 60), ("b", 30), ("c", 2)) for i in range(n)]
    source = Folder(fill(tmp_path, *files))
    for holdout in (0.01, 0.5, 0.99):
        for part in split(source, holdout):
            assert {part.label(i) for i in range(len(part))} == {0, 1, 2}
    _, held = split(source, 46)
    assert np.bincount([held.label(i) for i in range(46)]).tolist() == [30, 15, 1]


@pytest.mark.parametrize("holdout", [0.001, 0.999, 1])
def test_both_sides_hold_something(tmp_path, holdout):
    train, held = split(Folder(fill(tmp_path, "1.png", "2.png")), holdout)
    assert len(train) == len(held) == 1


def test_split_of_singleton_classes(tmp_path):
    train, held = split(Folder(fill(tmp_path, "a/1.png", "b/1.png", "c/1.png")), 0.3)
    assert len(train) == 2
    assert len(held) == 1


def test_split_refuses(tmp_path):
    source = Folder(fill(tmp_path, "1.png", "2.png", "3.png"))
    for holdout in (0, 3, -1):
        with pytest.raises(
            UserError, match=f"split: holdout has {holdout}, expected 1 to 2 because the source holds 3"
        ):
            split(source, holdout)
    for holdout in (0.0, 1.0):
        with pytest.raises(UserError, match=r"split: holdout has .*, expected a share between 0 and 1"):
            split(source, holdout)
    with pytest.raises(UserError, match="split: source has 1 image, expected at least 2"):
        split(Subset(source, np.array([0])))
