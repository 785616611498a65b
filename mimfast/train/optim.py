"""AdamW with MAE's decay groups, and a step that the device itself skips when the gradient is not finite."""

from collections.abc import Container, Iterable

import torch
from torch import Tensor, nn


def make_optimizer(
    module: nn.Module, betas: tuple[float, float], weight_decay: float, no_decay: Container[str] = ()
) -> torch.optim.AdamW:
    """Fused AdamW in two groups: one-dimensional parameters and biases without decay, all others with it.

    As in MAE's code the class and mask tokens, which are three-dimensional, are decayed, unless `no_decay` names them.
    The learning rate starts at 0 and is set every step by `set_lr`.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    plain = [p for name, p in named if p.ndim <= 1 or name.endswith(".bias") or name in no_decay]
    decayed = [p for name, p in named if not (p.ndim <= 1 or name.endswith(".bias") or name in no_decay)]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=betas, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def guarded_step(
    optimizer: torch.optim.AdamW, params: Iterable[nn.Parameter], clip: float | None
) -> tuple[Tensor, Tensor]:
    """One step that leaves weights and moments untouched when any gradient is not finite, without asking the device.

    Args:
        optimizer: fused AdamW; its kernel reads the skip flag where the gradients are.
        params: the parameters whose gradients are judged (and clipped) together.
        clip: largest gradient norm, or None.
    Returns:
        (norm, skipped): the gradient norm before clipping, fp32 scalar, and 1.0 if the step was skipped, else 0.0;
            both on the device.
    """
    params = [p for p in params if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    skipped = (~torch.isfinite(norm)).float()
    if clip is not None:
        nn.utils.clip_grads_with_norm_(params, clip, norm)
    # the fused kernels take the gradient scaler's flag: 1 means do nothing, step counters included
    optimizer.found_inf = skipped  # type: ignore[attr-defined]
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.step()
    return norm, skipped
