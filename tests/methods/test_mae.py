"""MAE: its loss against a plain formula, its names, compilation, precision, and what it refuses."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mimfast import Mask
from mimfast._check import UserError
from mimfast._images import normalize
from mimfast.decoders import ViTDecoder
from mimfast.encoders import ViT
from mimfast.methods import MAE
from mimfast.targets import Pixels

# written by hand from the published description of the official files, not from our code
OFFICIAL_BLOCK = [
    f"{layer}.{kind}"
    for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    for kind in ("weight", "bias")
]
OFFICIAL_TOP = ["cls_token", "pos_embed", "mask_token", "decoder_pos_embed"] + [
    f"{layer}.{kind}"
    for layer in ("patch_embed.proj", "norm", "decoder_embed", "decoder_norm", "decoder_pred")
    for kind in ("weight", "bias")
]


def official_names(depth: int, decoder_depth: int) -> set[str]:
    stacks = [f"blocks.{i}" for i in range(depth)] + [f"decoder_blocks.{i}" for i in range(decoder_depth)]
    return {*OFFICIAL_TOP, *(f"{stack}.{name}" for stack in stacks for name in OFFICIAL_BLOCK)}


def tiny(img_size: int | tuple[int, int] = 32, norm: bool = True) -> MAE:
    encoder = ViT(img_size, patch=8, dim=32, depth=2, heads=2)
    return MAE(encoder, ViTDecoder(32, encoder.grid, 8, dim=16, depth=1, heads=2), Pixels(8, norm))


def pixels(batch: int = 3, size: tuple[int, int] = (32, 32)) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8)


@pytest.mark.parametrize("norm", [True, False])
def test_loss_is_that_of_the_paper(norm: bool) -> None:
    model, img = tiny((32, 48), norm), normalize(pixels(size=(32, 48)))
    mask = model.sample_mask(3)
    pred = model.predict(img, mask)
    assert pred.shape == (3, 24, 192)
    patches = img.view(3, 3, 4, 8, 6, 8).permute(0, 2, 4, 3, 5, 1).reshape(3, 24, 192)
    if norm:
        patches = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    wanted = ((pred - patches) ** 2).mean(-1)[mask.hidden].mean()
    assert torch.allclose(model(img, mask), wanted, rtol=1e-5)


def test_uint8_gives_the_loss_of_the_normalised_image() -> None:
    model, img = tiny(), pixels()
    mask = model.sample_mask(3)
    assert torch.allclose(model(img, mask), model(normalize(img), mask), rtol=1e-6)


def test_prediction_follows_the_tokens_not_their_order() -> None:
    """Mask tokens differ by their positions, and the visible tokens go back to where they came from."""
    model, img = tiny(), pixels(1)
    mask = model.sample_mask(1)
    pred = model.predict(img, mask)[0]
    hidden = pred[mask.hidden[0]]
    assert (hidden[1:] - hidden[:1]).abs().amax(1).min() > 1e-3
    tokens = model.encoder(img, mask)
    with torch.no_grad():
        model.decoder.blocks = nn.ModuleList()
        alone = model.decoder(tokens, mask)[0]
        x = model.decoder.embed(tokens)[0, 1:] + model.decoder.pos_embed[0, 1:][mask.keep[0]]
    assert torch.allclose(alone[mask.keep[0]], model.decoder.pred(model.decoder.norm(x)), atol=1e-5)


def test_masks_are_fresh_unless_given_and_keep_the_exact_count() -> None:
    model = tiny()
    model.ratio = 0.6
    assert model.sample_mask(2).visible == int(16 * (1 - 0.6)) == 6
    img = pixels()
    assert model(img) != model(img)
    ids = torch.tensor([5, 1, 8])
    one, two = (model.sample_mask(3, sample_ids=ids, seed=3, epoch=1) for _ in range(2))
    assert torch.equal(one.hidden, two.hidden)
    assert model.unit == 8


def test_every_trained_parameter_gets_a_gradient() -> None:
    model = tiny()
    model(pixels()).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {"encoder.pos_embed", "decoder.pos_embed"}
    assert all(p.grad.abs().max() > 0 for name, p in model.named_parameters() if name not in without)


def test_names_are_the_official_ones() -> None:
    model = tiny()
    assert set(model.state_dict()) == official_names(2, 1)
    with torch.device("meta"):
        base = MAE.build("vit_b16", 224).state_dict()
    assert set(base) == official_names(12, 8)
    assert {key: tuple(base[key].shape) for key in ("pos_embed", "decoder_pos_embed", "decoder_pred.weight")} == {
        "pos_embed": (1, 197, 768),
        "decoder_pos_embed": (1, 197, 512),
        "decoder_pred.weight": (768, 512),
    }


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_names_survive_prefixes_copies_and_compile() -> None:
    model, other = tiny(), tiny()
    copied = copy.deepcopy(model)
    assert all(torch.equal(a, b) for a, b in zip(copied.state_dict().values(), model.state_dict().values()))
    for wrap in (Wrapper, nn.Sequential, torch.compile):
        wrapped, target = wrap(model), wrap(other)
        prefix = {Wrapper: "module.", nn.Sequential: "0.", torch.compile: "_orig_mod."}[wrap]
        state = wrapped.state_dict()
        assert set(state) == {prefix + name for name in official_names(2, 1)}
        nn.init.zeros_(other.decoder.mask_token)
        target.load_state_dict(state, strict=True)
        assert torch.equal(other.decoder.mask_token, model.decoder.mask_token)
    # a copy's hooks are its own: loading into it leaves the original alone
    copied.load_state_dict({key: value * 0 for key, value in model.state_dict().items()})
    assert copied.encoder.cls_token.abs().max() == 0 < model.encoder.cls_token.abs().max()


def test_names_survive_distributed_data_parallel(tmp_path: Path) -> None:
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(tiny())
        assert set(parallel.state_dict()) == {f"module.{name}" for name in official_names(2, 1)}
        parallel.load_state_dict(parallel.state_dict(), strict=True)
        parallel(pixels()).backward()
    finally:
        torch.distributed.destroy_process_group()


def test_strict_loading_reports_official_names() -> None:
    model = tiny()
    state = model.state_dict()
    del state["cls_token"], state["decoder_norm.weight"]
    state["head.weight"] = torch.zeros(1)
    missing, unexpected = tiny().load_state_dict(state, strict=False)
    assert sorted(missing) == ["cls_token", "decoder_norm.weight"]
    assert unexpected == ["head.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "cls_token"'):
        tiny().load_state_dict(state)
    assert "head.weight" in state  # the caller's mapping is left alone
    assert "cls_token" not in state


@pytest.mark.parametrize("given", [True, False])
def test_compiles_as_one_graph(given: bool) -> None:
    model, img = tiny(), pixels()
    mask = model.sample_mask(3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    if not given:
        compiled(img).backward()
        assert model.decoder.mask_token.grad.abs().max() > 0
        return
    wanted, found = model(img, mask), compiled(img, mask)
    assert torch.allclose(found, wanted, rtol=1e-5)
    (wanted_grad,) = torch.autograd.grad(wanted, [model.decoder.mask_token])
    (found_grad,) = torch.autograd.grad(found, [model.decoder.mask_token])
    assert torch.allclose(found_grad, wanted_grad, rtol=1e-4, atol=1e-6)


def test_bf16_autocast_stays_near_fp32() -> None:
    model, img = tiny(), pixels()
    mask = model.sample_mask(3)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(img, mask)
        assert model.predict(img, mask).dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, model(img, mask), rtol=2e-2)
    loss.backward()
    assert model.encoder.cls_token.grad.isfinite().all()


class Sparse(nn.Module):
    stride, dim, grid, mask_modes = 8, 32, (4, 4), frozenset({"sparse", "paint"})


def test_refuses_wrong_pairs() -> None:
    vit, decoder = ViT(32, 8, 32, 1, 2), ViTDecoder(32, (4, 4), 8, 16, 1, 2)
    pair = r"MAE needs mask mode 'drop'; Sparse offers \['paint', 'sparse'\]"
    with pytest.raises(UserError, match=pair):
        MAE(Sparse(), decoder, Pixels(8))
    with pytest.raises(UserError, match="MAE: decoder has grid 2x8, expected grid 4x4 because"):
        MAE(vit, ViTDecoder(32, (2, 8), 8, 16, 1, 2), Pixels(8))
    with pytest.raises(UserError, match=r"MAE: decoder has patch 4, expected patch 8 because a token .* covers 8 px"):
        MAE(vit, ViTDecoder(32, (4, 4), 4, 16, 1, 2), Pixels(8))
    with pytest.raises(UserError, match="MAE: decoder has encoder_dim 64, expected 32 because"):
        MAE(vit, ViTDecoder(64, (4, 4), 8, 16, 1, 2), Pixels(8))
    with pytest.raises(UserError, match="MAE: target has dim 48, expected 192 because the decoder predicts 192"):
        MAE(vit, decoder, Pixels(4))
    with pytest.raises(UserError, match=r"MAE: ratio has 1.0, expected a number in \[0, 1\)"):
        MAE(vit, decoder, Pixels(8), ratio=1.0)
    with pytest.raises(UserError, match=r"MAE: ratio has 0.97, expected at least one visible patch because int\(16 \*"):
        MAE(vit, decoder, Pixels(8), ratio=0.97)


def test_decoder_refuses_other_tokens_and_masks() -> None:
    model, img = tiny(), pixels()
    mask = model.sample_mask(3)
    with pytest.raises(UserError, match=r"ViTDecoder: tokens has shape \(3, 17, 32\), expected \(any, 5, 32\) because"):
        model.decoder(model.encoder(img), mask)
    with pytest.raises(UserError, match="ViTDecoder: mask has grid 2x8, expected 4x4"):
        model.decoder(model.encoder(img, mask), Mask.random(3, (2, 8), 0.75))
