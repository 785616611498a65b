"""The fused kernels as functions: `from mimfast.ops import pixel_loss`.

Each op is one file with the name of its function. The functions are bound here, eagerly, because importing the file
`mimfast.ops.<op>` would otherwise leave the *module* under the name of the function.
"""

from mimfast.ops.crop_gather import crop_gather
from mimfast.ops.crop_resize import crop_resize
from mimfast.ops.group_plan import group_plan
from mimfast.ops.hog import hog
from mimfast.ops.hog_loss import hog_loss
from mimfast.ops.local_norm import local_norm
from mimfast.ops.mask_blockwise import mask_blockwise
from mimfast.ops.mask_guided import mask_guided
from mimfast.ops.mask_pack import mask_pack
from mimfast.ops.mask_plan import mask_plan
from mimfast.ops.noop import noop
from mimfast.ops.patch_gather import patch_gather
from mimfast.ops.patch_unshuffle import patch_unshuffle
from mimfast.ops.pixel_loss import pixel_loss
from mimfast.ops.short_attention import short_attention
from mimfast.ops.window_attention import window_attention
from mimfast.ops.window_attention_v2 import window_attention_v2

__all__ = [
    "crop_gather",
    "crop_resize",
    "group_plan",
    "hog",
    "hog_loss",
    "local_norm",
    "mask_blockwise",
    "mask_guided",
    "mask_pack",
    "mask_plan",
    "noop",
    "patch_gather",
    "patch_unshuffle",
    "pixel_loss",
    "short_attention",
    "window_attention",
    "window_attention_v2",
]
