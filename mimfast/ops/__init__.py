"""The fused kernels as functions: `from mimfast.ops import pixel_loss`.

Each op is one file with the name of its function. The functions are bound here, eagerly, because importing the file
`mimfast.ops.<op>` would otherwise leave the *module* under the name of the function.
"""

from mimfast.ops.mask_plan import mask_plan
from mimfast.ops.noop import noop
from mimfast.ops.pixel_loss import pixel_loss
from mimfast.ops.short_attention import short_attention

__all__ = ["mask_plan", "noop", "pixel_loss", "short_attention"]
