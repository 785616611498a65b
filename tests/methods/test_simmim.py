"""SimMIM: its loss against plain torch over BEiT, ViT and Swin, what stays hidden, its names, what it refuses."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimfast import Mask
from mimfast._check import UserError
from mimfast._images import normalize
from mimfast.encoders import BEiT, Swin, ViT
from mimfast.heads import PixelHead
from mimfast.methods import SimMIM
from mimfast.targets import HOG, LocalNormPixels, Pixels

KINDS = ("vit", "beit", "swin")


def encoder(kind: str = "swin", size: int = 64) -> nn.Module:
    if kind == "swin":
        return Swin(size, embed_dim=16, depths=(1, 2, 2, 1), heads=(1, 2, 2, 4), mask_token=True)
    return (ViT if kind == "vit" else BEiT)(size, 16, 32, 2, 2, mask_token=True)


def build(kind: str = "swin", local: bool = False, **changes) -> SimMIM:
    part = encoder(kind)
    target = LocalNormPixels(part.stride, 47) if local else Pixels(part.stride, False, "l1", "cpq")
    model = SimMIM(part, PixelHead(part.dim, target.dim), target, **changes)
    for name, parameter in model.named_parameters():
        if name.endswith(("mask_token", "bias_table")):
            nn.init.normal_(parameter)
    return model.eval()


def pixels(batch: int = 3, size: tuple[int, int] = (64, 64)) -> Tensor:
    return torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8)


def standardised(x: Tensor, window: int = 47) -> Tensor:
    """Every pixel by mean and unbiased variance of its window, pixels outside the image left out."""
    ones = torch.ones_like(x)

    def box(values: Tensor) -> Tensor:
        return F.avg_pool2d(values, window, 1, window // 2, count_include_pad=True) * window**2

    count = box(ones)
    mean = box(x) / count
    var = ((box(x * x) / count - mean**2) * count / (count - 1)).clamp(min=0)
    return (x - mean) / (var + 1e-6).sqrt()


def plain_loss(model: SimMIM, img: Tensor, mask: Mask) -> Tensor:
    """The whole head as convolution and PixelShuffle, the loss at pixel resolution as the paper has it."""
    B, _, H, W = img.shape
    stride = model.encoder.stride
    x = normalize(img)
    part = model.encoder if tuple(model.encoder.img_size) == (H, W) else model.encoder.at((H, W))
    tokens = part(x, mask, mode="replace")[:, part.prefix :]
    maps = tokens.mT.reshape(B, -1, H // stride, W // stride)
    rec = F.pixel_shuffle(F.conv2d(maps, model.decoder[0].weight, model.decoder[0].bias), stride)
    wanted = standardised(x.double()).float() if isinstance(model.target, LocalNormPixels) else x
    m = mask.hidden.view(B, 1, H // stride, W // stride).repeat_interleave(stride, 2).repeat_interleave(stride, 3)
    return (F.l1_loss(rec, wanted, reduction="none") * m).sum() / (m.sum() + 1e-5) / 3


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_plain_torch(kind: str, local: bool) -> None:
    model, img = build(kind, local), pixels()
    mask = model.sample_mask(3)
    found, wanted = model(img, mask), plain_loss(model, img, mask)
    assert torch.allclose(found, wanted, rtol=1e-5), (found.item(), wanted.item())
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    one, two = (torch.autograd.grad(loss, [p for _, p in named]) for loss in (found, wanted))
    scale = max(g.abs().max() for g in two)
    for (name, _), a, b in zip(named, one, two):
        assert (a - b).abs().max() <= 1e-5 * scale + 1e-4 * b.abs().max(), name
    assert dict(zip([name for name, _ in named], one))["encoder.mask_token"].abs().max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_pixels_never_reach_the_encoder(kind: str) -> None:
    model, img = build(kind), normalize(pixels())
    mask = model.sample_mask(3)
    n = 64 // mask.grid[0]
    hidden = mask.hidden.view(3, 1, *mask.grid).repeat_interleave(n, 2).repeat_interleave(n, 3)
    poisoned = torch.where(hidden, torch.nan, img)
    assert torch.equal(model.predict(poisoned, mask), model.predict(img, mask))
    visible = torch.where(hidden, img, img + 1)
    assert not torch.equal(model.predict(visible, mask), model.predict(img, mask))


@pytest.mark.parametrize("kind", KINDS)
def test_masks_hide_whole_blocks_rounded_up(kind: str) -> None:
    model = build(kind)
    mask = model.sample_mask(2, img_size=192)
    stride = model.encoder.stride
    assert mask.grid == (192 // stride, 192 // stride)
    assert mask.hide.shape[1] * stride**2 == math.ceil(36 * 0.6) * 32**2
    n = 32 // stride
    blocks = mask.hidden.view(2, 6, n, 6, n).permute(0, 1, 3, 2, 4).flatten(3)
    assert torch.equal(blocks.all(-1), blocks.any(-1))
    assert model.unit == 32


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_of_the_images_may_change(kind: str) -> None:
    model, img = build(kind), pixels(2, (96, 96))
    mask = model.sample_mask(2, img_size=96)
    assert torch.allclose(model(img, mask), plain_loss(model, img, mask), rtol=1e-5)
    assert model(img).isfinite()


def test_the_head_predicts_hidden_tokens_only_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    model, img = build("beit"), pixels()
    mask = model.sample_mask(3)
    shapes = []
    forward = PixelHead.forward
    monkeypatch.setattr(PixelHead, "forward", lambda *args: shapes.append((y := forward(*args)).shape) or y)
    model(img, mask)
    assert shapes == [(3, mask.hide.shape[1], 768)]


def test_names_are_those_of_the_authors() -> None:
    with torch.device("meta"):
        swin = SimMIM.build("swin_b", 192).state_dict()
        vit = SimMIM.build("beit_b16", 224).state_dict()
    shapes = {
        "encoder.mask_token": (1, 1, 128),
        "encoder.patch_embed.proj.weight": (128, 3, 4, 4),
        "encoder.patch_embed.norm.weight": (128,),
        "encoder.layers.0.blocks.0.attn.relative_position_bias_table": (121, 4),
        "encoder.layers.2.blocks.17.attn.qkv.weight": (1536, 512),
        "encoder.layers.0.downsample.reduction.weight": (256, 512),
        "encoder.norm.weight": (1024,),
        "decoder.0.weight": (3072, 1024, 1, 1),
        "decoder.0.bias": (3072,),
    }
    assert {key: tuple(swin[key].shape) for key in shapes} == shapes
    shapes = {
        "encoder.mask_token": (1, 1, 768),
        "encoder.cls_token": (1, 1, 768),
        "encoder.rel_pos_bias.relative_position_bias_table": (732, 12),
        "encoder.blocks.0.gamma_1": (768,),
        "encoder.blocks.0.attn.q_bias": (768,),
        "encoder.blocks.0.attn.v_bias": (768,),
        "encoder.blocks.11.attn.qkv.weight": (2304, 768),
        "encoder.norm.weight": (768,),
        "decoder.0.weight": (768, 768, 1, 1),
    }
    assert {key: tuple(vit[key].shape) for key in shapes} == shapes


def test_what_escapes_weight_decay() -> None:
    assert build("swin").no_decay == {"encoder.mask_token"}
    assert build("beit").no_decay == {"encoder.cls_token"}
    assert not any("bias_table" in name for name in build("swin").no_decay)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("local", [False, True])
def test_config_and_weights_build_it_again(kind: str, local: bool) -> None:
    model = build(kind, local, ratio=0.5)
    again = SimMIM.from_config(model.config).eval()
    again.load_state_dict(model.state_dict())
    img = pixels()
    mask = model.sample_mask(3)
    assert torch.equal(again(img, mask), model(img, mask))
    assert again.config == model.config


def test_two_steps_are_deterministic() -> None:
    start, img = build("swin"), pixels()
    results = []
    for _ in range(2):
        model = copy.deepcopy(start)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step in range(2):
            optimizer.zero_grad()
            model(img, model.sample_mask(3, sample_ids=torch.arange(3), epoch=step)).backward()
            optimizer.step()
        results.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(results[0].values(), results[1].values()))


@pytest.mark.parametrize("kind", ["vit", "beit", pytest.param("swin", marks=pytest.mark.slow)])
def test_compiles_as_one_graph(kind: str) -> None:
    model, img = build(kind), pixels()
    mask = model.sample_mask(3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    wanted, found = model(img, mask), compiled(img, mask)
    assert torch.allclose(found, wanted, rtol=1e-5)
    (wanted_grad,), (found_grad,) = (torch.autograd.grad(loss, [model.encoder.mask_token]) for loss in (wanted, found))
    assert torch.allclose(found_grad, wanted_grad, rtol=1e-4, atol=1e-6)


def test_refuses_wrong_parts() -> None:
    part = encoder("vit")
    head, target = PixelHead(32, 768), Pixels(16, False, "l1", "cpq")

    def refused(message: str, *args, **kwargs) -> None:
        with pytest.raises(UserError, match=message):
            SimMIM(*args, **kwargs)

    refused(r"SimMIM needs mask mode 'replace'; ViT offers", ViT(64, 16, 32, 1, 2), head, target)
    refused("SimMIM: decoder has encoder_dim 64, expected 32", part, PixelHead(64, 768), target)
    refused("SimMIM: target has order 'pqc', expected order 'cpq' because the head", part, head, Pixels(16))
    refused("SimMIM: target has dim 108, expected 768", part, head, HOG(16))
    refused("SimMIM: block has 24, expected a multiple of 16 because a mask token", part, head, target, block=24)
    refused("SimMIM: block has 8, expected a multiple of 16", part, head, target, block=8)
    refused("SimMIM: img_size has 64, expected a multiple of 48", part, head, target, block=48)
    refused(r"SimMIM: ratio has 1, expected a number in \[0, 1\)", part, head, target, 1)
    with pytest.raises(UserError, match="LocalNormPixels: window has 46, expected an odd number of pixels because"):
        LocalNormPixels(16, 46)
