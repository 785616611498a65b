"""Swin: equality with timm, names of weights, masks against painting for real, other sizes, drop path, errors."""

import pytest
import torch
from torch import nn

from mimfast import Mask, encoders
from mimfast._check import UserError
from mimfast._images import normalize
from mimfast.encoders import Swin
from mimfast.encoders.paint import paint
from mimfast.encoders.swin_names import official_names, timm_names
from mimfast.encoders.tables import geometric_resize

TIMM = "timm is the peer of this test: pip install 'mimfast[timm]'"
SIZES = {"embed_dim": 16, "depths": (2, 2, 1, 2), "heads": (1, 2, 2, 4)}


def tiny(img_size: int | tuple[int, int] = 64, seed: int = 0, **kwargs: object) -> Swin:
    torch.manual_seed(seed)
    swin = Swin(img_size, **{**SIZES, **kwargs})  # type: ignore[arg-type]
    for name, parameter in swin.named_parameters():  # zeros and small tables would hide a mistake
        nn.init.normal_(parameter, std=1 if "table" in name else 0.1)
    return swin


@pytest.mark.parametrize(("img_size", "window"), [(64, 2), (64, 4), (128, 4), ((128, 64), 2), (96, 3)])
def test_equals_timm_with_its_weights(img_size: int | tuple[int, int], window: int) -> None:
    timm = pytest.importorskip("timm", reason=TIMM)
    depths = (2, 2, 1, 1) if isinstance(img_size, tuple) else SIZES["depths"]  # timm shifts along one axis alone
    swin = tiny(img_size, window=window, depths=depths)
    peer = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=img_size, num_classes=0, embed_dim=16, depths=depths,
        num_heads=SIZES["heads"], window_size=window, drop_path_rate=0.0,
    )  # fmt: skip
    peer.load_state_dict(timm_names(swin.state_dict()), strict=True)
    other = tiny(img_size, seed=1, window=window, depths=depths)
    other.load_state_dict(peer.state_dict(), strict=True)
    for a, b in zip(swin.parameters(), other.parameters()):
        assert torch.equal(a, b)
    height, width = swin.img_size
    img = torch.randn(2, 3, height, width)
    ours, theirs = swin(img), peer.forward_features(img).flatten(1, 2)
    assert torch.allclose(ours, theirs, atol=1e-5)
    weight = torch.randn_like(ours)
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    wanted = official_names({name: p.grad for name, p in peer.named_parameters()})
    grads = {name: p.grad for name, p in swin.named_parameters()}
    assert grads.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert torch.allclose(grads[name], grad, atol=2e-5 * grad.abs().max().item() + 1e-5), name


@pytest.mark.parametrize(
    ("name", "timm_name", "parameters"),
    [
        ("swin_t", "swin_tiny_patch4_window7_224", 27_519_354),
        ("swin_s", "swin_small_patch4_window7_224", 48_837_258),
        ("swin_b", "swin_base_patch4_window7_224", 86_743_224),
        ("swin_l", "swin_large_patch4_window7_224", 194_995_476),
    ],
)
def test_published_sizes_have_the_names_and_shapes_of_timm(name: str, timm_name: str, parameters: int) -> None:
    timm = pytest.importorskip("timm", reason=TIMM)
    with torch.device("meta"):
        ours, theirs = encoders.build(name, 224), timm.create_model(timm_name, num_classes=0)
    wanted = {key: tuple(value.shape) for key, value in official_names(theirs.state_dict()).items()}
    assert {key: tuple(value.shape) for key, value in ours.state_dict().items()} == wanted
    # the published counts without the classifier of 1000 classes
    assert sum(p.numel() for p in ours.parameters()) == parameters


