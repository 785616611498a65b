import gc
import os
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from mimfast._check import UserError
from mimfast.data import dali
from mimfast.data.crop import CropConfig, crop_boxes, crop_rows, crop_words
from mimfast.data.decode import MAX_PIXELS, BadImage, decode
from mimfast.data.header import look
from mimfast.testing.images import encode, noise, odd_images, picture, smooth

needs_dali = pytest.mark.skipif(dali.why_not() is not None, reason="nvidia.dali cannot be imported")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CASES = {case.name: case for case in odd_images()}
SIZE = 32


@pytest.fixture(scope="module")
def files():
    """Plain files of both kinds, many colour samplings, sides and modes."""
    found = []
    for i, sampling in enumerate(["4:4:4", "4:2:2", "4:2:0", "4:1:1"] * 4):
        image = smooth(60 + 17 * i, 50 + 13 * ((5 * i) % 16), i)
        found.append(encode(image, "JPEG", quality=70 + i, subsampling=sampling, progressive=i % 3 == 0))
        gray = Image.fromarray(image).convert("L")
        found.append(encode((image, gray, gray.quantize(20), gray)[i % 4], ("PNG", "PNG", "PNG", "JPEG")[i % 4]))
    assert all(look(file).plain for file in found)
    return found


def boxes_of(files, seed=0):
    headers = [look(file) for file in files]
    words = crop_words(seed, np.zeros(len(files), np.int64), np.arange(len(files)))
    widths, heights = (np.array([header[k] for header in headers]) for k in (0, 1))
    return (*crop_boxes(words, widths, heights, CropConfig()), widths)


def cut_jpegs(files, boxes, rows):
    """Files of which some are cut behind the header, where DALI's parser sees nothing, and boxes that show the end."""
    assert all(look(files[row]).format == "jpeg" for row in rows)
    cut = [file[: len(file) // 2] if row in rows else file for row, file in enumerate(files)]
    ends = boxes.copy()
    for row in rows:
        ends[row] = 0, 0, look(files[row]).height, look(files[row]).width
    return cut, ends


def portable(files, boxes, flip, size=SIZE, filter="bicubic"):
    out = np.empty((len(files), 3, size, size), np.uint8)
    crop_rows([decode(file) for file in files], boxes, flip, filter, out)
    return out


def difference(a, b):
    return np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16))


@needs_dali
class TestParts:
    def test_the_pixels_of_the_portable_decoder(self, files):
        parts = dali.DaliParts(len(files))
        whole = [decode(file) for file in files]
        for seed in range(4):
            boxes, _, widths = boxes_of(files, seed)
            for part, image, box in zip(parts.run(files, boxes, widths), whole, boxes.tolist()):
                top, left, height, width = box
                np.testing.assert_array_equal(part, image[top : top + height, left : left + width])

    def test_narrow_boxes_and_small_images(self):
        rng = np.random.default_rng(0)
        parts = dali.DaliParts(4 * 40, threads=2)
        for sampling in ("4:4:4", "4:2:2", "4:2:0", "4:1:1"):
            sides = rng.integers(1, 50, (40, 2)).tolist()
            data = [encode(noise(w, h, w), "JPEG", quality=80, subsampling=sampling) for w, h in sides] * 4
            widths, heights = np.array(sides * 4).T
            size = np.stack([rng.integers(1, heights + 1), rng.integers(1, np.minimum(widths, 12) + 1)], 1)
            start = np.stack([rng.integers(0, heights - size[:, 0] + 1), rng.integers(0, widths - size[:, 1] + 1)], 1)
            boxes = np.concatenate([start, size], 1).astype(np.int32)
            for file, part, (top, left, height, width) in zip(data, parts.run(data, boxes, widths), boxes.tolist()):
                np.testing.assert_array_equal(part, decode(file)[top : top + height, left : left + width])

    def test_parts_outlive_the_pipeline_and_later_batches(self, files):
        parts = dali.DaliParts(len(files))
        boxes, _, widths = boxes_of(files)
        found = parts.run(files, boxes, widths)
        copies = [part.copy() for part in found]
        for _ in range(4):
            parts.run(files[::-1], boxes[::-1], widths[::-1])
        parts.close()
        parts.close()
        del parts
        gc.collect()
        for part, copy in zip(found, copies):
            np.testing.assert_array_equal(part, copy)

    def test_each_thread_has_its_own(self, files):
        boxes, _, widths = boxes_of(files)
        wanted = dali.DaliParts(len(files)).run(files, boxes, widths)
        same = []

        def work():
            parts = dali.DaliParts(8)
            for a in range(0, len(files), 8):
                rows = slice(a, a + 8)
                found = parts.run(files[rows], boxes[rows], widths[rows])
                same.extend(np.array_equal(x, y) for x, y in zip(found, wanted[rows]))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(same) == 4 * len(files)
        assert all(same)


