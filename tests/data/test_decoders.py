"""Every decoder against `decode.decode`: which images are bad is the same, the pixels are the same or nearly so."""

import contextlib
import sys
import threading

import numpy as np
import pytest
import torch

from mimfast._check import UserError
from mimfast.data import dali, decoders
from mimfast.data.decode import BadImage, decode
from mimfast.data.decoders import DECODERS, open_decoder, why_not
from mimfast.data.loader import Loader
from mimfast.data.sources import Folder
from mimfast.testing.images import encode, noise, odd_images, picture, write_folder

CASES = {case.name: case for case in odd_images()}
EACH = [name for name in DECODERS if name not in ("auto", "dali", "dali_gpu")]
# Another libjpeg may round and interpolate colours differently; with the same one all differences are 0.
LEVELS = 1.0


@pytest.fixture(scope="module", params=EACH)
def decoder(request):
    reason = why_not(request.param)
    if reason:
        pytest.skip(reason)
    return open_decoder(request.param)


def outcome(call, *args):
    """Pixels, or the reason why there are none."""
    try:
        return call(*args)
    except BadImage as error:
        return error.reason


def assert_same(name, got, want):
    assert type(got) is type(want), (got, want)
    if isinstance(want, str):
        assert got == want
        return
    assert got.shape == want.shape
    assert got.dtype == np.uint8
    apart = np.abs(got.astype(int) - want).mean()
    assert apart <= (0 if name == "pillow" else LEVELS), f"{apart} levels apart on average"


@pytest.mark.parametrize("case", CASES)
def test_odd_images(decoder, case):
    data = CASES[case].data
    assert_same(decoder.name, outcome(decoder.pixels, data, None), outcome(decode, data, None))


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "4:1:1"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpegs(decoder, subsampling, progressive):
    for seed, (width, height) in enumerate([(64, 48), (1, 1), (7, 33), (40, 17), (3, 90)]):
        for quality in (60, 100):
            for pixels in (noise(width, height, seed), noise(width, height, seed)[..., 0]):
                sampling = {"subsampling": subsampling} if pixels.ndim == 3 else {}
                more = {"progressive": progressive, "restart_marker_blocks": seed, **sampling}
                data = encode(pixels, "JPEG", quality=quality, **more)
                assert_same(decoder.name, decoder.pixels(data, None), decode(data))


@pytest.mark.parametrize("min_side", [1, 30, 50, 51, 100, 101, 200, 1000])
def test_reduced_size_is_the_same(decoder, min_side):
    for pixels in (picture(400, 403), noise(401, 800)):
        data = encode(pixels, "JPEG", quality=90)
        assert_same(decoder.name, decoder.pixels(data, min_side), decode(data, min_side))


