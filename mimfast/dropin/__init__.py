"""Drop-in patches: the kernels put into somebody else's model, in place and reversibly.

The package is not called `accelerate`, because the import of a module of that name would replace the function.
"""

from mimfast.dropin.swap import Row as Row
from mimfast.dropin.swap import accelerate as accelerate
from mimfast.dropin.swap import restore as restore

__all__ = ["Row", "accelerate", "restore"]
