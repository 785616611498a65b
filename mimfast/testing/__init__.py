"""Helpers shared by tests and benchmarks: the tolerance rule, poison, and (in their files) fair races and records.

mimfast/testing/<op>.py holds the cases of one op: `CASES`, and `make(case)` which returns the arguments as a dict.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mimfast.testing.racing import Times as Times
from mimfast.testing.racing import as_graph as as_graph
from mimfast.testing.racing import race as race
from mimfast.testing.record import machine as machine
from mimfast.testing.record import write_record as write_record

# allowed beside the 2x rule, in fp32 units in the last place of the largest value: torch may round exactly by luck
FLOOR_ULPS = 8


class Error(NamedTuple):
    """Largest absolute errors of one tensor against fp64, and what is allowed."""

    name: str
    kernel: float
    torch: float
    allowed: float


def assert_close_to_ref(
    fn: Callable[..., Tensor], ref: Callable[..., Tensor], args: dict[str, Any], seed: int = 0
) -> list[Error]:
    """The tolerance rule: the error of `fn` is at most twice that of `ref` in the same dtype, both against fp64.

    Compares the output, and the gradient of every tensor in `args` that requires one, for a random upstream gradient.
    Prints both errors of each; returns them.
    """
    errors = compare(fn, ref, args, seed)
    for e in errors:
        print(f"{e.name}: error {e.kernel:.3e}, torch {e.torch:.3e}, allowed {e.allowed:.3e} (against fp64)")
    bad = [e for e in errors if not e.kernel <= e.allowed]  # `not <=` so that NaN fails
    assert not bad, f"error above twice torch's own: {bad}"
    return errors


def compare(fn: Callable[..., Tensor], ref: Callable[..., Tensor], args: dict[str, Any], seed: int = 0) -> list[Error]:
    """The errors `assert_close_to_ref` judges."""
    truth, plain, kernel = (_outputs(f, a, seed) for f, a in ((ref, _to_fp64(args)), (ref, args), (fn, args)))
    errors = []
    for name, want in truth.items():
        got = kernel[name]
        assert got.dtype == plain[name].dtype, f"{name} has {got.dtype}, torch gives {plain[name].dtype}"
        assert got.shape == want.shape, f"{name} has {tuple(got.shape)}, expected {tuple(want.shape)}"
        noise = FLOOR_ULPS * torch.finfo(torch.float32).eps * _largest(want)  # of fp32: half types get no such gift
        ours, theirs = _largest(got.double() - want), _largest(plain[name].double() - want)
        errors.append(Error(name, ours, theirs, 2 * theirs + noise))
    return errors


def _outputs(fn: Callable[..., Tensor], args: dict[str, Any], seed: int) -> dict[str, Tensor]:
    leaves = {k: v for k, v in args.items() if isinstance(v, Tensor) and v.requires_grad}
    out = fn(**args)
    found = {"output": out.detach()}
    if leaves:
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
        grads = torch.autograd.grad(out, list(leaves.values()), upstream.to(out.device, out.dtype))
        found |= {f"gradient of {k}": g for k, g in zip(leaves, grads)}
    return found


def _to_fp64(args: dict[str, Any]) -> dict[str, Any]:
    def wide(v: Any) -> Any:
        if isinstance(v, Tensor) and v.is_floating_point():
            return v.detach().double().requires_grad_(v.requires_grad)
        return v

    return {k: wide(v) for k, v in args.items()}


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN (integers: their maximum) instead of luck, so that an element never written is seen."""
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)


def skip_unless(impl: str, device: str) -> None:
    """Skip the running test, with the reason, where `impl` cannot run on tensors of this device type."""
    import pytest

    from mimfast.ops._choice import why_not_on

    reason = None if impl in ("auto", "ref") else why_not_on(impl, device)
    if reason is not None:
        pytest.skip(reason)
