"""What a drop-in needs to know of a kind of module, and the classes that are put in its place.

A module is swapped by giving it another class: a subclass of its own with one method replaced. Parameters, names,
buffers, hooks, train and eval mode, isinstance, gradient checkpointing and copies stay what they were.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mimfast.encoders.linear import linear


class Kind(NamedTuple):
    """A kind of module that can be swapped.

    Attributes:
        name: what people call it.
        op: the op that does the work.
        matches: whether a module is one, by its class or by its structure; imports nothing heavy.
        why_not: why this one cannot be swapped though it is one, without a full stop; None when it can.
        mixin: methods that go before those of the module's class.
        example: (module, batch, device, dtype) -> arguments of `forward` for the proof, the first one random.
    """

    name: str
    op: str
    matches: Callable[[nn.Module], bool]
    why_not: Callable[[nn.Module], str | None]
    mixin: type
    example: Callable[[nn.Module, int, torch.device, torch.dtype], tuple[Any, ...]]


_MADE: dict[tuple[type, type], type] = {}


class Swapped:
    """Base of all mixins: how a swapped module is copied, pickled and called when the plain path is needed."""

    _plain: type
    _mixin: type

    def __reduce_ex__(self, protocol: Any) -> Any:
        made = super().__reduce_ex__(protocol)  # its class is made on demand and has no name to be found by
        return (_empty, (self._plain, self._mixin), *made[2:])


def swapped(plain: Any, mixin: Any) -> Any:
    """The class that stands for `plain` with the methods of `mixin` first; the same one for equal arguments."""
    if (plain, mixin) not in _MADE:
        attributes = {"_plain": plain, "_mixin": mixin, "__module__": __name__}
        _MADE[plain, mixin] = type(f"Fast{plain.__name__}", (mixin, plain), attributes)
    return _MADE[plain, mixin]


class Linear(Swapped):
    """torch.nn.Linear inside a swapped module: in float32 on a CPU its products go through oneDNN."""

    def forward(self: Any, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def put(module: nn.Module, mixin: type) -> None:
    """Swap a module, and the linear layers in it but for those of a Sequential, whose next layer may work in place."""
    plain: Any = nn.Linear
    for parent in list(module.modules()):
        for part in parent.children():
            if type(part) is plain and not isinstance(parent, nn.Sequential):
                part.__class__ = swapped(plain, Linear)
    module.__class__ = swapped(type(module), mixin)


def _empty(plain: type, mixin: type) -> Any:
    return object.__new__(swapped(plain, mixin))


def hooked(module: nn.Module) -> bool:
    """Whether somebody listens to calls of `module`, which a fused path does not make."""
    lists = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name, None) for name in lists)


def drops(module: nn.Module, name: str) -> bool:
    """Whether the dropout called `name` would drop something now."""
    drop = getattr(module, name, None)
    return module.training and (drop if isinstance(drop, float) else getattr(drop, "p", 0.0)) > 0


def bias_of(*layers: nn.Linear) -> Tensor | None:
    """The biases of projections side by side; zeros stand for one that is missing beside others."""
    if all(layer.bias is None for layer in layers):
        return None
    return torch.cat(
        [layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias for layer in layers]
    )


def project(x: Tensor, *layers: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """(..., C) to (..., 3C) through separate q, k, v projections as one product; and its bias."""
    bias = bias_of(*layers)
    return linear(x, torch.cat([layer.weight for layer in layers]), bias), bias


def square(sides: Any) -> tuple[int, int]:
    """(rows, columns) of a window or shift that may be one number."""
    return (int(sides), int(sides)) if isinstance(sides, int) else (int(sides[0]), int(sides[1]))
