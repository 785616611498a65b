import io
import os
import tarfile

import pytest

from mimfast._check import UserError
from mimfast.data import tar as module
from mimfast.data.clock import Tally
from mimfast.data.loader import Loader
from mimfast.data.sources import open_source
from mimfast.data.tar import Shards
from mimfast.testing.images import encode, odd_images, picture

PNG = encode(picture(8, 8), "PNG")


def write(path, members, kind=tarfile.PAX_FORMAT):
    """members: (name, bytes) or TarInfo."""
    with tarfile.open(path, "w", format=kind) as file:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                file.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            file.addfile(info, io.BytesIO(member[1]))
    return str(path)


def odd(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def names(source):
    return [source.name(i) for i in range(len(source))]


def test_webdataset_samples(tmp_path):
    members = []
    for i in range(3):
        members += [
            (f"{i:06d}.jpg", PNG),
            (f"{i:06d}.seg.png", b"mask"),
            (f"{i:06d}.cls", b"%d\n" % (2 * i)),
            (f"{i:06d}.json", b"{}"),
        ]
    source = open_source(write(tmp_path / "a.tar", members))
    assert names(source) == ["000000.jpg", "000001.jpg", "000002.jpg"]
    assert source.read(2) == PNG
    assert [source.label(i) for i in range(3)] == [0, 2, 4]
    assert source.classes == ["0", "1", "2", "3", "4"]
    assert source.skipped == {"further images of a sample": 3, "other files": 3}


def test_dots_in_names_of_photographs(tmp_path):
    source = Shards([write(tmp_path / "a.tar", [("IMG.1.jpg", PNG), ("IMG.2.jpg", PNG), ("./x/3.JPEG", PNG)])])
    assert names(source) == ["IMG.1.jpg", "IMG.2.jpg", "x/3.JPEG"]
    assert source.classes is None
    assert source.label(0) is None


def test_folders_are_classes_below_what_all_share(tmp_path):
    members = [(f"set/train/{name}.jpg", PNG) for name in ("dog/1", "cat/1", "cat/x/2", "dog/3")]
    source = Shards([write(tmp_path / "a.tar", [odd("set", tarfile.DIRTYPE), *members])])
    assert source.classes == ["cat", "dog"]
    assert [source.label(i) for i in range(4)] == [1, 0, 0, 1]
    assert Shards([write(tmp_path / "b.tar", [*members, ("set/train/4.jpg", PNG)])]).classes is None
    assert Shards([write(tmp_path / "c.tar", members[:1])]).classes is None


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_long_and_foreign_names(tmp_path, kind):
    long = "/".join(["d" * 60] * 3) + "/1.png"
    wanted = [long, "naïve 写真.png" if kind != tarfile.USTAR_FORMAT else "plain.png", "last.png"]
    assert names(Shards([write(tmp_path / "a.tar", [(name, PNG) for name in wanted], kind)])) == wanted


def test_size_beyond_octal(tmp_path):
    """GNU's base-256 sizes; the content is not there, so the shard counts as cut short."""
    write(tmp_path / "a.tar", [("1.png", PNG)])
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[124:136] = b"\x80" + (1 << 40).to_bytes(11, "big")
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(UserError, match=rf"a\.tar' is cut short: member '1\.png' needs {(1 << 40) + 512} bytes"):
        Shards([str(tmp_path / "a.tar")])


def test_members_that_are_refused(tmp_path):
    members = [
        ("good.png", PNG),
        ("../../etc/cron.png", PNG),
        ("a/../../b.png", PNG),
        ("/abs.png", PNG),
        ("..\\win.png", PNG),
        odd("link.png", tarfile.SYMTYPE, "/etc/passwd"),
        odd("hard.png", tarfile.LNKTYPE, "good.png"),
        odd("device.png", tarfile.CHRTYPE),
        odd("pipe.png", tarfile.FIFOTYPE),
        ("._mac.png", b"x"),
        odd("folder.png", tarfile.DIRTYPE),
        ("late.png", PNG),
    ]
    source = Shards([write(tmp_path / "a.tar", members)])
    assert names(source) == ["good.png", "late.png"]
    assert source.skipped == {
        "devices": 1, "hidden files": 1, "links": 2, "names outside the archive": 4, "pipes": 1,
    }  # fmt: skip
    assert sorted(os.listdir(tmp_path)) == ["a.tar"]


@pytest.mark.parametrize("keep", [100, 512, 700, 1600])
def test_cut_short(tmp_path, keep):
    path = write(tmp_path / "a.tar", [("1.png", PNG + bytes(300)), ("2.png", PNG + bytes(500))], tarfile.USTAR_FORMAT)
    with open(path, "r+b") as file:
        file.truncate(keep)
    with pytest.raises(
        UserError, match=r"shard '.*a\.tar' is cut short: (member '[12]\.png'|the header at byte \d+) needs"
    ):
        Shards([path])


def test_cut_after_it_was_listed(tmp_path):
    path = write(tmp_path / "a.tar", [("1.png", PNG), ("2.png", PNG)])
    source = Shards([path])
    with open(path, "r+b") as file:
        file.truncate(1100)
    with pytest.raises(OSError, match=r"a\.tar' ends before byte"):
        source.read(1)


@pytest.mark.parametrize(
    ("at", "data", "message"),
    [
        (0, b"\x1f\x8b\x08 compressed", "does not begin with the header"),
        (1024, b"garbage", "header at byte 1024 is damaged"),
        (1124, b"7777777", "header at byte 1024 is damaged"),
    ],
)
def test_damaged(tmp_path, at, data, message):
    path = write(tmp_path / "a.tar", [("1.png", PNG[:400]), ("2.png", PNG)], tarfile.USTAR_FORMAT)
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)
    with pytest.raises(UserError, match=rf"shard '.*a\.tar' is damaged or no tar file: .*{message}"):
        Shards([path])