@needs_dali
class TestBadFiles:
    def test_every_odd_image_alone_and_the_pipeline_lives(self, files):
        """What is refused is unknown to DALI or damaged; what is not has the pixels that it should have, if plain."""
        parts = dali.DaliParts(2)
        good, box = files[0], np.array([[3, 4, 30, 20]], np.int32)
        wanted = decode(good)[3:33, 4:24]
        for case in CASES.values():
            try:
                header = look(case.data)
            except BadImage:
                header = None
            height, width = (48, 64) if case.pixels is None else case.pixels.shape[:2]
            boxes = np.concatenate([np.array([[0, 0, height, width]], np.int32), box])
            odd, other = parts.run([case.data, good], boxes, np.array([width, 60]))
            np.testing.assert_array_equal(other, wanted)
            if header is not None and header.plain:
                np.testing.assert_array_equal(odd, decode(case.data))
            if case.pixels is None and header is not None and header.format == "jpeg":
                assert odd is None, f"{case.name} was completed"  # its box shows where it was cut

    def test_refused_rows_are_named_and_the_others_given(self, files):
        boxes, flip, _ = boxes_of(files)
        with_bad, boxes = cut_jpegs(files, boxes, [2])
        with_bad[9] = b"<html>"
        with_bad[5] = with_bad[31] = None
        with_bad[14], with_bad[16] = CASES["cut_25.jpg"].data, CASES["animated.gif"].data
        outside = boxes.copy()
        outside[20, 1] = 1000
        with_box = dali.DaliCrops(SIZE, len(files)).run(files, outside, flip)
        assert with_box.refused == {20: "DALI cannot decode it"}
        crops = dali.DaliCrops(SIZE, len(files))
        clean = crops.run(files, boxes, flip).img.clone()
        for _ in range(3):
            found = crops.run(with_bad, boxes, flip)
            assert sorted(found.refused) == [2, 9, 14, 16]
            assert "not an image" in found.refused[9]
            assert "truncated" in found.refused[14]
            stay = [row for row in range(len(files)) if row not in (2, 5, 9, 14, 16, 31)]
            assert torch.equal(found.img[stay], clean[stay])
            assert found.img.shape == clean.shape
            assert torch.equal(crops.run(files, boxes, flip).img, clean)

    def test_a_bad_file_takes_no_batch_with_it_that_is_under_way(self, files):
        boxes, flip, _ = boxes_of(files)
        damaged = [0, 4, 8, 12]
        bad, boxes = cut_jpegs(files, boxes, damaged)
        crops = dali.DaliCrops(SIZE, len(files), threads=2)
        clean = crops.run(files, boxes, flip).img.clone()
        order = [files, bad, bad, files, [None] * len(files), bad, files, files, bad]
        crops.feed(order[0], boxes, flip)
        for step, batch in enumerate(order):
            if step + 1 < len(order):
                crops.feed(order[step + 1], boxes, flip)
            found = crops.collect()
            refused = damaged if batch is bad else []
            assert sorted(found.refused) == refused
            stay = [row for row in range(len(files)) if row not in refused and batch[row] is not None]
            assert torch.equal(found.img[stay], clean[stay]), step

    def test_nothing_but_bad_files(self):
        crops = dali.DaliCrops(SIZE, 3)
        boxes, flip = np.array([[0, 0, 48, 64]] * 3, np.int32), np.zeros(3, bool)
        bad = [CASES["cut_50.jpg"].data, CASES["cut_99.jpg"].data, b""]
        assert sorted(crops.run(bad, boxes, flip).refused) == [0, 1, 2]
        found = crops.run([None] * 3, boxes, flip)
        assert found.refused == {}
        assert found.img.shape == (3, 3, SIZE, SIZE)

    def test_damage_anywhere_is_pixels_or_a_reason(self):
        rng = np.random.default_rng(7)
        clean = [encode(smooth(50, 40, i), ("JPEG", "PNG")[i % 2], progressive=i % 3 == 0) for i in range(12)]
        crops = dali.DaliCrops(SIZE, 24)
        boxes, flip = np.tile(np.array([[5, 5, 30, 40]], np.int32), (24, 1)), np.zeros(24, bool)
        wanted = crops.run(clean * 2, boxes, flip).img.clone()
        refused = 0
        for _ in range(8):
            batch = clean * 2
            for row in range(0, 24, 3):
                data = bytearray(batch[row])
                for at in rng.integers(0, len(data), 3):
                    data[at] = rng.integers(0, 256)
                batch[row] = bytes(data)
            found = crops.run(batch, boxes, flip)
            assert all(row % 3 == 0 and reason for row, reason in found.refused.items())
            refused += len(found.refused)
            intact = [row for row in range(24) if row % 3]
            assert torch.equal(found.img[intact], wanted[intact])
        assert refused > 0


