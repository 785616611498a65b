"""Both versions of window attention in the situations that broke earlier kernels, and on a GPU in those of its user.

Batches beyond what a launch holds in one dimension, maps that are not square, odd batches in half types, other streams
and devices, replayed graphs. A test that needs a GPU is skipped without one.
"""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from mimfast.ops import _choice, _windows, window_attention, window_attention_v2
from mimfast.ops.window_attention import IMPLS, window_attention_ref
from mimfast.ops.window_attention_v2 import IMPLS as IMPLS_V2
from mimfast.ops.window_attention_v2 import window_attention_v2_ref
from mimfast.testing import assert_close_to_ref, compare, poisoned, skip_unless
from mimfast.testing import window_attention as v1
from mimfast.testing import window_attention_v2 as v2
from mimfast.testing.window_attention import FIRST, LAST, Case

OPS = {
    "v1": (window_attention, window_attention_ref, v1.make, v1.eager),
    "v2": (window_attention_v2, window_attention_v2_ref, v2.make, v2.eager),
}
HERE = torch.cuda.is_available()
ALL = [
    pytest.param(version, impl, marks=[pytest.mark.slow] if impl == "triton" and not HERE else [])  # interpreted
    for version, impls in (("v1", IMPLS), ("v2", IMPLS_V2))
    for impl in impls
]
FUSED = [pair for pair in ALL if pair.values[1] != "ref"]
ON_GPU = [pair for pair in ALL if pair.values[1] != "cpu"]
KERNELS = ("triton", "cuda")
needs_gpu = pytest.mark.skipif(not HERE, reason="needs a GPU")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

# odd batches, maps that are not square, heads of every stage of Swin-T, half types, padding in both orders, groups
SHAPES = [
    Case(3, 14, 21, 3, 32, 7, 3), Case(3, 7, 14, 6, 32, 7, 0, "bf16"), Case(1, 14, 7, 12, 32, 7, 3, "fp16"),
    Case(1, 7, 7, 24, 32, 7, 0, "bf16"), Case(3, 9, 13, 2, 24, 6, 3, "bf16", FIRST, bias=True),
    Case(3, 13, 9, 2, 24, 6, 3, "bf16", LAST, bias=True), Case(5, 6, 11, 1, 64, 4, 2, "fp16", FIRST, bias=True),
    Case(5, 11, 6, 1, 64, 4, 2, "bf16", LAST), Case(3, 8, 12, 2, 16, 4, 2, "bf16", groups=3),
    Case(3, 7, 10, 2, 48, 4, 1, "bf16", LAST, groups=2, bias=True),
    Case(3, 10, 7, 2, 16, 4, 2, "fp32", FIRST, groups=2, shared=True, bias=True),
    Case(1, 12, 24, 2, 32, 12, 6, "bf16"), Case(1, 14, 28, 1, 32, 14, 7, "bf16"), Case(1, 16, 32, 1, 32, 16, 8, "bf16"),
    Case(1, 24, 24, 1, 16, 24, 0, "bf16"),
]  # fmt: skip
# one window an image: more images than 1023; and more windows than 65535
MANY = Case(1025, 1, 2, 1, 16, (1, 2))
MORE = Case(1031, 8, 16, 1, 16, (1, 2), (0, 1))


def _judge(version: str, impl: str, case: Case, device: str) -> None:
    """The tolerance rule, as in test_window_attention.py."""
    op, ref, make, eager = OPS[version]
    _skip_unless_it_takes(version, impl, case, device)
    args = make(case, device)
    if version == "v2":
        args["logit_scale"].requires_grad_(False)  # one number for a head: judged in test_window_attention_v2.py
    elif impl == "sdpa" and case.dtype != "fp32":
        args["table"].requires_grad_(False)  # judged below
    with poisoned():
        assert_close_to_ref(partial(op, impl=impl), ref if case.dtype == "fp32" else eager, args)


def _skip_unless_it_takes(version: str, impl: str, case: Case, device: str) -> None:
    skip_unless(impl, device)
    reason = _windows.why_not(
        OPS[version][2](case._replace(batch=1), device)["qkv"], _windows.pair(case.window), case.heads, impl
    )
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize(("version", "impl"), FUSED)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_shapes_and_types(case, version, impl, device):
    if impl == "triton" and device == "cpu":
        pytest.skip("interpreted in test_window_attention.py, on smaller cases")
    _judge(version, impl, case, device)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("case", [SHAPES[0], SHAPES[4], SHAPES[8]], ids=str)
def test_table_gradient_of_torchs_attention_in_half_types(case, dtype, device):
    """torch rounds the bias and the gradient of each score, our chain neither: the rule for the root mean square."""
    errors = []
    for seed in range(8):
        torch.manual_seed(seed)
        args = v1.make(case._replace(dtype=dtype), device)
        found = compare(partial(window_attention, impl="sdpa"), v1.eager, args, seed)
        errors += [(e.kernel, e.torch) for e in found if e.name == "gradient of table"]
    kernel, plain = torch.tensor(errors).square().mean(0).sqrt().tolist()
    print(f"sdpa {kernel:.3e}, torch {plain:.3e}")
    assert len(errors) == 8
    assert kernel <= 2 * plain


