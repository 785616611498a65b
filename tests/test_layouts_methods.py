"""load and export of FastMIM, SimMIM and MaskFeat over every kind of backbone, and of Swin, BEiT and PVTv2 alone."""

import argparse
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimfast import export, load
from mimfast._check import UserError
from mimfast.encoders import BEiT, Swin, SwinV2, ViT
from mimfast.encoders.tables import geometric_resize
from mimfast.methods import FastMIM, MaskFeat, SimMIM
from mimfast.train import checkpoint

TIMM = "timm is the peer: pip install 'mimfast[timm]'"
TABLE = "relative_position_bias_table"
SWIN = {"embed_dim": 16, "depths": (1, 2, 1, 1), "drop_path": 0.0}
METHODS = ("fastmim vit", "fastmim swin", "fastmim pvt", "simmim swin", "simmim swinv2", "simmim beit", "maskfeat vit")


def randomised(model: nn.Module) -> Any:
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def build(what: str) -> Any:
    vit = {"img_size": 64, "patch": 16, "dim": 64, "depth": 2}
    small = {"decoder_dim": 32, "decoder_depth": 2, "decoder_heads": 2}
    if what == "fastmim vit":
        return randomised(FastMIM.build("vit", heads=2, ratio=0.6, norm=False, **vit, **small))
    if what == "fastmim swin":
        return randomised(FastMIM.build("swin_nano", 64, block=16, **SWIN, **small))
    if what == "fastmim pvt":
        pytest.importorskip("timm", reason=TIMM)
        return randomised(FastMIM.build("timm:pvt_v2_b0", 64, **small))
    if what == "simmim swin":
        return randomised(SimMIM.build("swin_nano", 64, ratio=0.5, **SWIN))
    if what == "simmim swinv2":
        return randomised(SimMIM.build("swinv2_nano", 64, target="local", window=9, **SWIN))
    if what == "simmim beit":
        return randomised(SimMIM.build("beit", heads=2, **vit))
    return randomised(MaskFeat.build("vit", heads=2, min_block=4, **vit))


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
    img = torch.randint(0, 256, (2, 3, *(wanted.encoder if hasattr(wanted, "encoder") else wanted).img_size)).byte()
    if hasattr(wanted, "sample_mask"):
        mask = wanted.sample_mask(2)
        assert torch.equal(model.predict(img, mask), wanted.predict(img, mask))
    else:
        assert torch.equal(model(img), wanted(img))


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
@pytest.mark.parametrize("what", METHODS)
def test_our_own_files_come_back_whole(tmp_path: Path, what: str, name: str) -> None:
    model = build(what)
    path = export(model, tmp_path / name, what.split()[0])
    again = loaded(path)
    assert_same(again, model)
    assert again.config == model.config
    assert (again.load_report.layout, again.load_report.notes) == ("mimfast", [])
    step = checkpoint.save(tmp_path / "checkpoints", 10, model.state_dict(), model.config, {}, {}, keep=1)
    assert_same(loaded(step), model)


def official(model: Any, path: Path, **args: Any) -> Path:
    """As the authors' trainers save: no word of the sizes, but buffers beside the weights."""
    state = dict(torch.load(export(model, path.with_name("own.pth"), type(model).__name__.lower()))["model"])
    for key in list(state):
        if key.endswith(f".{TABLE}") and ".layers." in key:
            state[key.replace(TABLE, "relative_position_index")] = torch.zeros(4, 4, dtype=torch.int64)
            if ".blocks.1." in key:
                state[key.replace(f"attn.{TABLE}", "attn_mask")] = torch.zeros(4, 4, 4)
    if isinstance(model, MaskFeat):
        state |= {"hogs.0.weight_x": torch.zeros(3, 1, 3, 3), "hogs.0.weight_y": torch.zeros(3, 1, 3, 3)}
        torch.save({"model_state": state, "epoch": 1, "cfg": "TRAIN: {}"}, path)
        return path
    torch.save({"model": state, "epoch": 399, "scaler": {}, "args": argparse.Namespace(**args)}, path)
    return path


@pytest.mark.parametrize("what", [name for name in METHODS if name != "simmim swinv2"])
def test_the_authors_files(tmp_path: Path, what: str) -> None:
    model = build(what)
    args = {"norm_pix_loss": model.target.normalize, "mask_ratio": model.ratio} if what.startswith("fastmim") else {}
    args |= {"block_size": model.block} if what == "fastmim swin" else {}
    given: dict[str, Any] = {"heads": 2} if what.endswith("vit") else {}
    given |= {"decoder_heads": 2} if what.startswith("fastmim") else {}
    given |= {"img_size": 64} if what == "fastmim pvt" else {}
    given |= {"ratio": model.ratio} if what == "simmim swin" else {}
    found = loaded(official(model, tmp_path / "checkpoint.pth", **args), **given)
    assert found.load_report.layout == f"official {type(model).__name__}"
    if isinstance(model, MaskFeat):
        assert found.min_block == 15
        found.min_block = model.min_block
    assert found.config == model.config
    assert_same(found, model)


