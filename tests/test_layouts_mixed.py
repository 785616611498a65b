"""load and export of MixMIM and GreenMIM, and of the encoder of MixMIM alone."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mimfast import export, load
from mimfast._check import UserError
from mimfast.decoders import DualDecoder, ViTDecoder
from mimfast.encoders import MixSwin, Swin
from mimfast.encoders.positions import sincos_2d
from mimfast.encoders.tables import geometric_resize
from mimfast.methods import GreenMIM, MixMIM
from mimfast.targets import Pixels

STAGES = {"depths": (1, 2, 1), "heads": (1, 2, 4), "embed_dim": 32}
TABLE = "layers.0.blocks.0.attn.relative_position_bias_table"


def build(what: str, **given: Any) -> Any:
    model: Any
    torch.manual_seed(0)
    window, norm = given.pop("window", None), given.pop("norm", True)
    sizes = {"dim": 64, "depth": 2, "heads": 2}
    if what == "mixmim":
        mixed = MixSwin(64, window=window, **STAGES)  # type: ignore[arg-type]
        model = MixMIM(mixed, DualDecoder(128, (4, 4), 16, **sizes), Pixels(16, norm), **given)
    else:
        swin = Swin(64, window=window, **STAGES)  # type: ignore[arg-type]
        decoder = ViTDecoder(128, (4, 4), 16, **sizes, class_token=False)  # type: ignore[arg-type]
        model = GreenMIM(swin, decoder, Pixels(16, norm), **given)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def loaded(source: Any, **given: Any) -> Any:
    """What `load` makes of it, without a warning: nothing is missing or unexpected."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load(source, **given).eval()


def assert_same(model: Any, wanted: Any) -> None:
    assert type(model) is type(wanted)
    state = wanted.state_dict()
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    img = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    if hasattr(wanted, "sample_mask"):
        mask = wanted.sample_mask(2)
        assert torch.equal(model.predict(img, mask), wanted.predict(img, mask))
    else:
        assert torch.equal(model(img), wanted(img))


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
@pytest.mark.parametrize("what", ["mixmim", "greenmim"])
def test_our_own_files_come_back_whole(tmp_path: Path, what: str, name: str) -> None:
    model = build(what, ratio=0.6, norm=False)
    again = loaded(export(model, tmp_path / name, what))  # type: ignore[arg-type]
    assert_same(again, model)
    assert again.config == model.config


@pytest.mark.parametrize("window", [None, (8, 4, 2)])
@pytest.mark.parametrize("what", ["mixmim", "greenmim"])
def test_the_authors_files(tmp_path: Path, what: str, window: Any) -> None:
    """Weights alone, with the buffers that their modules keep."""
    given = {"window": 2} if what == "greenmim" and window else {"window": window} if what == "mixmim" else {}
    model = build(what, **given)
    state = model.state_dict()
    prefix = "" if what == "mixmim" else "encoder."
    state[f"{prefix}layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(64, 64, dtype=torch.int64)
    torch.save({"model": state}, tmp_path / "theirs.pth")
    again = loaded(tmp_path / "theirs.pth")
    assert_same(again, model)
    assert again.load_report.layout == f"official {type(model).__name__}"
    assert f"assumed ratio={model.ratio}, which the source does not say" in again.load_report.notes
    assert [p.window for p in again.encoder.places] == [p.window for p in model.encoder.places]


def test_the_encoder_of_mixmim_alone(tmp_path: Path) -> None:
    model = build("mixmim").encoder
    torch.save({"model": model.state_dict()}, tmp_path / "encoder.pth")
    again = loaded(tmp_path / "encoder.pth")
    assert_same(again, model)
    assert_same(loaded(export(model, tmp_path / "ours.safetensors", "mixmim")), model)
    larger = loaded(tmp_path / "encoder.pth", img_size=128)
    assert torch.equal(larger.absolute_pos_embed, sincos_2d(32, (32, 32))[:, 1:])
    assert torch.equal(larger.state_dict()[TABLE], geometric_resize(model.state_dict()[TABLE], 8, 16))
    assert "made the positions anew for the image size" in larger.load_report.notes


def test_a_larger_image_for_a_whole_method(tmp_path: Path) -> None:
    for what in ("mixmim", "greenmim"):
        path = export(build(what), tmp_path / f"{what}.pth", what)  # type: ignore[arg-type]
        again = loaded(path, img_size=128)
        assert again.decoder.grid == (8, 8)
        assert torch.equal(again.decoder.pos_embed, sincos_2d(64, (8, 8))[:, 1:])


def test_published_shapes_are_recognised() -> None:
    with torch.device("meta"):
        shapes = [MixMIM.build().state_dict(), GreenMIM.build(window=14).state_dict()]
    zeros = [{key: torch.zeros(()).expand(value.shape) for key, value in state.items()} for state in shapes]
    mix, green = (loaded(state) for state in zeros)
    assert (type(mix), type(mix.encoder), mix.encoder.img_size) == (MixMIM, MixSwin, (224, 224))
    assert [p.window for p in mix.encoder.places] == [14, 14, 14, 7]
    assert (mix.decoder.depth, mix.decoder.heads) == (8, 16)
    assert (type(green), type(green.encoder), green.encoder.img_size) == (GreenMIM, Swin, (224, 224))
    assert [p.window for p in green.encoder.places] == [14, 14, 14, 7]
    assert (green.decoder.depth, green.decoder.heads) == (1, 16)


def test_refuses(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"export: model has a MixSwin, expected an encoder that timm has because"):
        export(build("mixmim"), tmp_path / "m.safetensors", "timm")
    with pytest.raises(UserError, match=r"export: model has GreenMIM, expected a MixMIM because"):
        export(build("greenmim"), tmp_path / "m.pth", "mixmim")
