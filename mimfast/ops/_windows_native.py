"""Window attention by the native core: mimfast._core, or in tests the emulated core, on tensors that were checked."""

from typing import Any

import torch
from torch import Tensor

from mimfast import _native
from mimfast.ops._windows import CHUNK, PADS


def run_cpu(
    qkv: Tensor, table: Tensor | None, qkv_bias: Tensor | None, group: Tensor | None, window: list[int],
    shift: list[int], heads: int, scale: float, pad: str, mask_value: float, *, head_scale: Tensor | None = None,
    grad: Tensor | None = None, lanes: int = 16, **outputs: Tensor,
) -> None:  # fmt: skip
    """Run the native code, which fills the `outputs`: out; or d_qkv, d_table, d_bias, d_head_scale, where not empty.

    On vectors of at most `lanes` floats.
    """
    core = _native.core()
    assert core is not None  # or `resolve` would have refused
    if qkv.dtype == torch.float16:  # the native code has float32 and bfloat16
        halves = {name: outputs[name] for name in ("out", "d_qkv") if name in outputs}
        outputs |= {name: torch.empty_like(half, dtype=torch.float32) for name, half in halves.items()}
    else:
        halves = {}
    dtype = torch.float32 if halves else qkv.dtype
    qkv, grad = _rows_dense(qkv.to(dtype)), None if grad is None else _rows_dense(grad.to(dtype))
    call, _kept = native_call(
        core, qkv, table, qkv_bias, group, window, shift, heads, scale, pad, mask_value, grad, outputs, head_scale
    )
    core.window_attention_cpu(call, torch.get_num_threads(), lanes)
    for name, half in halves.items():
        half.copy_(outputs[name])


def native_call(
    core, qkv: Tensor, table: Tensor | None, qkv_bias: Tensor | None, group: Tensor | None, window: list[int],
    shift: list[int], heads: int, scale: float, pad: str, mask_value: float, grad: Tensor | None,
    outputs: dict[str, Tensor], head_scale: Tensor | None = None,
) -> tuple[Any, list[Tensor | None]]:  # fmt: skip
    """csrc/window_attention.h's struct, and the tensors it points into that must live until the call."""
    table, qkv_bias, head_scale = (None if x is None else x.float().contiguous() for x in (table, qkv_bias, head_scale))
    inputs = {"table": table, "qkv_bias": qkv_bias, "head_scale": head_scale, "group": group, "grad": grad}
    filled = {name: outputs.get(name) for name in ("out", "d_qkv", "d_table", "d_bias", "d_head_scale")}
    call = core.WindowAttention(
        qkv=qkv.data_ptr(), bf16=qkv.dtype == torch.bfloat16, qkv_stride=qkv.stride()[:3],
        group_stride=0 if group is None or len(group) == 1 else group.stride(0),
        batch=qkv.shape[0], rows=qkv.shape[1], cols=qkv.shape[2],
        heads=heads, head=qkv.shape[3] // (3 * heads), window=window, shift=shift, roll_first=pad == PADS[1],
        scale=scale, mask=mask_value, grad_stride=(0, 0, 0) if grad is None else grad.stride()[:3],
        **{name: 0 if x is None or not x.numel() else x.data_ptr() for name, x in (inputs | filled).items()},
    )  # fmt: skip
    return call, [qkv, *inputs.values()]


def run_cuda(
    core, qkv: Tensor, table: Tensor | None, qkv_bias: Tensor | None, group: Tensor | None, window: list[int],
    shift: list[int], heads: int, scale: float, pad: str, mask_value: float, *, head_scale: Tensor | None = None,
    grad: Tensor | None = None, parts: int = 0, **outputs: Tensor,
) -> None:  # fmt: skip
    """Run the CUDA kernel of mimfast._core or of the emulated core, which fills the `outputs`, as run_cpu does.

    `parts` blocks share the windows of a head; 0: as many as the device runs at once.
    """
    qkv, grad = _aligned(qkv), None if grad is None else _aligned(grad)
    sums = [x for name, x in outputs.items() if name not in ("out", "d_qkv") and x.numel()]
    if not qkv.numel():  # nobody would write them
        for x in sums:
            x.zero_()
        return
    config = (window, shift, heads, scale, pad, mask_value)
    call, _kept = native_call(core, qkv, table, qkv_bias, group, *config, grad, outputs, head_scale)
    with torch.cuda.device_of(qkv):
        parts, partial = parts or core.window_attention_cuda_parts(call), None
        if sums:
            columns = (2 * window[0] - 1) * (2 * window[1] - 1) + 2 * qkv.shape[3] // (3 * heads)
            columns += head_scale is not None
            partial = qkv.new_empty((parts, heads, columns), dtype=torch.float32)
        stream = torch.cuda.current_stream().cuda_stream if qkv.is_cuda else 0
        core.window_attention_cuda(call, parts, 0 if partial is None else partial.data_ptr(), stream)


def _aligned(x: Tensor) -> Tensor:
    """`x`, or a copy whose rows are dense and begin at multiples of 16 bytes."""
    fits = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(s % CHUNK == 0 for s in x.stride()[:-1])
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _rows_dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
