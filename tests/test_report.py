"""The final table and pictures: fills that match hand calculations, no leak of hidden pixels, drawings that show what
they should.
"""

import math
import re

import pytest
import torch

from mimfast import recipes
from mimfast.data.sources import open_source, split
from mimfast.mask import Mask
from mimfast.report import Facts, Table, curve, page, sheet
from mimfast.report.reconstruct import (
    LINEAR,
    MEAN,
    MODEL,
    NEAREST,
    _image,
    _patches,
    fills,
    interpolate,
    over_pixels,
    predict_pixels,
    psnr,
    score,
)
from mimfast.testing.runs import tiny_recipe, write_images

CPU = torch.device("cpu")


def _row_mask(hidden):
    return Mask.from_hidden(torch.tensor([hidden]), grid=(1, len(hidden)))


def test_patches_are_in_row_major_order_with_colour_last_and_come_back():
    img = torch.rand(2, 3, 8, 12)
    patches = _patches(img, (2, 3))
    assert patches.shape == (2, 6, 48)
    assert torch.equal(patches[0, 4].view(4, 4, 3)[1, 2], img[0, :, 4 + 1, 4 + 2])
    assert torch.equal(_image(patches, (2, 3), (8, 12)), img)


def test_interpolation_is_linear_along_a_row_and_flat_beyond_its_ends():
    mask = _row_mask([True, False, True, True, False, True])
    values = torch.tensor([[[9.0], [1.0], [9.0], [9.0], [4.0], [9.0]]])
    assert interpolate(values, mask)[0, :, 0].tolist() == pytest.approx([1, 1, 2, 3, 4, 4])


def test_interpolation_keeps_visible_values_and_solves_laplace_inside():
    torch.manual_seed(3)
    mask = Mask.random(2, (5, 4), 0.7, seed=1)
    values = torch.rand(2, 20, 2)
    filled = interpolate(values, mask)
    assert torch.equal(filled[~mask.hidden], values[~mask.hidden])
    grid = filled.view(2, 5, 4, 2)
    for b, cell in mask.hidden.nonzero().tolist():
        row, column = divmod(cell, 4)
        around = [(row + i, column + j) for i, j in ((-1, 0), (1, 0), (0, -1), (0, 1))]
        near = torch.stack([grid[b, r, c] for r, c in around if 0 <= r < 5 and 0 <= c < 4])
        torch.testing.assert_close(grid[b, row, column], near.mean(0))


def test_fills_by_hand():
    # four 2x2 patches in a row with colours 0, .2, .4, .8; the first and the last are visible
    colours = torch.tensor([0.0, 0.2, 0.4, 0.8])
    img = colours.repeat_interleave(2).expand(1, 3, 2, 8).contiguous()
    filled = fills(img, _row_mask([False, True, True, False]))
    assert filled[MEAN].unique().tolist() == pytest.approx([0.4])
    assert filled[NEAREST][0, 0, 0].tolist() == pytest.approx([0, 0, 0, 0, 0.8, 0.8, 0.8, 0.8])
    third = 0.8 / 3
    centres = [0.0, third, 2 * third, 0.8]
    assert filled[LINEAR][0, 0, 0, 2].item() == pytest.approx(0.75 * centres[1] + 0.25 * centres[0])
    assert filled[LINEAR][0, 0, 0, 5].item() == pytest.approx(0.75 * centres[2] + 0.25 * centres[3])


def test_the_first_of_equally_near_patches_is_taken():
    img = torch.tensor([0.1, 0.5, 0.9]).repeat_interleave(2).expand(1, 3, 2, 6).contiguous()
    assert fills(img, _row_mask([False, True, False]))[NEAREST][0, 0, 0, 2:4].tolist() == pytest.approx([0.1, 0.1])


@pytest.mark.parametrize("norm", [False, True])
def test_nothing_looks_at_hidden_pixels(tmp_path, norm):
    recipe = tiny_recipe(tmp_path, tmp_path)
    torch.manual_seed(0)
    method = recipes.build(recipe).eval()
    method.target.norm = norm
    mask = Mask.random(3, (4, 4), 0.75, seed=2)
    img = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    other = torch.where(over_pixels(mask, (16, 16)), 255 - img, img)
    assert not torch.equal(img, other)
    with torch.no_grad():
        torch.testing.assert_close(
            predict_pixels(method, img, mask), predict_pixels(method, other, mask), rtol=0, atol=0
        )
    for name, filled in fills(img.float() / 255, mask).items():
        torch.testing.assert_close(filled, fills(other.float() / 255, mask)[name], rtol=0, atol=0)


