"""ViT with full sequences: painting and replacing over several mask grids, learned positions, `build`'s options."""

import copy

import pytest
import torch
from torch import Tensor

from mimfast import Mask, encoders
from mimfast._check import UserError
from mimfast._images import normalize
from mimfast.encoders import ViT
from mimfast.encoders.positions import sincos_2d


def tiny(**options) -> ViT:
    return ViT((32, 48), patch=8, dim=32, depth=2, heads=2, **options)


def painted_image(img: Tensor, mask: Mask, colour: Tensor) -> Tensor:
    """Written without the package: hidden cells of the normalised image in one colour."""
    pixels = normalize(img)
    (rows, columns), (height, width) = mask.grid, pixels.shape[2:]
    hidden = mask.hidden.view(-1, 1, rows, columns).repeat_interleave(height // rows, 2)
    return torch.where(hidden.repeat_interleave(width // columns, 3), colour, pixels)


# cells of 4 px (a patch is painted in part), 8 (a patch), 16 (four patches), 12 x 12 does not tile 32
GRIDS = [(8, 12), (4, 6), (2, 3)]


@pytest.mark.parametrize("positions", ["sincos", "learned"])
@pytest.mark.parametrize("kind", ["uint8", "float"])
@pytest.mark.parametrize("grid", GRIDS)
def test_paint_equals_encoding_the_painted_image(grid, kind, positions) -> None:
    vit = tiny(positions=positions)
    img = torch.randint(0, 256, (3, 3, 32, 48), dtype=torch.uint8)
    img = img if kind == "uint8" else normalize(img)
    mask, colour = Mask.random(3, grid, 0.5), torch.randn(1, 3, 1, 1, requires_grad=True)
    got = vit(img, mask, "paint", colour=colour)
    want = vit(painted_image(img, mask, colour))
    assert got.shape == (3, vit.prefix + 24, 32)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    upstream = torch.randn_like(got)
    leaves = [colour, *(p for p in vit.parameters() if p.requires_grad)]
    for a, b in zip(*(torch.autograd.grad(y, leaves, upstream) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * max(1, b.abs().max().item()))


@pytest.mark.parametrize("grid", [(4, 6), (2, 3)])
def test_paint_and_replace_take_images_that_hide_different_numbers(grid) -> None:
    vit = tiny(mask_token=True)
    hidden = torch.rand(3, grid[0] * grid[1]) < torch.tensor([[0.2], [0.5], [0.8]])
    hidden[:, 0], hidden[0, 1] = False, True
    mask = Mask.from_hidden(hidden, grid, ragged=True)
    img, colour = torch.randn(3, 3, 32, 48), torch.randn(1, 3, 1, 1)
    want = vit(painted_image(img, mask, colour))
    torch.testing.assert_close(vit(img, mask, "paint", colour=colour), want, rtol=0, atol=1e-5)
    if grid == vit.grid:
        got = vit(img, mask, "replace")
        singles = [vit(img[b : b + 1], Mask.from_hidden(hidden[b : b + 1], grid), "replace") for b in range(3)]
        torch.testing.assert_close(got, torch.cat(singles), rtol=0, atol=1e-5)


def test_hidden_pixels_are_not_embedded() -> None:
    vit, mask, colour = tiny(), Mask.random(2, (2, 3), 0.5), torch.zeros(1, 3, 1, 1)
    img = torch.randn(2, 3, 32, 48)
    spoilt = torch.where(painted_image(torch.ones_like(img), mask, colour) == 0, float("nan"), img)
    want = vit(img, mask, "paint", colour=colour)
    assert torch.equal(vit(spoilt, mask, "paint", colour=colour), want)


def test_paint_under_autocast() -> None:
    vit, mask, colour = tiny(), Mask.random(2, (2, 3), 0.5), torch.randn(1, 3, 1, 1)
    img = torch.randn(2, 3, 32, 48)
    want = vit(img, mask, "paint", colour=colour)
    with torch.autocast("cpu", torch.bfloat16):
        inside = vit(img, mask, "paint", colour=colour)
    torch.testing.assert_close(inside.float(), want, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("ragged", [False, True])
def test_paint_never_waits_for_the_device(grid, ragged) -> None:
    """A look at a tensor's values would break the graph."""
    vit, colour, img = tiny(), torch.randn(1, 3, 1, 1), torch.randn(2, 3, 32, 48)
    mask = Mask.random(2, grid, [0.5, 0.8] if ragged else 0.5)
    compiled = torch.compile(vit.embed, backend="aot_eager", fullgraph=True)
    got = compiled(img, mask, "paint", colour=colour)
    torch.testing.assert_close(got, vit.embed(img, mask, "paint", colour=colour))


def test_features_take_every_mode() -> None:
    vit, mask, colour = tiny(), Mask.random(2, (4, 6), 0.5), torch.randn(1, 3, 1, 1)
    img = torch.randn(2, 3, 32, 48)
    maps = vit.features(img, mask, "paint", colour=colour)
    assert len(maps) == 3
    assert torch.equal(vit.norm(maps[-1]), vit(img, mask, "paint", colour=colour))


def test_paint_refuses() -> None:
    vit, img = tiny(), torch.zeros(2, 3, 32, 48)
    mask, colour = Mask.random(2, (4, 6), 0.5), torch.zeros(1, 3, 1, 1)
    with pytest.raises(UserError, match=r"colour has None, expected a tensor \(1, 3, 1, 1\) because mode 'paint'"):
        vit(img, mask, "paint")
    with pytest.raises(UserError, match=r"colour has shape \(3,\), dtype float32"):
        vit(img, mask, "paint", colour=torch.zeros(3))
    with pytest.raises(UserError, match=r"mask has grid 5x6, expected a grid that divides the image"):
        vit(img, Mask.random(2, (5, 6), 0.5), "paint", colour=colour)
    with pytest.raises(UserError, match=r"mask has batch 3, expected 2"):
        vit(img, Mask.random(3, (4, 6), 0.5), "paint", colour=colour)
    with pytest.raises(UserError, match="ViT: img has size 32x32, expected 32x48"):
        vit(img[..., :32], mask, "paint", colour=colour)


def test_learned_positions() -> None:
    vit = tiny(positions="learned", mask_token=True)
    assert vit.pos_embed.requires_grad
    assert vit.pos_embed.shape == (1, 25, 32)
    assert 0.015 < vit.pos_embed.std() < 0.025
    assert vit.pos_embed.abs().max() < 0.11
    again = ViT(**vit.config)
    assert again.positions == "learned"
    assert again.config == vit.config
    again.load_state_dict(vit.state_dict())
    assert "positions" not in tiny().config
    assert list(tiny().state_dict()) == list(tiny(positions="learned").state_dict())
    with pytest.raises(UserError, match="ViT: positions has 'rope', expected 'sincos' or 'learned'"):
        tiny(positions="rope")


def test_learned_positions_at_another_size_pass_their_gradient_on() -> None:
    vit = tiny(positions="learned")
    other = vit.at((64, 48))
    assert other.pos_embed.shape == (1, 49, 32)
    assert torch.equal(other.pos_embed[:, 0], vit.pos_embed[:, 0])
    patches = vit.pos_embed[:, 1:].mT.unflatten(2, (4, 6))
    want = torch.nn.functional.interpolate(patches, (8, 6), mode="bicubic", antialias=True)  # as timm does
    torch.testing.assert_close(other.pos_embed[:, 1:], want.flatten(2).mT)
    other(torch.randn(2, 3, 64, 48), Mask.random(2, (8, 6), 0.5)).square().sum().backward()
    assert vit.pos_embed.grad.abs().max() > 0
    assert list(vit.state_dict()) == list(tiny().state_dict())
    assert sorted(other.state_dict()) == sorted(vit.state_dict())
    assert vit.at((32, 48)).pos_embed is vit.pos_embed
    table = torch.arange(25.0)[None, :, None].expand(-1, -1, 32)
    with torch.no_grad():
        vit.pos_embed.copy_(table)
    assert vit.at((64, 48)).at((64, 48)).pos_embed[0, 0, 0] == 0


def test_fixed_positions_at_another_size_are_made_once() -> None:
    vit = tiny()
    first = vit.at(64).pos_embed
    assert vit.at(64).pos_embed is first
    assert torch.equal(first, sincos_2d(32, (8, 8)))
    assert "pos_embed" in dict(vit.at(64).named_parameters())
    with torch.no_grad():
        vit.pos_embed.add_(1)
    changed = vit.at(64).pos_embed
    assert not torch.equal(changed, first)
    twin = copy.deepcopy(vit)
    assert torch.equal(twin.at(64).pos_embed, changed)
    assert vit.double().at(64).pos_embed.dtype == torch.float64
    with torch.inference_mode():
        inside = tiny().at(64).pos_embed
    assert torch.equal(inside, first)


def test_build_passes_options_on_and_drops_the_last_blocks() -> None:
    vit = encoders.build("vit_nano8", 64, mask_token=True, positions="learned", drop_last=1, heads=4)
    assert (vit.depth, len(vit.blocks), vit.heads, vit.positions) == (3, 3, 4, "learned")
    assert vit.mask_token is not None
    assert encoders.build("vit", 64, patch=32, depth=5, dim=64, drop_last=2).depth == 3
    full = encoders.build("vit_nano8", 64)
    missing, unexpected = full.load_state_dict(encoders.build("vit_nano8", 64, drop_last=1).state_dict(), strict=False)
    assert not unexpected
    assert {name.split(".")[1] for name in missing} == {"3"}
    with pytest.raises(UserError, match=r"drop_last has 4, expected 0 to 3 because vit_nano8 has 4 blocks and keeps"):
        encoders.build("vit_nano8", 64, drop_last=4)
    with pytest.raises(UserError, match=r"an option has 'drop_paths', expected one of img_size, patch, .*positions"):
        encoders.build("vit_nano8", 64, drop_paths=0.1)