@pytest.mark.parametrize(
    "records", [b"11 path=", b"x path=a\n", b"0 path=a\n", b"-5 path=a\n", b"20 size=99999999999999999999\n"]
)
def test_damaged_extended_header(tmp_path, records):
    info = odd("pax", tarfile.XHDTYPE)
    info.size = len(records)
    data = info.tobuf(tarfile.USTAR_FORMAT) + records.ljust(512, b"\0")
    (tmp_path / "a.tar").write_bytes(data + odd("1.png", tarfile.REGTYPE).tobuf() + bytes(1024))
    with pytest.raises(UserError, match="the extended header at byte 512 is damaged"):
        Shards([str(tmp_path / "a.tar")])


def test_no_images(tmp_path):
    with pytest.raises(
        UserError, match=r"a\.tar' has no images \(1 other files were seen\), expected at least one member"
    ):
        Shards([write(tmp_path / "a.tar", [("notes.txt", b"x")])])
    with pytest.raises(UserError, match=r"b\.tar' has no images \(no members at all were seen\)"):
        Shards([write(tmp_path / "b.tar", [])])


def test_unreadable(tmp_path, monkeypatch):
    path = write(tmp_path / "a.tar", [("1.png", PNG)])

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module, "open", refuse, raising=False)
    with pytest.raises(UserError, match=r"shard '.*a\.tar' cannot be read \(Permission denied\), expected a tar file"):
        Shards([path])


def test_several_shards_in_a_folder_or_a_pattern(tmp_path):
    for shard in range(3):
        write(tmp_path / f"s-{shard:03d}.tar", [(f"{i}.png", PNG + bytes([shard, i])) for i in range(2)])
    (tmp_path / "README.md").write_text("about")
    wanted = [f"s-{shard:03d}.tar/{i}.png" for shard in range(3) for i in range(2)]
    for spec in ("", "/s-{000..002}.tar", "/s-*.tar", "/{s-000,s-001,s-002}.tar"):
        source = open_source(f"{tmp_path}{spec}")
        assert names(source) == wanted
        assert source.read(5) == PNG + b"\x02\x01"
    with pytest.raises(UserError, match=r"shard '.*s-003\.tar' does not exist, expected every file of"):
        open_source(f"{tmp_path}/s-{{000..003}}.tar")


def test_listed_once(tmp_path, monkeypatch):
    path = write(tmp_path / "a.tar", [("1.png", PNG)])
    calls = []
    scan = module._scan
    monkeypatch.setattr(module, "_scan", lambda *args: calls.append(args) or scan(*args))
    assert names(Shards([path])) == names(Shards([path])) == ["1.png"]
    assert len(calls) == 1
    write(path, [("1.png", PNG), ("2.png", PNG)])
    assert len(Shards([path])) == 2


def test_more_shards_than_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_OPEN_FILES", 2)
    paths = [write(tmp_path / f"{i}.tar", [("1.png", PNG + bytes([i]))]) for i in range(5)]
    source = Shards(paths)
    assert [source.read(i)[-1] for i in (4, 0, 3, 2, 1, 0)] == [4, 0, 3, 2, 1, 0]
    assert len(source._files) == 2


def test_the_odd_images_are_counted_and_named(tmp_path):
    cases = odd_images()
    source = open_source(write(tmp_path / "a.tar", [(f"{i}/{case.name}", case.data) for i, case in enumerate(cases)]))
    assert len(source) == len(cases)
    with Loader(source, 16, len(cases), seed=0) as loader:
        next(loader)
        assert {name.split("/")[1] for name in loader.bad.names} <= {c.name for c in cases if c.pixels is None}
        for i, case in enumerate(cases):
            assert (loader._reader.image(i, Tally()) is None) == (case.pixels is None), case.name
        assert loader.bad.count == sum(case.pixels is None for case in cases)
