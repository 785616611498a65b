import math

import numpy as np
import pytest
import torch
from PIL import Image

from mimfast import _native
from mimfast._check import UserError
from mimfast.data.crop import Box, CropConfig, centre_box, crop_boxes, crop_rows, crop_words, min_decoded_side
from mimfast.ops.crop_resize import crop_resize
from mimfast.testing.images import noise, picture


def boxes_of(words, width, height, config):
    """(Box, flip) for each row of words, of images of one size."""
    found, flips = crop_boxes(words, np.full(len(words), width), np.full(len(words), height), config)
    return [(Box(left, top, wide, tall), flip) for (top, left, tall, wide), flip in zip(found.tolist(), flips.tolist())]


def boxes(width, height, config, n=3000, seed=5):
    return boxes_of(crop_words(seed, np.zeros(n, np.int64), np.arange(n)), width, height, config)


def distance(samples, cdf):
    """Kolmogorov-Smirnov statistic times sqrt(n): above 1.95 has a probability below 0.1 %."""
    x = np.sort(np.asarray(samples))
    n = len(x)
    wanted = cdf(x)
    upper, lower = np.arange(1, n + 1) / n - wanted, wanted - np.arange(n) / n
    return max(upper.max(), lower.max()) * math.sqrt(n)


def test_area_ratio_place_and_flip_are_uniform():
    """With these bounds the first attempt always fits, so nothing is rejected and the distributions are exact."""
    found = boxes(20_000, 20_000, CropConfig(scale=(0.2, 0.5)))
    area = [b.width * b.height / 4e8 for b, _ in found]
    ratio = [math.log(b.width / b.height) for b, _ in found]
    assert distance(area, lambda x: (x - 0.2) / 0.3) < 1.95
    assert distance(ratio, lambda x: (x - math.log(3 / 4)) / math.log(16 / 9)) < 1.95
    assert distance([b.left / (20_000 - b.width) for b, _ in found], lambda x: x) < 1.95
    assert distance([b.top / (20_000 - b.height) for b, _ in found], lambda x: x) < 1.95
    assert abs(np.mean([flip for _, flip in found]) - 0.5) < 0.04
    assert abs(np.corrcoef(area, ratio)[0, 1]) < 0.07


@pytest.mark.parametrize(("width", "height"), [(500, 375), (64, 64), (3, 5), (1, 1), (1, 5000), (5000, 1), (300, 900)])
def test_boxes_lie_inside(width, height):
    for box, _ in boxes(width, height, CropConfig(), n=300):
        assert box.width >= 1
        assert box.height >= 1
        assert 0 <= box.left <= width - box.width
        assert 0 <= box.top <= height - box.height


def test_same_distribution_as_torchvision():
    transforms = pytest.importorskip("torchvision.transforms")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    image = torch.empty(3, 375, 500)
    theirs = [transforms.RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(3000)]
    ours = [(b.top, b.left, b.height, b.width) for b, _ in boxes(500, 375, CropConfig())]
    for measure in (lambda b: b[2] * b[3], lambda b: b[3] / b[2], lambda b: b[0], lambda b: b[1]):
        a, b = np.sort([measure(x) for x in ours]), np.sort([measure(x) for x in theirs])
        at = np.concatenate([a, b])
        gap = np.abs(np.searchsorted(a, at, "right") - np.searchsorted(b, at, "right")).max() / 3000
        assert gap * math.sqrt(1500) < 1.95


