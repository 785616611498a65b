"""Timm: output equals forward_features of the painted image, gradients of the colour, live sizes, names, errors."""

import sys
from typing import Any

import pytest
import torch
from torch import nn

from mimfast import Mask, encoders
from mimfast._check import UserError
from mimfast._images import normalize
from mimfast.encoders.paint import paint
from mimfast.encoders.timm import Timm

timm = pytest.importorskip("timm", reason="timm is what is adapted: pip install 'mimfast[timm]'")

SMALL = {"depths": (1, 1, 1, 1), "embed_dim": 24, "num_heads": (1, 1, 2, 2)}
SWIN = {**SMALL, "window_size": 2}
PVT = {"depths": (1, 1, 1, 1)}
# name, keyword arguments, stride
MODELS: list[tuple[str, dict[str, Any], int]] = [
    ("pvt_v2_b0", {}, 32),
    ("pvt_v2_b2", PVT, 32),
    ("mvitv2_tiny", {}, 32),
    ("convnextv2_atto", {}, 32),
    ("swin_tiny_patch4_window7_224", SWIN, 32),
    ("hiera_tiny_224", {}, 32),
    ("vit_tiny_patch16_224", {"depth": 2}, 16),
    ("vit_small_patch16_dinov3", {"depth": 1}, 16),  # with register tokens
]


def made(name: str, kwargs: dict[str, Any], img_size: int = 64) -> Timm:
    torch.manual_seed(0)
    return Timm(name, img_size, **kwargs).eval()


@pytest.mark.parametrize(("name", "kwargs", "stride"), MODELS)
def test_equals_forward_features_of_the_painted_image(name: str, kwargs: dict[str, Any], stride: int) -> None:
    encoder = made(name, kwargs)
    side = 64 // stride
    assert (encoder.stride, encoder.grid, encoder.prefix, encoder.img_size) == (stride, (side, side), 0, (64, 64))
    img = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    mask, colour = Mask.random(2, (4, 4), 0.5), torch.randn(1, 3, 1, 1, requires_grad=True)
    tokens = encoder(img, mask, "paint", colour=colour)
    assert tokens.shape == (2, side * side, encoder.dim)
    # an independent path of timm gives maps, which shows the order of the tokens; these two have their norm in the head
    normed = not name.startswith(("hiera", "convnext"))
    painted = paint(img, mask, colour).detach()
    with torch.no_grad():
        feature_map = encoder.model.forward_intermediates(painted, norm=normed, intermediates_only=True)[-1]
        assert torch.equal(tokens, feature_map.flatten(2).mT)
        assert torch.equal(encoder(img), encoder(normalize(img)))
    tokens.square().sum().backward()
    assert colour.grad is not None
    assert colour.grad.abs().min() > 0
    assert [n for n, p in encoder.named_parameters() if p.requires_grad and p.grad is None] == []


