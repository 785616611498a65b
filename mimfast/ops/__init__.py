"""The fused kernels as functions: `from mimfast.ops.mask_plan import mask_plan
from mimfast.ops.noop import noop
from mimfast.ops.patch_gather import patch_gather
from mimfast.ops.patch_unshuffle import patch_unshuffle
from mimfast.ops.pixel_loss import pixel_loss

__all__ = ["mask_plan", "noop", "patch_gather", "patch_unshuffle", "pixel_loss"]
