"""State dicts under the names of the official checkpoints, whatever the module tree is called."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

Rename = Callable[[str], str]


def use_official_names(module: nn.Module, official: Rename, in_tree: Rename) -> None:
    """Make `module.state_dict()` give, and `load_state_dict()` take and report, official names.

    Args:
        official: official name of a name in the module tree; names that have none stay.
        in_tree: the inverse; names of the module tree stay.
    """
    module.register_state_dict_post_hook(partial(_to_official, official))
    module.register_load_state_dict_pre_hook(partial(_from_official, in_tree))
    module.register_load_state_dict_post_hook(partial(_report, official))


def flat(name: str) -> str:
    """MAE's layout: the encoder's names at the top level, then `mask_token` and `decoder_*`."""
    if name.startswith("encoder."):
        return name.removeprefix("encoder.")
    if name.startswith("decoder."):
        own = name.removeprefix("decoder.")
        return own if own == "mask_token" else f"decoder_{own}"
    return name


def from_flat(name: str) -> str:
    """The inverse of `flat`; names of the module tree stay."""
    if name.startswith(("encoder.", "decoder.", "target.")):
        return name
    if name == "mask_token":
        return "decoder.mask_token"
    if name.startswith("decoder_"):
        return f"decoder.{name.removeprefix('decoder_')}"
    return f"encoder.{name}"


def nested(name: str) -> str:
    """FastMIM's layout for backbones other than ViT: `encoder.*` as it is, `decoder_*`."""
    return f"decoder_{name.removeprefix('decoder.')}" if name.startswith("decoder.") else name


def from_nested(name: str) -> str:
    """The inverse of `nested`."""
    return f"decoder.{name.removeprefix('decoder_')}" if name.startswith("decoder_") else name


def _to_official(official: Rename, _module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    for key in [k for k in state if k.startswith(prefix)]:
        # every key is taken out and put back, so that the order stays that of the modules
        state[prefix + official(key.removeprefix(prefix))] = state.pop(key)


def _from_official(in_tree: Rename, _module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for key in [k for k in state if k.startswith(prefix)]:
        state[prefix + in_tree(key.removeprefix(prefix))] = state.pop(key)


def _report(official: Rename, _module: nn.Module, incompatible: Any) -> None:
    # torch gives whole paths and no prefix; names inside an encoder or decoder hold neither word: the last one is ours
    for keys in (incompatible.missing_keys, incompatible.unexpected_keys):
        for i, key in enumerate(keys):
            found = re.fullmatch(r"(.*\.)?((?:encoder|decoder)\..*)", key)
            if found:
                keys[i] = (found[1] or "") + official(found[2])