def settings(values: dict[str, Any]) -> Any:
    """A yacs.config.CfgNode, as SimMIM's trainer pickles beside the weights."""
    return sys.modules["yacs.config"].CfgNode({k: settings(v) if isinstance(v, dict) else v for k, v in values.items()})


def test_settings_in_simmim_files_are_read_as_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class CfgNode(dict):
        def __init__(self, values: dict[str, Any]) -> None:
            super().__init__(values)
            self.__dict__["__immutable__"] = True

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    yacs = types.ModuleType("yacs.config")
    yacs.CfgNode = CfgNode  # type: ignore[attr-defined]
    model = build("simmim swin")
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        patched.setitem(sys.modules, "yacs.config", yacs)
        config = settings({"DATA": {"IMG_SIZE": 64, "MASK_RATIO": 0.5, "MASK_PATCH_SIZE": 64}})
        torch.save({"model": model.state_dict(), "config": config}, tmp_path / "ckpt.pth")
    found = loaded(tmp_path / "ckpt.pth")
    assert (found.ratio, found.block, found.encoder.img_size) == (0.5, 64, (64, 64))


def zeros(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    # zeros in place of hundreds of megabytes of real numbers
    return {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}


def linear(name: str, out: int, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, width), f"{name}.bias": (out,)}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def block(name: str, width: int) -> dict[str, tuple[int, ...]]:
    parts = norm(f"{name}.norm1", width) | norm(f"{name}.norm2", width)
    parts |= linear(f"{name}.attn.qkv", 3 * width, width) | linear(f"{name}.attn.proj", width, width)
    return parts | linear(f"{name}.mlp.fc1", 4 * width, width) | linear(f"{name}.mlp.fc2", width, 4 * width)


def decoder(width: int, depth: int, out: int) -> dict[str, tuple[int, ...]]:
    shapes = {"mask_token": (1, 3, 1, 1)} | linear("decoder_embed", 256, width)
    for i in range(depth):
        shapes |= block(f"decoder_blocks.{i}", 256)
    return shapes | norm("decoder_norm", 256) | linear("decoder_pred", out, 256)


def vit_b(prefix: str = "", tokens: int = 65) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, 768), "pos_embed": (1, tokens, 768)}
    shapes |= {"patch_embed.proj.weight": (768, 3, 16, 16), "patch_embed.proj.bias": (768,)}
    for i in range(12):
        shapes |= block(f"blocks.{i}", 768)
    return {prefix + key: shape for key, shape in shapes.items()}


