"""Targets: what they score against plain torch, their plain values, what they refuse."""

import pytest
import torch
from torch.nn import functional as F

from mimfast import Mask, targets
from mimfast._check import UserError
from mimfast._images import normalize
from mimfast.ops.hog import hog
from mimfast.targets import HOG, LocalNormPixels, Pixels


def pixels(batch: int = 2, side: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8)


def test_colours_first_or_last() -> None:
    img, mask = normalize(pixels()), Mask.random(2, (4, 4), 0.5)
    pred = torch.randn(2, 16, 192)
    tiles = img.view(2, 3, 4, 8, 4, 8)
    last, first = (tiles.permute(*order).reshape(2, 16, 192) for order in ((0, 2, 4, 3, 5, 1), (0, 2, 4, 1, 3, 5)))
    for order, wanted in (("pqc", last), ("cpq", first)):
        found = Pixels(8, norm=False, kind="l1", order=order)(pred, img, mask)
        assert torch.allclose(found, (pred - wanted).abs()[mask.hidden].mean(), rtol=1e-5)


@pytest.mark.parametrize("window", [0, 16])
@pytest.mark.parametrize("kind", ["mse", "l1", "smooth_l1"])
def test_histograms_of_tokens_of_rows_and_of_cells(kind: str, window: int) -> None:
    img, mask = pixels(), Mask.random(2, (2, 2), 0.5)
    target = HOG(16, gaussian_window=window, kind=kind)
    assert target.dim == 108
    wanted = hog(img, stride=16, gaussian_window=window, impl="ref")
    distance = {"mse": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}[kind]
    pred = torch.randn(2, 4, 108)
    found = target(pred, img, mask)
    assert torch.allclose(found, distance(pred[mask.hidden], wanted[mask.hidden]), rtol=1e-5)
    rows = mask.hide
    some = pred.gather(1, rows[..., None].expand(-1, -1, 108))
    assert torch.allclose(target(some, img, mask, rows), found, rtol=1e-5)
    fine = Mask.random(2, (4, 4), 0.75)
    cells = [x.unflatten(-1, (27, 2, 2)).view(2, 2, 2, 27, 2, 2).permute(0, 1, 4, 2, 5, 3) for x in (pred, wanted)]
    one, two = (x.reshape(2, 16, 27)[fine.hidden] for x in cells)
    assert torch.allclose(target(pred, img, fine), distance(one, two), rtol=1e-5)


def test_float_images_are_scored_with_the_published_arithmetic() -> None:
    img, mask, target = pixels(), Mask.random(2, (2, 2), 0.5), HOG(16)
    pred = torch.randn(2, 4, 108)
    found = target(pred, normalize(img), mask)
    wanted = hog(normalize(img), stride=16, compat="float", impl="ref")
    assert torch.allclose(found, (pred - wanted)[mask.hidden].square().mean(), rtol=1e-5)
    assert torch.allclose(found, target(pred, img, mask), rtol=1e-2)


def test_plain_values_build_a_target_again() -> None:
    for target in (
        Pixels(8, False, "l1", "cpq"),
        LocalNormPixels(8, 5, "mse"),
        HOG(8, normalize=False, gaussian_window=16, kind="smooth_l1"),
    ):
        again = targets.from_config(8, target.config)
        assert type(again) is type(target)
        assert (again.config, again.dim, repr(again)) == (target.config, target.dim, repr(target))


def test_refuses() -> None:
    with pytest.raises(UserError, match="HOG: patch has 12, expected a multiple of 8 because a histogram covers"):
        HOG(12)
    with pytest.raises(UserError, match="LocalNormPixels: window has 4, expected an odd number of pixels because"):
        LocalNormPixels(8, 4)
    with pytest.raises(UserError, match=r"targets.from_config: type has 'Sift', expected one of \['Pixels',"):
        targets.from_config(8, {"type": "Sift"})
