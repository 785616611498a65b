"""Targets: what a prediction is scored against. A target is a loss, so a fused op never stores what it compares with.

B batch, L patches, M predicted patches, P values per patch
"""

from typing import Any, Literal, Protocol

from torch import Tensor, nn

from mimfast._check import fail
from mimfast.mask import Mask
from mimfast.ops.hog_loss import hog_loss
from mimfast.ops.local_norm import local_norm
from mimfast.ops.pixel_loss import pixel_loss

Kind = Literal["mse", "l1", "smooth_l1"]
Order = Literal["pqc", "cpq"]
CELL = 8  # side in pixels of a histogram of gradients


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
        order: of the values of a patch, "pqc" (row, column, colour: MAE, FastMIM) or "cpq" (colour first: SimMIM, whose
            head ends in a PixelShuffle).
    """

    def __init__(self, patch: int, norm: bool = True, kind: Kind = "mse", order: Order = "pqc") -> None:
        super().__init__()
        self.patch, self.norm, self.kind, self.order = patch, norm, kind, order
        self.dim = patch * patch * 3

    @property
    def config(self) -> dict[str, Any]:
        """The plain arguments that build this target again, `patch` aside, which is the encoder's stride."""
        return {"type": "Pixels", "norm": self.norm, "kind": self.kind, "order": self.order}

    def extra_repr(self) -> str:
        return f"patch={self.patch}, norm={self.norm}, kind={self.kind!r}, order={self.order!r}"

    def loss(self, pred: Tensor, img: Tensor, mask: Mask, rows: Tensor | None = None) -> Tensor:
        """Mean loss over the hidden patches, or over the given ones.

        Args:
            pred: (B, L, P), or (B, M, P) with `rows`; P in `order`.
            img: (B, 3, H, W), uint8 or floating point, normalised already.
            mask: the one the prediction was made with.
            rows: (B, M) int64, the patches that `pred` is for; None when it is for all.
        Returns:
            scalar fp32.
        """
        hidden = mask.hidden if rows is None else rows
        return pixel_loss(pred, img, hidden, patch=self.patch, norm=self.norm, kind=self.kind, order=self.order)

    # a module is called to score, like any loss
    forward = loss


class LocalNormPixels(nn.Module):
    """Pixels standardised by the mean and variance of a window around each. SimMIM's target for Swin V2.

    From the code of Swin Transformer V2 (arXiv:2111.09883): every channel by itself, pixels outside the image left out,
    see `mimfast.ops.local_norm`. Values in colour-first order, as SimMIM's head has them.

    Args:
        patch: side of a patch in pixels; dim = patch * patch * 3.
        window: side of the window in pixels, odd.
        kind: "mse", "l1" or "smooth_l1".
    """

    def __init__(self, patch: int, window: int = 47, kind: Kind = "l1") -> None:
        super().__init__()
        if window < 1 or window % 2 == 0:
            fail(
                "LocalNormPixels", "window", window, "an odd number of pixels", "a pixel is in the middle of its window"
            )
        self.patch, self.window, self.kind = patch, window, kind
        self.dim = patch * patch * 3

    @property
    def config(self) -> dict[str, Any]:
        """As `Pixels.config`."""
        return {"type": "LocalNormPixels", "window": self.window, "kind": self.kind}

    def extra_repr(self) -> str:
        return f"patch={self.patch}, window={self.window}, kind={self.kind!r}"

    def loss(self, pred: Tensor, img: Tensor, mask: Mask, rows: Tensor | None = None) -> Tensor:
        """As `Pixels.loss`, with P in (c, py, px) order."""
        hidden = mask.hidden if rows is None else rows
        target = local_norm(img, self.window)
        return pixel_loss(pred, target, hidden, patch=self.patch, norm=False, kind=self.kind, order="cpq")

    forward = loss


class HOG(nn.Module):
    """Histograms of oriented gradients of 8 px cells, nine unsigned bins for each colour. FastMIM, arXiv:2212.06593.

    MaskFeat (arXiv:2112.09133) has the same target, always normalised. See `mimfast.ops.hog_loss`.

    Args:
        patch: side of a patch in pixels, a multiple of 8; dim = 27 (patch / 8)^2, in (histogram, cell row, cell column)
            order, histogram = 9 * colour + bin.
        normalize: divide the nine values of a cell and colour by their Euclidean norm.
        gaussian_window: side in pixels of a Gaussian weight on the gradients, tiled over the image; 0: none.
        kind: "mse", "l1" or "smooth_l1".
    """

    def __init__(self, patch: int, normalize: bool = True, gaussian_window: int = 0, kind: Kind = "mse") -> None:
        super().__init__()
        if patch < CELL or patch % CELL:
            fail("HOG", "patch", patch, f"a multiple of {CELL}", f"a histogram covers a cell of {CELL}x{CELL} px")
        self.patch, self.normalize, self.gaussian_window, self.kind = patch, normalize, gaussian_window, kind
        self.dim = 27 * (patch // CELL) ** 2

    @property
    def config(self) -> dict[str, Any]:
        """As `Pixels.config`."""
        return {
            "type": "HOG",
            "normalize": self.normalize,
            "gaussian_window": self.gaussian_window,
            "kind": self.kind,
        }

    def extra_repr(self) -> str:
        return (
            f"patch={self.patch}, normalize={self.normalize}, gaussian_window={self.gaussian_window}, "
            f"kind={self.kind!r}"
        )

    def loss(self, pred: Tensor, img: Tensor, mask: Mask, rows: Tensor | None = None) -> Tensor:
        """Mean loss over the hidden patches, the given ones, or the hidden cells.

        Args:
            pred: (B, L, P), or (B, M, P) with `rows`.
            img: (B, 3, H, W), uint8, or floating point, normalised already, which has slower code.
            mask: over the patches, or over a finer grid whose cells are at least 8 px wide: then the histograms inside
                hidden mask cells are scored, each as often as any other.
            rows: (B, M) int64, the patches that `pred` is for, -1 for none; None when it is for all.
        Returns:
            scalar fp32.
        """
        hidden = mask.hidden if rows is None else rows
        # the exact arithmetic is that of 8-bit images
        compat: Literal["integer", "float"] = "float" if img.is_floating_point() else "integer"
        return hog_loss(
            pred,
            img,
            hidden,
            patch=self.patch,
            cell=CELL,
            normalize=self.normalize,
            kind=self.kind,
            gaussian_window=self.gaussian_window,
            compat=compat,
        )

    forward = loss


def from_config(patch: int, config: dict[str, Any]) -> Target:
    """The target that a `config` describes."""
    classes = {"Pixels": Pixels, "LocalNormPixels": LocalNormPixels, "HOG": HOG}
    given = {key: value for key, value in config.items() if key != "type"}
    if config.get("type") not in classes:
        fail(
            "targets.from_config",
            "type",
            repr(config.get("type")),
            f"one of {list(classes)}",
            "no other target is known",
        )
    return classes[config["type"]](patch, **given)