def photographs():
    skimage = pytest.importorskip("skimage.data")
    names = ("astronaut", "chelsea", "coffee", "rocket")
    return [encode(np.asarray(getattr(skimage, name)())[..., :3], "JPEG", quality=90) for name in names]


# mean absolute error of DALI's own resampling against ops.crop_resize, in gray levels; 0.18 was measured over 300
# photographs, and 0.23 for the worst of them (bicubic), 0.17 and 0.20 (bilinear)
WHOLE, ONE = 0.3, 0.5


@needs_dali
class TestCrops:
    @pytest.mark.parametrize("filter", ["bicubic", "bilinear"])
    def test_photographs_agree_with_the_portable_path(self, filter):
        files = photographs() * 4
        boxes, flip, _ = boxes_of(files, 3)
        assert flip.any()
        assert not flip.all()
        found = dali.DaliCrops(224, len(files), filter).run(files, boxes, flip)
        error = difference(found.img, portable(files, boxes, flip, 224, filter)).mean((1, 2, 3))
        assert error.mean() <= WHOLE
        assert error.max() <= ONE

    def test_boxes_smaller_than_the_crop(self, files):
        boxes, flip, _ = boxes_of(files)
        found = dali.DaliCrops(96, len(files)).run(files, boxes, flip)
        error = difference(found.img, portable(files, boxes, flip, 96)).mean((1, 2, 3))
        assert error.max() <= 1

    def test_whole_image_of_the_size_is_copied(self):
        image = noise(SIZE, SIZE)
        box = np.array([[0, 0, SIZE, SIZE]] * 2, np.int32)
        found = dali.DaliCrops(SIZE, 2).run([encode(image, "PNG")] * 2, box, np.array([False, True]))
        np.testing.assert_array_equal(found.img[0], image.transpose(2, 0, 1))
        np.testing.assert_array_equal(found.img[1], image[:, ::-1].transpose(2, 0, 1))

    def test_same_for_any_number_of_threads_and_any_neighbours(self, files):
        boxes, flip, _ = boxes_of(files)
        one = dali.DaliCrops(SIZE, len(files)).run(files, boxes, flip).img
        three = dali.DaliCrops(SIZE, len(files), threads=3)
        for rows in (slice(0, 5), slice(5, 6), slice(6, 32)):
            assert torch.equal(three.run(files[rows], boxes[rows], flip[rows]).img, one[rows])

    def test_result_is_kept_while_it_is_used(self, files):
        crops = dali.DaliCrops(SIZE, len(files))
        boxes, flip, _ = boxes_of(files)
        first = crops.run(files, boxes, flip).img
        copy = first.clone()
        for _ in range(4):
            crops.run(files[::-1], boxes[::-1], flip[::-1])
        crops.close()
        crops.close()
        del crops
        gc.collect()
        assert torch.equal(first, copy)
        first.fill_(0)  # it may be written

    def test_out_of_turn(self, files):
        crops = dali.DaliCrops(SIZE, 1)
        boxes, flip = np.array([[0, 0, 9, 9]], np.int32), np.zeros(1, bool)
        with pytest.raises(RuntimeError, match="no batch is fed"):
            crops.collect()
        crops.feed(files[:1], boxes, flip)
        with pytest.raises(RuntimeError, match="1 batches are fed, expected none"):
            crops.run(files[:1], boxes, flip)
        crops.feed(files[:1], boxes, flip)
        with pytest.raises(RuntimeError, match="2 batches are fed, expected one to be collected"):
            crops.feed(files[:1], boxes, flip)

    @pytest.mark.slow
    def test_memory_and_threads_do_not_grow(self, files):
        boxes, flip, _ = boxes_of(files)
        crops = dali.DaliCrops(SIZE, len(files), threads=2)
        bad, boxes = cut_jpegs(files, boxes, [0])

        def state():
            gc.collect()
            with open("/proc/self/status") as status:
                fields = dict(line.split(":", 1) for line in status)
            return int(fields["VmRSS"].split()[0]) / 1024, int(fields["Threads"])

        for step in range(400):
            crops.run(bad if step % 20 == 0 else files, boxes, flip)
            if step == 100:
                memory, threads = state()
        after = state()
        assert after[0] - memory < 24
        assert after[1] == threads


