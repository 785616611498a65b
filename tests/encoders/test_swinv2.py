"""SwinV2: equality with timm, names of weights, masks, other sizes, precision of the scores, errors."""

import pytest
import torch
from torch import nn

from mimfast import Mask, encoders
from mimfast._check import UserError
from mimfast.encoders import SwinV2
from mimfast.encoders.paint import paint
from mimfast.encoders.swin_names import official_names, timm_names

TIMM = "timm is the peer of this test: pip install 'mimfast[timm]'"
SIZES = {"embed_dim": 16, "depths": (2, 2, 1, 2), "heads": (1, 2, 2, 4)}


def tiny(img_size: int | tuple[int, int] = 64, seed: int = 0, **kwargs: object) -> SwinV2:
    torch.manual_seed(seed)
    swin = SwinV2(img_size, **{**SIZES, **kwargs})  # type: ignore[arg-type]
    for name, parameter in swin.named_parameters():  # its zeros would hide a mistake
        nn.init.normal_(parameter, std=0.3)
        if "logit_scale" in name:
            parameter.data += 4.5  # some are over the cap
    return swin


@pytest.mark.parametrize(
    ("img_size", "window", "pretrained"),
    [(64, 2, (0, 0, 0, 0)), (128, 4, (0, 0, 0, 0)), (96, 3, (2, 2, 2, 1)), (64, 4, (8, 8, 8, 4))],
)
def test_equals_timm_with_its_weights(img_size: int, window: int, pretrained: tuple[int, ...]) -> None:
    timm = pytest.importorskip("timm", reason=TIMM)
    swin = tiny(img_size, window=window, pretrained_windows=pretrained)
    peer = timm.create_model(
        "swinv2_tiny_window8_256", img_size=img_size, num_classes=0, embed_dim=16, depths=SIZES["depths"],
        num_heads=SIZES["heads"], window_size=window, drop_path_rate=0.0, pretrained_window_sizes=pretrained,
    )  # fmt: skip
    peer.load_state_dict(timm_names(swin.state_dict()), strict=True)
    other = tiny(img_size, seed=1, window=window, pretrained_windows=pretrained)
    other.load_state_dict(peer.state_dict(), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(swin.parameters(), other.parameters()))
    img = torch.randn(2, 3, img_size, img_size)
    ours, theirs = swin(img), peer.forward_features(img).flatten(1, 2)
    assert torch.allclose(ours, theirs, atol=2e-5)
    # gradients of the scale are sums that cancel: in float64, where only timm's float32 coordinates are rounded
    swin, peer, img = swin.double(), peer.double(), img.double()
    ours, theirs = swin(img), peer.forward_features(img).flatten(1, 2)
    weight = torch.randn_like(ours)
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    wanted = official_names({name: p.grad for name, p in peer.named_parameters()})
    grads = {name: p.grad for name, p in swin.named_parameters()}
    assert grads.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert torch.allclose(grads[name], grad, atol=2e-5 * grad.abs().max().item() + 1e-9), name


@pytest.mark.parametrize(
    ("name", "timm_name", "parameters"),
    [
        ("swinv2_t", "swinv2_tiny_window8_256", 28_347_154),
        ("swinv2_s", "swinv2_small_window8_256", 49_728_418),
        ("swinv2_b", "swinv2_base_window8_256", 87_918_816),
        ("swinv2_l", "swinv2_large_window12_192", 196_739_932),
    ],
)
def test_published_sizes_have_the_names_and_shapes_of_timm(name: str, timm_name: str, parameters: int) -> None:
    timm = pytest.importorskip("timm", reason=TIMM)
    with torch.device("meta"):
        ours, theirs = encoders.build(name, 256), timm.create_model(timm_name, num_classes=0)
    wanted = {key: tuple(value.shape) for key, value in official_names(theirs.state_dict()).items()}
    assert {key: tuple(value.shape) for key, value in ours.state_dict().items()} == wanted
    classifier = ours.dim * 1000 + 1000
    assert sum(p.numel() for p in ours.parameters()) + classifier == parameters


def test_official_and_simmim_names() -> None:
    swin = tiny()
    state = {key.replace("cpb_mlp", "rpe_mlp"): value for key, value in swin.state_dict().items()}
    attention = "layers.0.blocks.1"
    state[f"{attention}.attn.relative_coords_table"] = torch.zeros(1, 3, 3, 2)
    state[f"{attention}.attn.relative_position_index"] = torch.zeros(4, 4, dtype=torch.int64)
    state[f"{attention}.attn_mask"] = torch.zeros(64, 4, 4)
    other = tiny(seed=1)
    other.load_state_dict(state, strict=True)
    assert all(torch.equal(a, b) for a, b in zip(swin.parameters(), other.parameters()))


