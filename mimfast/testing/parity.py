"""Models of timm and transformers at their real sizes before and after `mimfast.accelerate`, both against float64."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mimfast.dropin.swap import FLOOR, WORSE, _shares, accelerate


class Row(NamedTuple):
    """Errors of one model, root mean square relative to that of the values; of the gradients the worst parameter's.

    Attributes:
        model: its name in MODELS.
        modules: how many modules were swapped, of how many that are known.
        forward: error of the output after, and `plain_forward` before.
        gradient: error of the gradients after, and `plain_gradient` before.
    """

    model: str
    modules: tuple[int, int]
    forward: float
    plain_forward: float
    gradient: float
    plain_gradient: float

    @property
    def passed(self) -> bool:
        """The rule of `accelerate`: at most twice the error of the plain model, or within the floor of both."""
        pairs = ((self.forward, self.plain_forward), (self.gradient, self.plain_gradient))
        return self.modules[0] == self.modules[1] > 0 and all(ours <= max(WORSE * it, FLOOR) for ours, it in pairs)


def _timm(name: str, **kwargs: Any) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, drop_path_rate=0.0, **kwargs)


def _hf(family: str, kind: str, **kwargs: Any) -> nn.Module:
    import transformers

    return getattr(transformers, kind)(getattr(transformers, f"{family}Config")(**kwargs))


# name: how it is made, side of its images in px
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "timm swin_tiny": (lambda: _timm("swin_tiny_patch4_window7_224"), 224),
    "timm swin_base": (lambda: _timm("swin_base_patch4_window7_224"), 224),
    "timm swinv2_tiny": (lambda: _timm("swinv2_tiny_window8_256"), 256),
    "timm vit_small": (lambda: _timm("vit_small_patch16_224"), 224),
    "transformers Swin-T": (lambda: _hf("Swin", "SwinModel", drop_path_rate=0.0), 224),
    "transformers Swinv2-T": (lambda: _hf("Swinv2", "Swinv2Model", drop_path_rate=0.0), 224),
    "transformers SwinForMaskedImageModeling-T": (
        lambda: _hf("Swin", "SwinForMaskedImageModeling", drop_path_rate=0.0, encoder_stride=32),
        224,
    ),
    "transformers ViTMAE-B": (lambda: _hf("ViTMAE", "ViTMAEForPreTraining"), 224),
}


def measure(name: str, batch: int = 1, device: str = "cpu") -> Row:
    """Output and gradients of one model in float32, plain and accelerated, and in float64 for the truth."""
    make, side = MODELS[name]
    torch.manual_seed(0)
    plain = make().train().to(device)
    with torch.no_grad():  # what begins at 0 or 1 would hide mistakes
        for parameter in plain.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    img = torch.randn(batch, 3, side, side, device=device)
    truth = _results(copy.deepcopy(plain).double(), img.double())
    before = _results(plain, img)
    rows = accelerate(plain, verify=False, report=False)
    after = _results(plain, img)
    if not len(after) == len(before) == len(truth):
        raise AssertionError(f"{name}: {len(after)} gradients after, {len(before)} before")
    if not all(t.isfinite().all() for t in after):
        raise AssertionError(f"{name}: values or gradients that are not finite")
    forward, plain_forward = (_shares(found[:1], truth[:1])[0] for found in (after, before))
    gradient, plain_gradient = (max(_shares(found[1:], truth[1:])) for found in (after, before))
    return Row(name, (sum(bool(r.fused) for r in rows), len(rows)), forward, plain_forward, gradient, plain_gradient)


def _results(model: nn.Module, img: Tensor) -> list[Tensor]:
    """The output, then the gradient of every parameter for one random weighting of it."""
    model.zero_grad(set_to_none=True)
    y = _output(model, img)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (y * weights.to(y)).sum().backward()
    return [y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def _output(model: nn.Module, img: Tensor) -> Tensor:
    kind = type(model).__name__
    if kind == "ViTMAEForPreTraining":  # what it hides is drawn by the noise
        noise = torch.rand(len(img), 196, generator=torch.Generator().manual_seed(0)).to(img)
        return model(img, noise=noise).logits
    if kind == "SwinForMaskedImageModeling":
        hidden = torch.rand(len(img), 56 * 56, generator=torch.Generator().manual_seed(0)).to(img.device) < 0.6
        return model(img, bool_masked_pos=hidden).reconstruction
    out = model(img)
    return out if isinstance(out, Tensor) else out.last_hidden_state