@needs_dali
class TestArguments:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"size": 0}, "dali: size has 0, expected at least 1"),
            ({"batch_size": 0}, "dali: batch_size has 0, expected at least 1"),
            ({"threads": 0}, "dali: threads has 0, expected at least 1"),
            ({"filter": "nearest"}, "dali: filter has 'nearest', expected 'bilinear' or 'bicubic'"),
            ({"hw_decoder_load": 2}, "dali: hw_decoder_load has 2, expected 0 to 1"),
            ({"device": "mps"}, "dali: device has 'mps', expected 'cpu' or a CUDA device"),
        ],
    )
    def test_out_of_range(self, options, message):
        with pytest.raises(UserError, match=message):
            dali.DaliCrops(**{"size": 8, "batch_size": 2, **options})

    def test_batches_that_do_not_fit(self, files):
        crops = dali.DaliCrops(SIZE, 2)
        boxes, flip = np.zeros((2, 4), np.int32), np.zeros(2, bool)
        for rows, box, mirror, message in (
            (3, boxes, flip, "dali: files has 3, expected 1 to 2"),
            (0, boxes, flip, "dali: files has 0, expected 1 to 2"),
            (2, boxes[:1], flip, r"dali: boxes has shape \(1, 4\), expected \(2, 4\)"),
            (2, boxes.astype(np.int64), flip, "dali: boxes has dtype int64, expected int32"),
            (2, boxes, flip.astype(np.uint8), "dali: flip has dtype uint8, expected bool"),
            (2, boxes, flip[:1], r"dali: flip has shape \(1,\), expected \(2\)"),
        ):
            with pytest.raises(UserError, match=message):
                crops.feed(files[:rows], box, mirror)

    def test_no_gpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(UserError, match="dali: device has 'cuda:0', expected 'cpu' or a CUDA device"):
            dali.DaliCrops(8, 2, device="cuda:0")

    def test_limit_of_pixels_is_set_and_can_be_set(self, monkeypatch):
        monkeypatch.delenv("DALI_MAX_IMAGE_SIZE", raising=False)
        dali.DaliCrops(8, 1)
        assert os.environ["DALI_MAX_IMAGE_SIZE"] == str(3 * MAX_PIXELS)
        monkeypatch.setenv("DALI_MAX_IMAGE_SIZE", "1000")
        crops = dali.DaliCrops(8, 1)
        assert os.environ["DALI_MAX_IMAGE_SIZE"] == "1000"
        box, flip = np.array([[0, 0, 5, 5]], np.int32), np.zeros(1, bool)
        assert crops.run([encode(picture(), "JPEG")], box, flip).refused == {0: "DALI cannot decode it"}
        assert crops.run([encode(picture(20, 16), "JPEG")], box, flip).refused == {}


def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(UserError, match=r"install it with pip install 'mimfast\[dali\]'"):
        dali.DaliCrops(8, 2)
    assert "pip install 'mimfast[dali]'" in dali.why_not()


@needs_dali
@needs_gpu
class TestGpu:
    """The same on a GPU: nvJPEG's pixels are not those of libjpeg-turbo, but near."""

    @pytest.mark.parametrize("load", [0.0, 0.65, 1.0])
    @pytest.mark.parametrize("filter", ["bicubic", "bilinear"])
    def test_photographs_agree_with_the_portable_path(self, filter, load):
        files = photographs() * 8
        boxes, flip, _ = boxes_of(files, 3)
        crops = dali.DaliCrops(224, len(files), filter, threads=4, device="cuda", hw_decoder_load=load)
        wanted = portable(files, boxes, flip, 224, filter)
        for _ in range(3):
            found = crops.run(files, boxes, flip)
            assert found.img.device == torch.device("cuda", torch.cuda.current_device())
            assert found.refused == {}
            assert difference(found.img.cpu(), wanted).mean() <= 2

    def test_bad_files_and_rows_without_a_file(self, files):
        boxes, flip, _ = boxes_of(files)
        crops = dali.DaliCrops(SIZE, len(files), device="cuda")
        clean = crops.run(files, boxes, flip).img.clone()
        bad = list(files)
        bad[1], bad[3], bad[7] = CASES["animated.gif"].data, None, b"no image"
        stay = [row for row in range(len(files)) if row not in (1, 3, 7)]
        crops.feed(bad, boxes, flip)
        crops.feed(files, boxes, flip)
        found = crops.collect()
        assert sorted(found.refused) == [1, 7]
        assert difference(found.img[stay].cpu(), clean[stay].cpu()).max() <= 1
        assert difference(crops.collect().img.cpu(), clean.cpu()).max() <= 1

    def test_result_is_ready_for_the_current_stream(self, files):
        boxes, flip, _ = boxes_of(files)
        crops = dali.DaliCrops(SIZE, len(files), device="cuda")
        wanted = crops.run(files, boxes, flip).img.cpu()
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(5):
                assert difference(crops.run(files, boxes, flip).img.clone().cpu(), wanted).max() <= 1
