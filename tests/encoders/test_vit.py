"""ViT: masked forward, sizes, errors, and equality with timm's VisionTransformer."""

import pytest
import torch
from torch.nn import functional as F

from mimfast import Mask, encoders
from mimfast._check import UserError
from mimfast._images import normalize
from mimfast.encoders import ViT
from mimfast.encoders.positions import sincos_2d

TIMM = "timm is the peer of this test: pip install 'mimfast[timm]'"


def tiny(img_size: int | tuple[int, int] = 32, depth: int = 2) -> ViT:
    return ViT(img_size, patch=8, dim=32, depth=depth, heads=2)


def test_positions_are_column_first() -> None:
    table = sincos_2d(8, (2, 3))[0].double()
    assert table[0].abs().max() == 0
    row, column = 1, 2
    angles = torch.tensor([1.0, 0.01], dtype=torch.float64)
    halves = [(x * angles) for x in (column, row)]
    wanted = torch.cat([torch.cat([h.sin(), h.cos()]) for h in halves])
    assert torch.allclose(table[1 + row * 3 + column], wanted, atol=1e-7)


def test_without_blocks_the_tokens_are_the_patch_convolution_of_the_kept_patches() -> None:
    vit = tiny((16, 24), depth=0)
    img = torch.randn(3, 3, 16, 24)
    mask = Mask.random(3, vit.grid, 0.5)
    conv = F.conv2d(img, vit.patch_embed.proj.weight, vit.patch_embed.proj.bias, stride=8).flatten(2).mT
    wanted = vit.norm(conv + vit.pos_embed[:, 1:])
    full, kept = vit(img), vit(img, mask)
    assert full.shape == (3, 7, 32)
    assert kept.shape == (3, 4, 32)
    assert torch.allclose(full[:, 1:], wanted, atol=1e-6)
    assert torch.allclose(kept[:, 1:], wanted.gather(1, mask.keep[:, :, None].expand(-1, -1, 32)), atol=1e-6)
    assert torch.allclose(kept[:, 0], vit.norm(vit.cls_token[0]), atol=1e-6)


def test_hidden_pixels_do_not_reach_the_encoder() -> None:
    vit = tiny()
    mask = Mask.random(2, vit.grid, 0.75)
    img = torch.randn(2, 3, 32, 32)
    pixels = mask.hidden.view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert torch.equal(vit(img, mask), vit(img.masked_fill(pixels, float("nan")), mask))


def test_uint8_equals_the_normalised_image_and_strides_do_not_matter() -> None:
    vit = tiny()
    img = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mask = Mask.random(2, vit.grid, 0.75)
    assert torch.equal(vit(img, mask), vit(normalize(img), mask))
    assert torch.equal(vit(img.contiguous(memory_format=torch.channels_last)), vit(img))


def test_equals_timm_without_a_mask() -> None:
    vision_transformer = pytest.importorskip("timm.models.vision_transformer", reason=TIMM)
    vit = ViT(48, patch=8, dim=96, depth=3, heads=3)
    peer = vision_transformer.VisionTransformer(48, 8, num_classes=0, embed_dim=96, depth=3, num_heads=3)
    for name, parameter in peer.named_parameters():  # timm's zeros would hide a mistake
        if name != "pos_embed":
            torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.1)
    vit.load_state_dict(peer.state_dict(), strict=True)
    img = torch.randn(2, 3, 48, 48)
    ours, theirs = vit(img), peer.forward_features(img)
    assert torch.allclose(ours, theirs, atol=1e-5)
    weight = torch.randn_like(ours)
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    grads = dict(vit.named_parameters())
    for name, parameter in peer.named_parameters():
        if name == "pos_embed":  # fixed in MAE, trained in timm
            continue
        wanted = parameter.grad
        assert torch.allclose(grads[name].grad, wanted, atol=1e-5 * wanted.abs().max().item() + 1e-5), name