def swin_b(window: int) -> dict[str, tuple[int, ...]]:
    side, n = 2 * window - 1, window**2
    shapes = {"patch_embed.proj.weight": (128, 3, 4, 4), "patch_embed.proj.bias": (128,)}
    shapes |= norm("patch_embed.norm", 128) | norm("norm", 1024)
    for s, (depth, heads) in enumerate(zip((2, 2, 18, 2), (4, 8, 16, 32))):
        for i in range(depth):
            name = f"layers.{s}.blocks.{i}"
            shapes |= block(name, 128 * 2**s)
            shapes |= {f"{name}.attn.{TABLE}": (side**2, heads), f"{name}.attn.relative_position_index": (n, n)}
            if i % 2 and s < 3:
                shapes[f"{name}.attn_mask"] = (64 // 4**s, n, n)
        if s < 3:
            shapes |= norm(f"layers.{s}.downsample.norm", 512 * 2**s)
            shapes[f"layers.{s}.downsample.reduction.weight"] = (256 * 2**s, 512 * 2**s)
    return {f"encoder.{key}": shape for key, shape in shapes.items()}


def test_published_fastmim_vit_b() -> None:
    found = loaded({"model": zeros(vit_b() | norm("norm", 768) | decoder(768, 1, 108))})
    assert isinstance(found, FastMIM)
    assert (found.encoder.heads, found.encoder.depth, found.encoder.img_size) == (6, 12, (128, 128))
    assert (found.decoder.heads, found.decoder.depth, found.decoder.eps) == (8, 1, 1e-6)
    assert (found.target.dim, found.target.normalize, found.block) == (108, True, 16)
    assert "assumed heads=6, as FastMIM pre-trains with; it fine-tunes with twice as many" in str(found.load_report)
    assert loaded(zeros(vit_b() | norm("norm", 768) | decoder(768, 1, 108)), heads=12).encoder.heads == 12


def test_published_fastmim_swin_b() -> None:
    found = loaded({"model": zeros(swin_b(4) | decoder(1024, 4, 432))})
    assert isinstance(found.encoder, Swin)
    assert (found.encoder.img_size, found.encoder.heads) == ((128, 128), (4, 8, 16, 32))
    assert [place.window for place in found.encoder.places] == [4, 4, 4, 4]
    assert (found.target.dim, found.decoder.depth, found.decoder.eps, found.block) == (432, 4, 1e-5, 32)
    pixels = loaded(zeros(swin_b(4) | decoder(1024, 4, 3072)))
    assert (pixels.target.config["type"], pixels.target.norm) == ("Pixels", True)


def test_published_simmim_and_maskfeat() -> None:
    head = {"decoder.0.weight": (3072, 1024, 1, 1), "decoder.0.bias": (3072,), "encoder.mask_token": (1, 1, 128)}
    swin = loaded(zeros(swin_b(6) | head))
    assert isinstance(swin, SimMIM)
    assert (swin.encoder.img_size, swin.ratio, swin.block) == ((192, 192), 0.6, 32)
    head = norm("pred_head.transforms.0.0", 768) | linear("pred_head.projections.0", 108, 768)
    vit = loaded({"model_state": zeros(vit_b(tokens=197) | head | {"mask_token": (1, 1, 768)})})
    assert isinstance(vit, MaskFeat)
    assert (vit.encoder.heads, vit.encoder.positions, vit.ratio) == (12, "learned", 0.4)


PVT_B0 = {
    "patch_embed1.proj.weight": (32, 3, 7, 7),
    "patch_embed2.norm.bias": (64,),
    "patch_embed4.proj.weight": (256, 160, 3, 3),
    "block1.0.attn.q.weight": (32, 32),
    "block1.1.attn.kv.weight": (64, 32),
    "block2.0.attn.sr.weight": (64, 64, 4, 4),
    "block3.1.attn.norm.weight": (160,),
    "block4.1.attn.proj.bias": (256,),
    "block4.0.mlp.fc1.weight": (1024, 256),
    "block4.0.mlp.dwconv.dwconv.weight": (1024, 1, 3, 3),
    "norm1.weight": (32,),
    "norm4.bias": (256,),
}


def test_pvt_has_its_authors_names(tmp_path: Path) -> None:
    model = build("fastmim pvt")
    state = torch.load(export(model, tmp_path / "model.pth", "fastmim"))["model"]
    assert {key: tuple(state[f"encoder.{key}"].shape) for key in PVT_B0} == PVT_B0
    assert len(state) == len(model.state_dict())
    own = {key.removeprefix("encoder."): value for key, value in state.items() if key.startswith("encoder.")}
    encoder = loaded(own, img_size=64)
    assert encoder.name == "pvt_v2_b0"
    assert_same(encoder, model.encoder)
    assert_same(loaded(model.encoder.state_dict(), img_size=64), model.encoder)


@pytest.mark.parametrize("what", METHODS)
def test_encoders_load_strictly_into_timm(tmp_path: Path, what: str) -> None:
    pytest.importorskip("timm", reason=TIMM)
    import timm
    from safetensors.torch import load_file

    model = build(what)
    path = export(model, tmp_path / "encoder.safetensors", "timm")
    swin = {"embed_dim": 16, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 4, 8), "window_size": 2}
    vit = {"patch_size": 16, "embed_dim": 64, "depth": 2, "num_heads": 2}
    from timm.models.beit import Beit
    from timm.models.swin_transformer import SwinTransformer
    from timm.models.swin_transformer_v2 import SwinTransformerV2
    from timm.models.vision_transformer import VisionTransformer

    kind = what.split()[1]
    if kind == "vit":
        peer = VisionTransformer(64, num_classes=0, **vit)
    elif kind == "beit":
        peer = Beit(64, num_classes=0, use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1,
                    global_pool="token", **vit)  # fmt: skip
    elif kind == "pvt":
        peer = timm.create_model("pvt_v2_b0", num_classes=0)
    else:
        peer = (SwinTransformer if kind == "swin" else SwinTransformerV2)(64, num_classes=0, **swin)
    peer.load_state_dict(load_file(path), strict=True)
    img = torch.randn(2, 3, 64, 64)
    wanted = peer.eval().forward_features(img)
    if isinstance(model, MaskFeat):
        found = model.decoder.transforms[0][0](model.encoder(img))
    else:
        found = model.encoder(img)
    wanted = wanted.flatten(2).mT if kind == "pvt" else wanted.flatten(1, -2)
    assert torch.allclose(found, wanted, atol=1e-4)
    again = loaded(path)
    assert torch.allclose(again(img), wanted, atol=1e-4)
    if kind == "vit":
        assert again.positions == model.encoder.positions
    if kind in ("swin", "beit"):
        given = {} if kind == "swin" else {"heads": 2}
        assert torch.allclose(loaded(peer.state_dict(), **given)(img), wanted, atol=1e-4)


