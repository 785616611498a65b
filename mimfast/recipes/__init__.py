"""Recipes: what `mimfast pretrain NAME` runs, as plain data.

A recipe is one frozen `Recipe` made of small sections. Each function returns one; its docstring gives the
command, the hardware, the time to expect and, where the numbers come from a publication, the source and the published
scores. Nothing here touches an image or a device; `build` makes the network.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

from mimfast._check import UserError
from mimfast.recipes.fastmim import fastmim_p_vit_b as fastmim_p_vit_b
from mimfast.recipes.fastmim import fastmim_pvtv2_b2 as fastmim_pvtv2_b2
from mimfast.recipes.fastmim import fastmim_swin_b as fastmim_swin_b
from mimfast.recipes.fastmim import fastmim_tiny as fastmim_tiny
from mimfast.recipes.fastmim import fastmim_vit_b as fastmim_vit_b
from mimfast.recipes.greenmim import greenmim_swin_b as greenmim_swin_b
from mimfast.recipes.greenmim import greenmim_tiny as greenmim_tiny
from mimfast.recipes.mae import mae_cifar as mae_cifar
from mimfast.recipes.mae import mae_digits as mae_digits
from mimfast.recipes.mae import mae_photos as mae_photos
from mimfast.recipes.mae import mae_small as mae_small
from mimfast.recipes.mae import mae_vit_b as mae_vit_b
from mimfast.recipes.mae import mae_vit_h as mae_vit_h
from mimfast.recipes.mae import mae_vit_l as mae_vit_l
from mimfast.recipes.maskfeat import maskfeat_vit_b as maskfeat_vit_b
from mimfast.recipes.mixmim import mixmim_b as mixmim_b
from mimfast.recipes.mixmim import mixmim_tiny as mixmim_tiny
from mimfast.recipes.sections import Data as Data
from mimfast.recipes.sections import Masking as Masking
from mimfast.recipes.sections import Model as Model
from mimfast.recipes.sections import Optim as Optim
from mimfast.recipes.sections import Progress as Progress
from mimfast.recipes.sections import Recipe as Recipe
from mimfast.recipes.sections import Run as Run
from mimfast.recipes.sections import Score as Score
from mimfast.recipes.sections import Target as Target
from mimfast.recipes.sections import Train as Train
from mimfast.recipes.simmim import simmim_swin_b as simmim_swin_b
from mimfast.recipes.simmim import simmim_swinv2_b as simmim_swinv2_b
from mimfast.recipes.simmim import simmim_tiny as simmim_tiny
from mimfast.recipes.simmim import simmim_vit_b as simmim_vit_b

if TYPE_CHECKING:
    from torch import nn

    from mimfast.data.crop import CropConfig

RECIPES = (
    *(mae_photos, mae_digits, mae_small, mae_cifar, mae_vit_b, mae_vit_l, mae_vit_h),
    *(fastmim_tiny, fastmim_vit_b, fastmim_swin_b, fastmim_pvtv2_b2, fastmim_p_vit_b),
    *(simmim_tiny, simmim_vit_b, simmim_swin_b, simmim_swinv2_b),
    maskfeat_vit_b,
    *(mixmim_tiny, mixmim_b),
    *(greenmim_tiny, greenmim_swin_b),
)

_METHODS = {
    "mae": "MAE",
    "fastmim": "FastMIM",
    "simmim": "SimMIM",
    "maskfeat": "MaskFeat",
    "mixmim": "MixMIM",
    "greenmim": "GreenMIM",
}


def by_name(name: str) -> Recipe:
    """The recipe called `name`, with hyphens or underscores. Raises UserError that lists the recipes."""
    from mimfast.settings import did_you_mean

    known = {make.__name__: make for make in RECIPES}
    wanted = name.replace("-", "_")
    if wanted not in known:
        raise UserError(
            f"pretrain: recipe has {name!r}, expected one of {', '.join(known)} because those are the functions of "
            f"mimfast.recipes{did_you_mean(wanted, known)}"
        )
    return known[wanted]()


def default_for(path: str | None) -> Recipe:
    """The recipe of a run that names none, by its data: "photos" or nothing, "digits", or a folder."""
    return {"photos": mae_photos, None: mae_photos, "digits": mae_digits}.get(path, mae_small)()


def describe(recipe: Recipe) -> str:
    """The network in a few words."""
    model = recipe.model
    sizes = {"wide": model.dim, "blocks": model.depth, "heads": model.heads}
    own = [f"{value} {word}" for word, value in sizes.items() if value is not None]
    own += [f"{model.patch} px patches"] if model.patch is not None else []
    own += [f"windows of {model.window}"] if model.window is not None else []
    own += [f"without its last {model.drop_last} blocks"] if model.drop_last else []
    name = {"vit": "ViT", "beit": "BEiT", "swin": "Swin"}.get(model.encoder, model.encoder)
    return f"{_METHODS[model.method]}, {name}" + (f" ({', '.join(own)})" if own else "")


def sizes(recipe: Recipe) -> str:
    """The sides of the training crops in words: "224 px", or "128, 160, 192 px" for a schedule."""
    return f"{', '.join(map(str, recipe.progress.sizes or [recipe.model.img_size]))} px"


def peak_lr(recipe: Recipe, batch_size: int | None = None) -> float:
    """The peak learning rate: lr, or base_lr * batch_size / 256 (the linear rule of MAE).

    batch_size is that of the recipe unless given, as for a stage of a schedule.
    """
    optim = recipe.optim
    batch_size = optim.batch_size if batch_size is None else batch_size
    return optim.lr if optim.lr is not None else optim.base_lr * batch_size / 256


def crop(recipe: Recipe) -> "CropConfig":
    """The random crop of a recipe."""
    from mimfast.data.crop import CropConfig

    data = recipe.data
    return CropConfig(data.crop_scale, data.crop_ratio, data.flip, data.resample)


def build(recipe: Recipe) -> "nn.Module":
    """The method of a recipe with fresh weights drawn from torch's generator (call torch.manual_seed before)."""
    from mimfast import methods

    model, target, block = recipe.model, recipe.target, recipe.mask.block
    make = getattr(methods, _METHODS[model.method]).build
    sizes = {name: getattr(model, name) for name in ("dim", "depth", "heads")}
    decoder = {name: getattr(model, name) for name in ("decoder_dim", "decoder_depth", "decoder_heads")}
    window = {"attention_window" if model.method == "simmim" else "window": model.window}
    given: dict[str, Any] = {
        "mae": {"norm": target.norm, **decoder},
        "fastmim": {
            "norm": target.norm,
            "block": block,
            "target": target.what,
            "gaussian_window": target.gaussian_window,
            "drop_last": model.drop_last,
            **decoder,
        },
        "simmim": {"block": block, "target": target.what, "drop_path": model.drop_path},
        "maskfeat": {"gaussian_window": target.gaussian_window},
        "mixmim": {"norm": target.norm, **decoder},
        "greenmim": {"norm": target.norm, **decoder},
    }[model.method]
    # what the recipe leaves open is the method's to choose
    chosen = {name: value for name, value in {**sizes, **window, **given}.items() if value is not None}
    return make(model.encoder, model.img_size, model.patch, recipe.mask.ratio, kind=target.kind, **chosen)


def as_dict(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The recipe as {section: {key: value}}."""
    return dataclasses.asdict(recipe)
