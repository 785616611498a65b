"""MixMIM: its loss against the published steps, masks of a batch and of pairs, names, training, what it refuses."""

import pytest
import torch

from mimfast import Mask
from mimfast._check import UserError
from mimfast._images import normalize
from mimfast.decoders import DualDecoder
from mimfast.encoders import MixSwin, ViT
from mimfast.methods import MixMIM
from mimfast.targets import Pixels
from mimfast.testing.runs import few_steps, photographs

SIZES = {"embed_dim": 16, "depths": (1, 1, 1), "heads": (1, 2, 4)}


def tiny(img_size: int | tuple[int, int] = 64, norm: bool = True, depth: int = 2, **kwargs: object) -> MixMIM:
    torch.manual_seed(0)
    encoder = MixSwin(img_size, **SIZES)  # type: ignore[arg-type]
    decoder = DualDecoder(64, encoder.grid, 16, dim=32, depth=depth, heads=2)
    return MixMIM(encoder, decoder, Pixels(16, norm), **kwargs)  # type: ignore[arg-type]


def pixels(batch: int = 4, side: int = 64) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8)


def published(model: MixMIM, img: torch.Tensor, mask: Mask) -> torch.Tensor:
    """Two sequences of each mixture, the halves merged, the mean over everything."""
    decoder, m = model.decoder, mask.hidden[..., None].float()
    z = decoder.embed(model.encoder(img, mask, "mix"))
    x1 = z * (1 - m) + decoder.mask_token * m
    x2 = z * m + decoder.mask_token * (1 - m)
    x = torch.cat([x1, x2]) + decoder.pos_embed
    for block in decoder.blocks:
        x = block(x)
    x1, x2 = decoder.pred(decoder.norm(x)).chunk(2)
    merged = x1 * m + x2.flip(0) * (1 - m)
    rows, columns = mask.grid
    cut = img.view(-1, 3, rows, 16, columns, 16).permute(0, 2, 4, 3, 5, 1).reshape(len(img), rows * columns, 768)
    if model.target.norm:
        cut = (cut - cut.mean(-1, keepdim=True)) / (cut.var(-1, keepdim=True) + 1e-6).sqrt()
    return ((merged - cut) ** 2).mean()


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("batch", "shared"), [(4, True), (4, False), (5, False), (1, True)])
@pytest.mark.parametrize("depth", [2, 0])
def test_loss_and_gradients_are_the_published_ones(norm: bool, batch: int, shared: bool, depth: int) -> None:
    model, img = tiny(norm=norm, shared=shared, depth=depth), normalize(pixels(batch))
    mask = model.sample_mask(batch)
    found, wanted = model(img, mask), published(model, img, mask)
    assert torch.allclose(found, wanted, rtol=1e-5)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for a, b in zip(*(torch.autograd.grad(loss, parameters) for loss in (found, wanted))):
        assert torch.allclose(a, b, atol=1e-4 * b.abs().max().item() + 1e-7)


def test_predictions_are_those_that_are_scored() -> None:
    model, img = tiny(), pixels(5)
    mask = model.sample_mask(5)
    tokens = model.encoder(img, mask, "mix")
    rows = model.decoder.rows(mask)
    assert torch.equal(rows.sort(1).values, torch.arange(16).expand(5, -1))
    some, every = model.decoder(tokens, mask, rows), model.predict(img, mask)
    assert torch.allclose(some, every.gather(1, rows[..., None].expand_as(every)), atol=1e-5)


def test_a_prediction_knows_only_the_visible_part_of_its_image() -> None:
    model, img = tiny(), torch.randn(4, 3, 64, 64)
    mask = model.sample_mask(4)
    pixels_hidden = mask.hidden.view(4, 1, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)
    other = torch.where(pixels_hidden, torch.randn_like(img), img)  # what mixture i shows of image i stays
    before, after = (model.predict(x, mask) for x in (img, other))
    assert torch.equal(before[mask.hidden], after[mask.hidden])
    swapped = img.clone()
    swapped[3] = torch.randn(3, 64, 64)
    assert torch.equal(before[0], model.predict(swapped, mask)[0])


def test_masks_of_a_batch() -> None:
    model, ids = tiny(), torch.tensor([7, 3, 9, 4, 5])
    epochs = torch.tensor([2, 2, 2, 3, 3])
    mask = model.sample_mask(5, sample_ids=ids, seed=1, epoch=epochs)
    assert mask.hidden.sum(1).tolist() == [8] * 5
    assert mask.hide.shape == mask.keep.shape == (5, 8)
    alone = Mask.random(1, (4, 4), 0.5, sample_ids=ids[:1], seed=1, epoch=2, rounding="hide_floor")
    assert torch.equal(mask.hidden, alone.hidden.expand(5, -1))
    assert model.sample_mask(5, sample_ids=ids, seed=1, epoch=2).hidden.equal(mask.hidden)
    assert mask.check() is mask
    published_counts = MixMIM.build("mixswin_nano", 112).sample_mask(1)
    assert (published_counts.hide.shape[1], published_counts.keep.shape[1]) == (24, 25)