def test_damage_gives_what_pillow_gives(decoder, capfd):
    """Damaged bytes anywhere, ends in the middle: never another exception; libjpeg's own remarks, of other libraries,
    are all that is printed."""
    rng = np.random.default_rng(5)
    for name in ("plain.jpg", "progressive.jpg", "orientation_6.jpg", "gray.jpg", "cmyk.jpg"):
        data = CASES[name].data
        for turn in range(60):
            damaged = bytearray(data)
            for at in rng.integers(0, len(data), turn % 3 + 1):
                damaged[at] = rng.integers(0, 256)
            if turn % 5 == 0:
                damaged[len(data) * 2 // 3 :] = b"\xff\xd9"
            got, want = (outcome(call, bytes(damaged), None) for call in (decoder.pixels, decode))
            assert type(got) is type(want), (name, turn, got, want)
            if isinstance(want, str):
                assert got == want
            else:
                assert got.shape == want.shape
                assert decoder.name != "pillow" or np.array_equal(got, want)
    assert decoder.name != "pillow" or capfd.readouterr().err == ""


def test_plain_jpegs_do_not_take_the_long_way(decoder, monkeypatch):
    """A decoder that has come to refuse everything would only be slow."""
    monkeypatch.setattr(decoders, "decode", lambda *_: pytest.fail("decoded by Pillow's long way"))
    names = ["plain.jpg", "full_chroma.jpg", "gray.jpg", "junk_after_end.jpg"]
    for name in names + ["progressive.jpg"] * (decoder.name != "nvimagecodec"):
        assert decoder.pixels(CASES[name].data, None).shape == (48, 64, 3)
        assert decoder.pixels(CASES[name].data, 24).shape == (24, 32, 3)


def test_pixels_stay_when_others_are_decoded(decoder):
    data = [encode(noise(64, 48, seed), "JPEG") for seed in range(8)]
    kept = [decoder.pixels(item, None) for item in data]
    for item, pixels in zip(data, kept):
        assert_same(decoder.name, pixels, decode(item))


def test_threads_agree(decoder):
    data = [encode(noise(40 + seed, 30, seed), "JPEG") for seed in range(12)] + [CASES["rgba.png"].data]
    wanted = [decoder.pixels(item, None) for item in data]
    failures = []

    def work():
        for _ in range(8):
            failures.extend(
                i for i, item in enumerate(data) if not np.array_equal(decoder.pixels(item, None), wanted[i])
            )

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """The odd images among as many plain photographs."""
    root = tmp_path_factory.mktemp("zoo")
    write_folder(root / "odd")
    for i in range(40):
        (root / f"{i:02d}.jpg").write_bytes(encode(noise(40 + i, 60, i), "JPEG", quality=90))
    return root


@pytest.mark.parametrize("workers", [0, 3])
def test_loader_survives_the_zoo(decoder, zoo, workers):
    """Every batch whole, the same images bad for the same reasons, the same replacements, nearly the same crops."""

    def run(name, workers):
        source = Folder(zoo)
        with Loader(source, 32, 16, 4, workers=workers, decoder=name) as loader:
            batches = [next(loader) for _ in range(3 * len(source) // 16 + 1)]
            return batches, loader.bad.items()

    (wanted, bad), (got, found) = run("pillow", 0), run(decoder.name, workers)
    assert found == bad
    assert {name for name, _ in found} == {f"odd/{case.name}" for case in CASES.values() if case.pixels is None}
    for batch, want in zip(got, wanted):
        assert batch.img.shape == (16, 3, 32, 32)
        assert torch.equal(batch.sample_ids, want.sample_ids)
        assert (batch.img.float() - want.img.float()).abs().mean() <= LEVELS


def test_what_a_library_refuses_is_left_to_pillow(monkeypatch):
    def refuse(*_):
        raise RuntimeError("cannot")

    data = CASES["plain.jpg"].data
    for jpeg in (refuse, lambda *_: None, lambda *_: np.zeros((3, 48, 64), np.uint8)):
        monkeypatch.setattr(decoders, "_by_pillow", lambda jpeg=jpeg: jpeg)
        np.testing.assert_array_equal(open_decoder("pillow").pixels(data, None), decode(data))
    monkeypatch.setattr(decoders, "_by_pillow", lambda: lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        open_decoder("pillow").pixels(data, None)


@pytest.mark.parametrize(
    ("name", "module", "pip"),
    [
        ("torchcodec", "torchcodec", "pip install torchcodec"),
        ("nvimagecodec", "nvidia.nvimgcodec", r"pip install 'nvidia-nvimgcodec-cu13\[all\]'"),
    ],
)
def test_a_missing_package_is_named(name, module, pip, monkeypatch):
    for known in [known for known in sys.modules if f"{known}.".startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, known)
    monkeypatch.setitem(sys.modules, module, None)
    assert why_not("auto") is why_not("pillow") is None
    with pytest.raises(UserError, match=f"decoder '{name}' needs a package that is not installed: {pip}"):
        raise UserError(why_not(name))
    with contextlib.suppress(UserError):
        open_decoder(name)
        pytest.fail("opened without its package")
    if name == "torchcodec":
        assert open_decoder("auto").name == "pillow"


def test_a_package_that_cannot_be_loaded_is_named(monkeypatch, tmp_path):
    (tmp_path / "torchcodec").mkdir()
    (tmp_path / "torchcodec" / "__init__.py").write_text("raise OSError('libc10.so: undefined symbol\\nand more')")
    for known in [known for known in sys.modules if f"{known}.".startswith("torchcodec.")]:
        monkeypatch.delitem(sys.modules, known)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"cannot be loaded \(libc10.so: undefined symbol\): pip install --upgrade"):
        open_decoder("torchcodec")
    assert open_decoder("auto").name == "pillow"


def test_dali_says_for_itself_what_it_needs():
    assert why_not("dali") == dali.why_not()


def test_auto_is_the_fastest_that_is_there():
    assert open_decoder("auto").name == ("pillow" if why_not("torchcodec") else "torchcodec")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("guess", "loader: decoder has 'guess', expected 'auto' or 'pillow' or 'torchcodec'"),
        ("dali", "loader: decoder has 'dali', expected one that takes image by image because DALI takes whole batches"),
    ],
)
def test_names_that_are_not_opened(name, message):
    with pytest.raises(UserError, match=message):
        open_decoder(name)
