"""`accelerate`: find what is known in a model, prove the fused paths against the plain, swap; `restore` undoes it."""

import copy
import importlib
import statistics
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mimfast._check import UserError, fail
from mimfast.dropin.kind import Kind, Linear, Swapped, put
from mimfast.ops._choice import why_not_auto, why_not_on

# the plain path rounds as well: a fused one may be this many times further from fp64, and never has to be closer than
# this share of the values
WORSE, FLOOR = 2.0, 1e-6
# gradients of fewer values, such as a logit scale for each head, are sums that cancel: which path comes closer is luck
# below this share of them
FEW, LUCK = 32, 1e-4
BATCH, ROUNDS = 2, 3


class Row(NamedTuple):
    """What happened to one module.

    Attributes:
        module: its name in the model.
        plain: what it was, such as "timm SwinTransformerBlock".
        fused: op and implementation that stand for its attention now, or "" when it was left as it is.
        error: difference from fp64, root mean square relative to that of the values, of the output or gradient that is
            worst (gradients of fewer than 32 values from 1e-4 on); None: not measured.
        plain_error: the same of the plain path.
        speedup: time of the plain path over that of the fused one, forward and backward of the module; None likewise.
        reason: why it was left as it is, or "".
    """

    module: str
    plain: str
    fused: str
    error: float | None = None
    plain_error: float | None = None
    speedup: float | None = None
    reason: str = ""


class _Proof(NamedTuple):
    error: float
    plain_error: float
    speedup: float


def accelerate(model: nn.Module, verify: bool = True, report: bool = True) -> list[Row]:
    """Put mimfast's attention into a model somebody else wrote, in place.

    Known are timm's Swin, Swin V2 and ViT, transformers' Swin, Swin V2 and ViTMAE, and microsoft/Swin-Transformer's
    blocks (by structure), alone or inside a larger model. On a CPU in float32 the linear layers inside these go
    through oneDNN. Parameters, state-dict keys, hooks, train and eval mode, drop path, autocast, activation
    checkpointing, DDP and torch.compile (call this before compiling) go on as before. A module whose attention drops
    weights in training, or whose attention is hooked, runs its plain path while that is so.

    Args:
        model: any module; it is changed in place.
        verify: before anything is changed, run each kind and size of module once on random data beside its plain path,
            forward and backward, on the module's own device and dtype, and measure both.
        report: print the table.
    Returns:
        a row for each known module, in the order of the model.
    Raises:
        UserError: no module is known (the message lists what is, and what the model holds), or a fused path differs
            from fp64 by more than twice what the plain one does, and by more than 1e-6 of the values; the model is then
            untouched.
    """
    found = [
        (name, module, kind) for name, module in model.named_modules() for kind in _kinds() if kind.matches(module)
    ]
    if not found:
        _refuse(model)
    proofs: dict[tuple[Any, ...], _Proof | None] = {}
    rows, swaps = [], []
    for name, module, kind in found:
        if isinstance(module, Swapped):
            rows.append(Row(name, kind.name, "", reason="it is accelerated already"))
            continue
        impl, reason = _choice(module, kind)
        if impl is None:
            rows.append(Row(name, kind.name, "", reason=reason))
            continue
        key = _key(module, kind)
        if key not in proofs:
            proofs[key] = _prove(name, module, kind) if verify else None
        proof = proofs[key] or _Proof(None, None, None)  # type: ignore[arg-type]
        rows.append(Row(name, kind.name, f"{kind.op} ({impl})", *proof))
        swaps.append((module, kind))
    for module, kind in swaps:
        put(module, kind.mixin)
    if report:
        _print(rows, verify)
    return rows


def restore(model: nn.Module) -> int:
    """Undo `accelerate`; returns the number of modules that were put back, their linear layers not counted."""
    count = 0
    for module in model.modules():
        if isinstance(module, Swapped):
            count += not isinstance(module, Linear)
            module.__class__ = module._plain
    return count


def _kinds() -> Iterator[Kind]:
    for file in ("timm_kinds", "hf_kinds", "official_kinds"):  # an official block looks like no other: it comes last
        yield from importlib.import_module(f"mimfast.dropin.{file}").KINDS


def _refuse(model: nn.Module) -> None:
    seen = sorted({type(module).__name__ for module in model.modules()})
    more = f" and {len(seen) - 12} more" if len(seen) > 12 else ""
    wanted = "at least one of " + ", ".join(kind.name for kind in _kinds())
    fail("accelerate", "model", f"none of them among {', '.join(seen[:12])}{more}", wanted, "nothing else is known yet")


