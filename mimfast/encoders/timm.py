"""Any timm backbone as an encoder: hidden pixels are painted over (FastMIM, arXiv:2212.06593), then it runs as it is.

B batch, H W pixels, T tokens of the last stage's map, D width
"""

import copy
from difflib import get_close_matches
from inspect import signature
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from mimfast._check import UserError, fail
from mimfast._images import IMAGENET_MEAN, IMAGENET_STD, Triple, normalize
from mimfast.encoders.inputs import Size
from mimfast.encoders.paint import check_image, paint
from mimfast.mask import Mask

# parts behind forward_features; what is left of them without a classifier gets no gradient here
HEADS = ("head", "fc", "classifier", "fc_norm", "head_dist", "attn_pool")


class Timm(nn.Module):
    """A timm backbone; without a mask it gives its last map as tokens, with one it sees the painted image.

    Args:
        model: a name of `timm.list_models()`, or a model that is built already.
        img_size: of the square input in pixels, or (height, width), multiples of the stride.
        mean: per channel, of values in 0..1; for uint8 images. timm's own statistics differ for some models.
        std: per channel, of values in 0..1; for uint8 images.
        **kwargs: go to `timm.create_model`, which otherwise gets num_classes=0, no drop path, the size where the model
            is built for one, and dynamic_img_size=True where position embeddings then follow the input.
    Attributes:
        model: the timm model. `state_dict()` has its names, so it loads into timm's model and back.
        stride: pixels per token side of the last map.
        dim: width D.
        prefix: 0; class and register tokens are cut off.
        mask_modes: {"paint"}.
    Raises:
        UserError: timm is missing, an unknown name, a model that does not tell its stride, a size that does not fit.
    """

    mask_modes = frozenset({"paint"})
    prefix = 0

    def __init__(
        self,
        model: str | nn.Module,
        img_size: Size = 224,
        *,
        mean: Triple = IMAGENET_MEAN,
        std: Triple = IMAGENET_STD,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        size = (img_size, img_size) if isinstance(img_size, int) else (int(img_size[0]), int(img_size[1]))
        if isinstance(model, nn.Module) and kwargs:
            fail("Timm", "kwargs", sorted(kwargs), "none", "the model is built already")
        self._config: dict[str, Any] = {**kwargs}
        self.model = _create(model, size, kwargs) if isinstance(model, str) else model
        self.name = model if isinstance(model, str) else type(model).__name__
        self.mean, self.std = mean, std
        self.stride, self.dim = _read(self.model, self.name)
        self._set_size(size)
        for head in HEADS:
            part = getattr(self.model, head, None)
            if isinstance(part, nn.Module):
                part.requires_grad_(False)
        self.register_state_dict_post_hook(_to_timm_names)
        self.register_load_state_dict_pre_hook(_from_timm_names)

    @property
    def config(self) -> dict[str, Any]:
        """The plain arguments that build this encoder again (of a model given by its name)."""
        given = {"mean": list(self.mean), "std": list(self.std)}
        usual = {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}
        changed = {key: value for key, value in given.items() if value != usual[key]}
        return {"name": f"timm:{self.name}", "img_size": list(self.img_size), **changed, **self._config}

    def at(self, img_size: Size) -> "Timm":
        """The same encoder for images of another size: every parameter is shared.

        Args:
            img_size: pixels, or (height, width), multiples of the stride.
        Raises:
            UserError: the model has weights that belong to one size.
        """
        size = (img_size, img_size) if isinstance(img_size, int) else (int(img_size[0]), int(img_size[1]))
        other = copy.copy(self)
        other._modules = dict(self._modules)
        other._set_size(size)
        if size != self.img_size:
            other.model = _resized(self.model, self.name, size)
        return other

    def forward(
        self, img: Tensor, mask: Mask | None = None, mode: str = "paint", *, colour: Tensor | None = None
    ) -> Tensor:
        """Encode the images, with the hidden cells painted over when there is a mask.

        Args:
            img: (B, 3, H, W), uint8 (normalised inside) or floating point, normalised already.
            mask: over any grid whose cells are whole square pixels, or None.
            mode: "paint"; only read with a mask.
            colour: (1, 3, 1, 1) in normalised colour space; needed with a mask.
        Returns:
            (B, T, D), what `forward_features` gives, row-major.
        Raises:
            UserError: an image, a mask or a colour that does not fit; a mode that is not offered; an output that is not
                one map of tokens.
        """
        if mask is not None and mode != "paint":
            fail("Timm", "mode", repr(mode), "'paint'", "masks are not known inside a timm model, only painted images")
        check_image("Timm", img)
        if tuple(img.shape[2:]) != self.img_size:
            height, width = self.img_size
            because = "this encoder is for that size; at(size) gives the one for another"
            fail("Timm", "img", f"size {img.shape[2]}x{img.shape[3]}", f"{height}x{width}", because)
        if mask is None:
            x = normalize(img, self.mean, self.std)
        else:
            x = paint(img, mask, colour, mean=self.mean, std=self.std)
        backbone: Any = self.model
        return self._tokens(backbone.forward_features(x))

    def _tokens(self, found: Tensor) -> Tensor:
        (rows, columns), shape = self.grid, tuple(found.shape)
        prefix = getattr(self.model, "num_prefix_tokens", None) or 0
        if shape[1:] == (prefix + rows * columns, self.dim):
            return found[:, prefix:]
        if shape[1:] == (self.dim, rows, columns) and getattr(self.model, "output_fmt", "NCHW") != "NHWC":
            return found.flatten(2).mT
        if shape[1:] == (rows, columns, self.dim):
            return found.flatten(1, 2)
        because = (
            f"{self.name} says stride {self.stride}: {rows}x{columns} tokens of {self.dim}, as a map or a sequence"
        )
        fail("Timm", "forward_features", f"shape {shape}", "one map of tokens", because)

    def _set_size(self, size: tuple[int, int]) -> None:
        for side in size:
            if side < self.stride or side % self.stride:
                because = f"a token of {self.name} covers {self.stride} px"
                fail("Timm", "img_size", side, f"a multiple of {self.stride}", because)
        self.img_size, self.grid = size, (size[0] // self.stride, size[1] // self.stride)


def _to_timm_names(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: dict[str, Any]) -> None:
    for key in [k for k in state if k.startswith(f"{prefix}model.")]:
        state[prefix + key.removeprefix(f"{prefix}model.")] = state.pop(key)


def _from_timm_names(_module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for key in [k for k in state if k.startswith(prefix) and not k.startswith(f"{prefix}model.")]:
        state[f"{prefix}model.{key.removeprefix(prefix)}"] = state.pop(key)


def _timm() -> ModuleType:
    try:
        import timm
    except ImportError:
        raise UserError(
            "Timm: timm is not installed, and its models come from there: pip install 'mimfast[timm]'"
        ) from None
    return timm


def _create(name: str, size: tuple[int, int], kwargs: dict[str, Any]) -> nn.Module:
    timm = _timm()
    if not timm.is_model(name.split(".")[0]):
        close = get_close_matches(name, timm.list_models(), n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        fail("Timm", "model", repr(name), "a name of timm.list_models()", f"timm has no model of this name{hint}")
    kwargs = {"num_classes": 0, **kwargs}
    with torch.device("meta"):
        plan = timm.create_model(name, **{**kwargs, "pretrained": False})
    if _cfg(plan).get("fixed_input_size"):
        kwargs.setdefault("img_size", size)
    # windows have no need of it and would have to rebuild their masks in every forward
    if hasattr(plan, "dynamic_img_size") and getattr(plan, "pos_embed", None) is not None:
        kwargs.setdefault("dynamic_img_size", True)
    if "drop_path_rate" in signature(type(plan)).parameters:  # pre-training has none, and timm's Swin has 0.1
        kwargs.setdefault("drop_path_rate", 0.0)
    return timm.create_model(name, **kwargs)


def _cfg(model: nn.Module) -> dict[str, Any]:
    found = getattr(model, "pretrained_cfg", None)
    return found if isinstance(found, dict) else {}


def _read(model: nn.Module, name: str) -> tuple[int, int]:
    """Stride and width of the last map."""
    info = list(getattr(model, "feature_info", None) or [])
    stride = info[-1].get("reduction") if info else None
    dim = getattr(model, "num_features", None)
    if not hasattr(model, "forward_features") or not stride or not dim:
        because = "stride and width of the tokens are read from it, and its last map is the output"
        fail("Timm", "model", name, "a model with forward_features, feature_info and num_features", because)
    return int(stride), int(dim)


def _resized(model: nn.Module, name: str, size: tuple[int, int]) -> nn.Module:
    """The model for another size with the same parameters."""
    if getattr(model, "dynamic_img_size", False) or not (
        hasattr(model, "set_input_size") or _cfg(model).get("fixed_input_size")
    ):
        return model
    found, wanted = f"{size[0]}x{size[1]}", "the size it was built for"
    if not hasattr(model, "set_input_size"):
        because = f"the position weights of {name} belong to that size; build it anew for another"
        fail("Timm.at", "img_size", found, wanted, because)
    shared = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    other: Any = copy.deepcopy(model, dict(shared))
    other.set_input_size(img_size=size)
    new = [key for key, parameter in other.named_parameters() if id(parameter) not in shared]
    if new:
        because = (
            f"{new[0]} of {name} would be a resized copy, trained apart; "
            "build it with dynamic_img_size=True, or take our own ViT or Swin"
        )
        fail("Timm.at", "img_size", found, wanted, because)
    return other