def test_shapes_of_released_fastmim_files() -> None:
    with torch.device("meta"):
        state = encoders.build("swin_b", 128).state_dict()
    shapes = {
        "patch_embed.proj.weight": (128, 3, 4, 4),
        "patch_embed.norm.weight": (128,),
        "layers.0.blocks.0.attn.relative_position_bias_table": (49, 4),
        "layers.3.blocks.1.attn.relative_position_bias_table": (49, 32),
        "layers.0.downsample.reduction.weight": (256, 512),
        "layers.0.downsample.norm.weight": (512,),
        "norm.weight": (1024,),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes
    assert not any("index" in name or "mask" in name for name in state)
    assert "layers.3.downsample.norm.weight" not in state


def test_official_buffers_are_dropped_under_any_prefix() -> None:
    swin = tiny()
    state = {f"encoder.{key}": value for key, value in swin.state_dict().items()}
    state["encoder.layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(4, 4, dtype=torch.int64)
    state["encoder.layers.0.blocks.1.attn_mask"] = torch.zeros(64, 4, 4)
    outer = nn.ModuleDict({"encoder": tiny(seed=1)})
    outer.load_state_dict(state, strict=True)
    assert all(torch.equal(a, b) for a, b in zip(outer.parameters(), swin.parameters()))
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"head.weight\""):
        swin.load_state_dict({**swin.state_dict(), "head.weight": torch.zeros(1)}, strict=True)


@pytest.mark.parametrize("cell", [32, 16, 8, 4, 2, 12])
@pytest.mark.parametrize("ragged", [False, True])
def test_paint_equals_the_painted_image(cell: int, ragged: bool) -> None:
    swin = tiny((96, 192), window=3)
    img = torch.randint(0, 256, (2, 3, 96, 192), dtype=torch.uint8)
    mask = Mask.random(2, (96 // cell, 192 // cell), [0.3, 0.7] if ragged else 0.6)
    found, wanted = torch.randn(1, 3, 1, 1).requires_grad_(), torch.zeros(1, 3, 1, 1, requires_grad=True)
    wanted.data.copy_(found.data)
    ours = swin(img, mask, "paint", colour=found)
    weight = torch.randn_like(ours)
    (ours * weight).sum().backward()
    grads = [p.grad.clone() for p in swin.parameters()]
    swin.zero_grad()
    theirs = swin(paint(img, mask, wanted))
    # patch_gather has no gradient for images: the colour's goes through a convolution here
    x = nn.functional.conv2d(paint(img, mask, wanted), swin.patch_embed.proj.weight, swin.patch_embed.proj.bias, 4)
    through = swin.patch_embed.norm(x.flatten(2).mT)
    for stage, place in zip(swin.layers, swin.places):
        through = stage(through, place)
    through = swin.norm(through)
    (through * weight).sum().backward()
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert torch.allclose(ours, through, atol=1e-5)
    assert found.grad is not None
    if cell % 4 == 0:
        assert torch.allclose(found.grad, wanted.grad, rtol=1e-3, atol=1e-4)
    for grad, parameter in zip(grads, swin.parameters()):
        bound = 1e-4 * parameter.grad.abs().max().item() + 1e-5
        assert torch.allclose(grad, parameter.grad, atol=bound)


@pytest.mark.parametrize("cell", [32, 16, 4])
@pytest.mark.parametrize("ragged", [False, True])
def test_replace_puts_the_token_in_after_the_norm(cell: int, ragged: bool) -> None:
    swin = tiny((64, 128), window=2, depths=(2, 2, 1, 1), mask_token=True)
    assert swin.mask_modes == {"drop", "paint", "replace"}
    img = torch.randn(2, 3, 64, 128)
    mask = Mask.random(2, (64 // cell, 128 // cell), [0.3, 0.7] if ragged else 0.6)
    k = cell // 4
    hidden = mask.hidden.view(2, *mask.grid).repeat_interleave(k, 1).repeat_interleave(k, 2)
    w = hidden.view(2, -1, 1).float()
    x = swin.patch_embed(img) * (1 - w) + swin.mask_token * w
    for stage, place in zip(swin.layers, swin.places):
        x = stage(x, place)
    wanted = swin.norm(x)
    found = swin(img, mask, "replace")
    assert torch.allclose(found, wanted, atol=1e-5)
    weight = torch.randn_like(found)
    grads = [torch.autograd.grad((y * weight).sum(), list(swin.parameters())) for y in (found, wanted)]
    for a, b in zip(*grads):
        assert torch.allclose(a, b, atol=1e-4 * b.abs().max().item() + 1e-5)


def test_hidden_pixels_do_not_reach_the_encoder() -> None:
    swin = tiny(mask_token=True)
    mask, img = Mask.random(2, (4, 4), 0.75), torch.randn(2, 3, 64, 64)
    pixels = mask.hidden.view(2, 1, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)
    spoilt, colour = img.masked_fill(pixels, float("nan")), torch.randn(1, 3, 1, 1)
    assert torch.equal(swin(img, mask, "replace"), swin(spoilt, mask, "replace"))
    assert torch.equal(swin(img, mask, "paint", colour=colour), swin(spoilt, mask, "paint", colour=colour))


def test_uint8_equals_the_normalised_image() -> None:
    swin, img = tiny(), torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    assert torch.equal(swin(img), swin(normalize(img)))
    assert torch.equal(swin(img.contiguous(memory_format=torch.channels_last)), swin(img))


def test_another_size_has_resized_tables_and_shares_every_weight() -> None:
    swin = tiny(128)
    other = swin.at(224)
    assert [p.window for p in swin.places] == [4, 4, 4, 4]
    assert [p.window for p in other.places] == [7, 7, 7, 7]
    assert (other.img_size, other.grid, swin.img_size, swin.grid) == ((224, 224), (7, 7), (128, 128), (4, 4))
    assert all(a is b for a, b in zip(swin.parameters(), other.parameters()))
    state = {
        key: geometric_resize(value, 4, 7) if key.endswith("bias_table") else value
        for key, value in swin.state_dict().items()
    }
    fresh = tiny(224, seed=1)
    fresh.load_state_dict(state, strict=True)
    img = torch.randn(1, 3, 224, 224)
    found = other(img)
    assert torch.allclose(found, fresh(img), atol=1e-5)
    found.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in swin.named_parameters() if "table" in n)
    small = torch.randn(1, 3, 128, 128)
    assert torch.equal(other.at(128)(small), swin(small))


def test_a_given_window_stays() -> None:
    swin = tiny((64, 64), window=2)
    assert [(p.window, p.shift) for p in swin.places] == [(2, 1), (2, 1), (2, 1), (2, 0)]
    assert [(p.window, p.shift) for p in swin.at((128, 64)).places] == [(2, 1), (2, 1), (2, 1), (2, 0)]
    assert [(p.size, p.window, p.shift) for p in Swin(192, window=12).places][2:] == [((12, 12), 12, 0), ((6, 6), 6, 0)]


def test_drop_path() -> None:
    swin = tiny(depths=(2, 1, 1, 1), drop_path=0.4).train()
    assert [round(b.drop_path, 2) for stage in swin.layers for b in stage.blocks] == [0, 0.1, 0.2, 0.3, 0.4]
    block = swin.layers[3].blocks[0]
    kept = block.dropped(torch.ones(20_000, 1, 1)).flatten()
    assert kept.unique().tolist() == [0.0, pytest.approx(1 / 0.6)]
    assert kept.mean().item() == pytest.approx(1, abs=0.03)
    img = torch.randn(4, 3, 64, 64)
    assert not torch.equal(swin(img), swin(img))
    swin.eval()
    assert torch.equal(swin(img), tiny(depths=(2, 1, 1, 1)).eval()(img))


def test_traces_without_graph_breaks() -> None:
    """A look at a tensor's values, which waits for the device, would break the graph."""
    swin = tiny(32, mask_token=True, depths=(2, 0), heads=(1, 2))
    img, colour = torch.randn(2, 3, 32, 32), torch.randn(1, 3, 1, 1)
    ragged, mask = Mask.random(2, (2, 2), [0.25, 0.5]), Mask.random(2, (2, 2), 0.5)
    for arguments in ((), (mask, "replace"), (ragged, "replace"), (mask, "paint"), (Mask.random(2, (16, 16), 0.5),)):
        compiled = torch.compile(swin, backend="eager", fullgraph=True, dynamic=False)
        assert torch.allclose(compiled(img, *arguments, colour=colour), swin(img, *arguments, colour=colour), atol=1e-6)
    other, img = swin.at(48), torch.randn(1, 3, 48, 48)
    assert torch.allclose(
        torch.compile(other, backend="eager", fullgraph=True, dynamic=False)(img), other(img), atol=1e-6
    )


def test_autocast_keeps_close() -> None:
    swin = tiny(mask_token=True)
    mask, img, colour = Mask.random(2, (2, 2), 0.5), torch.randn(2, 3, 64, 64), torch.randn(1, 3, 1, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = swin(img, mask, "paint", colour=colour)
    wanted = swin(img, mask, "paint", colour=colour)
    assert (half - wanted).square().mean() < 1e-3 * wanted.square().mean()


def test_build_names_options_and_config() -> None:
    assert {"swin_t", "swin_s", "swin_b", "swin_l", "swin_nano"} <= set(encoders.names())
    swin = encoders.build("swin_nano", 64, mask_token=True, drop_path=0.1, window=2)
    again = encoders.from_config(swin.config)
    assert type(again) is Swin
    assert again.config == swin.config
    assert (swin.dim, swin.stride, swin.grid, swin.prefix) == (256, 32, (2, 2), 0)
    for name in ("vit_nano8", "beit_nano"):
        plain = encoders.build(name, 64)
        assert type(encoders.from_config(plain.config)) is type(plain)
    cut = encoders.build("swin_nano", 64, drop_last=3)
    assert [len(stage.blocks) for stage in cut.layers] == [2, 2, 1, 0]
    assert cut(torch.zeros(1, 3, 64, 64)).shape == (1, 4, 256)


def test_refuses() -> None:
    swin, img = tiny(), torch.zeros(2, 3, 64, 64)
    mask = Mask.random(2, (2, 2), 0.5)
    with pytest.raises(UserError, match=r"Swin: img has size 32x64, expected 64x64 because .* at\(size\) gives"):
        swin(img[:, :, :32])
    with pytest.raises(
        UserError, match=r"Swin: mode has 'replace', expected one of \['drop', 'paint'\] because .*token=True"
    ):
        swin(img, mask, "replace")
    with pytest.raises(UserError, match=r"Swin: mode has 'mix', expected one of .* because Swin has no other way"):
        swin(img, mask, "mix")
    with pytest.raises(UserError, match=r"Swin: colour has None, expected a tensor"):
        swin(img, mask)
    with pytest.raises(UserError, match=r"Swin: mask has cells of 2 px, expected a multiple of 4 px because"):
        tiny(mask_token=True)(img, Mask.random(2, (32, 32), 0.5), "replace")
    with pytest.raises(UserError, match=r"Swin: mask has grid 3x3, expected a grid that divides the image"):
        swin(img, Mask.random(2, (3, 3), 0.5), "paint", colour=torch.zeros(1, 3, 1, 1))
    with pytest.raises(UserError, match=r"Swin: img_size has 72, expected a multiple of 32 because 4 stages halve"):
        swin.at(72)
    with pytest.raises(UserError, match=r"Swin: window has 7, expected a divisor of both sides because .* 16x16"):
        tiny(window=7)
    with pytest.raises(UserError, match=r"Swin: heads has 3, expected a divisor of 16 because"):
        tiny(heads=(3, 2, 2, 4))
    with pytest.raises(UserError, match=r"Swin: stages has depths \(2, 2\) and heads \(1, 2, 2, 4\), expected one"):
        tiny(depths=(2, 2))


def test_build_refuses() -> None:
    with pytest.raises(UserError, match=r"encoders.build: dim has 96, expected None because swin_t has stages"):
        encoders.build("swin_t", 64, dim=96)
    with pytest.raises(UserError, match=r"encoders.build: an option has 'windows', expected one of .*Swin has no"):
        encoders.build("swin_t", 64, windows=2)
    with pytest.raises(UserError, match=r"encoders.build: drop_last has 8, expected 0 to 7 because swin_nano has 8"):
        encoders.build("swin_nano", 64, drop_last=8)
    with pytest.raises(UserError, match=r"encoders.build: drop_last has 1, expected None because timm:pvt_v2_b0"):
        encoders.build("timm:pvt_v2_b0", 64, drop_last=1)
    with pytest.raises(UserError, match=r"encoders.build: name has 'swin_x', expected one of .*; did you mean 'swin_"):
        encoders.build("swin_x", 64)
    with pytest.raises(UserError, match=r"encoders.from_config: name has 'cnn', expected one of .*swin"):
        encoders.from_config({"name": "cnn"})
