"""FastMIM: its loss against plain torch over every kind of backbone, block and size, its names, what it refuses."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimfast import Mask
from mimfast._check import UserError
from mimfast._images import normalize
from mimfast.encoders import BEiT, Swin, ViT
from mimfast.encoders.block import Block
from mimfast.heads import TokenDecoder
from mimfast.methods import FastMIM
from mimfast.ops.hog import hog
from mimfast.targets import HOG, LocalNormPixels, Pixels

TIMM = "timm has these backbones: pip install 'mimfast[timm]'"
BACKBONES = ("vit", "beit", "swin", "pvt_v2_b0", "mvitv2_tiny", "convnextv2_atto")


def encoder(kind: str = "vit", size: int | tuple[int, int] = 64) -> nn.Module:
    if kind == "vit":
        return ViT(size, 16, 32, 2, 2)
    if kind == "beit":
        return BEiT(size, 16, 32, 2, 2, mask_token=False)
    if kind == "swin":
        return Swin(size, embed_dim=16, depths=(1, 2, 2, 1), heads=(1, 2, 2, 4))
    pytest.importorskip("timm", reason=TIMM)
    from mimfast.encoders.timm import Timm

    return Timm(kind, size)


def build(kind: str = "vit", block: int | None = None, depth: int = 2, norm: bool = True, **changes) -> FastMIM:
    part = encoder(kind, changes.pop("size", 64))
    target = changes.pop("target", None) or HOG(part.stride, norm)
    model = FastMIM(part, TokenDecoder(part.dim, target.dim, 64, depth), target, block=block, **changes)
    nn.init.normal_(model.mask_token)
    return model.eval()


def pixels(batch: int = 3, size: tuple[int, int] = (64, 64)) -> Tensor:
    return torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8)


def block_forward(block: Block, x: Tensor) -> Tensor:
    B, T, D = x.shape
    h = F.layer_norm(x, (D,), block.norm1.weight, block.norm1.bias, block.norm1.eps)
    qkv = F.linear(h, block.attn.qkv.weight, block.attn.qkv.bias).view(B, T, 3, block.attn.heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    x = x + F.linear((weights @ v).transpose(1, 2).reshape(B, T, D), block.attn.proj.weight, block.attn.proj.bias)
    h = F.layer_norm(x, (D,), block.norm2.weight, block.norm2.bias, block.norm2.eps)
    return x + block.mlp.fc2(F.gelu(block.mlp.fc1(h)))


def plain_loss(model: FastMIM, img: Tensor, mask: Mask) -> Tensor:
    """Paint every pixel, run everything on every token, index with booleans."""
    B, _, H, W = img.shape
    stride, cell = model.encoder.stride, H // mask.grid[0]
    hidden_BHW = mask.hidden.view(B, *mask.grid).repeat_interleave(cell, 1).repeat_interleave(cell, 2)
    painted = torch.where(hidden_BHW[:, None], model.mask_token, normalize(img))
    part = model.encoder if tuple(model.encoder.img_size) == (H, W) else model.encoder.at((H, W))
    x = part(painted)
    decoder = model.decoder
    if decoder.embed is not None:
        x = decoder.embed(x)
    for block in decoder.blocks:
        x = block_forward(block, x)
    pred = decoder.pred(F.layer_norm(x, x.shape[-1:], decoder.norm.weight, decoder.norm.bias, decoder.eps))
    pred = pred[:, part.prefix :].view(B, H // stride, W // stride, -1)
    if isinstance(model.target, Pixels):
        tiles = normalize(img).view(B, 3, H // stride, stride, W // stride, stride)
        tiles = tiles.permute(0, 2, 4, 3, 5, 1).flatten(3)
        wanted = (tiles - tiles.mean(-1, keepdim=True)) / (tiles.var(-1, keepdim=True) + 1e-6).sqrt()
        return (pred - wanted).square()[hidden_BHW[:, ::stride, ::stride]].mean()
    # one prediction for every histogram cell
    u = stride // 8
    pred = pred.unflatten(-1, (27, u, u)).permute(0, 3, 1, 4, 2, 5).reshape(B, 27, H // 8, W // 8)
    wanted = hog(img, normalize=model.target.normalize, impl="ref")
    return (pred - wanted).square().movedim(1, -1)[hidden_BHW[:, ::8, ::8]].mean()


def assert_same_loss(model: FastMIM, img: Tensor, mask: Mask) -> None:
    found, wanted = model(img, mask), plain_loss(model, img, mask)
    assert torch.allclose(found, wanted, rtol=1e-5), (found.item(), wanted.item())
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    one, two = (torch.autograd.grad(loss, [p for _, p in named], allow_unused=True) for loss in (found, wanted))
    scale = max(g.abs().max() for g in two if g is not None)
    for (name, _), a, b in zip(named, one, two):
        assert (a is None) == (b is None), name
        if a is not None:
            assert (a - b).abs().max() <= 1e-5 * scale + 1e-4 * b.abs().max(), name
    colour = dict(zip([name for name, _ in named], one))["mask_token"]
    assert colour.abs().max() > 0


@pytest.mark.parametrize("kind", BACKBONES)
def test_loss_and_gradients_are_those_of_plain_torch(kind: str) -> None:
    model, img = build(kind, ratio=0.5), pixels()
    assert_same_loss(model, img, model.sample_mask(3))


@pytest.mark.parametrize(("kind", "block"), [("vit", 8), ("vit", 32), ("swin", 8), ("swin", 16), ("pvt_v2_b0", 16)])
def test_blocks_smaller_and_larger_than_a_token(kind: str, block: int) -> None:
    model, img = build(kind, block), pixels()
    mask = model.sample_mask(3)
    cell, blocks = min(block, model.encoder.stride), (64 // block) ** 2
    assert mask.grid == (64 // cell, 64 // cell)
    assert mask.visible * cell**2 == int(blocks * 0.25) * block**2
    assert model.unit == block
    assert_same_loss(model, img, mask)


@pytest.mark.parametrize("norm", [True, False])
def test_raw_histograms_and_pixels(norm: bool) -> None:
    model, img = build(norm=norm), pixels()
    assert_same_loss(model, img, model.sample_mask(3))
    model = build(target=Pixels(16))
    assert_same_loss(model, img, model.sample_mask(3))


@pytest.mark.parametrize("kind", ["vit", "beit", "swin", "pvt_v2_b0", "convnextv2_atto"])
@pytest.mark.parametrize("size", [(96, 96), (64, 128)])
def test_the_size_of_the_images_may_change(kind: str, size: tuple[int, int]) -> None:
    """FastMIM-P: encoder and mask follow the images, the weights stay the same."""
    model, img = build(kind), pixels(2, size)
    mask = model.sample_mask(2, img_size=size)
    assert mask.grid == (size[0] // model.encoder.stride, size[1] // model.encoder.stride)
    assert_same_loss(model, img, mask)
    assert model.predict(img, mask).shape == (2, mask.grid[0] * mask.grid[1], model.target.dim)
    assert model(img).isfinite()
    assert model.encoder.img_size == (64, 64)
    assert model(pixels()).isfinite()


def test_depth_zero_reads_the_encoder() -> None:
    part = encoder()
    model = FastMIM(part, TokenDecoder(32, 108, 32, 0), HOG(16)).eval()
    assert "decoder_embed.weight" not in model.state_dict()
    assert_same_loss(model, pixels(), model.sample_mask(3))


def test_uint8_gives_the_loss_of_the_normalised_image() -> None:
    model, img = build(target=Pixels(16)), pixels()
    mask = model.sample_mask(3)
    assert torch.allclose(model(img, mask), model(normalize(img), mask), rtol=1e-6)


def test_what_is_hidden_does_not_reach_the_prediction() -> None:
    for kind in ("vit", "swin"):
        model, img = build(kind), normalize(pixels())
        mask = model.sample_mask(3)
        stride = model.encoder.stride
        hidden = mask.hidden.view(3, 1, *mask.grid).repeat_interleave(stride, 2).repeat_interleave(stride, 3)
        poisoned = torch.where(hidden, torch.nan, img)
        assert torch.equal(model.predict(poisoned, mask), model.predict(img, mask))


def test_every_parameter_gets_a_gradient() -> None:
    for name in ("vit_nano8", "beit", "swin_nano"):
        model = FastMIM.build(name, 64, **({"dim": 32, "depth": 1} if name == "beit" else {}))
        model(pixels()).backward()
        without = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
        assert not without


def test_masks_are_a_function_of_seed_epoch_and_sample() -> None:
    model, ids = build(), torch.tensor([5, 1, 8])
    one, two = (model.sample_mask(3, sample_ids=ids, seed=3, epoch=1) for _ in range(2))
    other = model.sample_mask(3, sample_ids=ids, seed=3, epoch=2)
    assert torch.equal(one.hidden, two.hidden)
    assert not torch.equal(one.hidden, other.hidden)
    img = pixels()
    assert model(img) != model(img)


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


def test_compiles_as_one_graph() -> None:
    model, img = build(), pixels()
    mask = model.sample_mask(3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    wanted, found = model(img, mask), compiled(img, mask)
    assert torch.allclose(found, wanted, rtol=1e-5)
    (wanted_grad,), (found_grad,) = (torch.autograd.grad(loss, [model.mask_token]) for loss in (wanted, found))
    assert torch.allclose(found_grad, wanted_grad, rtol=1e-4, atol=1e-6)
    assert compiled(img).isfinite()


def test_bf16_autocast_stays_near_fp32() -> None:
    model, img = build(), pixels()
    mask = model.sample_mask(3)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(img, mask)
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, model(img, mask), rtol=2e-2)


def test_names_over_a_vit_are_flat_and_nested_over_others() -> None:
    with torch.device("meta"):
        state = FastMIM.build("vit_b16", 128).state_dict()
    shapes = {
        "cls_token": (1, 1, 768),
        "pos_embed": (1, 65, 768),
        "mask_token": (1, 3, 1, 1),
        "patch_embed.proj.weight": (768, 3, 16, 16),
        "blocks.0.attn.qkv.weight": (2304, 768),
        "decoder_embed.weight": (256, 768),
        "decoder_blocks.0.attn.qkv.weight": (768, 256),
        "decoder_blocks.0.mlp.fc1.weight": (1024, 256),
        "decoder_pred.weight": (108, 256),
        "decoder_pred.bias": (108,),
    }
    assert {key: tuple(state[key].shape) for key in shapes} == shapes
    stacks = {"blocks": 12, "decoder_blocks": 1}
    layers = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    inner = {f"{s}.{i}.{layer}" for s, n in stacks.items() for i in range(n) for layer in layers}
    outer = {"patch_embed.proj", "norm", "decoder_embed", "decoder_norm", "decoder_pred"}
    names = {f"{layer}.{part}" for layer in inner | outer for part in ("weight", "bias")}
    assert set(state) == names | {"cls_token", "pos_embed", "mask_token"}
    nested = build("pvt_v2_b0").state_dict()
    assert {name.split(".")[0] for name in nested} == {
        "mask_token", "encoder", "decoder_embed", "decoder_blocks", "decoder_norm", "decoder_pred",
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["vit", "swin", "pvt_v2_b0"])
def test_config_and_weights_build_it_again(kind: str) -> None:
    model = build(kind, 16 if kind == "swin" else None)
    again = FastMIM.from_config(model.config).eval()
    again.load_state_dict(model.state_dict())
    img = pixels()
    mask = model.sample_mask(3)
    assert torch.equal(again(img, mask), model(img, mask))
    assert again.config == model.config
    del (state := model.state_dict())["mask_token"], state["decoder_norm.weight"]
    assert sorted(again.load_state_dict(state, strict=False).missing_keys) == ["decoder_norm.weight", "mask_token"]


def test_build_follows_the_authors() -> None:
    vit, swin = FastMIM.build("vit_nano8", 64), FastMIM.build("swin_nano", 64, embed_dim=16)
    assert (vit.decoder.depth, vit.decoder.dim, vit.decoder.heads, vit.decoder.eps) == (1, 256, 8, 1e-6)
    assert (swin.decoder.depth, swin.decoder.dim, swin.decoder.heads, swin.decoder.eps) == (4, 256, 8, 1e-5)
    assert {m.eps for m in swin.decoder.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    for name, module in swin.named_modules():
        if isinstance(module, nn.Linear):
            bound = (6 / sum(module.weight.shape)) ** 0.5
            assert 0.8 * bound < module.weight.abs().max() <= bound, name
            assert module.bias is None or not module.bias.any(), name
    assert (vit.ratio, vit.block, swin.block) == (0.75, 8, 32)
    assert FastMIM.build("vit_nano8", 64, drop_last=1).encoder.depth == 3
    assert FastMIM.build("swin_nano", 64, embed_dim=16, drop_last=3).encoder.depths == (2, 2, 1, 0)


def test_refuses_wrong_parts() -> None:
    part = encoder()
    decoder = TokenDecoder(32, 108, 64, 1)

    def refused(message: str, *args, **kwargs) -> None:
        with pytest.raises(UserError, match=message):
            FastMIM(*args, **kwargs)

    refused("FastMIM: decoder has encoder_dim 48, expected 32 because", part, TokenDecoder(48, 108, 64), HOG(16))
    refused("FastMIM: target has patch 8, expected patch 16 because a token", part, decoder, HOG(8))
    refused("FastMIM: target has dim 768, expected 108 because the decoder predicts 108", part, decoder, Pixels(16))
    refused(r"FastMIM: ratio has 1.0, expected a number in \[0, 1\)", part, decoder, HOG(16), 1.0)
    refused("FastMIM: ratio has 0.95, expected at least one visible block because", part, decoder, HOG(16), 0.95)
    refused("FastMIM: block has 24, expected a multiple of 16 because", part, decoder, HOG(16), block=24)
    refused("FastMIM: block has 4, expected a multiple of 8 that divides 16 because", part, decoder, HOG(16), block=4)
    refused("FastMIM: img_size has 64, expected a multiple of 48", part, decoder, HOG(16), block=48)
    wide = TokenDecoder(32, 768, 64)
    refused(
        "FastMIM: block has 8, expected 16 or more for Pixels because a block hides", part, wide, Pixels(16), block=8
    )
    refused("block has 8, expected 16 or more for LocalNormPixels", part, wide, LocalNormPixels(16), block=8)
    part.mask_modes = frozenset({"drop"})
    refused(r"FastMIM needs mask mode 'paint'; ViT offers \['drop'\]", part, decoder, HOG(16))
    token = ViT(64, 16, 32, 1, 2, mask_token=True)
    refused("FastMIM: encoder has a mask_token, expected none because mode 'paint' never", token, decoder, HOG(16))
    with pytest.raises(UserError, match="TokenDecoder: dim has 64, expected 32, or depth 1 or more because without"):
        TokenDecoder(32, 108, 64, 0)
    with pytest.raises(UserError, match="HOG: patch has 14, expected a multiple of 8 because"):
        HOG(14)


def test_refuses_images_that_do_not_fit() -> None:
    model = build(block=32)
    with pytest.raises(UserError, match="FastMIM: img_size has 80, expected a multiple of 32 because it is masked in"):
        model(pixels(2, (64, 80)))
    with pytest.raises(UserError, match=r"FastMIM: img has shape \(2, 1, 64, 64\), expected \(batch, 3, height, width"):
        model(pixels(2)[:, :1])
