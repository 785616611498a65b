import numpy as np
import pytest

from mimfast._check import UserError
from mimfast.data.arrays import Arrays
from mimfast.data.decode import decode
from mimfast.data.loader import Loader
from mimfast.data.sources import open_source

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 8, 10, 3), np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2])


def test_every_layout_gives_the_same_pixels():
    square = RGB[:, :, :8]
    planes = square.transpose(0, 3, 1, 2)
    for images in (square, planes, planes.reshape(6, -1)):
        assert all(np.array_equal(Arrays(images).pixels(i), square[i]) for i in range(6))
    gray = np.repeat(RGB[..., :1], 3, -1)
    for images in (RGB[..., 0], RGB[..., :1]):
        assert all(np.array_equal(Arrays(images).pixels(i), gray[i]) for i in range(6))


def test_read_gives_an_image_file():
    source = Arrays(RGB)
    assert np.array_equal(decode(source.read(3)), RGB[3])
    assert [source.name(0), source.name(5)] == ["0000000", "0000005"]
    assert source.classes is None
    assert source.label(0) is None


def test_npz_and_npy(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", x_train=RGB, y_train=LABELS[:, None], other=LABELS)
    np.save(tmp_path / "b.npy", RGB)
    np.save(tmp_path / "b_labels.npy", LABELS)
    for name in ("a.npz", "b.npy"):
        source = open_source(str(tmp_path / name))
        assert len(source) == 6
        assert source.classes == ["0", "1", "2"]
        assert [source.label(i) for i in range(6)] == LABELS.tolist()
        assert np.array_equal(source.pixels(4), RGB[4])
    with Loader(source, 4, 6, seed=0) as loader:
        batch = next(loader)
        assert sorted(batch.labels.tolist()) == sorted(LABELS.tolist())
        assert loader.bad.count == 0


@pytest.mark.parametrize(("label_bytes", "count"), [(1, 10), (2, 100)])
def test_cifar_binary(tmp_path, label_bytes, count):
    images = RNG.integers(0, 256, (4, 3, 32, 32), np.uint8)
    for part in (0, 1):
        rows = [bytes([7] * (label_bytes - 1) + [9 - i]) + images[i].tobytes() for i in (2 * part, 2 * part + 1)]
        (tmp_path / f"data_batch_{part + 1}.bin").write_bytes(b"".join(rows))
    (tmp_path / "test_batch.bin").write_bytes(b"".join(rows))
    source = open_source(str(tmp_path))
    assert len(source) == 4
    assert [source.label(i) for i in range(4)] == [9, 8, 7, 6]
    assert np.array_equal(source.pixels(3), images[3].transpose(1, 2, 0))
    assert source.classes[9] == ("truck" if count == 10 else "9")
    assert len(open_source(str(tmp_path / "test_batch.bin"))) == 2


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


def test_pickles_are_never_run(tmp_path):
    np.save(tmp_path / "a.npy", np.array([Trap()], object), allow_pickle=True)
    np.savez(tmp_path / "b.npz", images=np.array([Trap()], object))
    for name in ("a.npy", "b.npz"):
        with pytest.raises(UserError, match=r"cannot be read \(it holds pickled objects, which could run code\)"):
            open_source(str(tmp_path / name))
    (tmp_path / "c.pkl").write_bytes(b"")
    with pytest.raises(UserError, match=r"c\.pkl' is no folder or file that can be used, .* a pickle can run code"):
        open_source(str(tmp_path / "c.pkl"))


def test_damaged_files(tmp_path):
    np.savez(tmp_path / "a.npz", images=RGB)
    np.save(tmp_path / "b.npy", RGB)
    for name, keep in (("a.npz", -50), ("b.npy", -50), ("b.npy", 20), ("b.npy", 0), ("a.npz", 0)):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:keep])
        with pytest.raises(UserError, match=rf"{name}' cannot be read \(.*\), expected a whole file of plain arrays"):
            open_source(str(tmp_path / name))
    (tmp_path / "c.bin").write_bytes(bytes(5000))
    with pytest.raises(UserError, match=r"c\.bin' has 5000 bytes, expected a multiple of 3073 or 3074"):
        open_source(str(tmp_path / "c.bin"))


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (RGB.astype(np.float32), None, r"images of dtype float32 and shape \(6, 8, 10, 3\), expected uint8 images"),
        (RGB[:0], None, r"shape \(0, 8, 10, 3\), expected uint8 images, at least one"),
        (RGB[..., :2], None, r"shape \(6, 8, 10, 2\), expected \(N, H, W, 3\)"),
        (RGB.reshape(6, -1)[:, :7], None, r"shape \(6, 7\), expected .* rows of square images"),
        (RGB, LABELS[:5], r"labels of dtype int64 and shape \(5,\), expected integers from 0 on of shape \(6,\)"),
        (RGB, LABELS - 1, r"expected integers from 0 on"),
        (RGB, LABELS / 2, r"labels of dtype float64"),
    ],
)
def test_refused(images, labels, message):
    with pytest.raises(UserError, match=rf"data: 'x' has {message}|data: 'x' has .*{message}"):
        Arrays(images, labels, origin="x")


def test_npz_without_images(tmp_path):
    np.savez(tmp_path / "a.npz", weights=RGB)
    with pytest.raises(UserError, match=r"a\.npz' has arrays weights, expected one called images"):
        open_source(str(tmp_path / "a.npz"))
