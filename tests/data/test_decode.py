import contextlib
import threading
import warnings

import numpy as np
import pytest
from PIL import Image, ImageFile

from mimfast.data.decode import MAX_PIXELS, BadImage, decode
from mimfast.testing.images import encode, noise, odd_images, picture

CASES = {case.name: case for case in odd_images()}


@pytest.mark.parametrize("name", CASES)
def test_odd_images(name):
    case = CASES[name]
    if case.pixels is None:
        with pytest.raises(BadImage) as caught:
            decode(case.data)
        assert case.reason in caught.value.reason
        assert caught.value.reason
        return
    pixels = decode(case.data)
    assert pixels.dtype == np.uint8
    assert pixels.shape == case.pixels.shape
    error = np.abs(pixels.astype(int) - case.pixels).mean()
    assert error <= case.tolerance, f"mean absolute error {error}"


def test_no_warning_leaves_the_decoder():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for case in CASES.values():
            with contextlib.suppress(BadImage):
                decode(case.data)
    assert [str(warning.message) for warning in caught] == []


def test_pillow_is_left_strict():
    """Accepting cut files would fill the rest of the picture with gray."""
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_sixteen_bits_are_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
    assert decode(encode(ramp, "PNG"))[0, :, 0].tolist() == list(range(256))


def test_size_limit_is_named():
    with pytest.raises(BadImage, match=f"{MAX_PIXELS}"):
        decode(CASES["bomb.png"].data)


@pytest.mark.parametrize(
    ("min_side", "wanted"), [(None, 800), (1, 100), (100, 100), (101, 200), (200, 200), (700, 800), (5000, 800)]
)
def test_jpeg_is_shrunk_while_decoding_but_not_below_min_side(min_side, wanted):
    pixels = decode(encode(picture(800, 800), "JPEG", quality=95), min_side)
    assert pixels.shape == (wanted, wanted, 3)
    assert np.abs(pixels.astype(int) - picture(wanted, wanted)).mean() < 6


def test_min_side_leaves_other_formats_alone():
    assert decode(encode(picture(800, 800), "PNG"), 10).shape == (800, 800, 3)


def test_every_byte_of_damage_is_an_image_or_a_reason():
    """Random damage never raises anything but BadImage."""
    rng = np.random.default_rng(3)
    for name in ("plain.jpg", "palette_alpha.png", "animated.gif", "gray16.tif", "orientation_6.jpg", "plain.bmp"):
        data = CASES[name].data
        for _ in range(40):
            damaged = bytearray(data)
            for at in rng.integers(0, len(data), 4):
                damaged[at] = rng.integers(0, 256)
            with contextlib.suppress(BadImage):
                assert decode(bytes(damaged)).ndim == 3


def test_threads_agree():
    data = [encode(noise(40, 30, seed), kind) for seed in range(6) for kind in ("JPEG", "PNG", "GIF")]
    wanted = [decode(item) for item in data]
    failures = []

    def work():
        for _ in range(5):
            failures.extend(i for i, item in enumerate(data) if not np.array_equal(decode(item), wanted[i]))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_result_does_not_depend_on_the_data_staying_alive():
    data = bytearray(encode(picture(), "PNG"))
    pixels = decode(bytes(data))
    data[:] = b"\0" * len(data)
    np.testing.assert_array_equal(pixels, picture())


def test_only_codecs_that_run_in_process():
    with pytest.raises(BadImage, match="not an image"):
        decode(encode(Image.new("RGB", (8, 8)), "EPS"))
