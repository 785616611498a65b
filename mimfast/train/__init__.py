"""Training: `pretrain(recipe)` is the whole of it."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mimfast.train.loop import Outcome as Outcome
    from mimfast.train.loop import pretrain as pretrain

__all__ = ["Outcome", "pretrain"]


def __getattr__(name: str) -> Any:
    # the loop imports the report, which imports the metrics of this package
    if name in __all__:
        from mimfast.train import loop

        return getattr(loop, name)
    raise AttributeError(f"module 'mimfast.train' has no attribute {name!r}")
