"""Targets: what a prediction is scored against. A target is a loss, so a fused op never stores what it compares with.

B batch, L patches, M predicted patches, P values per patch
"""

from typing import Literal, Protocol

from torch import Tensor, nn

from mimfast.mask import Mask
from mimfast.ops.pixel_loss import pixel_loss

Kind = Literal["mse", "l1", "smooth_l1"]


class Target(Protocol):
    """What a method needs of a target; nobody has to inherit.

    Attributes:
        dim: values predicted per patch.
        patch: side of a patch in pixels.
    """

    dim: int
    patch: int

    def loss(self, pred: Tensor, img: Tensor, mask: Mask, rows: Tensor | None = None) -> Tensor: ...


class Pixels(nn.Module):
    """The pixels of the hidden patches. MAE, arXiv:2111.06377, sec. 3 ("reconstruction target").

    Args:
        patch: side of a patch in pixels; dim = patch * patch * 3.
        norm: standardise each patch by its own mean and unbiased variance (eps 1e-6 inside the root).
        kind: "mse", "l1" or "smooth_l1".
    """

    def __init__(self, patch: int, norm: bool = True, kind: Kind = "mse") -> None:
        super().__init__()
        self.patch, self.norm, self.kind = patch, norm, kind
        self.dim = patch * patch * 3

    def extra_repr(self) -> str:
        return f"patch={self.patch}, norm={self.norm}, kind={self.kind!r}"

    def loss(self, pred: Tensor, img: Tensor, mask: Mask, rows: Tensor | None = None) -> Tensor:
        """Mean loss over the hidden patches, or over the given ones.

        Args:
            pred: (B, L, P), or (B, M, P) with `rows`; P in (py, px, c) order.
            img: (B, 3, H, W), uint8 or floating point, normalised already.
            mask: the one the prediction was made with.
            rows: (B, M) int64, the patches that `pred` is for; None when it is for all.
        Returns:
            scalar fp32.
        """
        hidden = mask.hidden if rows is None else rows
        return pixel_loss(pred, img, hidden, patch=self.patch, norm=self.norm, kind=self.kind)

    # a module is called to score, like any loss
    forward = loss
