"""mimfast: masked image modeling at the speed of the hardware.

Importing the package is cheap: torch is loaded on the first use of a public name.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mimfast.dropin import accelerate as accelerate
    from mimfast.dropin import restore as restore
    from mimfast.layouts import export as export
    from mimfast.layouts import load as load
    from mimfast.mask import Mask as Mask

_PUBLIC = {
    "Mask": "mimfast.mask",
    "accelerate": "mimfast.dropin",
    "export": "mimfast.layouts",
    "load": "mimfast.layouts",
    "restore": "mimfast.dropin",
}
_MODULES = ("ops", "encoders", "methods", "decoders", "targets", "data", "train", "recipes")

__all__ = ["Mask", "__version__", "accelerate", "export", "load", "restore"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    if name in _MODULES:
        return import_module(f"mimfast.{name}")
    raise AttributeError(f"module 'mimfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC, *_MODULES])
