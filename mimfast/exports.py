"""Checkpoints out: `export` writes weights under timm's names, Hugging Face's, or those of a method's authors."""

import json
import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

from torch import Tensor, nn

from mimfast import _names, _weights
from mimfast._check import fail
from mimfast.decoders import ViTDecoder
from mimfast.encoders import pvt_names
from mimfast.encoders.beit import BEiT
from mimfast.encoders.beit_names import fine_tuning_names
from mimfast.encoders.mixswin import MixSwin
from mimfast.encoders.swin import Swin
from mimfast.encoders.swin_names import timm_names
from mimfast.encoders.timm import Timm
from mimfast.encoders.vit import EPS, ViT
from mimfast.methods.fastmim import FastMIM
from mimfast.methods.greenmim import GreenMIM
from mimfast.methods.mae import MAE
from mimfast.methods.maskfeat import MaskFeat
from mimfast.methods.mixmim import MixMIM
from mimfast.methods.simmim import SimMIM

Layout = Literal["timm", "hf", "mae", "fastmim", "simmim", "maskfeat", "mixmim", "greenmim"]
METHODS = {
    "mae": MAE,
    "fastmim": FastMIM,
    "simmim": SimMIM,
    "maskfeat": MaskFeat,
    "mixmim": MixMIM,
    "greenmim": GreenMIM,
}
LAYOUTS = ("timm", "hf", *METHODS)


def export(model: nn.Module, path: str | os.PathLike[str], layout: Layout = "timm") -> Path:
    """Write the weights under somebody else's names; the write is atomic, an existing file is replaced.

    Args:
        model: a method or an encoder (also inside DistributedDataParallel or torch.compile).
        path: "timm": a .safetensors file of the encoder that loads strictly into timm's model with num_classes=0
            (VisionTransformer, SwinTransformer, Beit with global_pool="token", or the model inside `Timm`).
            "hf": a folder with config.json and model.safetensors for ViTMAEForPreTraining (MAE) or ViTMAEModel (ViT).
            "mae", "fastmim", "simmim", "maskfeat", "mixmim", "greenmim": a .pth file {"model": the authors' names}, or
            .safetensors with the same names, of that method; "mae" also of a ViT, "mixmim" of a MixSwin.
        layout: as above.
    Returns:
        the path.
    Raises:
        UserError: an unknown layout, a model or a path that does not go with it.
    """
    if layout not in LAYOUTS:
        close = get_close_matches(str(layout), LAYOUTS, n=1, cutoff=0.3)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        fail("export", "layout", repr(layout), f"one of {list(LAYOUTS)}", f"no other layout is written{hint}")
    model = getattr(model, "_orig_mod", model)
    model = getattr(model, "module", model)
    target = Path(path)
    if layout == "hf":
        _export_hf(model, target)
        return target
    suffixes = (".safetensors",) if layout == "timm" else (".safetensors", ".pth", ".pt")
    state, config = _timm(model) if layout == "timm" else _official(model, layout)
    if target.suffix not in suffixes:
        wanted = " or ".join(f"a name in {s}" for s in suffixes)
        fail("export", "path", repr(str(target)), wanted, f"the layout {layout!r} is written in these formats")
    write = _weights.write_safetensors if target.suffix == ".safetensors" else _weights.write_torch
    write(state, target, config)
    return target


def _refuse(model: nn.Module, layout: str, wanted: str) -> NoReturn:
    fail("export", "model", type(model).__name__, wanted, f"the layout {layout!r} has names for nothing else")


