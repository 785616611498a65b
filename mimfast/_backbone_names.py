"""Names of backbones in timm and in their authors' repositories, to and from ours."""

import re
from collections.abc import Mapping

from torch import Tensor

# made from the sizes of a model, and stored by some releases all the same
BUFFERS = re.compile(r"(.*\.)?(relative_position_index|relative_coords_table|attn_mask|k_bias)")
SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"
BLOCK_TABLE = "attn.relative_position_bias_table"


def without_buffers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state without what is computed from the sizes."""
    return {key: value for key, value in state.items() if not BUFFERS.fullmatch(key)}


def swin_to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm puts the merging of patches at the beginning of a stage, the authors at the end of the one before."""
    return {_move_stage(key, 1): value for key, value in without_buffers(state).items()}


def swin_from_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `swin_to_timm`."""
    return {_move_stage(key, -1): value for key, value in state.items()}


def _move_stage(key: str, by: int) -> str:
    return re.sub(r"^layers\.(\d+)\.downsample\.", lambda found: f"layers.{int(found[1]) + by}.downsample.", key)


def pvt_to_official(key: str) -> str:
    """The authors' name for timm's of a PVTv2; others stay."""
    key = re.sub(r"^patch_embed\.", "patch_embed1.", key)
    key = re.sub(r"^stages\.(\d+)\.downsample\.", lambda found: f"patch_embed{int(found[1]) + 1}.", key)
    key = re.sub(r"^stages\.(\d+)\.blocks\.", lambda found: f"block{int(found[1]) + 1}.", key)
    key = re.sub(r"^stages\.(\d+)\.norm\.", lambda found: f"norm{int(found[1]) + 1}.", key)
    return re.sub(r"^(block\d+\.\d+\.mlp\.dwconv)\.", r"\1.dwconv.", key)


def pvt_to_timm(key: str) -> str:
    """The inverse of `pvt_to_official`."""
    key = re.sub(r"^patch_embed1\.", "patch_embed.", key)
    key = re.sub(r"^patch_embed(\d+)\.", lambda found: f"stages.{int(found[1]) - 1}.downsample.", key)
    key = re.sub(r"^block(\d+)\.", lambda found: f"stages.{int(found[1]) - 1}.blocks.", key)
    key = re.sub(r"^norm(\d+)\.", lambda found: f"stages.{int(found[1]) - 1}.norm.", key)
    return key.replace(".mlp.dwconv.dwconv.", ".mlp.dwconv.")


def beit_per_block(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The shared table of relative positions copied into every block, as fine-tuning code and timm have it."""
    renamed = without_buffers(state)
    table = renamed.pop(SHARED_TABLE, None)
    if table is None:
        return renamed
    depth = 1 + max(int(found[1]) for key in renamed if (found := re.match(r"blocks\.(\d+)\.", key)))
    return renamed | {f"blocks.{i}.{BLOCK_TABLE}": table.clone() for i in range(depth)}
