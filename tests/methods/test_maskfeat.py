"""MaskFeat: ragged masks, its loss against plain torch, its names, what it refuses."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimfast import Mask
from mimfast._check import UserError
from mimfast._images import normalize
from mimfast.encoders import ViT
from mimfast.heads import HOGHead
from mimfast.methods import MaskFeat
from mimfast.ops.hog import hog
from mimfast.targets import HOG


def build(**changes) -> MaskFeat:
    model = MaskFeat.build("vit", 128, 16, dim=32, depth=2, heads=2, min_block=15, **changes)
    nn.init.normal_(model.encoder.mask_token)
    return model.eval()


def pixels(batch: int = 4, side: int = 128) -> Tensor:
    return torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8)


def plain_loss(model: MaskFeat, img: Tensor, mask: Mask) -> Tensor:
    """Every token embedded and replaced with booleans, the target flattened and indexed with them."""
    vit, B = model.encoder, len(img)
    x = F.conv2d(normalize(img), vit.patch_embed.proj.weight, vit.patch_embed.proj.bias, 16).flatten(2).mT
    x = torch.where(mask.hidden[..., None], vit.mask_token, x)
    x = torch.cat([vit.cls_token.expand(B, -1, -1), x], 1) + vit.pos_embed
    for block in vit.blocks:
        x = block(x)
    head = model.decoder
    norm = head.transforms[0][0]
    pred = head.projections[0](F.layer_norm(x[:, 1:], (32,), norm.weight, norm.bias, 1e-6))
    cells = hog(img, impl="ref")
    side = img.shape[2] // 16
    target = cells.view(B, 27, side, 2, side, 2).permute(0, 2, 4, 1, 3, 5).reshape(B, side * side, 108)
    return (pred[mask.hidden] - target[mask.hidden]).square().mean()


def test_masks_are_blocks_of_differing_size() -> None:
    model = build()
    mask = model.sample_mask(64, sample_ids=torch.arange(64), seed=1)
    counts = mask.hidden.sum(1)
    assert counts.max() <= round(64 * 0.4) == 26
    assert counts.min() < counts.max()
    assert mask.cu_seqlens is not None
    assert model.unit == 16


def test_loss_and_gradients_are_those_of_plain_torch() -> None:
    model, img = build(), pixels()
    ragged = model.sample_mask(4, sample_ids=torch.arange(4), seed=2)
    assert ragged.hidden.sum(1).unique().numel() > 1
    for mask in (ragged, Mask.random(4, (8, 8), 0.4)):
        found, wanted = model(img, mask), plain_loss(model, img, mask)
        assert torch.allclose(found, wanted, rtol=1e-5), (found.item(), wanted.item())
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        one, two = (torch.autograd.grad(loss, [p for _, p in named]) for loss in (found, wanted))
        scale = max(g.abs().max() for g in two)
        for (name, _), a, b in zip(named, one, two):
            assert (a - b).abs().max() <= 1e-5 * scale + 1e-4 * b.abs().max(), name
            assert a.abs().max() > 0, name


def test_hidden_pixels_do_not_reach_the_prediction() -> None:
    model, img = build(), normalize(pixels())
    for mask in (model.sample_mask(4), Mask.random(4, (8, 8), 0.4)):
        hidden = mask.hidden.view(4, 1, 8, 8).repeat_interleave(16, 2).repeat_interleave(16, 3)
        changed = torch.where(hidden, img + 1, img)
        assert torch.equal(model.predict(changed, mask), model.predict(img, mask))


def test_the_size_of_the_images_may_change() -> None:
    model, img = build(), pixels(2, 160)
    assert model.sample_mask(2, img_size=160).grid == (10, 10)
    loss = model(img)
    loss.backward()
    assert model.encoder.pos_embed.grad.abs().max() > 0


def test_two_steps_are_deterministic() -> None:
    start, img = build(), pixels()
    results = []
    for _ in range(2):
        model = copy.deepcopy(start)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step in range(2):
            optimizer.zero_grad()
            model(img, model.sample_mask(4, sample_ids=torch.arange(4), epoch=step)).backward()
            optimizer.step()
        results.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(results[0].values(), results[1].values()))


def test_names_are_those_of_the_authors() -> None:
    with torch.device("meta"):
        state = MaskFeat.build("vit_b16", 224).state_dict()
    layers = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    parts = {f"blocks.{i}.{layer}" for i in range(12) for layer in layers}
    parts |= {"patch_embed.proj", "pred_head.transforms.0.0", "pred_head.projections.0"}
    names = {f"{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    assert set(state) == names | {"cls_token", "pos_embed", "mask_token"}
    assert tuple(state["pred_head.projections.0.weight"].shape) == (108, 768)
    assert tuple(state["pos_embed"].shape) == (1, 197, 768)


def test_config_and_weights_build_it_again() -> None:
    model = build(kind="smooth_l1")
    again = MaskFeat.from_config(model.config).eval()
    again.load_state_dict(model.state_dict())
    img = pixels()
    mask = model.sample_mask(4)
    assert torch.equal(again(img, mask), model(img, mask))
    assert again.config == model.config
    del (state := model.state_dict())["pred_head.projections.0.bias"], state["cls_token"]
    missing = again.load_state_dict(state, strict=False).missing_keys
    assert sorted(missing) == ["cls_token", "pred_head.projections.0.bias"]


def test_refuses_wrong_parts() -> None:
    part = ViT(96, 16, 32, 1, 2, mask_token=True, positions="learned")
    head = HOGHead(32, 108)
    with pytest.raises(UserError, match="MaskFeat: encoder has a final norm, expected encoder"):
        MaskFeat(part, head, HOG(16))
    part.norm = nn.Identity()
    MaskFeat(part, head, HOG(16))
    with pytest.raises(UserError, match="MaskFeat: target has normalize=False, expected normalize=True because"):
        MaskFeat(part, head, HOG(16, normalize=False))
    with pytest.raises(UserError, match="MaskFeat: target has patch 8, expected patch 16"):
        MaskFeat(part, HOGHead(32, 27), HOG(8))
    with pytest.raises(UserError, match="MaskFeat needs mask mode 'replace'; ViT offers"):
        MaskFeat(ViT(96, 16, 32, 1, 2), head, HOG(16))