def _choice(module: nn.Module, kind: Kind) -> tuple[str | None, str]:
    """The implementation that `auto` takes for this module, or None and why the module is better left alone."""
    reason = kind.why_not(module)
    if reason is not None:
        return None, reason
    weight = next(module.parameters())
    if weight.dtype == torch.float64:
        return None, "the fast paths compute in float32 and its weights are float64"
    device = weight.device.type
    for impl in importlib.import_module(f"mimfast.ops.{kind.op}").IMPLS:
        if impl != "ref" and why_not_on(impl, device) is None and why_not_auto(kind.op, impl) is None:
            return impl, ""
    return None, f"{kind.op} has no fast path that `auto` may take on {device!r}; `mimfast doctor` says why"


def _key(module: nn.Module, kind: Kind) -> tuple[Any, ...]:
    """Modules with equal keys compute the same function of their weights: one proof serves all."""
    shapes = tuple((name, tuple(p.shape), p.dtype, p.device) for name, p in module.named_parameters())
    window = tuple(repr(getattr(module, name, None)) for name in ("window_size", "shift_size", "input_resolution"))
    return kind.name, type(module), shapes, window


def _prove(name: str, module: nn.Module, kind: Kind) -> _Proof:
    """Run a copy of the module, fused and plain, beside fp64. Raises UserError when the fused one is too far away."""
    plain = copy.deepcopy(module).eval()
    parameters = list(plain.parameters())
    with torch.random.fork_rng(devices=[p.device for p in parameters[:1] if p.is_cuda]), torch.no_grad():
        torch.manual_seed(0)
        for parameter in parameters:  # weights that begin at zero would hide a wrong gradient
            parameter.requires_grad_(True).add_(0.02 * torch.randn_like(parameter))
        args = kind.example(plain, BATCH, parameters[0].device, parameters[0].dtype)
    fused = copy.deepcopy(plain)
    put(fused, kind.mixin)
    truth = _results(copy.deepcopy(plain).double(), tuple(a.double() if isinstance(a, Tensor) else a for a in args))
    errors = [_distance(_results(it, args), truth) for it in (plain, fused)]
    if not errors[1] <= max(WORSE * errors[0], FLOOR):
        raise UserError(
            f"accelerate: {name or 'model'} has an error of {errors[1]:.1e} against fp64 when fused, expected at most "
            f"{max(WORSE * errors[0], FLOOR):.1e} because the plain path has {errors[0]:.1e}; the model is untouched"
        )
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for it, seconds in zip((plain, fused), times):
            seconds.append(_time(it, args))
    return _Proof(errors[1], errors[0], statistics.median(times[0]) / statistics.median(times[1]))


def _results(module: nn.Module, args: tuple[Any, ...]) -> list[Tensor]:
    """Output, gradient of the input and gradients of all parameters, for one random weighting of the output."""
    module.zero_grad(set_to_none=True)
    x = args[0].detach().requires_grad_(True)
    out = module(x, *args[1:])
    y = out[0] if isinstance(out, tuple) else out
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (y * weights.to(y)).sum().backward()
    return [t.detach() for t in (y, x.grad, *(p.grad for p in module.parameters())) if t is not None]


def _distance(found: list[Tensor], truth: list[Tensor]) -> float:
    """The difference of the worst tensor but for those that luck decides."""
    if len(found) != len(truth):
        return float("inf")  # a parameter lost its gradient
    shares = [0.0 if b.numel() < FEW and e <= LUCK else e for e, b in zip(_shares(found, truth), truth)]
    return float(torch.tensor(shares, dtype=torch.float64).max())  # NaN if one is, unlike Python's max


def _shares(found: list[Tensor], truth: list[Tensor]) -> list[float]:
    """The difference of each tensor, root mean square, relative to that of its values.

    Sums in another order move single values by more than twice, the root mean square by much less.
    """
    sizes = [_rms(b) for b in truth]
    # some gradients are zero but for rounding, such as that of a bias of the keys: they count against the others
    least = 1e-3 * max(sizes)
    return [_rms(a.double() - b) / max(size, least) for a, b, size in zip(found, truth, sizes)]


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def _time(module: nn.Module, args: tuple[Any, ...]) -> float:
    """Seconds of one forward and backward."""
    x = args[0].detach().requires_grad_(True)
    _wait(x)
    began = time.perf_counter()
    out = module(x, *args[1:])
    (out[0] if isinstance(out, tuple) else out).sum().backward()
    _wait(x)
    return time.perf_counter() - began


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def _print(rows: list[Row], verified: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("module", "from", "to", "error", "plain error", "speed-up", box=None, header_style="bold")
    for row in rows:
        numbers = (
            [f"{row.error:.1e}", f"{row.plain_error:.1e}", f"{row.speedup:.2f}x"] if row.error is not None else [""] * 3
        )
        table.add_row(row.module or "(the model)", row.plain, row.fused or f"left as it is: {row.reason}", *numbers)
    console = Console()
    console.print(table)
    done = sum(bool(row.fused) for row in rows)
    how = "errors against fp64, speed-up of the module forward and backward" if verified else "not verified"
    console.print(f"{done} of {len(rows)} modules accelerated; {how}. mimfast.restore(model) undoes it.")