@pytest.mark.parametrize(
    ("name", "timm_name"), [("vit_b16", "vit_base_patch16_224"), ("vit_l16", "vit_large_patch16_224")]
)
def test_published_sizes_have_the_names_and_shapes_of_timm(name: str, timm_name: str) -> None:
    timm = pytest.importorskip("timm", reason=TIMM)
    with torch.device("meta"):
        ours, theirs = encoders.build(name, 224), timm.create_model(timm_name, num_classes=0)
    shapes = [{key: tuple(value.shape) for key, value in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("vit_ti16", (16, 192, 12, 3)),
        ("vit_s16", (16, 384, 12, 6)),
        ("vit_b16", (16, 768, 12, 12)),
        ("vit_l16", (16, 1024, 24, 16)),
        ("vit_h14", (14, 1280, 32, 16)),
    ],
)
def test_named_sizes(name: str, sizes: tuple[int, ...]) -> None:
    with torch.device("meta"):
        vit = encoders.build(name, 224)
    assert (vit.patch, vit.dim, vit.depth, vit.heads) == sizes


def test_build_overrides_sizes() -> None:
    vit = encoders.build("vit_nano8", 64, patch=16, dim=256, depth=1)
    assert (vit.patch, vit.dim, vit.depth, vit.heads, vit.grid) == (16, 256, 1, 4, (4, 4))


def test_initialisation_is_maes() -> None:
    vit = ViT(32, patch=8, dim=192, depth=1, heads=3)
    qkv, proj = vit.blocks[0].attn.qkv, vit.patch_embed.proj
    assert qkv.weight.abs().max() <= (6 / (4 * 192)) ** 0.5
    assert qkv.weight.abs().max() > 0.95 * (6 / (4 * 192)) ** 0.5
    assert qkv.bias.abs().max() == 0
    bound = (6 / (192 + 3 * 64)) ** 0.5
    assert 0.95 * bound < proj.weight.abs().max() <= bound
    assert 0.01 < vit.cls_token.std() < 0.03
    assert not vit.pos_embed.requires_grad


@pytest.mark.parametrize(
    ("img", "message"),
    [
        (torch.zeros(2, 3, 32, 40), r"ViT: img has size 32x40, expected 32x32 because .* 4x4 patches of 8 px"),
        (torch.zeros(2, 1, 32, 32), r"ViT: img has shape \(2, 1, 32, 32\), expected \(batch, 3, 32, 32\) because"),
        (torch.zeros(3, 32, 32), r"ViT: img has shape \(3, 32, 32\), expected \(batch, 3, 32, 32\) because"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.int32), r"ViT: img has dtype int32, expected uint8 or floating point"),
    ],
)
def test_refuses_images(img: torch.Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny()(img)


def test_refuses_masks_and_modes() -> None:
    vit, img = tiny(), torch.zeros(2, 3, 32, 32)
    with pytest.raises(UserError, match=r"ViT: mask has grid 2x8, expected 4x4 because the model has 4x4 tokens"):
        vit(img, Mask.random(2, (2, 8), 0.5))
    with pytest.raises(UserError, match=r"ViT: mask has batch 3, expected 2 because the batch holds 2 images"):
        vit(img, Mask.random(3, (4, 4), 0.5))
    with pytest.raises(UserError, match=r"ViT: mask has device meta, expected cpu because img is there"):
        vit(img, Mask.random(2, (4, 4), 0.5).to("meta"))
    with pytest.raises(
        UserError, match=r"ViT: mode has 'replace', expected one of \['drop', 'paint'\] because ViT\(mask_token=True\)"
    ):
        vit(img, Mask.random(2, (4, 4), 0.5), mode="replace")


def test_refuses_sizes() -> None:
    with pytest.raises(UserError, match=r"img_size has 225, expected a multiple of 16 because .* 225 = 14 \* 16 \+ 1"):
        ViT(225)
    with pytest.raises(UserError, match=r"ViT: heads has 5, expected a divisor of 32"):
        ViT(32, patch=8, dim=32, heads=5)
    with pytest.raises(UserError, match=r"sincos_2d: dim has 30, expected a multiple of 4"):
        ViT(32, patch=8, dim=30, heads=5)
    with pytest.raises(UserError, match=r"encoders.build: name has 'vit_b61', .* did you mean 'vit_b16'\?"):
        encoders.build("vit_b61", 224)


def test_replace_puts_a_mask_token_where_a_patch_is_hidden() -> None:
    vit = ViT((16, 24), patch=8, dim=32, depth=2, heads=2, mask_token=True)
    assert vit.mask_modes == {"drop", "paint", "replace"}
    assert vit.config["mask_token"] is True
    assert ViT(**vit.config).mask_token is not None
    img, mask = torch.randn(3, 3, 16, 24), Mask.random(3, (2, 3), 0.5)
    conv = F.conv2d(img, vit.patch_embed.proj.weight, vit.patch_embed.proj.bias, stride=8).flatten(2).mT
    x = torch.where(mask.hidden[:, :, None], vit.mask_token, conv)
    x = torch.cat([vit.cls_token.expand(3, -1, -1), x], dim=1) + vit.pos_embed
    for block in vit.blocks:
        x = block(x)
    want = vit.norm(x)
    got = vit(img, mask, mode="replace")
    assert torch.allclose(got, want, atol=1e-5)
    weight, leaves = torch.randn_like(got), [vit.mask_token, vit.cls_token, vit.patch_embed.proj.weight]
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), leaves) for y in (got, want))):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)
    pixels = mask.hidden.view(3, 1, 2, 3).repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert torch.equal(got, vit(img.masked_fill(pixels, float("nan")), mask, mode="replace"))
    assert "mask_token" in vit.state_dict()
    assert "mask_token" not in tiny().state_dict()