def test_fallback_is_the_largest_centred_box_in_bounds():
    box, _ = boxes(5000, 100, CropConfig(scale=(0.9, 1.0)), n=1)[0]
    assert box == Box((5000 - 133) // 2, 0, 133, 100)
    box, _ = boxes(100, 5000, CropConfig(scale=(0.9, 1.0)), n=1)[0]
    assert box == Box(0, (5000 - 133) // 2, 100, 133)


def test_pure_function_of_seed_epoch_and_id():
    config = CropConfig()
    together = crop_words(1, np.array([0, 4, 4]), np.array([7, 7, 8]))
    for row, (epoch, sample) in enumerate([(0, 7), (4, 7), (4, 8)]):
        alone = crop_words(1, np.array([epoch]), np.array([sample]))
        assert boxes_of(alone, 500, 375, config) == boxes_of(together, 500, 375, config)[row : row + 1]
    assert len(set(boxes_of(together, 5000, 3750, config))) == 3


def test_flip_can_be_off():
    assert not any(flip for _, flip in boxes(50, 50, CropConfig(flip=False), n=50))


def cropped(image, box, size, flip=False):
    out = np.full((1, 3, size, size), 77, np.uint8)
    box = np.array([[box.top, box.left, box.height, box.width]], np.int32)
    crop_rows([np.asarray(image)], box, np.array([flip]), "bicubic", out)
    return out[0]


@pytest.fixture(params=["native", "ref"])
def way(request, monkeypatch):
    """With the native core, and without one."""
    if request.param == "native":
        return pytest.importorskip("mimfast._core")
    return monkeypatch.setattr(_native, "core", lambda: None)


@pytest.mark.usefixtures("way")
def test_crops_are_channels_first_and_flipped():
    image = picture(64, 48)
    plain, flipped = (cropped(image, Box(0, 0, 64, 48), 8, flip) for flip in (False, True))
    np.testing.assert_array_equal(plain[:, 0, 0], picture()[0, 0])
    np.testing.assert_array_equal(plain[:, -1, 0], picture()[-1, 0])
    np.testing.assert_array_equal(flipped, plain[:, :, ::-1])


@pytest.mark.usefixtures("way")
def test_a_box_of_the_right_size_is_copied():
    pixels = noise(20, 20)
    np.testing.assert_array_equal(cropped(pixels, Box(5, 2, 8, 8), 8), pixels[2:10, 5:13].transpose(2, 0, 1))


@pytest.mark.usefixtures("way")
def test_same_pixels_as_cutting_first_with_pillow():
    image = Image.fromarray(noise(200, 150)).resize((500, 375), Image.Resampling.BICUBIC)
    cut = image.crop((40, 30, 440, 330)).resize((96, 96), Image.Resampling.BICUBIC)
    error = np.abs(cropped(image, Box(40, 30, 400, 300), 96).astype(int) - np.asarray(cut).transpose(2, 0, 1))
    assert error.max() <= 1


@pytest.mark.usefixtures("way")
def test_antialias():
    """One-pixel stripes shrunk eight times become gray, not stripes of another period."""
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    error = np.abs(cropped(stripes, Box(0, 0, 256, 256), 32).astype(int) - 127)
    assert error[..., 1:-1].max() <= 1
    assert error.max() <= 5  # at a border the filter is cut off and weighs one stripe more than the other


@pytest.mark.usefixtures("way")
def test_images_of_any_layout_and_size_together():
    """A view with gaps, a read-only one, one of another size: each as it is alone."""
    images = [noise(40, 30)[:, ::2], np.frombuffer(noise(9, 7).tobytes(), np.uint8).reshape(7, 9, 3), noise(50, 60)]
    boxes, flip = np.array([[1, 2, 20, 15], [0, 0, 7, 9], [5, 0, 55, 50]], np.int32), np.array([True, False, True])
    out = np.empty((3, 3, 16, 16), np.uint8)
    crop_rows(images, boxes, flip, "bilinear", out)
    for row, image in enumerate(images):
        tensors = [torch.from_numpy(x[row : row + 1]) for x in (boxes, flip)]
        alone = crop_resize(torch.from_numpy(image.copy())[None], *tensors, 16, filter="bilinear", impl="ref")
        np.testing.assert_array_equal(out[row], alone[0].numpy())


def test_centre_box():
    assert centre_box(640, 480) == Box(80, 0, 480, 480)
    assert centre_box(1, 5000) == Box(0, 2499, 1, 1)


def test_min_decoded_side():
    assert min_decoded_side(224, CropConfig(scale=(0.25, 1.0))) == 448
    assert min_decoded_side(224, None) == 224


def test_wrong_configuration():
    with pytest.raises(UserError, match=r"crop: scale has \(0\.0, 1\.0\), expected 0 < low <= high <= 1"):
        CropConfig(scale=(0.0, 1.0))
    with pytest.raises(UserError, match="crop: ratio has"):
        CropConfig(ratio=(2.0, 1.0))