def _official(model: nn.Module, layout: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and values of a method under its authors' names."""
    kind, found = METHODS[layout], cast(Any, model)
    if (layout == "mae" and isinstance(model, ViT)) or (layout == "mixmim" and isinstance(model, MixSwin)):
        return model.state_dict(), model.config
    if not isinstance(model, kind) or not isinstance(model.encoder, (ViT, BEiT, Swin, Timm)):
        _refuse(model, layout, "a MAE over a ViT, or a ViT" if layout == "mae" else f"a {kind.__name__}")
    state = found.state_dict()
    if isinstance(found.encoder, Timm) and found.encoder.name.startswith("pvt_v2"):
        own = "encoder."
        state = {
            own + pvt_names.official_name(key.removeprefix(own)) if key.startswith(own) else key: value
            for key, value in state.items()
        }
    return state, found.config


def _timm(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and values of an encoder under timm's names."""
    encoder: Any = getattr(model, "encoder", model)
    if not isinstance(encoder, (ViT, BEiT, Swin, Timm)):
        _refuse(model, "timm", "a method or an encoder of ours")
    if isinstance(encoder, MixSwin):
        reason = "timm's Swin has shifts and no positions; the layout 'mixmim' keeps all of it"
        fail("export", "model", "a MixSwin", "an encoder that timm has", reason)
    state, config = encoder.state_dict(), dict(encoder.config)
    if state.pop("mask_token", None) is not None:
        config["mask_token"] = False
    if isinstance(encoder, Timm):
        return state, config
    if isinstance(encoder, Swin):
        return timm_names(state), config
    if isinstance(encoder, BEiT):
        return fine_tuning_names(state), config | ({"relative": "block"} if encoder.relative == "shared" else {})
    if isinstance(encoder.norm, nn.Identity):
        if not isinstance(model, MaskFeat):
            fail("export", "model", "a ViT without its final norm", "the whole MaskFeat", "the head has that norm")
        norm: Any = model.decoder.get_submodule("transforms.0.0")
        state |= {f"norm.{key}": value for key, value in norm.state_dict().items()}
    return state, config


def _check_hf(model: nn.Module, encoder: ViT, path: Path) -> None:
    """Raise for what Hugging Face's ViTMAE has no names or no place for."""
    rows, columns = encoder.grid
    if rows != columns:
        reason = "Hugging Face's ViTMAE builds its positions for square images"
        fail("export", "model", f"grid {rows}x{columns}", "a square grid", reason)
    if isinstance(model, MAE) and not isinstance(model.decoder, ViTDecoder):
        found, reason = f"a {type(model.decoder).__name__}", "Hugging Face's ViTMAE has no other; export the encoder"
        fail("export", "model", found, "a ViTDecoder", reason)
    if encoder.mask_token is not None:
        fail("export", "model", "a ViT with a mask token", "one without", "Hugging Face's ViTMAE has no place for it")
    if path.is_file():
        reason = "the layout 'hf' is config.json and model.safetensors"
        fail("export", "path", f"{str(path)!r}, a file", "a folder", reason)


def _export_hf(model: nn.Module, path: Path) -> None:
    encoder = model.encoder if isinstance(model, MAE) else model
    if not isinstance(encoder, ViT):
        _refuse(model, "hf", "a MAE over a ViT, or a ViT")
    _check_hf(model, encoder, path)
    full = isinstance(model, MAE)
    config = {
        "architectures": ["ViTMAEForPreTraining" if full else "ViTMAEModel"],
        "model_type": "vit_mae",
        "hidden_size": encoder.dim,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.heads,
        "intermediate_size": int(encoder.dim * encoder.mlp_ratio),
        "hidden_act": "gelu",
        "layer_norm_eps": EPS,
        "image_size": encoder.img_size[0],
        "patch_size": encoder.patch,
        "num_channels": 3,
        "qkv_bias": True,
    }
    if isinstance(model, MAE):
        decoder = model.decoder
        config |= {
            "decoder_hidden_size": decoder.dim,
            "decoder_num_hidden_layers": decoder.depth,
            "decoder_num_attention_heads": decoder.heads,
            "decoder_intermediate_size": int(decoder.dim * decoder.mlp_ratio),
            "mask_ratio": model.ratio,
            "norm_pix_loss": bool(model.config.get("norm", False)),
        }
    text = json.dumps(config, indent=2) + "\n"
    _weights.write_atomically(path / "config.json", lambda tmp: tmp.write_text(text))
    state = _names.to_hf(model.state_dict(), decoder=full)
    owner: Any = model
    _weights.write_safetensors(state, path / "model.safetensors", owner.config)
