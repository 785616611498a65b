"""Self-attention inside many short groups of tokens, from packed q, k, v to merged heads. arXiv:1706.03762, equation 1.

For each group and head, over the tokens of that group only: out = softmax(scale * q k^T) v.
B groups of equal length N, or T tokens of G groups end to end; D width, E = 3D packed as [3, heads, d], h heads
"""

import importlib.util
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mimfast import _native
from mimfast._check import check_dtype, check_same_device, check_shape, fail
from mimfast.ops._choice import Impl, _constant_under_compile, resolve, why_not_on
from mimfast.ops._packed import Rows, pad_maps, take

IMPLS = ("triton", "cpu", "sdpa", "ref")
MAX_LENGTH, HEADS, WIDE_TILE = 256, (16, 128), 8192  # what the kernels take, the last one that of Triton


def short_attention_ref(
    qkv: Tensor, heads: int, *, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None,
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    wide = qkv.to(torch.promote_types(qkv.dtype, torch.float32))
    if cu_seqlens is None:
        group_BNE, inside_BN = wide, torch.ones(qkv.shape[:2], dtype=torch.bool, device=qkv.device)
    else:
        there, back, inside_BN = pad_maps(cu_seqlens, qkv.shape[0], _longest(qkv, cu_seqlens, max_seqlen))
        group_BNE = take(wide, there).view(*inside_BN.shape, qkv.shape[-1])  # padded, with zeros
    q, k, v = _split(group_BNE, heads)
    score_BhNN = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    prob_BhNN = score_BhNN.masked_fill(~inside_BN[:, None, None], float("-inf")).softmax(-1)
    out_BND = (prob_BhNN @ v).transpose(1, 2).flatten(2)
    return (out_BND if cu_seqlens is None else take(out_BND.flatten(0, 1), back)).to(qkv.dtype)


def short_attention(
    qkv: Tensor, heads: int, *, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None,
    scale: float | None = None, impl: Impl = "auto",
) -> Tensor:  # fmt: skip
    """Attend within each group of tokens; reads the output of one fused qkv projection in place and merges the heads.

    Args:
        qkv: (B, N, 3D), B groups of N tokens; or (T, 3D) packed groups with `cu_seqlens`. float32, bfloat16 or float16
            (float64 runs `sdpa` and `ref`). The last dimension is [q | k | v], each [heads, d]. Any strides; a last
            dimension that is not dense is copied once.
        heads: number of heads; D = heads * d. `triton` and `cpu` take d from 16 to 128 and N up to 256.
        cu_seqlens: (G + 1) int32 on the device of qkv: group g is rows cu_seqlens[g] to cu_seqlens[g + 1]. Starts at 0,
            never decreases; groups may be empty. Rows behind the last group get 0, also as gradient.
        max_seqlen: no group of a packed call is longer. Tight is faster; without it 256 is taken, on a CPU the truth.
            A GPU is not made to wait for a look at the groups: there the result of a longer one is undefined.
        scale: of the scores; default 1 / sqrt(d).
        impl: "auto", or one of IMPLS, which then runs or raises. "sdpa" is torch's own attention; for packed groups its
            varlen_attn (or flash-attn's) on a GPU, else groups padded to max_seqlen.
    Returns:
        (B, N, D) or (T, D) in the dtype of qkv, heads merged, contiguous; autocast does not change it.
    Raises:
        UserError: shapes, dtypes or devices that do not fit, or an implementation that cannot take this call.
    """
    _check(qkv, heads, cu_seqlens, max_seqlen)
    chosen = resolve("short_attention", impl, IMPLS, partial(_why_not, qkv, heads, cu_seqlens, max_seqlen))
    if chosen in ("triton", "cpu"):
        limit = 0 if cu_seqlens is None else max_seqlen or MAX_LENGTH
        scale = (qkv.shape[-1] // (3 * heads)) ** -0.5 if scale is None else float(scale)
        return _ShortAttention.apply(qkv, cu_seqlens, heads, limit, scale, chosen)
    with torch.autocast(qkv.device.type, enabled=False):  # a product in fewer bits is not this op
        if chosen == "ref":
            return short_attention_ref(qkv, heads, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, scale=scale)
        if cu_seqlens is None:
            return _sdpa(qkv, heads, None, scale)
        longest, source = _longest(qkv, cu_seqlens, max_seqlen), _varlen_of(qkv, heads, scale)
        if source is not None:
            return _varlen(source, qkv, heads, cu_seqlens, longest, scale)
        there, back, inside_BN = pad_maps(cu_seqlens, qkv.shape[0], longest)
        group_BNE = Rows.apply(qkv, there, back).view(*inside_BN.shape, qkv.shape[-1])
        return Rows.apply(_sdpa(group_BNE, heads, inside_BN[:, None, None], scale).flatten(0, 1), back, there)


def _check(qkv: Tensor, heads: int, cu_seqlens: Tensor | None, max_seqlen: int | None) -> None:
    op = "short_attention"
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    check_dtype(op, "qkv", qkv, dtypes, "scores are products of real numbers")
    packed = "(tokens, 3 * width) goes with cu_seqlens" if cu_seqlens is not None else "(groups, tokens, 3 * width)"
    check_shape(op, "qkv", qkv, (None,) * (3 if cu_seqlens is None else 2), f"it is {packed}")
    if heads < 1 or qkv.shape[-1] % (3 * heads) or qkv.shape[-1] == 0:
        fail(op, "heads", heads, f"a divisor of {qkv.shape[-1]} / 3", "q, k and v are split evenly among the heads")
    if cu_seqlens is None and max_seqlen is not None:
        fail(op, "max_seqlen", max_seqlen, "None", f"without cu_seqlens every group has {qkv.shape[1]} tokens")
    if cu_seqlens is None:
        return
    check_dtype(op, "cu_seqlens", cu_seqlens, (torch.int32,), "it holds where groups begin")
    check_shape(op, "cu_seqlens", cu_seqlens, (None,), "it is one list")
    check_same_device(op, qkv=qkv, cu_seqlens=cu_seqlens)
    if not cu_seqlens.shape[0]:
        fail(op, "cu_seqlens", "length 0", "length groups + 1", "it ends with the end of the last group")
    if max_seqlen is not None and max_seqlen < 1:
        fail(op, "max_seqlen", max_seqlen, "1 or more", "it is the length of the longest group")
    if _may_look(qkv):
        _check_bounds(cu_seqlens, qkv.shape[0], max_seqlen)


def _may_look(qkv: Tensor) -> bool:
    return qkv.device.type == "cpu" and not torch.compiler.is_compiling()  # elsewhere looking would mean waiting


def _check_bounds(cu_seqlens: Tensor, tokens: int, max_seqlen: int | None) -> None:
    op, lengths = "short_attention", cu_seqlens.diff().tolist()
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last > tokens:
        fail(op, "cu_seqlens", f"ends {first} and {last}", f"0 and at most {tokens}", f"qkv has {tokens} rows")
    short, long = min(lengths, default=0), max(lengths, default=0)
    if short < 0:
        fail(op, "cu_seqlens", f"a step of {short}", "steps of 0 or more", "a group ends where the next one begins")
    if max_seqlen is not None and long > max_seqlen:
        fail(op, "max_seqlen", max_seqlen, f"{long} or more", f"the longest group of cu_seqlens has {long} tokens")


def _why_not(qkv: Tensor, heads: int, cu_seqlens: Tensor | None, max_seqlen: int | None, impl: str) -> str | None:
    if impl not in ("triton", "cpu"):
        return why_not_on(impl, qkv.device.type)
    if qkv.dtype == torch.float64 or (impl == "cpu" and qkv.dtype == torch.float16):
        return f"the kernel computes in float32 and has no code for a tensor of {str(qkv.dtype).removeprefix('torch.')}"
    d, name = qkv.shape[-1] // (3 * heads), "qkv" if cu_seqlens is None else "max_seqlen"
    if not HEADS[0] <= d <= HEADS[1]:
        return f"the kernel takes {HEADS[0]} to {HEADS[1]} values per head, and {heads * d} / {heads} heads is {d}"
    longest = qkv.shape[1] if cu_seqlens is None else max_seqlen or MAX_LENGTH
    if longest > MAX_LENGTH:
        return f"the kernel keeps a group on chip, which suits up to {MAX_LENGTH} tokens, and {name} gives {longest}"
    tile = 1 << max(4, (longest - 1).bit_length()) + (d - 1).bit_length()  # padded to powers of 2
    if impl == "triton" and qkv.element_size() == 4 and tile > WIDE_TILE:
        return f"{longest} tokens x {d} values pad to {tile}, and float32 keys beyond {WIDE_TILE} do not fit on chip"
    return why_not_on(impl, qkv.device.type)


def _split(group_BNE: Tensor, heads: int) -> tuple[Tensor, ...]:
    """q, k, v as (B, heads, N, d) views; unbind, because its gradient is one copy and that of indexing five passes."""
    return group_BNE.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _sdpa(qkv: Tensor, heads: int, mask: Tensor | None, scale: float | None) -> Tensor:
    q, k, v = _split(qkv, heads)
    out_BhNd = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out_BhNd.transpose(1, 2).contiguous().flatten(2)  # no copy: torch's kernels write (B, N, heads, d)


def _varlen_of(qkv: Tensor, heads: int, scale: float | None) -> str | None:
    """Whose packed attention takes this call: "torch", "flash_attn" or None."""
    d = qkv.shape[-1] // (3 * heads)
    fits = qkv.dtype in (torch.bfloat16, torch.float16) and d % 8 == 0 and d <= 256 and (scale is None or scale > 0)
    return _installed_varlen(qkv.device.index) if fits and qkv.is_cuda else None


@_constant_under_compile
def _installed_varlen(device: int) -> str | None:
    if torch.cuda.get_device_capability(device) < (8, 0):
        return None
    if torch.backends.cuda.is_flash_attention_available():
        return "torch"
    return "flash_attn" if importlib.util.find_spec("flash_attn") else None


def _varlen(source: str, qkv: Tensor, heads: int, cu_seqlens: Tensor, longest: int, scale: float | None) -> Tensor:
    """Packed attention of torch or flash-attn, which leave rows behind the last group as they are: masked here."""
    owned_T1 = torch.arange(qkv.shape[0], device=qkv.device)[:, None] < cu_seqlens[-1]
    q, k, v = torch.where(owned_T1, qkv, 0).unflatten(-1, (3, heads, -1)).unbind(1)
    groups = (cu_seqlens, cu_seqlens, longest, longest)
    if source == "torch":
        from torch.nn.attention.varlen import varlen_attn

        out_Thd = varlen_attn(q, k, v, *groups, scale=scale)
        assert isinstance(out_Thd, Tensor)  # a tuple only when more is asked for
    else:
        from flash_attn import flash_attn_varlen_func

        out_Thd = flash_attn_varlen_func(q, k, v, *groups, softmax_scale=scale)
    return torch.where(owned_T1, out_Thd.flatten(1), 0)


def _longest(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int | None) -> int:
    if max_seqlen is None and _may_look(qkv):
        return max([1, *cu_seqlens.diff().tolist()])
    return min(MAX_LENGTH, qkv.shape[0]) if max_seqlen is None else max_seqlen


# contract: define + impl + register_fake under a thin autograd.Function, for the launch cost (see noop.py)
_CONFIG = "Tensor qkv, Tensor? cu_seqlens, int heads, SymInt limit, float scale, str impl"
torch.library.define("mimfast::short_attention_fwd", f"({_CONFIG}) -> Tensor")
torch.library.define("mimfast::short_attention_bwd", f"(Tensor grad, {_CONFIG}) -> Tensor")


@torch.library.impl("mimfast::short_attention_fwd", ("cpu", "cuda"))
def _fwd(*args):
    if args[-1] == "cpu":
        return _run_cpu(None, *args)
    from mimfast.kernels.short_attention import short_attention_fwd

    return short_attention_fwd(*args[:-1])


@torch.library.impl("mimfast::short_attention_bwd", ("cpu", "cuda"))
def _bwd(*args):
    if args[-1] == "cpu":
        return _run_cpu(*args)
    from mimfast.kernels.short_attention import short_attention_bwd

    return short_attention_bwd(*args[:-1])


def _run_cpu(grad, qkv, cu_seqlens, heads, _, scale, __):
    result, core = _fwd_fake(qkv) if grad is None else _bwd_fake(grad, qkv), _native.core()
    assert core is not None  # or `resolve` would have refused
    qkv, cu, grad = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (qkv, cu_seqlens, grad))
    groups, tokens = qkv.shape[:2] if cu is None else (cu.shape[0] - 1, qkv.shape[0])
    at, forward = [0 if x is None else x.data_ptr() for x in (qkv, cu, grad, result)], grad is None
    stride, grad_stride = ((0, *x.stride())[-3:-1] for x in (qkv, qkv if forward else grad))
    call = core.ShortAttention(
        qkv=at[0], bf16=qkv.dtype == torch.bfloat16, qkv_stride=stride, cu_seqlens=at[1], groups=groups, tokens=tokens,
        heads=heads, head=qkv.shape[-1] // (3 * heads), scale=scale, grad=at[2], grad_stride=grad_stride,
        out=at[3] if forward else 0, d_qkv=0 if forward else at[3],
    )  # fmt: skip
    core.short_attention_cpu(call, torch.get_num_threads())
    return result


@torch.library.register_fake("mimfast::short_attention_fwd")
def _fwd_fake(qkv, *_):
    return qkv.new_empty((*qkv.shape[:-1], qkv.shape[-1] // 3))


@torch.library.register_fake("mimfast::short_attention_bwd")
def _bwd_fake(grad, qkv, *_):  # noqa: ARG001
    return qkv.new_empty(qkv.shape)


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cu_seqlens, *config):
        ctx.save_for_backward(qkv, cu_seqlens)
        ctx.config = config
        return torch.ops.mimfast.short_attention_fwd(qkv, cu_seqlens, *config)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        d_qkv = torch.ops.mimfast.short_attention_bwd(grad, *ctx.saved_tensors, *ctx.config)
        return d_qkv, None, None, None, None, None