def test_a_perfect_prediction_has_no_error_and_a_constant_one_has_the_expected(tmp_path):
    recipe = tiny_recipe(write_images(tmp_path / "images"), tmp_path)
    method = recipes.build(recipe).eval()
    _, held_out = split(open_source(recipe.data.path), recipe.data.holdout)

    class Grey:
        target, encoder, sample_mask = method.target, method.encoder, staticmethod(method.sample_mask)

        @staticmethod
        def predict(img, mask):
            return torch.zeros(len(img), 16, 48)  # the mean colour of ImageNet, once un-normalised

    result = score(Grey(), held_out, recipe, CPU)
    again = score(Grey(), held_out, recipe, CPU)
    assert result.mse == again.mse
    assert (result.images, result.views) == (len(held_out), 2)
    original, pasted, hidden = result.shown
    wrong = (original - pasted).square()
    # the kept pictures are all of them here, so their errors must average to the table's
    assert len(original) == 2 * len(held_out)
    mean = wrong.sum() / (3 * 16 * hidden.sum())
    assert result.mse[MODEL] == pytest.approx(mean.item(), rel=1e-5)
    grey = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    assert torch.allclose(pasted[0] * (original != pasted)[0], grey * (original != pasted)[0], atol=1e-6)


def test_psnr():
    assert psnr(0.01) == pytest.approx(20)
    assert psnr(0) == math.inf


def test_sheet_shows_hidden_patches_grey_and_the_rest_as_it_is():
    original, pasted = torch.zeros(3, 3, 8, 8), torch.ones(3, 3, 8, 8)
    hidden = torch.zeros(3, 2, 2, dtype=torch.bool)
    hidden[:, 0, 1] = True
    image = sheet.draw(original, pasted, hidden, cell=64)
    colours = {colour: count for count, colour in image.getcolors(1 << 20)}
    assert colours[(206, 210, 216)] == 3 * 32 * 32
    # three originals and three quarters of what was seen are black
    assert colours[(0, 0, 0)] == 3 * 64 * 64 + 3 * 3 * 32 * 32
    assert image.width > image.height


@pytest.mark.parametrize("values", [[], [1.0], [1.0, 1.0, 1.0], [5.0, 3.0, None, float("nan"), 1.0]])
def test_curves_draw_whatever_comes(values):
    points = [(i + 1, value) for i, value in enumerate(values)]
    assert curve.draw(points, "title").size == (960, 480)
    text = curve.svg(points)
    assert text.startswith("<svg")
    assert "nan" not in text.lower()


def test_ticks_are_round_and_cover():
    assert curve.ticks(0, 1000, 5) == [0, 200, 400, 600, 800, 1000]
    low, *_, high = curve.ticks(0.37, 1.41, 5)
    assert low <= 0.37
    assert high >= 1.41


def test_the_page_is_self_contained_and_escaped(tmp_path):
    recipe = tiny_recipe("<b>&", tmp_path)
    line = {"step": 1, "loss": 0.5, "images_per_second": 9.0, "data_wait": 0.1, "memory": 2**30, "skipped": 0}
    facts = Facts(recipe, tmp_path, 6, 61.0, 9, 3, [("<evil>.png", "no & way")])
    table = Table("T", ["a", "b"], [["x", "1"]], ["note"])
    picture = sheet.draw(
        torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8), torch.ones(1, 2, 2, dtype=torch.bool), cell=16
    )
    line |= {"data_read_s": 0.1, "data_decode_s": 2.7, "data_crop_s": 0.2, "data_transfer_s": 0.0}
    text = page.render(facts, [table], picture, curve.svg([(1, 0.5), (2, 0.4)]), [line], {"torch": "9"})
    assert "&lt;evil&gt;.png" in text
    assert "<evil>" not in text
    assert "&lt;b&gt;&amp;" in text
    assert "prefers-color-scheme: dark" in text
    assert "data:image/png;base64," in text
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    assert "<p>data: the step waited 10.0 % of the time; the loader spent 90 % decoding, 7 % cropping" in text
    for word in ("1:01", "crop_scale = ", "1.00 GiB", "note"):
        assert word in text


def test_who_waited():
    def line(wait, read=0.0, decode=0.0, crop=0.0):
        return {"data_wait": wait, "data_read_s": read, "data_decode_s": decode, "data_crop_s": crop}

    assert page.who_waited([]) is None
    assert page.who_waited([{"data_wait": 0.25}]) == "data: the step waited 25.0 % of the time"
    # the first interval, with the start-up, does not count where there are others
    lines = [line(0.9, 50.0), line(0.01, 0.9, 6.1, 3.0), line(0.014, 0.9, 6.1, 3.0)]
    told = "data: the step waited 1.2 % of the time; the loader spent 61 % decoding, 30 % cropping, 9 % reading"
    assert page.who_waited(lines) == told
    assert page.who_waited([line(0, 0.001, 0.0, 9.0)]).endswith("; the loader spent 100 % cropping")
