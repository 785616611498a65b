"""Painting hidden cells: values, gradient of the colour, grids, errors."""

import pytest
import torch

from mimfast import Mask
from mimfast._check import UserError
from mimfast._images import normalize
from mimfast.encoders.paint import cell_of, paint


def hidden_pixels(mask: Mask, n: int) -> torch.Tensor:
    rows, columns = mask.grid
    return mask.hidden.view(-1, 1, rows, columns).repeat_interleave(n, 2).repeat_interleave(n, 3)


@pytest.mark.parametrize(("grid", "n"), [((4, 6), 8), ((8, 12), 4), ((1, 2), 24), ((2, 3), 16)])
def test_hidden_cells_become_the_colour_and_others_stay(grid: tuple[int, int], n: int) -> None:
    mask = Mask.random(3, grid, 0.5)
    colour = torch.randn(1, 3, 1, 1)
    img = torch.randint(0, 256, (3, 3, grid[0] * n, grid[1] * n), dtype=torch.uint8)
    assert cell_of(img, mask) == n
    wanted = torch.where(hidden_pixels(mask, n), colour, normalize(img))
    assert torch.equal(paint(img, mask, colour), wanted)
    assert torch.equal(paint(img.contiguous(memory_format=torch.channels_last), mask, colour), wanted)
    assert torch.equal(paint(normalize(img), mask, colour), wanted)


def test_the_dtype_of_float_images_stays() -> None:
    mask = Mask.random(2, (2, 2), 0.5)
    assert paint(torch.zeros(2, 3, 8, 8, dtype=torch.bfloat16), mask, torch.ones(1, 3, 1, 1)).dtype == torch.bfloat16


def test_the_colour_gets_the_sum_over_its_pixels() -> None:
    mask = Mask.random(2, (4, 4), 0.75)
    colour = torch.zeros(1, 3, 1, 1, requires_grad=True)
    weight = torch.randn(2, 3, 16, 16)
    (paint(torch.randn(2, 3, 16, 16), mask, colour) * weight).sum().backward()
    wanted = (weight * hidden_pixels(mask, 4)).sum((0, 2, 3))
    assert colour.grad is not None
    assert torch.allclose(colour.grad.flatten(), wanted, atol=1e-4)


def test_a_ragged_mask_paints_too() -> None:
    mask = Mask.random(2, (4, 4), [0.25, 0.75])
    painted = paint(torch.zeros(2, 3, 16, 16), mask, torch.ones(1, 3, 1, 1))
    assert painted.mean((1, 2, 3)).tolist() == [0.25, 0.75]


@pytest.mark.parametrize(
    ("shape", "grid", "message"),
    [
        ((2, 3, 16, 16), (3, 3), r"paint: mask has grid 3x3, expected a grid that divides the image because"),
        ((2, 3, 16, 32), (4, 4), r"paint: mask has grid 4x4, expected a grid that divides the image because the image"),
        ((3, 3, 16, 16), (4, 4), r"paint: mask has batch 2, expected 3 because the batch holds 3 images"),
        ((2, 1, 16, 16), (4, 4), r"paint: img has shape \(2, 1, 16, 16\), expected \(batch, 3, height, width\)"),
    ],
)
def test_refuses_images_and_masks(shape: tuple[int, ...], grid: tuple[int, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        paint(torch.zeros(shape), Mask.random(2, grid, 0.5), torch.zeros(1, 3, 1, 1))


def test_refuses_dtypes_and_colours() -> None:
    mask, img = Mask.random(2, (4, 4), 0.5), torch.zeros(2, 3, 16, 16)
    with pytest.raises(UserError, match=r"paint: img has dtype int32, expected uint8 or floating point"):
        paint(img.int(), mask, torch.zeros(1, 3, 1, 1))
    with pytest.raises(UserError, match=r"paint: colour has shape \(3,\), dtype float32, expected \(1, 3, 1, 1\)"):
        paint(img, mask, torch.zeros(3))
    with pytest.raises(UserError, match=r"paint: colour has device meta, expected cpu"):
        paint(img, mask, torch.zeros(1, 3, 1, 1, device="meta"))
    with pytest.raises(UserError, match=r"paint: mask has device meta, expected cpu"):
        paint(img, mask.to("meta"), torch.zeros(1, 3, 1, 1))
    with pytest.raises(UserError, match=r"paint: mask has grid 4x4 with 2 frames"):
        paint(img, mask.tube(2), torch.zeros(1, 3, 1, 1))
