"""load and export: every layout there and back, what is inferred, and files that must be refused."""

import argparse
import logging
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from mimfast import export, load
from mimfast._check import UserError
from mimfast.encoders import ViT
from mimfast.methods import MAE
from mimfast.train import checkpoint

HF = "transformers is the peer: pip install 'mimfast[hf]'"
TIMM = "timm is the peer: pip install 'mimfast[timm]'"


def tiny(**changes: Any) -> MAE:
    """One head in the encoder at a width whose guess is one, four in a decoder whose guess is one."""
    values = {"dim": 96, "depth": 2, "heads": 3, "decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 4}
    model = MAE.build("vit", **{"img_size": 32, "patch": 8, "norm": False, "ratio": 0.6, **values, **changes})
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def assert_same(model: torch.nn.Module, wanted: torch.nn.Module) -> None:
    """Same type, weights, settings and outputs."""
    assert type(model) is type(wanted)
    assert model.config == wanted.config
    state = wanted.state_dict()
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    height, width = wanted.config.get("encoder", wanted.config)["img_size"]
    img = torch.randn(2, 3, height, width)
    if isinstance(wanted, MAE):
        mask = wanted.sample_mask(2)
        assert torch.equal(model(img, mask), wanted(img, mask))
    else:
        assert torch.equal(model(img), wanted(img))


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
@pytest.mark.parametrize("img_size", [32, (32, 48)])
def test_our_own_files_come_back_whole(tmp_path: Path, name: str, img_size: Any) -> None:
    model = tiny(img_size=img_size)
    again = load(export(model, tmp_path / name, "mae"))
    assert_same(again, model)
    report = again.load_report
    assert (report.layout, report.missing, report.unexpected, report.notes) == ("mimfast", [], [], [])
    assert_same(load(export(model.encoder, tmp_path / name, "mae")), model.encoder)
    assert sorted(os.listdir(tmp_path)) == [name]


def test_timm_file_comes_back_and_loads_into_timm(tmp_path: Path) -> None:
    model = tiny()
    path = export(model, tmp_path / "encoder.safetensors", "timm")
    assert_same(load(path), model.encoder)
    timm = pytest.importorskip("timm.models.vision_transformer", reason=TIMM)
    from safetensors.torch import load_file

    peer = timm.VisionTransformer(32, 8, num_classes=0, embed_dim=96, depth=2, num_heads=3)
    peer.load_state_dict(load_file(path), strict=True)
    img = torch.randn(2, 3, 32, 32)
    assert torch.allclose(peer.forward_features(img), model.encoder(img), atol=1e-5)
    back = load(peer.state_dict(), heads=3)
    assert torch.equal(back(img), model.encoder(img))


@pytest.mark.parametrize("full", [True, False])
def test_hugging_face_folder_comes_back_and_loads_into_transformers(tmp_path: Path, full: bool) -> None:
    model = tiny() if full else tiny().encoder
    folder = export(model, tmp_path / "hf", "hf")
    assert_same(load(folder), model)
    transformers = pytest.importorskip("transformers", reason=HF)
    peer_class = transformers.ViTMAEForPreTraining if full else transformers.ViTMAEModel
    peer, info = peer_class.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    peer.eval()
    img = torch.randn(2, 3, 32, 32)
    noise = torch.rand(2, 16)
    if full:
        out = peer(pixel_values=img, noise=noise)
        from mimfast import Mask

        assert torch.allclose(model(img, Mask.from_hidden(out.mask.bool())), out.loss, rtol=1e-5)
    else:
        peer.config.mask_ratio = 0.0
        out = peer(pixel_values=img, noise=torch.arange(16.0).expand(2, 16))
        assert torch.allclose(model(img), out.last_hidden_state, atol=1e-5)
    peer.config.mask_ratio = 0.6
    peer.save_pretrained(tmp_path / "theirs")  # in whichever spelling the installed release writes
    assert_same(load(tmp_path / "theirs"), model)


def test_hugging_face_names_in_all_spellings(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = tiny()
    hub = load_file(export(model, tmp_path, "hf") / "model.safetensors")
    parts = {"attention.attention.query": "attention.q_proj", "attention.attention.key": "attention.k_proj"}
    parts |= {"attention.attention.value": "attention.v_proj", "attention.output.dense": "attention.o_proj"}
    parts |= {"intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2", "encoder.layer.": "layers."}
    modules = dict(hub)
    for old, new in parts.items():
        modules = {key.replace(old, new): value for key, value in modules.items()}
    odd = {key.replace("decoder.decoder_layers.", "decoder.decoder_encoder.layer."): v for key, v in hub.items()}
    for state in (hub, modules, odd):
        found = load(state, heads=3, decoder_heads=4, norm=False, ratio=0.6)
        assert found.load_report.layout == "Hugging Face ViTMAE"
        assert_same(found, model)


def official_file(path: Path, model: MAE, **args: Any) -> Path:
    """As the official trainer saves: weights, optimizer, epoch, scaler and its argparse.Namespace."""
    torch.save(
        {
            "model": model.state_dict(),
            "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]},
            "epoch": 799,
            "scaler": {"scale": 65536.0},
            "args": argparse.Namespace(model="mae_vit_base_patch16", **args),
        },
        path,
    )
    return path


def test_official_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny(dim=192, depth=1, decoder_dim=512, decoder_heads=16)
    path = official_file(tmp_path / "checkpoint-799.pth", model, norm_pix_loss=False, mask_ratio=0.6)
    with caplog.at_level(logging.INFO, "mimfast"), warnings.catch_warnings():
        warnings.simplefilter("error")
        found = load(path)
    assert_same(found, model)
    assert found.load_report.layout == "official MAE"
    assert "assumed heads=3, as the published sizes have at width 192" in str(found.load_report)
    assert "official MAE, MAE of ViT 192 wide, 1 blocks, 3 heads, patch 8, 32x32 px; decoder 512 wide" in caplog.text


def test_official_encoder_only_and_without_args(tmp_path: Path) -> None:
    model = tiny(dim=192)
    torch.save({"model": model.encoder.state_dict()}, tmp_path / "encoder.pth")
    assert_same(load(tmp_path / "encoder.pth"), model.encoder)
    full = load(model.state_dict(), decoder_heads=4)
    assert (full.ratio, full.target.norm) == (0.75, True)
    assert "assumed norm=True, which the source does not say" in full.load_report.notes


def test_published_key_sets_are_recognised_at_real_size() -> None:
    with torch.device("meta"):
        state = MAE.build("vit_b16", 224).state_dict()
    # zeros in place of 400 MB of real numbers
    found = load({key: torch.zeros(()).expand(value.shape) for key, value in state.items()})
    assert (found.encoder.heads, found.encoder.depth, found.decoder.heads, found.decoder.depth) == (12, 12, 16, 8)
    assert not found.load_report.missing
    assert not found.load_report.unexpected


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrapper_prefixes_are_taken_off(prefix: str) -> None:
    model = tiny()
    state = {prefix + key: value for key, value in model.state_dict().items()}
    found = load({"model": state, "mimfast": model.config})
    assert_same(found, model)
    assert found.load_report.notes[0].startswith("took 'm" if prefix.startswith("m") else "took '_")


def test_fine_tuned_checkpoint_says_what_is_missing_and_unexpected() -> None:
    state = tiny().encoder.state_dict()
    for kind in ("weight", "bias"):
        state[f"fc_norm.{kind}"] = state.pop(f"norm.{kind}")
        state[f"head.{kind}"] = torch.zeros(10)
    with pytest.warns(UserWarning, match=r"missing: norm.weight, norm.bias; unexpected: fc_norm.weight, head.weight"):
        found = load(state, heads=3)
    assert found.load_report.missing == ["norm.weight", "norm.bias"]
    assert found.load_report.unexpected == ["fc_norm.weight", "head.weight", "fc_norm.bias", "head.bias"]


def test_decoder_remainders_are_named_as_official() -> None:
    state = tiny().state_dict()
    del state["mask_token"], state["decoder_pred.bias"]
    with pytest.warns(UserWarning, match="missing: mask_token, decoder_pred.bias; unexpected: none"):
        load(state, heads=3, decoder_heads=4)


def test_unknown_widths_are_guessed_aloud() -> None:
    found = load(tiny().encoder.state_dict())
    assert found.heads == 1
    assert "guessed heads=1 (heads of 96 channels at width 96); pass heads=" in str(found.load_report)


def test_learned_positions_are_kept_and_noted() -> None:
    state = tiny().encoder.state_dict()
    state["pos_embed"] = torch.randn_like(state["pos_embed"])
    found = load(state, heads=3)
    assert torch.equal(found.pos_embed, state["pos_embed"])
    assert any("not the sine-cosine table" in note for note in found.load_report.notes)


def test_a_grid_that_is_not_square_needs_the_size() -> None:
    model = tiny(img_size=(16, 48))
    with pytest.raises(UserError, match=r"img_size has None, expected \(height, width\) in pixels because 12 patches"):
        load(model.state_dict())
    given = {"heads": 3, "decoder_heads": 4, "norm": False, "ratio": 0.6}
    assert_same(load(model.state_dict(), img_size=(16, 48), **given), model)


def test_loading_leaves_the_random_generator_alone() -> None:
    state = tiny().state_dict()
    before = torch.get_rng_state()
    load(state)
    assert torch.equal(before, torch.get_rng_state())


def test_run_folder_and_checkpoint_folder(tmp_path: Path) -> None:
    model = tiny()
    step = checkpoint.save(tmp_path / "checkpoints", 10, model.state_dict(), model.config, {}, {}, keep=1)
    for source in (tmp_path, tmp_path / "checkpoints", step, step / "model.safetensors"):
        assert_same(load(source), model)


class Malicious:
    """Unpickled without restrictions, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.path}",))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_asks_for_code_is_refused_and_runs_nothing(tmp_path: Path, zipped: bool) -> None:
    proof, path = tmp_path / "proof", tmp_path / "evil.pth"
    content = {"model": tiny().state_dict(), "args": Malicious(proof)}
    if zipped:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content["args"], protocol=2))
    message = r"load: source has '.*evil.pth', expected .* because it asks for 'posix.system', which is code"
    with pytest.raises(UserError, match=message):
        load(path)
    assert not proof.exists()
    if zipped:  # the trap itself works
        torch.load(path, weights_only=False)
        assert proof.exists()


def broken(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / kind
    if kind.startswith("cut"):
        export(tiny(), path, "mae")
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "empty.pth":
        path.touch()
    elif kind == "photo.pth":
        path.write_bytes(b"\xff\xd8\xff\xe0" + bytes(100))
    elif kind == "random.safetensors":
        path.write_bytes(bytes(range(256)))
    elif kind == "list.pth":
        torch.save([torch.zeros(1)], path)
    elif kind == "other.pth":
        torch.save({"model": {"conv1.weight": torch.zeros(1), "fc.bias": torch.zeros(1)}}, path)
    elif kind == "none.pth":
        torch.save({"epoch": 3}, path)
    elif kind == "folder":
        path.mkdir()
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("absent.pth", "expected an existing file or folder because nothing is there"),
        ("empty.pth", r"expected a checkpoint because the file is empty \(0 bytes\)"),
        ("cut.pth", "expected a complete torch checkpoint because it could not be read"),
        ("cut.safetensors", "expected a complete safetensors file because"),
        ("random.safetensors", "expected a complete safetensors file because"),
        ("photo.pth", "expected a safetensors or torch file because it begins with"),
        ("list.pth", "because it holds an object of type list and not tensors by name"),
        ("none.pth", r"because it holds keys \['epoch'\] and not tensors by name"),
        (
            "other.pth",
            r"names like conv1.weight, fc.bias, expected those of MAE.* 'patch_embed.proj.weight' .*other.pth",
        ),
        ("folder", "expected a folder with model.safetensors, .* because it has none"),
    ],
)
def test_refuses_what_is_no_checkpoint(tmp_path: Path, kind: str, message: str) -> None:
    path = broken(tmp_path, kind)
    with pytest.raises(UserError, match=message) as caught:
        load(path)
    assert kind in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refuses_tensors_of_two_models() -> None:
    state = tiny().state_dict()
    state["blocks.1.attn.qkv.weight"] = torch.zeros(5, 5)
    with pytest.raises(UserError, match=r"expected tensors of one model because size mismatch for .*attn.qkv.weight"):
        load(state)


def test_export_refuses(tmp_path: Path) -> None:
    model = tiny()
    with pytest.raises(UserError, match=r"export: layout has 'tim', .* did you mean 'timm'\?"):
        export(model, tmp_path / "x.safetensors", "tim")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"export: path has '.*x.pth', expected a name in .safetensors because"):
        export(model, tmp_path / "x.pth", "timm")
    with pytest.raises(UserError, match=r"export: model has Linear, expected a method or an encoder of ours because"):
        export(torch.nn.Linear(1, 1), tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"export: model has grid 2x6, expected a square grid because"):
        export(tiny(img_size=(16, 48)), tmp_path / "x", "hf")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"export: path has '.*file', a file, expected a folder because"):
        export(model, tmp_path / "file", "hf")


def test_export_replaces_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = export(ViT(32, 8, 32, 1, 2), tmp_path / "a.safetensors")
    before = path.read_bytes()

    def fails(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("mimfast._weights.save_file", fails)
    with pytest.raises(OSError, match="No space left"):
        export(ViT(32, 8, 32, 1, 2), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.safetensors"]