def test_blocks_begin_as_identity_and_scales_at_ten() -> None:
    swin = SwinV2(64, **SIZES)  # type: ignore[arg-type]
    x = torch.randn(2, 256, 16)
    stage = swin.layers[0]
    stage.downsample = None
    assert torch.equal(stage(x, swin.places[0]), x)
    assert stage.blocks[0].attn.logit_scale.exp().allclose(torch.tensor(10.0))


def test_masks() -> None:
    swin = tiny(mask_token=True)
    img, colour = torch.randn(2, 3, 64, 64), torch.randn(1, 3, 1, 1, requires_grad=True)
    for grid in ((2, 2), (16, 16), (32, 32)):
        mask = Mask.random(2, grid, 0.5)
        found = swin(img, mask, "paint", colour=colour)
        assert torch.allclose(found, swin(paint(img, mask, colour)), atol=2e-5)
        assert torch.autograd.grad(found.square().sum(), colour)[0].abs().min() > 0
    mask = Mask.random(2, (4, 4), 0.5)
    w = mask.hidden.view(2, 4, 4).repeat_interleave(4, 1).repeat_interleave(4, 2).view(2, -1, 1).float()
    x = swin.patch_embed(img) * (1 - w) + swin.mask_token * w
    for stage, place in zip(swin.layers, swin.places):
        x = stage(x, place)
    assert torch.allclose(swin(img, mask, "replace"), swin.norm(x), atol=2e-5)


def test_another_size_measures_in_the_old_window() -> None:
    swin = tiny(64)
    other = swin.at(128)
    assert all(a is b for a, b in zip(swin.parameters(), other.parameters()))
    assert [p.window for p in other.places] == [4, 4, 4, 4]
    fresh = tiny(128, pretrained_windows=(2, 2, 2, 2))
    img = torch.randn(1, 3, 128, 128)
    assert torch.allclose(other(img), fresh(img), atol=1e-5)
    small = torch.randn(1, 3, 64, 64)
    assert torch.equal(other.at(64)(small), swin(small))


def test_windows_of_one_token_are_finite() -> None:
    assert tiny(32)(torch.randn(1, 3, 32, 32)).isfinite().all()


def test_scores_keep_their_precision_under_autocast() -> None:
    swin = tiny(128, depths=(1, 0, 0, 0))
    attn, place = swin.layers[0].blocks[0].attn, swin.places[0]
    attn.logit_scale.data.fill_(10.0)  # at the cap
    wiring = encoders.swin.Wiring(place)
    x = torch.randn(1, 1024, 16).bfloat16().float()
    attn.qkv.weight.data.copy_(torch.cat([torch.eye(16)] * 3))  # no rounding but that of the scores is left
    attn.proj.weight.data.copy_(torch.eye(16))
    for bias in (attn.q_bias, attn.v_bias, attn.proj.bias):
        bias.data.zero_()
    wanted = attn(x, wiring, False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attn(x, wiring, False)
    assert (found - wanted).abs().max() < 2**-7 * wanted.abs().max()


def test_traces_without_graph_breaks() -> None:
    swin, mask = tiny(32, depths=(2, 0), heads=(1, 2)), Mask.random(2, (2, 2), 0.5)
    img, colour = torch.randn(2, 3, 32, 32), torch.randn(1, 3, 1, 1)
    compiled = torch.compile(swin, backend="eager", fullgraph=True, dynamic=False)
    assert torch.allclose(compiled(img, mask, colour=colour), swin(img, mask, colour=colour), atol=1e-6)


def test_config_and_refusals() -> None:
    swin = encoders.build("swinv2_nano", 64, mask_token=True, pretrained_windows=(4, 4, 4, 2))
    again = encoders.from_config(swin.config)
    assert type(again) is SwinV2
    assert again.config == swin.config
    with pytest.raises(UserError, match=r"SwinV2: pretrained_windows has \(4, 4\), expected one number for each stage"):
        tiny(pretrained_windows=(4, 4))
    with pytest.raises(UserError, match=r"SwinV2: mode has 'drop', expected one of \['paint'\]"):
        tiny()(torch.zeros(1, 3, 64, 64), Mask.random(1, (2, 2), 0.5), "drop")
