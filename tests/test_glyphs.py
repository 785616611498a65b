"""Stars of edges point where the edges do, and the HOG table compares like with like."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from mimfast import recipes, report
from mimfast.data.sources import open_source, split
from mimfast.mask import Mask
from mimfast.ops.hog import hog
from mimfast.report import gradients, sheet
from mimfast.report.glyphs import stars
from mimfast.testing.runs import tiny_fastmim, write_images

CPU = torch.device("cpu")


def _direction(ink):
    """Angle of a stroke in degrees, anticlockwise from the right, in [0, 180): the main axis of its ink."""
    side = len(ink)
    y, x = torch.meshgrid(torch.arange(side) - side / 2 + 0.5, torch.arange(side) - side / 2 + 0.5, indexing="ij")
    xx, yy, xy = ((ink * part).sum() for part in (x * x, y * y, x * y))
    # y counts downwards
    return math.degrees(0.5 * math.atan2(-2 * xy, xx - yy)) % 180


@pytest.mark.parametrize(
    ("wave", "edge"),
    [
        (lambda y, x: x, 90),  # vertical stripes
        (lambda y, x: y, 0),
        (lambda y, x: x + y, 45),
        (lambda y, x: x - y, 135),
        (lambda y, x: x + 2 * y, math.degrees(math.atan(0.5))),
        (lambda y, x: 2 * x + y, math.degrees(math.atan(2))),
        (lambda y, x: x - 2 * y, 180 - math.degrees(math.atan(0.5))),
    ],
)
def test_strokes_lie_along_the_edges(wave, edge):
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    img = (wave(y, x) * 1.5 + 100).round().clamp(0, 255).byte().expand(1, 3, 32, 32)
    # an inner cell; bins are 20 degrees wide
    found = _direction(stars(hog(img)[0], 64)[64:128, 64:128])
    assert min(abs(found - edge), 180 - abs(found - edge)) <= 10.5


def test_each_bin_turns_the_stroke_by_twenty_degrees():
    angles = []
    for b in range(9):
        cells = torch.zeros(27, 1, 1)
        cells[[b, 9 + b, 18 + b]] = 1
        angles.append(_direction(stars(cells, 96)))
    # bin 0 is a gradient nearly along the vertical axis, hence a nearly horizontal edge
    assert angles == pytest.approx([10 + 20 * b for b in range(9)], abs=0.2)


def test_stronger_values_are_longer_and_darker_and_colours_count_together():
    cells = torch.zeros(27, 1, 4)
    cells[4, 0, 0] = 1
    cells[[4, 13, 22], 0, 1] = 1
    cells[[4, 13, 22], 0, 2] = -1
    picture = stars(cells, 40)
    assert picture.shape == (40, 160)
    one, three, negative, empty = picture.split(40, 1)
    assert three.max() == 1
    assert 0.3 < one.max() < 0.4
    assert (three > 0.01).any(1).sum() > 1.5 * (one > 0.01).any(1).sum()
    assert negative.max() == empty.max() == 0
    # strokes end inside their cell
    assert three[:, 0].max() == three[:, -1].max() == 0


def test_tokens_become_cells_in_the_order_of_the_op():
    img = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    for stride in (8, 16):
        cells = gradients.as_cells(hog(img, stride=stride), (32 // stride, 48 // stride))
        assert torch.equal(cells, hog(img))


def test_the_nearest_visible_block_by_hand():
    # mask cells of two histograms' side, the two in the middle hidden; the visible ones hold 1..4 and 5..8
    real = torch.arange(1.0, 17.0).view(1, 1, 2, 8).expand(1, 27, 2, 8)
    filled = gradients.nearest(real, Mask.from_hidden(torch.tensor([[False, True, True, False]]), (1, 4)))
    assert filled[0, 5].tolist() == [[1, 2, 1, 2, 7, 8, 7, 8], [9, 10, 9, 10, 15, 16, 15, 16]]


@pytest.mark.parametrize("block", [8, 16])
def test_a_perfect_prediction_has_no_error_and_zero_has_the_mean_square(tmp_path, block):
    recipe = tiny_fastmim(write_images(tmp_path / "images", side=40), tmp_path)
    method = recipes.build(recipe).eval()
    train, held_out = split(open_source(recipe.data.path), recipe.data.holdout)

    class Perfect:
        target = method.target

        @staticmethod
        def sample_mask(batch, **given):
            return Mask.random(batch, (32 // block,) * 2, 0.75, **given)

        @staticmethod
        def predict(img, mask):
            return hog(img, stride=8)

    result = gradients.score(Perfect(), train, held_out, recipe, CPU)
    assert result.mse == gradients.score(Perfect(), train, held_out, recipe, CPU).mse
    assert result.mse[gradients.MODEL] == 0
    # nine values of a histogram have squares that sum to 1; the pictures have no flat cell
    assert result.mse[gradients.ZERO] == pytest.approx(1 / 9, rel=1e-4)
    original, hidden, target, predicted = result.shown
    assert (result.images, result.views) == (len(held_out), 2)
    assert torch.equal(target, predicted)
    assert torch.equal(target, hog(original))
    wide = hidden.repeat_interleave(block // 8, 1).repeat_interleave(block // 8, 2)[:, None]
    square = (target.square() * wide).sum() / (27 * wide.sum())
    assert result.mse[gradients.ZERO] == pytest.approx(square.item(), rel=1e-5)


def test_the_mean_is_that_of_the_training_images(tmp_path):
    stripes = np.where(np.arange(64) % 16 < 8, 255, 0).astype(np.uint8)
    for i in range(8):
        Image.fromarray(np.tile(stripes[None, :, None], (64, 1, 3))).save(tmp_path / f"{i}.png")
    recipe = tiny_fastmim(tmp_path, tmp_path)
    train, held_out = split(open_source(recipe.data.path), recipe.data.holdout)
    result = gradients.score(recipes.build(recipe).eval(), train, held_out, recipe, CPU)
    # every edge is vertical in every crop: one bin holds all, or the cell is flat
    assert result.mse[gradients.MEAN] < 0.1 * result.mse[gradients.ZERO]
    # a mean of more parts cannot fit its own images worse
    again = gradients.score(recipes.build(recipe).eval(), train, train, recipe, CPU)
    assert again.mse[gradients.PLACE] <= again.mse[gradients.MEAN] + 1e-6


def test_the_sheet_shows_paint_strokes_and_a_legend():
    original = torch.full((2, 3, 16, 16), 200, dtype=torch.uint8)
    hidden = torch.tensor([[[True, False], [False, False]]] * 2)
    target = torch.zeros(2, 27, 2, 2)
    target[:, [4, 13, 22]] = 1
    image = sheet.draw_hog(original, hidden, target, torch.zeros_like(target), (255, 0, 0), cell=64)
    colours = {colour: count for count, colour in image.getcolors(1 << 20)}
    assert colours[255, 0, 0] == 2 * 32 * 32
    blue, grey = colours[20, 60, 160], colours[150, 154, 162]
    # the one hidden cell has a stroke as target and none as prediction; three visible ones have it in both
    assert grey == 6 * blue
    legend = sheet.draw_hog(original[:1], hidden[:1], target[:1], target[:1], cell=64)
    assert legend.height > 64 + 40


def test_a_run_with_hog_targets_writes_its_table_and_picture(tmp_path, capsys):
    from mimfast.train import loop

    recipe = tiny_fastmim(write_images(tmp_path / "images", side=40), tmp_path / "run", steps=2)
    loop.pretrain(recipe)
    told = capsys.readouterr().out
    for name in (gradients.MODEL, gradients.MEAN, gradients.NEAREST, gradients.ZERO, "HOG of held-out images"):
        assert name in told
    found = report.json.loads((tmp_path / "run/results.json").read_text())["hog"]
    assert set(found["mse"]) == {gradients.MODEL, gradients.MEAN, gradients.PLACE, gradients.NEAREST, gradients.ZERO}
    assert (tmp_path / "run/hog.png").stat().st_size > 1000
    assert not (tmp_path / "run/reconstruction.png").exists()
    assert "HOG of held-out images" in (tmp_path / "run/report.html").read_text()
