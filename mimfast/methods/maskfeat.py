"""MaskFeat: replace hidden tokens, encode them all, predict histograms of gradients linearly. arXiv:2112.09133.

B batch, T tokens, M hidden tokens, H W pixels, P values per token
"""

from typing import Any

import torch
from torch import Tensor, nn

from mimfast import encoders, targets
from mimfast._check import fail
from mimfast.encoders.inputs import Size
from mimfast.encoders.paint import check_image
from mimfast.heads import HOGHead
from mimfast.mask import Mask
from mimfast.methods.live import check_parts, encoder_for, sides
from mimfast.methods.official import use_official_names
from mimfast.targets import HOG, Kind


class MaskFeat(nn.Module):
    """Mask tokens inside a ViT, and a linear head that predicts the histograms under them.

    Masks are those of BEiT: rectangles, at most round(T ratio) tokens, another number in each image. The loss is the
    mean over all hidden tokens of the batch.

    `state_dict()` has the names of the authors' checkpoints: the encoder's at the top level, then `pred_head.*`.

    Args:
        encoder: offers "replace" and ends without a norm: the head's takes its place.
        decoder: `HOGHead` for the encoder's width and the target's `dim`.
        target: `HOG`, normalised, with the encoder's stride as `patch`.
        ratio: largest share of hidden tokens, in [0, 1).
        min_block: smallest area of a rectangle, in tokens.
    """

    def __init__(
        self, encoder: encoders.Encoder, decoder: HOGHead, target: HOG, ratio: float = 0.4, min_block: int = 15
    ) -> None:
        super().__init__()
        check_parts("MaskFeat", encoder, "replace", decoder, target, ratio)
        if not target.normalize:
            fail("MaskFeat", "target", "normalize=False", "normalize=True", "its histograms are always normalised")
        if not isinstance(getattr(encoder, "norm", None), nn.Identity):
            fail("MaskFeat", "encoder", "a final norm", "encoder.norm = nn.Identity()", "the head has that norm")
        self.encoder, self.decoder, self.target = encoder, decoder, target
        self.ratio, self.min_block = ratio, min_block
        use_official_names(self, _official, _in_tree)

    @classmethod
    def build(
        cls,
        encoder: str = "vit_b16",
        img_size: Size = 224,
        patch: int | None = None,
        ratio: float = 0.4,
        min_block: int = 15,
        kind: Kind = "mse",
        gaussian_window: int = 0,
        dim: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        **options: Any,
    ) -> "MaskFeat":
        """A MaskFeat from plain values.

        Args:
            encoder, img_size, patch, dim, depth, heads: as in `mimfast.encoders.build`; it gets learned positions and a
                mask token.
            kind: "mse", "l1" or "smooth_l1".
            gaussian_window: of `HOG`; 16 is the variant of mmpretrain.
            options: further arguments of the encoder.
        """
        vit: Any = encoders.build(
            encoder, img_size, patch, dim=dim, depth=depth, heads=heads, mask_token=True, positions="learned", **options
        )
        vit.norm = nn.Identity()
        target = HOG(vit.stride, True, gaussian_window, kind)
        return cls(vit, HOGHead(vit.dim, target.dim), target, ratio, min_block)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "MaskFeat":
        """The method that a `config` describes, with fresh weights."""
        encoder: Any = encoders.from_config(config["encoder"])
        encoder.norm = nn.Identity()
        target: Any = targets.from_config(encoder.stride, config["target"])
        return cls(encoder, HOGHead(encoder.dim, target.dim), target, config["ratio"], config["min_block"])

    @property
    def unit(self) -> int:
        """Side of the smallest part of a mask in pixels: one token."""
        return self.encoder.stride

    @property
    def config(self) -> dict[str, Any]:
        """The plain values that build this method again; written beside its weights."""
        return {
            "method": "MaskFeat",
            "encoder": self.encoder.config,
            "target": self.target.config,
            "ratio": self.ratio,
            "min_block": self.min_block,
        }

    def sample_mask(
        self,
        batch: int,
        *,
        sample_ids: Tensor | None = None,
        seed: int = 0,
        epoch: int | Tensor = 0,
        device: torch.device | str | None = None,
        img_size: Size | None = None,
    ) -> Mask:
        """Draw a mask of random rectangles over the tokens; see `Mask.blockwise`.

        Args:
            img_size: of the images, in pixels; None: the encoder's own.
        """
        height, width = sides(self.encoder.img_size if img_size is None else img_size)
        grid = (height // self.encoder.stride, width // self.encoder.stride)
        device = next(self.parameters()).device if device is None else device
        return Mask.blockwise(
            batch,
            grid,
            round(grid[0] * grid[1] * self.ratio),
            exact=False,
            min_block=self.min_block,
            sample_ids=sample_ids,
            seed=seed,
            epoch=epoch,
            device=device,
        )

    def predict(self, img: Tensor, mask: Mask) -> Tensor:
        """The prediction for every token, hidden or not: (B, T, P)."""
        return self.decoder(self._encode(img, mask), prefix=self.encoder.prefix)

    def forward(self, img: Tensor, mask: Mask | None = None) -> Tensor:
        """The loss of a batch.

        Args:
            img: (B, 3, H, W), uint8 (0..255) or floating point, normalised already.
            mask: over the tokens; None draws a random one from torch's generator.
        Returns:
            scalar fp32.
        """
        check_image("MaskFeat", img)
        if mask is None:
            mask = self.sample_mask(img.shape[0], device=img.device, img_size=(img.shape[2], img.shape[3]))
        tokens = self._encode(img, mask)
        # how many tokens an image of a packed mask hides is known on the device only: there the head, a thousandth of
        # the work, runs over all of them
        rows = mask.hide if mask.cu_seqlens is None and mask.hide.shape[1] else None
        pred = self.decoder(tokens, rows, self.encoder.prefix)
        return self.target.loss(pred, img, mask, rows)

    def _encode(self, img: Tensor, mask: Mask) -> Tensor:
        return encoder_for(self.encoder, img)(img, mask, mode="replace")


def _official(name: str) -> str:
    if name.startswith("decoder."):
        return f"pred_head.{name.removeprefix('decoder.')}"
    return name.removeprefix("encoder.")


def _in_tree(name: str) -> str:
    if name.startswith("pred_head."):
        return f"decoder.{name.removeprefix('pred_head.')}"
    return name if name.startswith(("encoder.", "decoder.", "target.")) else f"encoder.{name}"
