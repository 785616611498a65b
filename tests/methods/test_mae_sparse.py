"""MAE as rebuilt on the sparse ops against a plain path: same loss, same gradients; and CrossMAE's decoder."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mimfast import Mask, export
from mimfast._check import UserError
from mimfast._images import normalize
from mimfast.decoders import CrossDecoder, ViTDecoder
from mimfast.encoders import ViT
from mimfast.encoders.linear import linear
from mimfast.methods import MAE
from mimfast.targets import Pixels


def tiny(img_size: tuple[int, int] = (32, 48), decoder_depth: int = 2, ratio: float = 0.75) -> MAE:
    encoder = ViT(img_size, patch=8, dim=32, depth=2, heads=2)
    model = MAE(encoder, ViTDecoder(32, encoder.grid, 8, 16, decoder_depth, 2), Pixels(8), ratio)
    for name, parameter in model.named_parameters():  # zero biases and unit norms would hide mistakes
        if parameter.requires_grad and parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.2)
    return model


def plain_block(x: Tensor, block: torch.nn.Module) -> Tensor:
    """A whole block over all tokens, in the plainest torch."""
    attn, mlp, (B, T, D) = block.attn, block.mlp, x.shape
    n = F.layer_norm(x, (D,), block.norm1.weight, block.norm1.bias, 1e-6)
    q, k, v = F.linear(n, attn.qkv.weight, attn.qkv.bias).view(B, T, 3, attn.heads, -1).permute(2, 0, 3, 1, 4)
    y = ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).reshape(B, T, D)
    x = x + F.linear(y, attn.proj.weight, attn.proj.bias)
    n = F.layer_norm(x, (D,), block.norm2.weight, block.norm2.bias, 1e-6)
    return x + F.linear(F.gelu(F.linear(n, mlp.fc1.weight, mlp.fc1.bias)), mlp.fc2.weight, mlp.fc2.bias)


def plain_loss(model: MAE, img: Tensor, mask: Mask) -> Tensor:
    """The usual path: embed all patches, gather; mask tokens by cat and gather; decode and predict every patch."""
    encoder, decoder, D = model.encoder, model.decoder, model.encoder.dim
    img = normalize(img)
    proj = encoder.patch_embed.proj
    x = F.conv2d(img, proj.weight, proj.bias, stride=8).flatten(2).mT + encoder.pos_embed[:, 1:]
    x = x.gather(1, mask.keep[:, :, None].expand(-1, -1, D))
    x = torch.cat([(encoder.cls_token + encoder.pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)
    for block in encoder.blocks:
        x = plain_block(x, block)
    x = F.layer_norm(x, (D,), encoder.norm.weight, encoder.norm.bias, 1e-6)
    x = F.linear(x, decoder.embed.weight, decoder.embed.bias)
    L = mask.inverse.shape[1]
    pool = torch.cat([x[:, 1:], decoder.mask_token.expand(len(x), L - mask.visible, -1)], dim=1)
    x = torch.cat([x[:, :1], pool.gather(1, mask.inverse[:, :, None].expand(-1, -1, decoder.dim))], dim=1)
    x = x + decoder.pos_embed
    for block in decoder.blocks:
        x = plain_block(x, block)
    x = F.layer_norm(x, (decoder.dim,), decoder.norm.weight, decoder.norm.bias, 1e-6)
    pred = F.linear(x, decoder.pred.weight, decoder.pred.bias)[:, 1:]
    B, _, H, W = img.shape
    target = img.view(B, 3, H // 8, 8, W // 8, 8).permute(0, 2, 4, 3, 5, 1).reshape(B, L, -1)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    return ((pred - target) ** 2).mean(-1)[mask.hidden].mean()


@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.95])
@pytest.mark.parametrize("decoder_depth", [0, 1, 2])
def test_loss_and_every_gradient_equal_the_plain_path(decoder_depth: int, ratio: float) -> None:
    model = tiny(decoder_depth=decoder_depth, ratio=ratio)
    img = torch.randint(0, 256, (3, 3, 32, 48), dtype=torch.uint8)
    mask = model.sample_mask(3)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ours, plain = model(img, mask), plain_loss(model, img, mask)
    assert torch.allclose(ours, plain, rtol=1e-5)
    grads = (torch.autograd.grad(loss, list(named.values())) for loss in (ours, plain))
    for name, got, want in zip(named, *grads):
        scale = want.abs().max().item()
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-5 * max(scale, 1e-2)), name
        assert scale > 0 or decoder_depth == 0, name  # without attention the class token reaches nothing


def test_bf16_errs_no_more_than_the_plain_path() -> None:
    model, img = tiny(), torch.randn(3, 3, 32, 48)
    mask, weights = model.sample_mask(3), [p for p in model.parameters() if p.requires_grad]
    truth = torch.autograd.grad(plain_loss(model, img, mask), weights)
    errors = []
    for path in (model, lambda *given: plain_loss(model, *given)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = path(img, mask)
        grads = torch.autograd.grad(loss, weights)
        errors.append([((g - t).norm() / t.norm()).item() for g, t in zip(grads, truth)])
    print(f"relative errors of gradients: ours {max(errors[0]):.1e}, plain {max(errors[1]):.1e}")
    assert all(ours <= 2 * plain + 5e-3 for ours, plain in zip(*errors))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_captured_step_takes_new_masks() -> None:
    model, img = tiny().cuda(), torch.randn(3, 3, 32, 48, device="cuda")
    mask, other = model.sample_mask(3), model.sample_mask(3)
    weights = [p for p in model.parameters() if p.requires_grad]

    def run() -> list[Tensor]:
        loss = model(img, mask)
        return [loss.detach(), *torch.autograd.grad(loss, weights)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for name in ("keep", "inverse", "hidden", "hide"):
        getattr(mask, name).copy_(getattr(other, name))
    graph.replay()
    for got, want in zip(captured, run()):
        torch.testing.assert_close(got, want)


def test_training_predicts_what_predict_gives_at_the_hidden_patches() -> None:
    model, img = tiny(), torch.randn(3, 3, 32, 48)
    mask = model.sample_mask(3)
    every = model.predict(img, mask)
    rows = model.decoder.rows(mask)
    some = model.decoder(model.encoder(img, mask), mask, rows)
    assert every.shape == (3, 24, 192)
    assert torch.equal(rows, mask.hide)
    assert torch.allclose(some, every[mask.hidden].view(3, -1, 192), atol=1e-5)


def test_nothing_hidden_is_a_loss_of_zero() -> None:
    model, img = tiny(ratio=0.0), torch.randn(2, 3, 32, 48)
    assert model(img).item() == 0


def test_gradients_repeat_bit_for_bit() -> None:
    model, img = tiny(), torch.randn(3, 3, 32, 48)
    mask, weights = model.sample_mask(3), [p for p in model.parameters() if p.requires_grad]
    first, second = (torch.autograd.grad(model(img, mask), weights) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 8), (5, 8), (0, 4, 8)])
def test_linear_is_torchs(shape: tuple[int, ...], add: bool) -> None:
    x, weight, bias = torch.randn(shape), torch.randn(6, 8), torch.randn(6)
    leaves = [x, weight, bias] + ([torch.randn(*shape[:-1], 6)] if add else [])
    for leaf in leaves:
        leaf.requires_grad_()
    got, want = linear(*leaves), F.linear(*leaves[:3]) + (leaves[3] if add else 0)
    torch.testing.assert_close(got, want)
    upstream = torch.randn_like(want.mT.contiguous()).mT if len(shape) == 2 else torch.randn_like(want)
    pairs = zip(*(torch.autograd.grad(y, leaves, upstream) for y in (got, want)))
    for one, other in pairs:
        torch.testing.assert_close(one, other)
    sliced = linear(x.detach()[..., ::2], weight[:, ::2], bias)
    torch.testing.assert_close(sliced, F.linear(x[..., ::2], weight[:, ::2], bias))


def test_linear_contract() -> None:
    x, weight, bias = torch.randn(2, 3, 8), torch.randn(6, 8), torch.randn(6)
    torch.library.opcheck(torch.ops.mimfast.linear_cpu, (x, weight, bias, torch.randn(2, 3, 6)))
    torch.library.opcheck(torch.ops.mimfast.linear_cpu, (x, weight, None, None))


def cross(share: float = 0.25) -> MAE:
    encoder = ViT((32, 48), patch=8, dim=32, depth=2, heads=2)
    return MAE(encoder, CrossDecoder(32, 3, encoder.grid, 8, dim=16, depth=2, heads=2, share=share), Pixels(8))


def test_crossmae_predicts_a_share_and_each_patch_alone() -> None:
    model, img = cross(), torch.randn(3, 3, 32, 48)
    mask = model.sample_mask(3)
    rows = model.decoder.rows(mask)
    assert rows.shape == (3, 6)
    assert mask.hidden.gather(1, rows).all()
    assert (rows.diff() > 0).all()
    assert not torch.equal(rows, model.decoder.rows(mask))
    every = model.predict(img, mask)
    some = model.decoder(model.encoder.features(img, mask), mask, rows)
    assert torch.allclose(some, every.gather(1, rows[:, :, None].expand(-1, -1, 192)), atol=1e-5)
    model(img).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0}
    # the encoder's last norm is not used: the decoder normalises its mixtures itself
    assert without == {"encoder.pos_embed", "decoder.pos_embed", "encoder.norm.weight", "encoder.norm.bias"}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert compiled(img, mask).isfinite()


def test_crossmae_mixes_the_maps_as_written() -> None:
    """One block by hand: mixture, norm, cross-attention, MLP."""
    model, img = cross(1.0), torch.randn(2, 3, 32, 48)
    mask, decoder = model.sample_mask(2), model.decoder
    decoder.blocks = decoder.blocks[:1]
    maps = model.encoder.features(img, mask)
    y = sum(w * m for w, m in zip(decoder.mix.weight[0], maps))
    y = decoder.mix_norms[0](y)
    x = (decoder.mask_token + decoder.pos_embed[:, 1:]).expand(2, -1, -1)
    block = decoder.blocks[0]
    q, (k, v) = block.q(block.norm1(x)), block.kv(y).chunk(2, -1)
    heads = [F.softmax(a @ b.mT / 8**0.5, -1) @ c for a, b, c in zip(q.split(8, -1), k.split(8, -1), v.split(8, -1))]
    x = x + block.proj(torch.cat(heads, -1))
    x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
    want = decoder.pred(decoder.norm(x))
    assert torch.allclose(decoder(maps, mask), want, atol=1e-5)
    assert torch.allclose(decoder(maps, mask, decoder.rows(mask)), want[mask.hidden].view(2, -1, 192), atol=1e-5)


def test_crossmae_refuses() -> None:
    vit = ViT(32, 8, 32, 2, 2)
    with pytest.raises(UserError, match=r"CrossDecoder: share has 0, expected a number in \(0, 1\] because"):
        CrossDecoder(32, 3, (4, 4), 8, share=0)
    with pytest.raises(UserError, match=r"MAE: decoder has 2 features, expected 2 \+ 1 features because"):
        MAE(vit, CrossDecoder(32, 2, (4, 4), 8, 16, 1, 2), Pixels(8))
    model = cross()
    mask = model.sample_mask(2)
    with pytest.raises(UserError, match="MAE: encoder has a mask_token, expected none because"):
        MAE(ViT(32, 8, 32, 2, 2, mask_token=True), ViTDecoder(32, (4, 4), 8, 16, 1, 2), Pixels(8))
    with pytest.raises(UserError, match="CrossDecoder: features has 1 maps, expected 3 because"):
        model.decoder([torch.zeros(2, 7, 32)], mask)


def test_hugging_face_layout_refuses_a_cross_decoder(tmp_path):
    encoder = ViT(32, patch=8, dim=32, depth=2, heads=2)
    decoder = CrossDecoder(32, 3, encoder.grid, 8, dim=32, depth=1, heads=2)
    with pytest.raises(UserError, match="export: model has a CrossDecoder, expected a ViTDecoder"):
        export(MAE(encoder, decoder, Pixels(8)), tmp_path / "hf", layout="hf")
