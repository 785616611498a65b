"""Put visible tokens back among mask tokens and add positions: the decoder's input. MAE, arXiv:2111.06377, section 3.

out[b, s] = visible[b, s] + pos[s] for the prefix rows s < S (class token);
out[b, S + l] = (visible[b, S + inverse[b, l]] if 0 <= inverse[b, l] < K else mask_token) + pos[S + l].
The official code reaches the same by concatenating, gathering, concatenating and adding, one pass over memory each.
B batch, S prefix rows, L tokens in image order, K visible tokens, T = S + L, D width
"""

from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mimfast._check import check_dtype, check_same_device, check_shape, fail
from mimfast.ops._choice import Impl, resolve, why_not_on

IMPLS = ("triton", "ref")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def patch_unshuffle_ref(
    visible: Tensor, mask_token: Tensor, inverse: Tensor, pos: Tensor | None = None, *,
    prefix: int = 1, dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    out = _promoted(visible, mask_token, pos) if dtype is None else dtype
    wide = torch.promote_types(out, torch.float32)
    D = visible.shape[2]
    shown_BL = (inverse >= 0) & (inverse < visible.shape[1] - prefix)
    index_BL = prefix + torch.where(shown_BL, inverse, 0)
    # where() after the gather: the gradient of a row is added up from itself and zeros only, exact in any order
    row_BLD = visible.gather(1, index_BL[:, :, None].expand(-1, -1, D)).to(wide)
    token_BLD = torch.where(shown_BL[:, :, None], row_BLD, mask_token.reshape(D).to(wide))
    x_BTD = torch.cat([visible[:, :prefix].to(wide), token_BLD], dim=1) if prefix else token_BLD
    return (x_BTD if pos is None else x_BTD + pos.reshape(-1, D).to(wide)).to(out)


def patch_unshuffle(
    visible: Tensor, mask_token: Tensor, inverse: Tensor, pos: Tensor | None = None, *,
    prefix: int = 1, dtype: torch.dtype | None = None, checked: bool = False, impl: Impl = "auto",
) -> Tensor:  # fmt: skip
    """Write the full sequence: prefix rows, then for each place of the image its visible token or the mask token.

    Args:
        visible: (B, S + K, D) float32, bfloat16 or float16 (float64 runs `ref`); any strides.
        mask_token: (D,) or (1, 1, D), floating point.
        inverse: (B, L) int64: token l is visible token inverse[l] when that is in 0..K-1, else the mask token. No two
            tokens of an image share a visible one. (`Mask.inverse`: visible tokens hold 0..K-1, hidden ones K..L-1.)
        pos: (S + L, D) or (1, S + L, D) floating point, added to every image; or None.
        prefix: S, leading rows of `visible` that stay in front; 1 for a class token, 0 without.
        dtype: of the result; None takes the type that torch gives the sum of `visible`, `mask_token` and `pos`.
        checked: raise when a visible token is used twice or an index is outside 0..L-1. Waits for the device.
        impl: "auto", or one of IMPLS, which then runs or raises.
    Returns:
        (B, S + L, D), contiguous. Gradients reach `visible` (0 in rows that no token uses), `mask_token` and `pos`,
        each added up in float32 in a fixed order.
    Raises:
        UserError: shapes, dtypes or devices that do not fit, or an implementation that cannot take this call.
    """
    _check(visible, mask_token, inverse, pos, prefix, dtype)
    if checked:
        _check_indices(inverse, visible.shape[1] - prefix)
    tensors = (visible, mask_token) if pos is None else (visible, mask_token, pos)
    chosen = resolve("patch_unshuffle", impl, IMPLS, partial(_why_not, tensors, dtype))
    if chosen == "ref":
        return patch_unshuffle_ref(visible, mask_token, inverse, pos, prefix=prefix, dtype=dtype)
    out = _promoted(visible, mask_token, pos) if dtype is None else dtype
    D = visible.shape[2]
    flat = None if pos is None else pos.reshape(-1, D)
    return _PatchUnshuffle.apply(visible, mask_token.reshape(D), inverse, flat, prefix, out, chosen)


def _check(
    visible: Tensor, mask_token: Tensor, inverse: Tensor, pos: Tensor | None, prefix: int, dtype: torch.dtype | None
) -> None:
    op = "patch_unshuffle"
    check_dtype(op, "visible", visible, FLOATS, "it holds token vectors")
    check_dtype(op, "mask_token", mask_token, FLOATS, "it is a token vector")
    check_dtype(op, "inverse", inverse, (torch.int64,), "it holds the place of each token among the visible ones")
    check_same_device(op, visible=visible, mask_token=mask_token, inverse=inverse)
    check_shape(op, "visible", visible, (None, None, None), "a batch of sequences is (B, S + K, D)")
    B, rows, D = visible.shape
    if prefix < 0:
        fail(op, "prefix", prefix, "0 or more", "it is the number of leading rows without a place in the image")
    if rows <= prefix:
        fail(op, "visible", f"{rows} rows", f"at least {prefix + 1}", f"{prefix} prefix rows come before visible ones")
    if tuple(mask_token.shape) not in ((D,), (1, 1, D)):
        wanted = f"({D},) or (1, 1, {D})"
        fail(op, "mask_token", f"shape {tuple(mask_token.shape)}", wanted, f"visible tokens are {D} wide")
    check_shape(op, "inverse", inverse, (B, None), f"visible holds {B} sequences")
    T = prefix + inverse.shape[1]
    if pos is not None:
        check_dtype(op, "pos", pos, FLOATS, "it holds token vectors")
        check_same_device(op, visible=visible, pos=pos)
        if tuple(pos.shape) not in ((T, D), (1, T, D)):
            reason = f"{prefix} prefix rows and {T - prefix} tokens of width {D} get one each"
            fail(op, "pos", f"shape {tuple(pos.shape)}", f"({T}, {D}) or (1, {T}, {D})", reason)
    if dtype is not None and dtype not in FLOATS:
        fail(op, "dtype", dtype, "a floating-point type", "the result holds token vectors")


def _check_indices(inverse: Tensor, kept: int) -> None:
    L = inverse.shape[1]
    outside = (inverse < 0) | (inverse >= L)
    if outside.any():
        found = int(inverse[outside][0])
        fail("patch_unshuffle", "inverse", f"the index {found}", f"0..{L - 1}", f"an image has {L} tokens")
    ordered = inverse.sort(dim=1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] < kept)
    if twice.any():
        b, at = twice.nonzero()[0].tolist()
        reason = f"it is there more than once in row {b} and a visible token has one place"
        fail("patch_unshuffle", "inverse", f"the index {int(ordered[b, at])} twice", "distinct visible ones", reason)


