"""Names of PVTv2 weights: the authors' code's and timm's. timm puts an embedding at the start of its stage."""

import re


def official_name(key: str) -> str:
    """The authors' name for timm's of a PVTv2; others stay."""
    key = re.sub(r"^patch_embed\.", "patch_embed1.", key)
    key = re.sub(r"^stages\.(\d+)\.downsample\.", lambda found: f"patch_embed{int(found[1]) + 1}.", key)
    key = re.sub(r"^stages\.(\d+)\.blocks\.", lambda found: f"block{int(found[1]) + 1}.", key)
    key = re.sub(r"^stages\.(\d+)\.norm\.", lambda found: f"norm{int(found[1]) + 1}.", key)
    return re.sub(r"^(block\d+\.\d+\.mlp\.dwconv)\.", r"\1.dwconv.", key)


def timm_name(key: str) -> str:
    """The inverse of `official_name`."""
    key = re.sub(r"^patch_embed1\.", "patch_embed.", key)
    key = re.sub(r"^patch_embed(\d+)\.", lambda found: f"stages.{int(found[1]) - 1}.downsample.", key)
    key = re.sub(r"^block(\d+)\.", lambda found: f"stages.{int(found[1]) - 1}.blocks.", key)
    key = re.sub(r"^norm(\d+)\.", lambda found: f"stages.{int(found[1]) - 1}.norm.", key)
    return key.replace(".mlp.dwconv.dwconv.", ".mlp.dwconv.")