def test_bias_tables_follow_another_window(tmp_path: Path) -> None:
    model = build("fastmim swin")
    path = official(model, tmp_path / "checkpoint.pth", block_size=32)
    found = loaded(path, img_size=128)
    assert found.encoder.img_size == (128, 128)
    assert [place.window for place in found.encoder.places] == [4, 4, 4, 4]
    key = f"encoder.layers.1.blocks.0.attn.{TABLE}"
    assert torch.equal(found.state_dict()[key], geometric_resize(model.state_dict()[key], 2, 4))
    assert any("resized the tables of relative positions" in note for note in found.load_report.notes)
    # the same function as the live one
    img = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8)
    assert torch.allclose(found.encoder(img), model.encoder.at(128)(img), atol=1e-5)
    own = loaded(export(model, tmp_path / "own.pth", "fastmim"), img_size=128)
    assert torch.equal(own.encoder(img), found.encoder(img))
    beit = build("simmim beit")
    larger = loaded(beit.state_dict(), img_size=128)
    assert larger.state_dict()[f"encoder.rel_pos_bias.{TABLE}"].shape == (15 * 15 + 3, 2)
    assert torch.allclose(larger.encoder(img), beit.encoder.at(128)(img), atol=1e-5)


def test_positions_are_interpolated_and_not_made_anew() -> None:
    model = build("fastmim vit")
    found = loaded(model.state_dict(), heads=2, img_size=128)
    patches = model.encoder.pos_embed[:, 1:].mT.unflatten(-1, (4, 4))
    wanted = F.interpolate(patches, (8, 8), mode="bicubic", align_corners=False).flatten(2).mT
    assert torch.allclose(found.encoder.pos_embed[:, 1:], wanted, atol=1e-5)
    assert torch.equal(found.encoder.pos_embed[:, :1], model.encoder.pos_embed[:, :1])
    assert any("resized the positions" in note for note in found.load_report.notes)


def test_encoders_alone_are_recognised() -> None:
    for encoder in (
        Swin(64, **SWIN, heads=(1, 2, 4, 8)),
        BEiT(64, 16, 64, 2, 2),
        BEiT(64, 16, 64, 2, 2, relative="block"),
    ):
        randomised(encoder)
        found = loaded(encoder.state_dict())
        assert_same(found, encoder)
    swin = randomised(SwinV2(64, **SWIN, heads=(1, 2, 4, 8)))
    state = swin.state_dict() | {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(4, 4)}
    assert_same(loaded(state, img_size=64), swin)
    assert loaded(ViT(32, 8, 64, 1, 1).state_dict()).load_report.layout.startswith("official MAE encoder")


def test_what_is_missing_is_said() -> None:
    model = build("fastmim vit")
    state = model.state_dict()
    del state["decoder_pred.bias"]
    state["head.weight"] = torch.zeros(3, 64)
    with pytest.warns(UserWarning, match=r"missing: decoder_pred.bias; unexpected: head.weight"):
        load(state, heads=2)
    state = build("simmim swin").state_dict()
    del state["encoder.norm.weight"]
    with pytest.warns(UserWarning, match=r"missing: encoder.norm.weight; unexpected: none"):
        load(state)


def test_refuses(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="load: source has the weights of a CMT, expected a ViT, BEiT, Swin or PVTv2"):
        load({"encoder.stem_conv1.weight": torch.zeros(32, 3, 3, 3), "mask_token": torch.zeros(1, 3, 1, 1)})
    odd = {f"patch_embed{s}.proj.weight": torch.zeros(8, 3, 3, 3) for s in (1, 2, 3, 4)}
    with pytest.raises(
        UserError, match=r"load: source has a PVTv2 with widths \(8, 8, 8, 8\) .* expected pvt_v2_b0 to"
    ):
        load(odd)
    model = build("simmim beit")
    with pytest.raises(UserError, match="export: model has SimMIM, expected a FastMIM because the layout 'fastmim'"):
        export(model, tmp_path / "x.pth", "fastmim")
    with pytest.raises(UserError, match="export: model has SimMIM, expected a MAE over a ViT, or a ViT because"):
        export(model, tmp_path / "x.pth", "mae")
    with pytest.raises(UserError, match="export: model has SimMIM, expected a MAE over a ViT, or a ViT because"):
        export(model, tmp_path / "x", "hf")
    feature = build("maskfeat vit")
    with pytest.raises(UserError, match="export: model has a ViT without its final norm, expected the whole MaskFeat"):
        export(feature.encoder, tmp_path / "x.safetensors", "timm")
    with pytest.raises(UserError, match="export: model has a ViT with a mask token, expected one without because"):
        export(feature.encoder, tmp_path / "x", "hf")
