"""Settings of a run as text: TOML in and out, layering (recipe < TOML file < command line), and "did you mean"."""

import dataclasses
import difflib
import hashlib
import json
import math
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Union

from mimfast._check import UserError
from mimfast.recipes import Recipe, as_dict

# of each pair the first one wins when both are set, so setting the second must clear the first
RIVALS = {"train.epochs": "train.steps", "optim.base_lr": "optim.lr"}

# sections that do not change a single weight
_HARMLESS = ("score", "run")
_HARMLESS_KEYS = {
    "data.workers",
    "data.decoder",
    "data.cache",
    "data.eval",
    "data.labels",
    "train.device",
    "train.log_every",
    "train.keep",
} | {
    "train.checkpoint_steps",
    "train.checkpoint_minutes",
}


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """'; did you mean X?' for the nearest of `known`, or an empty string."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if not near and "." not in word:
        tails = [k for k in known if difflib.get_close_matches(word, [k.rpartition(".")[2]], n=1, cutoff=0.75)]
        near = tails[:1]
    return f"; did you mean {near[0]}?" if near else ""


def known_keys() -> dict[str, Any]:
    """Every setting as {'section.key': type}."""
    found = {}
    for section, holder in typing.get_type_hints(Recipe).items():
        for key, kind in typing.get_type_hints(holder).items():
            found[f"{section}.{key}"] = kind
    return found


def override(recipe: Recipe, settings: Mapping[str, Any], where: str) -> Recipe:
    """The recipe with {'section.key': value} laid over it.

    Args:
        recipe: what is changed; it stays as it is.
        settings: values as TOML gives them; the word "none" stands for None.
        where: named in the messages, for example the file.
    Raises:
        UserError: for an unknown key (with the nearest known one) and for a value of the wrong type.
    """
    known = known_keys()
    recipe = clear_rivals(recipe, settings) if settings else recipe
    sections: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        if name not in known:
            raise UserError(
                f"pretrain: {where} has the key {name!r}, which is not a setting{did_you_mean(name, known)}"
            )
        section, key = name.split(".")
        sections.setdefault(section, {})[key] = _as_type(name, value, known[name], where)
    parts = {section: dataclasses.replace(getattr(recipe, section), **values) for section, values in sections.items()}
    return dataclasses.replace(recipe, **parts)


def clear_rivals(recipe: Recipe, given: Iterable[str]) -> Recipe:
    """The recipe with the winner of each pair in RIVALS unset when only the other one is among the `given` keys."""
    given = set(given)
    return override(
        recipe, {winner: "none" for rival, winner in RIVALS.items() if rival in given and winner not in given}, ""
    )


def _as_type(name: str, value: Any, kind: Any, where: str) -> Any:
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        if value == "none" or value is None:
            return None
        return _as_type(name, value, next(k for k in options if k is not type(None)), where)
    if origin is Literal and value in options:
        return value
    if origin is tuple and isinstance(value, list | tuple):
        # any number of values of one type
        options = options[:1] * len(value) if options[-1] is Ellipsis else options
    if origin is tuple and isinstance(value, list | tuple) and len(value) == len(options):
        return tuple(_as_type(name, v, k, where) for v, k in zip(value, options))
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if kind in (int, bool, str) and type(value) is kind:
        return value
    raise UserError(
        f"pretrain: {name} has {value!r} in {where}, expected {_words(kind)} because that is the type of the setting"
    )


def _words(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return " or ".join(repr(o) for o in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        options = typing.get_args(kind)
        many = {int: "whole numbers", float: "numbers", str: "texts"}[options[0]]
        return f"a list of {many}" if options[-1] is Ellipsis else f"{len(options)} {many}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[kind]


def read_toml(path: str | Path) -> dict[str, Any]:
    """The settings in a TOML file as {'section.key': value}; a top-level `recipe = "name"` comes back under "recipe".

    Raises:
        UserError: when the file is missing, unreadable or not TOML, or has a value outside a section.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"pretrain: --config has {str(path)!r}, expected a TOML file because {_reason(error)}"
        ) from error
    try:
        tree = _toml().loads(text)
    except ValueError as error:
        raise UserError(
            f"pretrain: --config has {str(path)!r}, expected a TOML file because its text is not TOML ({error})"
        ) from error
    flat: dict[str, Any] = {}
    for section, values in tree.items():
        if isinstance(values, dict):
            flat.update({f"{section}.{key}": value for key, value in values.items()})
        elif section == "recipe":
            flat["recipe"] = values
        else:
            raise UserError(
                f"pretrain: {path} has the key {section!r} outside a section{did_you_mean(section, known_keys())}"
            )
    return flat


