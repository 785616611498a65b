"""MixSwin: mixtures against a plain masked attention, isolation of the two images bit for bit, sizes, names, errors."""

import pytest
import torch
from torch import nn

from mimfast import Mask, encoders
from mimfast._check import UserError
from mimfast.encoders import MixSwin, Swin
from mimfast.encoders.mixswin import group_of
from mimfast.encoders.positions import sincos_2d

SIZES = {"embed_dim": 16, "depths": (2, 1, 2), "heads": (1, 2, 4)}


def tiny(img_size: int | tuple[int, int] = 64, **kwargs: object) -> MixSwin:
    torch.manual_seed(0)
    swin = MixSwin(img_size, **{**SIZES, **kwargs})  # type: ignore[arg-type]
    for name, parameter in swin.named_parameters():  # zeros and small tables would hide a mistake
        if parameter.requires_grad and "norm" not in name:
            nn.init.normal_(parameter, std=1 if "table" in name else 0.2)
    return swin


def shared(batch: int, grid: tuple[int, int] = (4, 4)) -> Mask:
    return Mask.random(1, grid, 0.5, rounding="hide_floor").expand(batch)


def own(batch: int, grid: tuple[int, int] = (4, 4)) -> Mask:
    return Mask.random(batch, grid, 0.5, rounding="hide_floor")


