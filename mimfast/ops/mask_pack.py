"""The index lists of a given mask: from a map of hidden tokens to what gathers, unshuffles and varlen attention read.

For one sample with the map h: keep = the tokens with h false, ascending; hide = those with h true, ascending;
inverse[l] = the place of token l in [keep | hide]. Samples that keep different numbers of tokens are packed one after
the other, without waiting for the device: the lists then have fixed capacities and the bounds are data (cu_seqlens).

B samples, L tokens, K kept tokens.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from mimfast import _native
from mimfast._check import check_dtype, check_shape, fail
from mimfast.ops import _masks
from mimfast.ops._choice import Impl, resolve, why_not_on
from mimfast.ops._masks import MaskPlan, address, lists_ref

IMPLS = ("cuda", "cpu", "ref")


def mask_pack_ref(hidden_BL: Tensor, visible: int | None, most_hidden: int) -> MaskPlan:
    """The specification, in traceable torch for any device."""
    return lists_ref(hidden_BL, visible, most_hidden)


def mask_pack(
    hidden: Tensor,
    visible: int | None = None,
    *,
    most_hidden: int | None = None,
    checked: bool = False,
    impl: Impl = "auto",
) -> MaskPlan:
    """Turn a map of hidden tokens into index lists.

    Args:
        hidden: (B, L) bool, True = hidden from the encoder.
        visible: K, when every sample keeps that many: keep (B, K) and hide (B, L - K). None: they may differ, and the
            lists are packed: keep (B * L,), hide (B * most_hidden,), cu_seqlens (B + 1) int32 (see MaskPlan).
        most_hidden: no sample hides more; sets the capacity of the packed `hide`. L by default.
        checked: raise when a sample breaks the promise of visible or most_hidden; waits for the device. Without it too
            long a list is cut, and too short a row is filled up with -1.
        impl: "auto", "ref", "cpu" (native, CPU tensors) or "cuda".
    Returns:
        MaskPlan; its `hidden` is the argument itself.
    Raises:
        UserError: another shape or dtype, visible or most_hidden outside 0 .. L.
    """
    check_shape("mask_pack", "hidden", hidden, (None, None), "each image has one row with one entry for each token")
    check_dtype("mask_pack", "hidden", hidden, (torch.bool,), "True must mean hidden, and numbers are read both ways")
    B, tokens = hidden.shape
    most_hidden = tokens if most_hidden is None else most_hidden
    for name, value in (("visible", visible), ("most_hidden", most_hidden)):
        if value is not None and not 0 <= value <= tokens:
            fail("mask_pack", name, value, f"0 to {tokens}", f"each image has {tokens} tokens")
    if visible is None:
        _masks.check_packed_size("mask_pack", B, tokens)
    if checked:
        _check_promise(hidden, visible, most_hidden)
    chosen = resolve("mask_pack", impl, IMPLS, partial(_why_not, hidden.device.type))
    if chosen == "ref":
        return mask_pack_ref(hidden, visible, most_hidden)
    keep, inverse, hide, cu_seqlens = torch.ops.mimfast.mask_pack(
        hidden, -1 if visible is None else visible, most_hidden, chosen
    )
    return MaskPlan(keep, inverse, hidden, hide, cu_seqlens if visible is None else None)


def _check_promise(hidden: Tensor, visible: int | None, most_hidden: int) -> None:
    tokens, counts = hidden.shape[1], hidden.sum(1).tolist()
    for b, count in enumerate(counts):
        if visible is not None and tokens - count != visible:
            fail("mask_pack", "hidden", f"{tokens - count} visible tokens in row {b}", visible, f"visible is {visible}")
        if visible is None and count > most_hidden:
            because = f"most_hidden is {most_hidden}"
            fail("mask_pack", "hidden", f"{count} hidden tokens in row {b}", f"at most {most_hidden}", because)


def _why_not(device: str, impl: str) -> str | None:
    return why_not_on(impl, device)


# contract: one schema and one fake; integers have no gradient, so there is no autograd
torch.library.define(
    "mimfast::mask_pack", "(Tensor hidden, int visible, int most_hidden, str impl) -> (Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.register_fake("mimfast::mask_pack")
def _allocate(hidden, visible, most_hidden, impl):  # noqa: ARG001
    B, tokens = hidden.shape
    packed = visible < 0
    keep = hidden.new_empty((B * tokens,) if packed else (B, visible), dtype=torch.int64)
    hide = hidden.new_empty((B * most_hidden,) if packed else (B, tokens - visible), dtype=torch.int64)
    cu_seqlens = hidden.new_empty((B + 1,) if packed else (0,), dtype=torch.int32)
    return keep, hidden.new_empty(B, tokens, dtype=torch.int64), hide, cu_seqlens


@torch.library.impl("mimfast::mask_pack", ("cpu", "cuda"))
def _run(hidden, visible, most_hidden, impl):
    lists = _allocate(hidden, visible, most_hidden, impl)
    run_native(_native.core(), impl, hidden, visible, most_hidden, lists)
    return lists


def run_native(core, impl, hidden, visible, most_hidden, lists) -> None:
    """Fill `lists` (keep, inverse, hide, cu_seqlens) with mimfast._core, or the emulated core in tests."""
    hidden = hidden.contiguous()
    keep, inverse, hide, cu_seqlens = lists
    if len(hidden) == 0:  # no block runs that could write the first bound
        cu_seqlens.zero_()
    kept = torch.empty(len(hidden), dtype=torch.int32, device=hidden.device) if visible < 0 else None
    call = core.MaskPack(
        hidden=address(hidden), batch=hidden.shape[0], tokens=hidden.shape[1], visible=visible, most_hidden=most_hidden,
        kept=address(kept), keep=address(keep), inverse=address(inverse), hide=address(hide),
        cu_seqlens=address(cu_seqlens),
    )  # fmt: skip
    _masks.launch(core, "mask_pack", impl, call, hidden.device)
