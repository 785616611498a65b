"""GreenMIM: its loss against a plain formula, one planned mask for a batch, names, training, what it refuses."""

import pytest
import torch

from mimfast import Mask
from mimfast._check import UserError
from mimfast._images import normalize
from mimfast.decoders import ViTDecoder
from mimfast.encoders import MixSwin, Swin, ViT
from mimfast.encoders.visible import PlannedMask
from mimfast.methods import MAE, GreenMIM
from mimfast.recipes import Masking, Model, Target
from mimfast.targets import Pixels
from mimfast.testing.runs import few_steps, photographs, tiny_recipe, write_images
from mimfast.train import loop

SIZES = {"embed_dim": 16, "depths": (2, 1, 1), "heads": (1, 2, 4)}


def tiny(img_size: int | tuple[int, int] = 64, norm: bool = True, depth: int = 1, **kwargs: object) -> GreenMIM:
    torch.manual_seed(0)
    encoder = Swin(img_size, **SIZES)  # type: ignore[arg-type]
    decoder = ViTDecoder(64, encoder.grid, 16, dim=32, depth=depth, heads=2, class_token=False)
    return GreenMIM(encoder, decoder, Pixels(16, norm), **kwargs)  # type: ignore[arg-type]


def pixels(batch: int = 4, height: int = 64, width: int = 64) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("size", "depth"), [((64, 64), 1), ((64, 128), 2), ((64, 64), 0)])
def test_loss_is_that_of_the_paper(norm: bool, size: tuple[int, int], depth: int) -> None:
    model, img = tiny(size, norm, depth), normalize(pixels(3, *size))
    mask = model.sample_mask(3)
    decoder, (rows, columns) = model.decoder, mask.grid
    tokens = decoder.embed(model.encoder(img, mask, "drop"))
    x = decoder.mask_token.expand(3, rows * columns, -1).clone()
    x.scatter_(1, mask.keep[..., None].expand_as(tokens), tokens)
    x = x + decoder.pos_embed
    for block in decoder.blocks:
        x = block(x)
    pred = decoder.pred(decoder.norm(x))
    assert torch.allclose(model.predict(img, mask), pred, atol=1e-5)
    cut = img.view(3, 3, rows, 16, columns, 16).permute(0, 2, 4, 3, 5, 1).reshape(3, rows * columns, 768)
    if norm:
        cut = (cut - cut.mean(-1, keepdim=True)) / (cut.var(-1, keepdim=True) + 1e-6).sqrt()
    wanted = ((pred - cut) ** 2).mean(-1)[mask.hidden].mean()
    assert torch.allclose(model(img, mask), wanted, rtol=1e-5)


def test_one_mask_for_a_batch_with_its_plan() -> None:
    model, ids = tiny(), torch.tensor([7, 3, 9])
    mask = model.sample_mask(3, sample_ids=ids, seed=1, epoch=torch.tensor([2, 2, 3]))
    assert isinstance(mask, PlannedMask)
    alone = Mask.random(1, (4, 4), 0.75, sample_ids=ids[:1], seed=1, epoch=2)
    assert torch.equal(mask.hidden, alone.hidden.expand(3, -1))
    counts = GreenMIM.build("swin_nano").sample_mask(2)
    assert (counts.keep.shape, counts.hide.shape) == ((2, 12), (2, 37))
    img = pixels(3)
    assert torch.equal(model(img, mask), model(img, alone.expand(3)))  # planned when it comes without
    assert torch.isfinite(model(img))


def test_every_trained_parameter_gets_a_gradient() -> None:
    model = tiny()
    model(pixels()).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {"decoder.pos_embed"}
    assert all(p.grad.abs().max() > 0 for name, p in model.named_parameters() if name not in without)


