"""One format for every message about an argument: `op: argument has <found>, expected <wanted> because <reason>`."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:  # `mimfast --help` and its mistakes need no torch
    import torch
    from torch import Tensor


class UserError(ValueError):
    """A mistake in what the caller gave us. The message is one complete sentence: nobody needs the traceback."""


def fail(op: str, name: str, found: object, wanted: object, because: str) -> NoReturn:
    """Raise UserError for argument `name` of `op`. `because` gives the reason with its numbers."""
    raise UserError(f"{op}: {name} has {found}, expected {wanted} because {because}")


def check_shape(op: str, name: str, tensor: Tensor, wanted: tuple[int | None, ...], because: str) -> None:
    """Hold the shape of `tensor` against `wanted`; None stands for any size."""
    found = tuple(tensor.shape)
    if len(found) != len(wanted) or any(w is not None and f != w for f, w in zip(found, wanted)):
        fail(op, name, f"shape {found}", "(" + ", ".join("any" if w is None else str(w) for w in wanted) + ")", because)


def check_dtype(op: str, name: str, tensor: Tensor, wanted: tuple[torch.dtype, ...], because: str) -> None:
    """Raise unless the dtype of `tensor` is one of `wanted`."""
    if tensor.dtype not in wanted:
        fail(op, name, f"dtype {_short(tensor.dtype)}", " or ".join(_short(d) for d in wanted), because)


def check_same_device(op: str, **tensors: Tensor) -> None:
    """Raise unless all tensors live on the device of the first one; the keywords are the names used in the message."""
    (first, lead), *others = tensors.items()
    for name, tensor in others:
        if tensor.device != lead.device:
            fail(
                op, name, f"device {tensor.device}", str(lead.device), f"{first} is there and nothing is moved silently"
            )


def check_indices(op: str, name: str, indices: Tensor, count: int, because: str) -> None:
    """Raise unless every row of `indices` (rows, any) holds distinct numbers in 0..count-1. Waits for the device."""
    for row, ordered in enumerate(indices.sort(-1).values.tolist()):
        bad = next((i for i in ordered if not 0 <= i < count), None)
        if bad is not None:
            fail(op, name, f"index {bad} in row {row}", f"0 to {count - 1}", because)
        twice = next((i for i, j in pairwise(ordered) if i == j), None)
        if twice is not None:
            fail(op, name, f"index {twice} twice in row {row}", "distinct indices", because)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
