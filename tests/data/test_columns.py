import numpy as np
import pytest

from mimfast.data import columns
from mimfast.data.columns import Damaged

COLUMNS = {
    "names": np.frombuffer(b"abc", np.uint8),
    "ends": np.array([0, 1, 3], np.int64),
    "none": np.empty(0, np.int32),
}


def write(path):
    with open(path, "wb") as file:
        columns.save(file, {"what": "a test", "n": 3}, COLUMNS)
    return path


def test_what_is_written_is_read(tmp_path):
    meta, read = columns.load(write(tmp_path / "x"))
    assert meta == {"what": "a test", "n": 3}
    assert list(read) == sorted(COLUMNS)
    for name, column in COLUMNS.items():
        assert read[name].dtype == column.dtype
        assert np.array_equal(read[name], column)
        assert not read[name].flags.writeable
    assert columns.damaged(tmp_path / "x") == []


def test_same_content_same_bytes(tmp_path):
    assert write(tmp_path / "x").read_bytes() == write(tmp_path / "y").read_bytes()


@pytest.mark.parametrize(
    ("at", "message"), [(3, "begins with"), (8, "cut short|checksum"), (17, "checksum"), (40, "checksum")]
)
def test_a_flipped_bit_in_the_header(tmp_path, at, message):
    data = bytearray(write(tmp_path / "x").read_bytes())
    data[at] ^= 4
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(Damaged, match=message):
        columns.load(tmp_path / "x")


def test_a_flipped_bit_in_a_column(tmp_path):
    data = bytearray(write(tmp_path / "x").read_bytes())
    data[-60] ^= 4
    (tmp_path / "x").write_bytes(data)
    assert columns.damaged(tmp_path / "x") == ["ends"]


@pytest.mark.parametrize("length", [0, 5, 23, 30, -1])
def test_cut_short(tmp_path, length):
    data = write(tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(data[:length])
    with pytest.raises(Damaged, match=r"cut short|begins with"):
        columns.load(tmp_path / "x")


def test_a_header_that_lies(tmp_path):
    """Valid checksum, absurd content: no allocation follows it."""
    for column in ({"dtype": "|O8", "count": 1, "at": 0}, {"dtype": "|u1", "count": 2**62, "at": 0}, {"dtype": "|u1"}):
        header = columns.json.dumps({"meta": {}, "columns": {"x": {"crc32c": 0, **column}}}).encode()
        first = columns.MAGIC + len(header).to_bytes(8, "little") + columns.crc32c(header).to_bytes(4, "little")
        (tmp_path / "x").write_bytes(first + bytes(4) + header)
        with pytest.raises(Damaged):
            columns.load(tmp_path / "x")


def test_cached_is_built_once_for_a_stamp(tmp_path):
    built = []

    def build():
        built.append(1)
        return {}, {"x": np.arange(len(built), dtype=np.int64)}

    for stamp, length in (("a", 1), ("a", 1), ("b", 2), ("a", 3)):
        assert len(columns.cached(tmp_path / "sub" / "c", stamp, build)[1]["x"]) == length
    (tmp_path / "file").write_text("")
    assert len(columns.cached(tmp_path / "file" / "c", "a", build)[1]["x"]) == 4
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["c"]