@pytest.mark.parametrize(("version", "impl"), FUSED)
@pytest.mark.parametrize("case", [MANY, MORE], ids=["1025 images", "65984 windows"])
def test_more_than_one_dimension_of_a_launch_holds(case, version, impl, device):
    if impl == "triton" and device == "cpu" and case is MORE:
        pytest.skip("too many programs for Triton's interpreter")
    _judge(version, impl, case, device)


@pytest.mark.parametrize(("version", "impl"), ALL)
def test_compiled_once_for_every_batch(version, impl, device):
    op, _, make, _ = OPS[version]
    case = Case(7, 5, 6, 2, 16, 4, 2, pad=LAST, groups=2, bias=True)
    skip_unless(impl, device)
    args, graphs = make(case, device), []

    def count(graph: torch.fx.GraphModule, _: list) -> object:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    rest = {k: v for k, v in args.items() if k not in ("qkv", "group")}
    compiled = torch.compile(partial(op, **rest, impl=impl), backend=count, fullgraph=True)
    for batch in (7, 8, 11):
        found = make(case._replace(batch=batch), device)
        given = {name: found[name] for name in ("qkv", "group")}
        for tensor in given.values():
            torch._dynamo.mark_dynamic(tensor, 0)
        torch.testing.assert_close(compiled(**given), op(**given, **rest, impl=impl))
    assert len(graphs) == 1


@needs_gpu
@pytest.mark.parametrize(("version", "impl"), ON_GPU)
@pytest.mark.parametrize("pad", [None, FIRST, LAST])
def test_side_stream_and_replay_of_a_graph(pad, version, impl, device):
    """Changed inputs are seen: q, k, v, the table and the group ids of the captured call are read again."""
    case = Case(3, 8, 12, 2, 32, 4, 2, "bf16", groups=2) if pad is None else Case(3, 7, 10, 2, 32, 4, 2, "bf16", pad)
    case = case._replace(bias=pad is not None)
    _skip_unless_it_takes(version, impl, case, device)
    op, _, make, _ = OPS[version]
    args, again = make(case, device), make(case, device)
    leaves = [v for v in args.values() if isinstance(v, Tensor) and v.requires_grad]
    upstream = torch.randn(3, *args["qkv"].shape[1:3], 64, device=device, dtype=torch.bfloat16)

    def run() -> list[Tensor]:
        out = op(**args, impl=impl)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]

    def check(found: list[Tensor]) -> None:
        close = {"rtol": 0.0, "atol": 0.0} if impl in KERNELS else {}  # a library may choose another algorithm
        torch.testing.assert_close(found, run(), **close)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)  # cycles: work on another stream than this one would come first
        aside = run()
    torch.cuda.current_stream().wait_stream(side)
    check(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        for name, value in again.items():
            if isinstance(value, Tensor):
                args[name].copy_(value)
    graph.replay()
    check(captured)


@needs_two
@pytest.mark.parametrize(("version", "impl"), ON_GPU)
def test_another_device_than_the_current_one(version, impl):
    case = Case(2, 8, 12, 2, 32, 4, 2, "bf16")
    _skip_unless_it_takes(version, impl, case, "cuda:1")
    op, _, make, _ = OPS[version]
    args = make(case, "cuda:1")
    with torch.cuda.device(0):
        out = op(**args, impl=impl)
        (grad,) = torch.autograd.grad(out.sum(), args["table"])
    assert out.device == grad.device == torch.device("cuda:1")
    with torch.cuda.device(1):
        torch.testing.assert_close(out, op(**args, impl=impl))


@needs_gpu
@pytest.mark.parametrize(("version", "impl"), ON_GPU)
def test_nothing_waits_for_the_device(version, impl, device):
    op, _, make, _ = OPS[version]
    for case in (Case(2, 8, 12, 2, 32, 4, 2, "bf16", groups=2), Case(2, 7, 9, 2, 32, 4, 2, "bf16", LAST, bias=True)):
        _skip_unless_it_takes(version, impl, case, device)
        args = make(case, device)
        op(**args, impl=impl).sum().backward()  # compiled and loaded
        torch.cuda.set_sync_debug_mode("error")
        try:
            op(**args, impl=impl).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("impls", [IMPLS, IMPLS_V2], ids=["v1", "v2"])
def test_auto_on_a_gpu_without_a_record_is_torchs_attention(impls, monkeypatch):
    monkeypatch.setattr(_choice, "verified", dict)
    qkv = SimpleNamespace(
        shape=(2, 14, 14, 288), dtype=torch.bfloat16, is_cuda=True, device=torch.device("cuda"), element_size=lambda: 2
    )
    why_not = partial(_windows.why_not, qkv, (7, 7), 3)
    assert _choice.resolve("window_attention", "auto", impls, why_not) == "sdpa"
    qkv.shape = (2, 1036, 1036, 288)
    assert why_not("sdpa") == "torch's kernel takes up to 65535 windows times heads of an image, and these are 65712"
    assert _choice.resolve("window_attention", "auto", impls, why_not) == "ref"