def test_masks_of_pairs() -> None:
    model, ids = tiny(shared=False), torch.arange(5)
    mask = model.sample_mask(5, sample_ids=ids, epoch=ids)
    assert torch.equal(mask.hidden, mask.hidden.flip(0))
    each = Mask.random(5, (4, 4), 0.5, sample_ids=ids, epoch=ids, rounding="hide_floor")
    assert torch.equal(mask.hidden[:3], each.hidden[:3])
    assert mask.check() is mask


def test_every_trained_parameter_gets_a_gradient() -> None:
    model = tiny()
    model(pixels()).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {"encoder.absolute_pos_embed", "decoder.pos_embed"}
    assert all(p.grad.abs().max() > 0 for name, p in model.named_parameters() if name not in without)


def test_names_are_the_official_ones() -> None:
    with torch.device("meta"):
        base = MixMIM.build()
    # as mmpretrain counts its copy of the pre-training model
    assert sum(p.numel() for p in base.parameters()) == pytest.approx(114.67e6, abs=5e3)
    state = {key: tuple(value.shape) for key, value in base.state_dict().items()}
    wanted = {
        "absolute_pos_embed": (1, 3136, 128), "mask_token": (1, 1, 512), "decoder_pos_embed": (1, 49, 512),
        "decoder_embed.weight": (512, 1024), "decoder_blocks.7.attn.qkv.weight": (1536, 512),
        "decoder_norm.bias": (512,), "decoder_pred.weight": (3072, 512), "norm.weight": (1024,),
        "layers.2.blocks.17.attn.relative_position_bias_table": (729, 16),
    }  # fmt: skip
    assert {key: state[key] for key in wanted} == wanted
    tops = {key.split(".")[0] for key in state}
    assert tops == {"absolute_pos_embed", "patch_embed", "layers", "norm", "mask_token", *(
        f"decoder_{name}" for name in ("embed", "pos_embed", "blocks", "norm", "pred"))}  # fmt: skip
    one, two = tiny(), tiny(depth=2)
    with torch.no_grad():
        two.decoder.mask_token.add_(1)
    state = {**one.state_dict(), "layers.0.blocks.0.attn.relative_position_index": torch.zeros(64, 64).long()}
    assert str(two.load_state_dict(state)) == "<All keys matched successfully>"
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))


def test_from_config_and_compile() -> None:
    model = MixMIM.build("mixswin_nano", 64, decoder_dim=32, decoder_depth=1, shared=False, kind="l1", norm=False)
    again = MixMIM.from_config(model.config)
    assert again.config == model.config
    again.load_state_dict(model.state_dict())
    img, mask = pixels(), model.sample_mask(4)
    assert torch.equal(again(img, mask), model(img, mask))
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    assert torch.allclose(compiled(img, mask), model(img, mask), rtol=1e-6)


def test_trains_on_the_photographs() -> None:
    torch.manual_seed(0)
    model = MixMIM.build("mixswin_nano", 64, decoder_dim=64, decoder_depth=1, norm=False)
    losses = few_steps(model, photographs(8, 64), 40)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_refuses() -> None:
    encoder = MixSwin(64, **SIZES)  # type: ignore[arg-type]
    decoder, target = DualDecoder(64, (4, 4), 16, dim=32, depth=1, heads=2), Pixels(16)
    with pytest.raises(UserError, match=r"MixMIM: encoder has ViT with mask modes .*'mix'.*, expected|needs mask mode"):
        MixMIM(ViT(64, patch=16, dim=64, depth=1, heads=2), decoder, target)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"MixMIM: decoder has grid 2x4, expected grid 4x4 because"):
        MixMIM(encoder, DualDecoder(64, (2, 4), 16, dim=32, depth=1, heads=2), target)
    with pytest.raises(UserError, match=r"MixMIM: encoder has a mask_token, expected none because"):
        MixMIM(MixSwin(64, **SIZES, mask_token=True), decoder, target)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"MixMIM: target has patch 8, expected patch 16"):
        MixMIM(encoder, decoder, Pixels(8))
    with pytest.raises(UserError, match=r"MixMIM: ratio has 1, expected a number in \[0, 1\)"):
        MixMIM(encoder, decoder, target, ratio=1)
    model = MixMIM(encoder, decoder, target)
    with pytest.raises(UserError, match="DualDecoder: mask has images that hide different numbers of patches"):
        model(pixels(2), Mask.random(2, (4, 4), [0.3, 0.6]))
    with pytest.raises(UserError, match=r"DualDecoder: tokens has .*, expected .* because each patch has one"):
        decoder(torch.zeros(2, 8, 64), model.sample_mask(2))