def test_a_map_with_channels_last_and_one_with_as_many_channels_as_rows_are_told_apart() -> None:
    class Cube(nn.Module):
        num_features, feature_info, output_fmt = 3, ({"reduction": 8},), "NCHW"

        def forward_features(self, x: torch.Tensor) -> torch.Tensor:
            x = x[:, :, ::8, ::8]
            return x if self.output_fmt == "NCHW" else x.permute(0, 2, 3, 1)

    img = torch.randn(2, 3, 24, 24)
    for fmt in ("NCHW", "NHWC"):
        cube = Cube()
        cube.output_fmt = fmt
        assert torch.equal(Timm(cube, 24)(img), img[:, :, ::8, ::8].flatten(2).mT)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("pvt_v2_b0", {}),
        ("convnextv2_atto", {}),
        ("vit_tiny_patch16_224", {"depth": 2}),
        ("swin_tiny_patch4_window7_224", {**SWIN, "dynamic_img_size": True}),
    ],
)
def test_another_size_shares_every_parameter(name: str, kwargs: dict[str, Any]) -> None:
    encoder = made(name, kwargs)
    other = encoder.at((96, 128))
    assert (encoder.img_size, other.img_size) == ((64, 64), (96, 128))
    assert all(a is b for a, b in zip(encoder.parameters(), other.parameters()))
    img = torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        tokens = other(img)
        assert tokens.shape == (1, 96 * 128 // encoder.stride**2, encoder.dim)
        back = torch.randn(1, 3, 64, 64)
        assert torch.equal(other.at(64)(back), encoder(back))


@pytest.mark.parametrize(
    ("name", "kwargs", "because"),
    [
        ("mvitv2_tiny", {}, "the position weights of mvitv2_tiny belong to that size"),
        ("hiera_tiny_224", {}, "the position weights of hiera_tiny_224 belong to that size"),
        ("swin_tiny_patch4_window7_224", SWIN, "relative_position_bias_table of .* would be a resized copy, trained"),
    ],
)
def test_says_why_another_size_cannot_be(name: str, kwargs: dict[str, Any], because: str) -> None:
    message = f"Timm.at: img_size has 96x96, expected the size it was built for because .*{because}"
    encoder = made(name, kwargs)
    parameters = list(encoder.parameters())
    with pytest.raises(UserError, match=message):
        encoder.at(96)
    assert all(a is b for a, b in zip(parameters, encoder.parameters()))
    assert encoder(torch.zeros(1, 3, 64, 64)).shape[0] == 1


def test_state_dict_has_timms_names() -> None:
    encoder = made("pvt_v2_b0", PVT)
    peer = timm.create_model("pvt_v2_b0", num_classes=0, **PVT)
    assert list(encoder.state_dict()) == list(peer.state_dict())
    encoder.load_state_dict(peer.state_dict(), strict=True)
    img = torch.randn(1, 3, 64, 64)
    assert torch.equal(encoder(img), peer.eval().forward_features(img).flatten(2).mT)
    peer.load_state_dict(nn.ModuleDict({"encoder": encoder}).encoder.state_dict(), strict=True)
    outer = nn.ModuleDict({"encoder": encoder})
    outer.load_state_dict(outer.state_dict(), strict=True)


def test_config_builds_it_again() -> None:
    encoder = Timm("pvt_v2_b0", (64, 96), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), **PVT)

    again = encoders.from_config(encoder.config)
    assert again.config == encoder.config
    assert [tuple(p.shape) for p in again.parameters()] == [tuple(p.shape) for p in encoder.parameters()]


def test_refuses() -> None:
    encoder = made("pvt_v2_b0", PVT)
    img, mask = torch.zeros(2, 3, 64, 64), Mask.random(2, (2, 2), 0.5)
    with pytest.raises(
        UserError, match=r"Timm: mode has 'replace', expected 'paint' because masks are not known inside"
    ):
        encoder(img, mask, "replace")
    with pytest.raises(
        UserError, match=r"paint: colour has None, expected a tensor \(1, 3, 1, 1\) because mode 'paint'"
    ):
        encoder(img, mask)
    with pytest.raises(
        UserError, match=r"Timm: img has size 96x64, expected 64x64 because .* at\(size\) gives the one"
    ):
        encoder(torch.zeros(2, 3, 96, 64))
    with pytest.raises(
        UserError, match=r"Timm: img_size has 72, expected a multiple of 32 because a token of pvt_v2_b0"
    ):
        encoder.at((64, 72))
    with pytest.raises(UserError, match=r"Timm: model has 'pvt_v2_b9', expected a name of .*; did you mean 'pvt_v2_b"):
        Timm("pvt_v2_b9", 64)
    with pytest.raises(
        UserError, match=r"Timm: model has Linear, expected a model with forward_features, feature_info"
    ):
        Timm(nn.Linear(3, 3), 64)
    with pytest.raises(UserError, match=r"Timm: kwargs has \['depths'\], expected none because the model is built"):
        Timm(encoder.model, 64, depths=(1, 1, 1, 1))


def test_an_output_that_is_no_map_is_refused() -> None:
    model = timm.create_model("pvt_v2_b0", num_classes=0, **PVT)
    model.forward_features = lambda x: x.mean((2, 3))  # type: ignore[method-assign]
    with pytest.raises(
        UserError, match=r"Timm: forward_features has shape \(2, 3\), expected one map of tokens because"
    ):
        Timm(model, 64)(torch.zeros(2, 3, 64, 64))


def test_without_timm_the_message_has_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"Timm: timm is not installed, .* pip install 'mimfast\[timm\]'"):
        Timm("pvt_v2_b0", 64)