def test_names_and_published_shapes() -> None:
    with torch.device("meta"):
        state = {key: tuple(value.shape) for key, value in GreenMIM.build().state_dict().items()}
    wanted = {
        "encoder.patch_embed.proj.weight": (128, 3, 4, 4), "encoder.norm.weight": (1024,), "mask_token": (1, 1, 512),
        "encoder.layers.2.blocks.17.attn.relative_position_bias_table": (169, 16),
        "decoder_pos_embed": (1, 49, 512), "decoder_embed.weight": (512, 1024), "decoder_norm.bias": (512,),
        "decoder_blocks.0.attn.qkv.weight": (1536, 512), "decoder_pred.weight": (3072, 512),
    }  # fmt: skip
    assert {key: state[key] for key in wanted} == wanted
    assert not any(key.startswith("decoder_blocks.1") for key in state)
    one, two = tiny(), tiny()
    with torch.no_grad():
        two.decoder.mask_token.add_(1)
    assert str(two.load_state_dict(one.state_dict())) == "<All keys matched successfully>"
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    again = GreenMIM.from_config(one.config)
    assert again.config == one.config
    again.load_state_dict(one.state_dict())
    img, mask = pixels(), one.sample_mask(4)
    assert torch.equal(again(img, mask), one(img, mask))


def test_trains_on_the_photographs() -> None:
    torch.manual_seed(0)
    model = GreenMIM.build("swin_nano", 128, ratio=0.5, norm=False, decoder_dim=64, decoder_heads=2)
    losses = few_steps(model, photographs(8, 128), 40)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_the_loop_hands_ids_to_the_cpu(tmp_path, monkeypatch) -> None:
    """And masks are those of the first sample of each batch, drawn again when the run is repeated."""
    seen, draw = [], GreenMIM.sample_mask

    def watched(self, batch, *, sample_ids=None, **kwargs):
        seen.append((sample_ids.device.type, tuple(sample_ids.tolist())))
        return draw(self, batch, sample_ids=sample_ids, **kwargs)

    monkeypatch.setattr(GreenMIM, "sample_mask", watched)
    recipe = tiny_recipe(write_images(tmp_path / "images", side=72), tmp_path / "run", steps=2)
    given = {"model": Model("greenmim", "swin_nano", 128, decoder_dim=32), "mask": Masking(0.5), "target": Target()}
    recipe = type(recipe)(**{**vars(recipe), **given})
    assert loop.pretrain(recipe).step == 2
    assert all(device == "cpu" for device, _ in seen)


def test_refuses() -> None:
    encoder, target = Swin(64, **SIZES), Pixels(16)  # type: ignore[arg-type]
    decoder = ViTDecoder(64, (4, 4), 16, dim=32, depth=1, heads=2, class_token=False)
    with pytest.raises(UserError, match=r"GreenMIM: encoder has MixSwin with mask modes .*'drop'"):
        GreenMIM(MixSwin(64, **SIZES), decoder, target)  # type: ignore[arg-type]
    vit = ViT(64, patch=16, dim=64, depth=1, heads=2)
    with pytest.raises(UserError, match=r"GreenMIM: encoder has ViT, expected a Swin because groups are planned"):
        GreenMIM(vit, decoder, target)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"GreenMIM: decoder has a class token, expected none"):
        GreenMIM(encoder, ViTDecoder(64, (4, 4), 16, dim=32, depth=1, heads=2), target)
    with pytest.raises(UserError, match=r"GreenMIM: decoder has grid 2x4, expected grid 4x4"):
        GreenMIM(encoder, ViTDecoder(64, (2, 4), 16, dim=32, depth=1, heads=2, class_token=False), target)
    with pytest.raises(UserError, match=r"GreenMIM: encoder has a mask_token, expected none"):
        GreenMIM(Swin(64, **SIZES, mask_token=True), decoder, target)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"GreenMIM: ratio has 0.95, expected at least one visible token"):
        GreenMIM(encoder, decoder, target, ratio=0.95)
    with pytest.raises(UserError, match=r"MAE: encoder has 0 class tokens, expected 1 because .*GreenMIM takes a Swin"):
        MAE(encoder, decoder, target)