def _why_not(tensors: tuple[Tensor, ...], dtype: torch.dtype | None, impl: str) -> str | None:
    if dtype == torch.float64 or any(t.dtype == torch.float64 for t in tensors):
        return "the kernel computes in float32 and was given float64"
    return why_not_on(impl, tensors[0].device.type)


def _promoted(visible: Tensor, mask_token: Tensor, pos: Tensor | None) -> torch.dtype:
    both = torch.promote_types(visible.dtype, mask_token.dtype)
    return both if pos is None else torch.promote_types(both, pos.dtype)


# contract: as in noop.py. The backward needs the upstream gradient and `inverse`; what it is not asked for is (0,).
torch.library.define(
    "mimfast::patch_unshuffle_fwd",
    "(Tensor visible, Tensor mask_token, Tensor inverse, Tensor? pos, int prefix, ScalarType dtype, str impl) "
    "-> Tensor",
)
torch.library.define(
    "mimfast::patch_unshuffle_bwd",
    "(Tensor upstream, Tensor inverse, int rows, int prefix, ScalarType visible, bool mask_token, bool pos, str impl) "
    "-> (Tensor d_visible, Tensor d_mask_token, Tensor d_pos)",
)


@torch.library.impl("mimfast::patch_unshuffle_fwd", ("cpu", "cuda"))
def _fwd(*args):
    from mimfast.kernels.patch_unshuffle import patch_unshuffle_fwd

    return patch_unshuffle_fwd(*args[:-1])  # the last one is impl, and triton is the only one so far


@torch.library.impl("mimfast::patch_unshuffle_bwd", ("cpu", "cuda"))
def _bwd(*args):
    from mimfast.kernels.patch_unshuffle import patch_unshuffle_bwd

    return patch_unshuffle_bwd(*args[:-1])


@torch.library.register_fake("mimfast::patch_unshuffle_fwd")
def _fwd_fake(visible, mask_token, inverse, pos, prefix, dtype, impl):  # noqa: ARG001
    return visible.new_empty((inverse.shape[0], prefix + inverse.shape[1], visible.shape[2]), dtype=dtype)


@torch.library.register_fake("mimfast::patch_unshuffle_bwd")
def _bwd_fake(upstream, inverse, rows, prefix, visible, mask_token, pos, impl):  # noqa: ARG001
    B, T, D = upstream.shape
    d_visible = upstream.new_empty((B, rows, D), dtype=visible)
    d_mask_token = upstream.new_empty((D,) if mask_token else (0,), dtype=torch.float32)
    return d_visible, d_mask_token, upstream.new_empty((T, D) if pos else (0,), dtype=torch.float32)


class _PatchUnshuffle(torch.autograd.Function):
    @staticmethod
    def forward(ctx, visible, mask_token, inverse, pos, prefix, dtype, impl):
        ctx.save_for_backward(inverse)
        ctx.config = visible.shape[1], prefix, visible.dtype, impl
        ctx.types = mask_token.dtype, None if pos is None else pos.dtype
        return torch.ops.mimfast.patch_unshuffle_fwd(visible, mask_token, inverse, pos, prefix, dtype, impl)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        rows, prefix, visible, impl = ctx.config
        token, pos = ctx.needs_input_grad[1], ctx.needs_input_grad[3]
        d_visible, d_token, d_pos = torch.ops.mimfast.patch_unshuffle_bwd(
            upstream, *ctx.saved_tensors, rows, prefix, visible, token, pos, impl
        )
        d_token = d_token.to(ctx.types[0]) if token else None
        return d_visible, d_token, None, d_pos.to(ctx.types[1]) if pos else None, None, None, None