def plain(swin: MixSwin, img: torch.Tensor, mask: Mask) -> torch.Tensor:
    """The published computation: a mask of all pairs of tokens of a window, -1e30 where they are of two images."""
    x = swin.patch_embed(img)
    for i, (stage, (size, w, _)) in enumerate(zip(swin.layers, swin.places)):
        times = size[0] // mask.grid[0]
        m = mask.hidden.view(-1, 1, *mask.grid).float()
        m_BL = nn.functional.interpolate(m, scale_factor=times).flatten(1)
        if i == 0:
            x = (1 - m_BL[..., None]) * x + m_BL[..., None] * x.flip(0) + swin.absolute_pos_embed

        def cut(t: torch.Tensor, size: tuple[int, int] = size, w: int = w) -> torch.Tensor:
            t = t.view(len(t), size[0] // w, w, size[1] // w, w, -1)
            return t.transpose(2, 3).reshape(-1, w * w, t.shape[-1])

        m_Wn1 = cut(m_BL)
        apart_W1nn = -1e30 * (m_Wn1 - m_Wn1.mT).abs()[:, None]
        at = torch.stack(torch.meshgrid(torch.arange(w), torch.arange(w), indexing="ij")).flatten(1)
        dy, dx = at[:, :, None] - at[:, None]
        for block in stage.blocks:
            attn = block.attn
            q, k, v = cut(attn.qkv(block.norm1(x))).unflatten(-1, (3, attn.heads, -1)).permute(2, 0, 3, 1, 4)
            table = attn.relative_position_bias_table[(dy + w - 1) * (2 * w - 1) + dx + w - 1]
            score = q @ k.mT / q.shape[-1] ** 0.5 + table.permute(2, 0, 1) + apart_W1nn
            y = (score.softmax(-1) @ v).transpose(1, 2).flatten(2)
            y = y.view(len(x), size[0] // w, size[1] // w, w, w, -1).transpose(2, 3).reshape(x.shape)
            x = x + attn.proj(y)
            x = block.mlp(block.norm2(x), x)
        if stage.downsample is not None:
            x = stage.downsample(x, size)
    return swin.norm(x)


@pytest.mark.parametrize("make", [shared, own])
@pytest.mark.parametrize(("size", "window"), [((64, 64), None), ((64, 128), (4, 2, 2)), ((64, 64), (16, 4, 4))])
def test_equals_the_published_computation(make, size, window) -> None:
    swin, img = tiny(size, window=window), torch.randn(3, 3, *size)
    mask = make(3, (size[0] // 16, size[1] // 16))
    found, wanted = swin(img, mask), plain(swin, img, mask)
    assert found.shape == (3, size[0] * size[1] // 256, 64)
    assert torch.allclose(found, wanted, atol=1e-5)
    weight = torch.randn_like(found)
    parameters = [p for p in swin.parameters() if p.requires_grad]
    grads = [torch.autograd.grad((y * weight).sum(), parameters) for y in (found, wanted)]
    for a, b in zip(*grads):
        assert torch.allclose(a, b, atol=1e-4 * b.abs().max().item() + 1e-5)


def test_a_mask_for_all_equals_the_same_mask_for_each() -> None:
    swin, img, mask = tiny(), torch.randn(4, 3, 64, 64), shared(4)
    each = mask.rows(torch.zeros(4, dtype=torch.int64))
    assert group_of(mask, (16, 16)).shape == (16, 16)
    assert group_of(each, (16, 16)).shape == (4, 16, 16)
    assert torch.equal(group_of(mask, (16, 16))[::4, ::4].flatten(), mask.hidden[0])
    assert torch.equal(swin(img, mask), swin(img, each))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [4, 5])
@pytest.mark.parametrize("make", [shared, own])
def test_an_image_never_changes_the_features_of_its_partner(dtype, batch: int, make) -> None:
    swin, mask, img = tiny(), make(batch), torch.randn(batch, 3, 64, 64)
    other = img.clone()
    other[-1] = 100 * torch.randn(3, 64, 64)  # the partner of image 0
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        before, after = swin(img, mask), swin(other, mask)
    first, last = mask.hidden[0], mask.hidden[-1]
    assert torch.equal(before[0, ~first], after[0, ~first])
    assert torch.equal(before[-1, last], after[-1, last])
    assert torch.equal(before[1:-1], after[1:-1])
    assert (before[0, first] - after[0, first]).abs().mean() > 0.1
    assert (before[-1, ~last] - after[-1, ~last]).abs().mean() > 0.1


def test_an_image_never_changes_the_gradients_of_its_partner() -> None:
    """Of an image's own tokens, with respect to what it is embedded as; and the partner's have none."""
    swin, mask = tiny(), shared(2)
    grads = []
    for seed in (1, 2):
        e = torch.cat([torch.randn(1, 256, 16, generator=torch.manual_seed(0)), 9 * torch.randn(1, 256, 16)])
        torch.manual_seed(seed)
        e[1] = 9 * torch.randn(256, 16)
        e.requires_grad_()
        groups = [group_of(mask, place.size) for place in swin.places]
        x = torch.where(groups[0].flatten()[:, None], e.flip(0), e)
        out = swin._stages(x, groups)
        hidden = mask.hidden[0]
        loss = out[0, ~hidden].square().sum() + out[1, hidden].square().sum()  # all tokens of image 0
        (grad,) = torch.autograd.grad(loss, e)
        grads.append(grad)
    assert torch.equal(grads[0][0], grads[1][0])
    assert grads[0][0].abs().min() > 0
    assert not grads[0][1].any()
    assert not grads[1][1].any()


def test_without_a_mask_it_is_a_swin_without_shifts() -> None:
    swin = tiny()
    other = Swin(64, 16, (1, 1, 1), (1, 2, 4), window=8)
    one = tiny(depths=(1, 1, 1), window=(8, 8, 4))
    state = one.state_dict()
    pos = state.pop("absolute_pos_embed").clone()
    other.load_state_dict(state)
    with torch.no_grad():
        one.absolute_pos_embed.zero_()
    img = torch.randn(2, 3, 64, 64)
    assert torch.equal(one(img), other(img))
    assert torch.equal(pos, sincos_2d(16, (16, 16))[:, 1:])
    assert all(place.shift == 0 for place in swin.places)
    assert swin.mask_modes == {"paint", "mix"}
    assert tiny(mask_token=True).mask_modes == {"paint", "mix", "replace"}
    colour = torch.zeros(1, 3, 1, 1)
    assert swin(img, Mask.random(2, (4, 4), 0.5), "paint", colour=colour).shape == (2, 16, 64)


def test_published_sizes_names_and_windows() -> None:
    with torch.device("meta"):
        base = encoders.build("mixswin_b", 224)
        large = encoders.build("mixswin_b", 384, window=(16, 16, 24, 12))
    assert [p.window for p in base.places] == [14, 14, 14, 7]
    assert [p.window for p in large.places] == [16, 16, 24, 12]
    state = base.state_dict()
    shapes = {
        "absolute_pos_embed": (1, 3136, 128),
        "patch_embed.norm.weight": (128,),
        "layers.0.blocks.0.attn.relative_position_bias_table": (729, 4),
        "layers.3.blocks.1.attn.relative_position_bias_table": (169, 32),
        "layers.2.downsample.reduction.weight": (1024, 2048),
        "layers.2.blocks.17.mlp.fc2.bias": (512,),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes
    # 88 M are published, with a classifier of 1000 classes
    assert sum(p.numel() for p in base.parameters()) + 1025 * 1000 == pytest.approx(88e6, rel=0.01)


def test_another_size_shares_weights_and_has_its_own_positions() -> None:
    swin = tiny(64)
    other = swin.at((128, 256))
    assert [p.window for p in swin.places] == [8, 8, 4]
    assert [p.window for p in other.places] == [16, 16, 8]
    assert torch.equal(other.absolute_pos_embed, sincos_2d(16, (32, 64))[:, 1:])
    mine, theirs = (dict(s.named_parameters()) for s in (swin, other))
    assert all(theirs[name] is p for name, p in mine.items() if name != "absolute_pos_embed")
    img = torch.randn(1, 3, 64, 64)
    assert torch.equal(other.at(64)(img), swin(img))
    assert torch.equal(swin.at(64).absolute_pos_embed, swin.absolute_pos_embed)


def test_config_and_traces() -> None:
    swin = tiny(window=(4, 4, 2))
    again = encoders.from_config(swin.config)
    assert type(again) is MixSwin
    assert again.config == swin.config
    img = torch.randn(2, 3, 64, 64)
    for mask in (shared(2), own(2)):
        compiled = torch.compile(swin, backend="eager", fullgraph=True, dynamic=False)
        assert torch.allclose(compiled(img, mask), swin(img, mask), atol=1e-6)


def test_refuses() -> None:
    swin, img = tiny(), torch.zeros(2, 3, 64, 64)
    with pytest.raises(UserError, match=r"MixSwin: mask has cells of 8 px, expected a multiple of 16 px because a"):
        swin(img, shared(2, (8, 8)))
    with pytest.raises(UserError, match=r"MixSwin: mode has 'drop', expected one of \['mix', 'paint'\]"):
        swin(img, shared(2), "drop")
    with pytest.raises(UserError, match=r"MixSwin: window has \(8, 8\), expected one number for each stage"):
        tiny(window=(8, 8))
    with pytest.raises(UserError, match=r"MixSwin: window has 7, expected a divisor of both sides"):
        tiny(window=(7, 8, 4))
    with pytest.raises(UserError, match=r"MixSwin: img has size 32x64, expected 64x64"):
        swin(img[:, :, :32], shared(2))
    with pytest.raises(UserError, match=r"Mask.expand: batch has 2 in the mask, expected 1"):
        own(2).expand(4)
