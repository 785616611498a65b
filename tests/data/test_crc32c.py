import numpy as np
import pytest

from mimfast import _native
from mimfast.data import crc32c as module
from mimfast.data.crc32c import by_numpy, crc32c

# RFC 3720, appendix B.4, and the check value of the catalogue of parametrised CRC algorithms
KNOWN = [
    (bytes(32), 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (bytes(range(31, -1, -1)), 0x113FDB5C),
    (b"123456789", 0xE3069283),
    (b"", 0),
]


def _native_versions():
    if _native.core() is None:
        pytest.skip(_native.why_missing())
    call = _native.core().crc32c_cpu
    return [lambda d, c=0, p=portable: call(d.ctypes.data, d.size, c, p) for portable in (False, True)]


@pytest.mark.parametrize(("data", "value"), KNOWN)
def test_known_values(data, value):
    array = np.frombuffer(data, np.uint8)
    assert crc32c(data) == crc32c(bytearray(data)) == crc32c(memoryview(data)) == crc32c(array) == value
    assert by_numpy(array) == value
    assert [version(array) for version in _native_versions()] == [value, value]


@pytest.mark.parametrize("size", [1, 3, 4, 5, 7, 8, 9, 255, 3071, 3072, 3073, 10_001])
def test_all_versions_agree_at_any_alignment(size):
    data = np.random.default_rng(size).integers(0, 256, size + 3, np.uint8)[3:]
    for cut in (0, 1, size // 3, size):
        values = {version(data[cut:], version(data[:cut])) for version in [by_numpy, crc32c, *_native_versions()]}
        assert values == {by_numpy(data)}


def test_one_flipped_bit_is_seen():
    data = np.random.default_rng(0).integers(0, 256, 5000, np.uint8)
    whole = crc32c(data)
    for bit in range(0, 8 * data.size, 997):
        data[bit // 8] ^= 1 << bit % 8
        assert crc32c(data) != whole
        data[bit // 8] ^= 1 << bit % 8


def test_arrays_of_any_kind():
    array = np.arange(24, dtype=np.int32).reshape(4, 6)
    assert crc32c(array.T) == crc32c(np.ascontiguousarray(array.T).tobytes())


def test_without_the_core(monkeypatch):
    monkeypatch.setattr(module._native, "core", lambda: None)
    assert not module.is_fast()
    assert crc32c(b"123456789") == 0xE3069283
