"""Names of Swin and SwinV2 weights: the official code's, which are ours, and timm's.

timm puts the merging of neighbours at the start of a stage: its layers.{i + 1}.downsample is layers.{i}.downsample.
"""

import re
from collections.abc import Mapping

from torch import Tensor

# what official files hold beside weights; it follows from the sizes
BUFFERS = ("relative_position_index", "relative_coords_table", "attn_mask")
MERGING = re.compile(r"layers\.(\d+)\.downsample\.(.+)")


def official_names(state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """A state dict under the official names, without buffers; names outside `prefix` stay as they are.

    Args:
        state: official (Swin, SwinV2, their SimMIM files) or timm's.
        prefix: of every name of the encoder.
    """
    own = [key.removeprefix(prefix) for key in state if key.startswith(prefix)]
    shift = -1 if _is_timm(own) else 0
    found = {}
    for key, value in state.items():
        name = key.removeprefix(prefix)
        if not key.startswith(prefix):
            found[key] = value
        elif name.rpartition(".")[2] not in BUFFERS:
            found[prefix + _moved(name, shift).replace(".rpe_mlp.", ".cpb_mlp.")] = value
    return found


def timm_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of an encoder under timm's names: strict for a model with num_classes=0 but for a mask token."""
    return {_moved(key, 1): value for key, value in official_names(state).items()}


def _is_timm(names: list[str]) -> bool:
    """timm has a merging in the last stage, the official code in the first."""
    stages = {int(found[1]) for name in names if (found := re.match(r"layers\.(\d+)\.", name))}
    return bool(stages) and any(name.startswith(f"layers.{max(stages)}.downsample.") for name in names)


def _moved(name: str, by: int) -> str:
    found = MERGING.fullmatch(name)
    return name if found is None else f"layers.{int(found[1]) + by}.downsample.{found[2]}"