def test_another_size_shares_the_weights_and_remakes_the_positions() -> None:
    vit = tiny()
    other = vit.at((16, 48))
    assert other.grid == (2, 6)
    assert torch.equal(other.pos_embed, sincos_2d(32, (2, 6)))
    assert vit.grid == (4, 4)
    assert vit.pos_embed.shape == (1, 17, 32)
    other(torch.randn(2, 3, 16, 48)).sum().backward()
    assert vit.blocks[0].attn.qkv.weight.grad is not None
    assert other.cls_token is vit.cls_token
    # a learned table is interpolated: a linear ramp stays one, and the class row stays
    with torch.no_grad():
        vit.pos_embed.copy_(torch.arange(17.0)[None, :, None].expand(-1, -1, 32))
    table = vit.at(64).pos_embed[0, :, 0]
    assert table[0] == 0
    inner = table[1:].view(8, 8)[2:-2, 2:-2]
    assert torch.allclose(inner.diff(dim=0), torch.full((3, 4), 2.0), atol=0.2)
    with pytest.raises(UserError, match="ViT: img_size has 30, expected a multiple of 8 because"):
        vit.at(30)


def test_packed_equals_separate() -> None:
    """Two sizes, with and without a mask, and a mask that keeps another number in each image."""
    vit = tiny()
    hidden = torch.zeros(3, 16, dtype=torch.bool)
    hidden[0, 3:] = hidden[1, :5] = hidden[2, 7] = True
    ragged = Mask.from_hidden(hidden, ragged=True)
    big = Mask.random(2, (6, 4), 0.75)
    imgs = [torch.randn(2, 3, 48, 32), torch.randn(3, 3, 32, 32), torch.randn(1, 3, 32, 32)]
    packed = vit.forward_packed(imgs, [big, ragged, None])
    singles = [Mask.from_hidden(row[None]) for row in hidden]
    parts = [
        *vit.at((48, 32))(imgs[0], big),
        *(vit(imgs[1][i : i + 1], one)[0] for i, one in enumerate(singles)),
        *vit(imgs[2]),
    ]
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.cu_seqlens.diff().tolist() == [len(part) for part in parts] == [7, 7, 4, 12, 16, 17]
    want = torch.cat(parts)
    assert torch.allclose(packed.tokens, want, atol=1e-5)
    weight, leaves = torch.randn_like(want), [p for p in vit.parameters() if p.requires_grad]
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), leaves) for y in (packed.tokens, want))):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * max(1, b.abs().max().item()))


def test_packed_refuses() -> None:
    vit, img = tiny(), torch.zeros(2, 3, 32, 32)
    hidden = torch.eye(16, dtype=torch.bool)[:2]
    hidden[0, 5] = True
    ragged = Mask.from_hidden(hidden, ragged=True)
    with pytest.raises(UserError, match="ViT: mask has different numbers of visible tokens, expected the same number"):
        vit(img, ragged)
    with pytest.raises(UserError, match="ViT: masks has 1 masks for 2 batches, expected one mask for each"):
        vit.forward_packed([img, img], [None])
    with pytest.raises(UserError, match="ViT: masks has 0 masks for 0 batches"):
        vit.forward_packed([])