def _toml() -> Any:
    if sys.version_info >= (3, 11):
        import tomllib

        return tomllib
    import tomli

    return tomli


def _reason(error: Exception) -> str:
    return error.strerror.lower() if isinstance(error, OSError) and error.strerror else str(error)


def to_toml(recipe: Recipe, heading: str = "") -> str:
    """The recipe as TOML text that `read_toml` and `override` turn back into the same recipe."""
    lines = [f"# {line}" for line in heading.splitlines()]
    for section, values in as_dict(recipe).items():
        lines += ["", f"[{section}]"]
        lines += [f"{key} = {_toml_value(value)}" for key, value in values.items()]
    return "\n".join(lines).lstrip("\n") + "\n"


def _toml_value(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    if isinstance(value, str):
        # JSON's escapes are a subset of TOML's once DEL is written out
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def check(recipe: Recipe) -> Recipe:
    """The recipe itself, after tests that need no image. Raises UserError naming the first bad value."""
    for good, name, wanted, because in [
        *_network_rules(recipe),
        *_method_rules(recipe),
        *_schedule_rules(recipe),
        *_training_rules(recipe),
    ]:
        if not good:
            section, key = name.split(".")
            found = getattr(getattr(recipe, section), key)
            raise UserError(f"pretrain: {name} has {found!r}, expected {wanted} because {because}")
    return recipe


# whether it holds, of which setting, what is wanted, and why
_Rule = tuple[bool, str, str, str]


def _network_rules(recipe: Recipe) -> list[_Rule]:
    model, data = recipe.model, recipe.data
    size, patch = model.img_size, model.patch
    rules: list[_Rule] = [
        (0 <= recipe.mask.ratio < 1, "mask.ratio", "0 <= ratio < 1", "it is hidden and something must stay visible"),
        (size > 0, "model.img_size", "a positive number of pixels", "it is the side of the training crop"),
        (patch is None or patch > 0, "model.patch", "a positive number of pixels", "it is the side of a patch"),
        (0 < data.holdout < 1, "data.holdout", "a fraction between 0 and 1", "the final table needs unseen images"),
        (0 <= model.drop_path < 1, "model.drop_path", "0 <= drop_path < 1", "it is a probability"),
        (model.drop_last >= 0, "model.drop_last", "0 or more", "it is a number of blocks"),
    ]
    if model.window is not None:
        staged = model.encoder.startswith(("swin_", "swinv2_")) and model.method in ("fastmim", "simmim", "greenmim")
        rules.append((staged, "model.window", "none", f"{model.method} of {model.encoder} has no windows of one size"))
        rules.append((model.window > 0, "model.window", "1 or more", "it is a number of tokens"))
    if patch:
        why = f"patches are {patch} px and {size} = {size // patch} * {patch} + {size % patch}"
        rules.append((size % patch == 0, "model.img_size", f"a multiple of {patch}", why))
    for name, (low, high) in (("data.crop_scale", data.crop_scale), ("data.crop_ratio", data.crop_ratio)):
        rules.append((0 < low <= high, name, "two positive numbers in ascending order", "they bound a range"))
    rules += [
        (data.crop_scale[1] <= 1, "data.crop_scale", "numbers up to 1", "a crop is not larger than its image"),
        (0 <= data.recolour <= 1, "data.recolour", "0 to 1", "it is a strength"),
        (data.workers is None or data.workers >= 0, "data.workers", "0 or more", "it is a number of threads"),
        (
            data.cache_side is None or 0 < data.cache_side <= 65536,
            "data.cache_side",
            "1 to 65536",
            "it is a side in pixels",
        ),
        (data.repeat > 0, "data.repeat", "1 or more", "it is a number of views of an image"),
    ]
    if data.decoder == "dali_gpu":
        why = "data.decoder 'dali_gpu' makes crops out of files and keeps no images"
        rules.append((data.cache == "none", "data.cache", "'none'", why))
        rules.append((data.cache_side is None, "data.cache_side", "none", why))
        on_gpu = "another one with train.device cpu", "it works on the GPU of the run"
        rules.append((recipe.train.device != "cpu", "data.decoder", *on_gpu))
    return rules


def _method_rules(recipe: Recipe) -> list[_Rule]:
    """Rules against settings that a method would not look at."""
    model, mask, target, method = recipe.model, recipe.mask, recipe.target, recipe.model.method
    masked = method if method in ("mae", "maskfeat", "mixmim", "greenmim") else ""
    whats = {
        "mae": ("pixels",), "fastmim": ("hog", "pixels"), "simmim": ("pixels", "local"), "maskfeat": ("hog",),
        "mixmim": ("pixels",), "greenmim": ("pixels",),
    }  # fmt: skip
    predicts = whats[method] if target.what is None else (target.what,)
    rules: list[_Rule] = [
        (
            mask.block is None or mask.block > 0,
            "mask.block",
            "a positive number of pixels",
            "it is the side of a block",
        ),
        (not masked or mask.block is None, "mask.block", "none", f"{masked} has masks of its own kind"),
        (predicts[0] in whats[method], "target.what", " or ".join(whats[method]), f"{method} predicts nothing else"),
        (target.gaussian_window >= 0, "target.gaussian_window", "0 or more", "it is a side in pixels"),
        (
            target.gaussian_window == 0 or predicts[0] == "hog",
            "target.gaussian_window",
            "0",
            f"the target is {predicts[0]}, and only hog is weighed",
        ),
        (method != "simmim" or not target.norm, "target.norm", "False", "simmim predicts plain pixels"),
        (method != "maskfeat" or target.norm, "target.norm", "True", "maskfeat's histograms are always normalised"),
        (method == "simmim" or model.drop_path == 0, "model.drop_path", "0", f"{method} drops no branches"),
        (method == "fastmim" or model.drop_last == 0, "model.drop_last", "0", f"{method} leaves no blocks out"),
    ]
    for name in ("decoder_dim", "decoder_depth", "decoder_heads"):
        bare = getattr(model, name) is None
        rules.append(
            (method not in ("simmim", "maskfeat") or bare, f"model.{name}", "none", f"{method} has no decoder")
        )
    return rules


def _schedule_rules(recipe: Recipe) -> list[_Rule]:
    """Rules of the sections that make a run change while it lasts."""
    progress, optim, model = recipe.progress, recipe.optim, recipe.model
    sizes, starts, batches = progress.sizes, progress.starts, progress.batch_sizes
    ascending = all(a < b for a, b in zip(optim.milestones, optim.milestones[1:]))
    rules: list[_Rule] = [
        (optim.warmup_lr >= 0, "optim.warmup_lr", "0 or more", "it is a learning rate"),
        (
            ascending and all(0 < milestone < 1 for milestone in optim.milestones),
            "optim.milestones",
            "ascending fractions between 0 and 1",
            "they are parts of the run",
        ),
        (
            not optim.milestones or optim.schedule == "multistep",
            "optim.milestones",
            "none",
            f"optim.schedule is {optim.schedule!r}",
        ),
    ]
    if not sizes:
        off = "there is no schedule without progress.sizes"
        return [
            *rules,
            (not batches, "progress.batch_sizes", "none", off),
            (not starts, "progress.starts", "none", off),
        ]
    count = len(sizes)
    parts = starts == () or (starts[0] == 0 and all(a < b for a, b in zip(starts, (*starts[1:], 1.0))))
    return [
        *rules,
        (all(size > 0 for size in sizes), "progress.sizes", "positive numbers", "they are sides of crops in pixels"),
        (
            model.method not in ("mae", "mixmim", "greenmim"),
            "progress.sizes",
            "none",
            f"{'MAE' if model.method == 'mae' else model.method}'s encoder sees one size; fastmim follows a schedule",
        ),
        (model.img_size == sizes[-1], "model.img_size", str(sizes[-1]), "it is the last of progress.sizes"),
        (len(batches) in (0, count), "progress.batch_sizes", f"{count} numbers or none", f"there are {count} stages"),
        (all(batch > 0 for batch in batches), "progress.batch_sizes", "1 or more", "a step needs images"),
        (len(starts) in (0, count), "progress.starts", f"{count} numbers or none", f"there are {count} stages"),
        (parts, "progress.starts", "0 first, then ascending fractions below 1", "they are parts of the run"),
    ]


def _training_rules(recipe: Recipe) -> list[_Rule]:
    optim, train, score = recipe.optim, recipe.train, recipe.score
    steps, epochs = train.steps, train.epochs
    return [
        (optim.batch_size > 0, "optim.batch_size", "1 or more", "a step needs images"),
        (
            0 <= optim.warmup <= 1,
            "optim.warmup",
            "a fraction between 0 and 1",
            "it is a part of the run",
        ),
        (optim.lr is None or optim.lr > 0, "optim.lr", "a positive number", "the weights would not move"),
        (optim.clip is None or optim.clip > 0, "optim.clip", "a positive number", "the weights would not move"),
        (steps is not None or epochs is not None, "train.steps", "a number", "train.epochs is not set either"),
        (steps is None or steps > 0, "train.steps", "1 or more", "it is the length of the run"),
        (epochs is None or epochs > 0, "train.epochs", "more than 0", "it is the length of the run"),
        (0 <= train.seed < 2**63, "train.seed", "0 to 2**63 - 1", "it is a key of 63 bits"),
        (train.log_every > 0, "train.log_every", "1 or more", "it is a number of steps"),
        (train.checkpoint_steps >= 0, "train.checkpoint_steps", "0 or more", "it is a number of steps"),
        (train.keep > 0, "train.keep", "1 or more", "a run without a checkpoint cannot be resumed"),
        (score.images > 0, "score.images", "1 or more", "the final table needs images"),
        (score.views > 0, "score.views", "1 or more", "it is a number of crops"),
        (score.knn > 0, "score.knn", "1 or more", "it is a number of neighbours"),
        (score.probe_images > 1, "score.probe_images", "2 or more", "a probe learns from images"),
    ]


def fingerprint(recipe: Recipe) -> str:
    """Sixteen hex digits over every setting that changes what is learnt (not place, logging, hardware)."""
    return hashlib.sha256(json.dumps(_learning(recipe), sort_keys=True).encode()).hexdigest()[:16]


def changed(old: Recipe, new: Recipe) -> list[str]:
    """The settings that change what is learnt and differ, as 'section.key: old -> new'."""
    before, after = _learning(old), _learning(new)
    pairs = {key: (before.get(key, "another"), after.get(key, "another")) for key in before | after}
    return [f"{key}: {old} -> {new}" for key, (old, new) in pairs.items() if old != new]


def _learning(recipe: Recipe) -> dict[str, Any]:
    found = {
        f"{section}.{key}": value
        for section, values in as_dict(recipe).items()
        for key, value in values.items()
        if section not in _HARMLESS and f"{section}.{key}" not in _HARMLESS_KEYS
    }
    if recipe.data.decoder == "dali_gpu":  # the only one with pixels of its own
        found["data.decoder"] = "dali_gpu"
    return found
