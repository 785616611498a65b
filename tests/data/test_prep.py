"""Writing a store: the same bytes for any number of workers and interruptions, bad images, bad places to write."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import mimfast
from mimfast._check import UserError
from mimfast.data import prep as module
from mimfast.data import store_writer as writer
from mimfast.data.arrays import Arrays
from mimfast.data.prep import PrepConfig, prep
from mimfast.data.sources import Folder
from mimfast.data.store import BAD, Store
from mimfast.data.verify import verify
from mimfast.testing.images import odd_images, write_folder

ARRAYS = Arrays(np.random.default_rng(0).integers(0, 256, (100, 20, 24, 3), np.uint8), np.arange(100) % 3)
CONFIG = PrepConfig(size=16)
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(mimfast.__file__).parent.parent)}


@pytest.fixture(autouse=True)
def commit_always(monkeypatch):
    monkeypatch.setattr(writer, "_COMMIT_SECONDS", 0.0)


def content(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """What an undisturbed run leaves."""
    out = tmp_path_factory.mktemp("clean") / "s"
    prep(ARRAYS, out, CONFIG, workers=1)
    return content(out)


@pytest.mark.parametrize("workers", [2, 5])
def test_any_number_of_workers(clean, tmp_path, workers):
    assert prep(ARRAYS, tmp_path / "s", CONFIG, workers=workers)[:2] == (100, 0)
    assert content(tmp_path / "s") == clean


def stop_after(count, error=KeyboardInterrupt):
    def progress(done, total, bad):
        assert (total, bad) == (100, 0)
        if done >= count:
            raise error

    return progress


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_interrupted_and_continued(clean, tmp_path, kind):
    out = tmp_path / "s"
    for count in (1, 30, 31, 90, 100):
        with pytest.raises(kind):
            prep(ARRAYS, out, CONFIG, workers=3, progress=stop_after(count, kind))
        with pytest.raises(UserError, match=r"is a store that was never finished, expected a whole one: run the same"):
            Store(out)
    done = prep(ARRAYS, out, CONFIG, workers=2)
    assert done.resumed == 100
    assert content(out) == clean
    again = prep(ARRAYS, out, CONFIG)
    assert (again.images, again.resumed) == (100, 100)
    assert content(out) == clean


@pytest.mark.parametrize("damage", ["torn line", "flipped line", "no newline", "tail", "data cut", "empty journal"])
def test_what_a_crash_may_leave(clean, tmp_path, damage):
    out = tmp_path / "s"
    with pytest.raises(KeyboardInterrupt):
        prep(ARRAYS, out, CONFIG, progress=stop_after(60))
    journal, data = out / "journal", out / "data.mim"
    lines = journal.read_bytes()
    if damage == "torn line":
        journal.write_bytes(lines[:-40])
    elif damage == "no newline":
        journal.write_bytes(lines[:-1])
    elif damage == "flipped line":
        journal.write_bytes(lines.replace(b'"kept"', b'"kepT"', 1))
    elif damage == "tail":
        data.write_bytes(data.read_bytes() + b"x" * 3000)
    elif damage == "data cut":
        os.truncate(data, data.stat().st_size - 1000)
    else:
        journal.write_bytes(b"")
    prep(ARRAYS, out, CONFIG)
    assert content(out) == clean


def test_killed_between_the_last_two_steps(clean, tmp_path):
    out = tmp_path / "s"
    prep(ARRAYS, out, CONFIG)
    (out / "journal").write_bytes(b"left over")
    assert prep(ARRAYS, out, CONFIG).resumed == 100
    assert content(out) == clean


def test_bad_images_are_left_out_and_listed(tmp_path):
    cases = {case.name: case for case in odd_images()}
    write_folder(tmp_path / "images")
    (tmp_path / "images" / "gone.png").symlink_to(tmp_path / "nowhere")
    summary = prep(Folder(tmp_path / "images"), tmp_path / "s", PrepConfig(size=64, format="raw"), workers=3)
    store = Store(tmp_path / "s")
    bad = {line["name"]: line["reason"] for line in map(json.loads, (store.path / BAD).open())}
    refused = {name for name, case in cases.items() if case.pixels is None}
    assert set(bad) == refused | {"gone.png"}
    assert (summary.images, summary.bad) == (len(cases) - len(refused), len(refused) + 1)
    assert bad["empty.jpg"] == "the file is empty"
    assert bad["gone.png"] == "cannot be read: No such file or directory"
    for i in range(len(store)):
        case = cases[store.name(i)]
        if min(case.pixels.shape[:2]) <= 64:
            error = np.abs(store.pixels(i).astype(int) - case.pixels)
            assert error.mean() <= case.tolerance, case.name
    assert verify(store.path) == []


def test_no_readable_image(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"prep: the source has no readable image among 3 \(the first: '0\.png', the file"
    ):
        prep(Folder(tmp_path), tmp_path / "s")


def test_too_long_for_jpeg():
    tower = Arrays(np.zeros((2, 5000, 10, 3), np.uint8))
    record = module.make_record(tower, 0, PrepConfig(size=1, format="jpeg"))
    assert (record.height, record.width) == (500, 1)
    huge = Arrays(np.zeros((1, 70000, 3, 3), np.uint8))
    for size in (2, 100):
        record = module.make_record(huge, 0, PrepConfig(size=size))
        assert record.data is None or record.height <= 65500
        assert record.reason or record.data


@pytest.fixture
def small_disk(monkeypatch):
    """A disk of so many bytes; None lifts the limit."""
    limit = [None]
    real, truncate, written = os.write, os.ftruncate, [0]

    def write(file, data):
        if limit[0] is not None and written[0] + len(data) > limit[0]:
            part = max(0, limit[0] - written[0])
            if part == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            data = bytes(data)[:part]
        written[0] += len(data)
        return real(file, data)

    def cut(file, size):
        written[0] -= os.fstat(file).st_size - size
        truncate(file, size)

    monkeypatch.setattr(writer.os, "write", write)
    monkeypatch.setattr(writer.os, "ftruncate", cut)
    return limit


@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_disk_full(clean, tmp_path, small_disk, monkeypatch, seconds):
    monkeypatch.setattr(writer, "_COMMIT_SECONDS", seconds)
    out = tmp_path / "s"
    small_disk[0] = len(clean["data.mim"]) // 2
    full = (
        r"disk of '.*s' is full \(No space left on device\) after \d\d of 100 images, expected about [\d.]+ MB more; "
    )
    with pytest.raises(UserError, match=full + "what is written is kept, and the same command goes on from there"):
        prep(ARRAYS, out, CONFIG)
    small_disk[0] = None
    done = prep(ARRAYS, out, CONFIG)
    assert done.resumed in (32, 48)  # three chunks fit, and the journal may need a little of the third
    assert content(out) == clean


@pytest.mark.parametrize("room", [0, 10, 64, 300])
def test_disk_full_from_the_start(clean, tmp_path, small_disk, room):
    small_disk[0] = room
    with pytest.raises(UserError, match=r"is full \(No space left on device\) after 0 of 100 images, expected room"):
        prep(ARRAYS, tmp_path / "s", CONFIG)
    small_disk[0] = None
    prep(ARRAYS, tmp_path / "s", CONFIG)
    assert content(tmp_path / "s") == clean


def test_disk_full_while_the_index_is_written(clean, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writer._columns, "save", full)
        with pytest.raises(UserError, match=r"is full \(No space left on device\) after 100 of 100 images, expected"):
            prep(ARRAYS, tmp_path / "s", CONFIG)
    prep(ARRAYS, tmp_path / "s", CONFIG)
    assert content(tmp_path / "s") == clean


def test_places_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"prep: '.*file' is a file, expected a new or empty folder"):
        prep(ARRAYS, tmp_path / "file")
    with pytest.raises(UserError, match=r"prep: '.*s' cannot be written \(Not a directory\) after 0 of 100 images"):
        prep(ARRAYS, tmp_path / "file" / "s")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"prep: '.*other' holds 'thesis\.tex', expected a new or empty folder"):
        prep(ARRAYS, tmp_path / "other")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(writer.os, "open", refuse)
    with pytest.raises(
        UserError, match=r"prep: '.*s' cannot be written \(Permission denied\) after 0 of 100 images, expec"
    ):
        prep(ARRAYS, tmp_path / "s")


def test_begun_or_finished_for_something_else(tmp_path):
    out = tmp_path / "s"
    with pytest.raises(KeyboardInterrupt):
        prep(ARRAYS, out, CONFIG, progress=stop_after(40))
    other = Arrays(np.zeros((100, 4, 4, 3), np.uint8))
    for finished in (False, True):
        if finished:
            prep(ARRAYS, out, CONFIG)
        with pytest.raises(
            UserError, match=r"of something else \(its size|begun for something else \(size was 16\), .* 17"
        ):
            prep(ARRAYS, out, PrepConfig(size=17))
        with pytest.raises(UserError, match=r"of something else \(its format|begun for something else \(format was"):
            prep(ARRAYS, out, PrepConfig(size=16, format="raw"))
        with pytest.raises(UserError, match=r"\(the images (differ|have changed since)\)"):
            prep(other, out, CONFIG)
    with pytest.raises(UserError, match=r"is both source and store, expected another folder"):
        prep(Store(out), out, CONFIG)


def test_two_at_once(tmp_path):
    job = module._job(ARRAYS, CONFIG)
    busy = r"prep: '.*s' is being written by another process"
    with writer.Writer(tmp_path / "s", job), pytest.raises(UserError, match=busy):
        prep(ARRAYS, tmp_path / "s", CONFIG)
    assert prep(ARRAYS, tmp_path / "s", CONFIG).images == 100


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"size": 0}, "prep: size has 0, expected 1 to 65500"),
        ({"quality": 101}, "prep: quality has 101, expected 1 to 100"),
        ({"format": "png"}, "prep: format has 'png', expected 'jpeg' or 'raw'"),
        ({"filter": "nearest"}, "prep: filter has 'nearest', expected 'bicubic' or 'lanczos' or 'bilinear'"),
    ],
)
def test_settings_out_of_range(config, message):
    with pytest.raises(UserError, match=message):
        PrepConfig(**config)


def test_needs_no_torch():
    code = "import sys; import mimfast.data.command; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=ENVIRONMENT)


def test_workers_out_of_range(tmp_path):
    with pytest.raises(UserError, match="prep: workers has 0, expected at least 1"):
        prep(ARRAYS, tmp_path / "s", workers=0)


def test_memory_is_bounded_by_the_chunks_ahead(tmp_path, monkeypatch):
    """A slow disk must not let finished chunks pile up."""
    ahead, most = set(), [0]
    make, append = module.make_record, writer.Writer.append

    def making(source, i, config):
        ahead.add(i)
        most[0] = max(most[0], len(ahead))
        return make(source, i, config)

    def appending(self, records):
        time.sleep(0.01)
        ahead.difference_update(record.sample_id for record in records)
        append(self, records)

    monkeypatch.setattr(module, "make_record", making)
    monkeypatch.setattr(writer.Writer, "append", appending)
    monkeypatch.setattr(module, "_CHUNK", 2)
    prep(ARRAYS, tmp_path / "s", CONFIG, workers=2)
    assert most[0] <= 2 * (2 * 2 + 1)
