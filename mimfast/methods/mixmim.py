"""MixMIM (MixMAE): encode mixtures of two images, predict both from them. arXiv:2205.13137.

B batch, L tokens, H W pixels, P values per token
"""

from typing import Any

import torch
from torch import Tensor, nn

from mimfast import encoders, targets
from mimfast._check import fail
from mimfast.decoders import DualDecoder
from mimfast.encoders.inputs import Size
from mimfast.encoders.paint import check_image
from mimfast.mask import Mask
from mimfast.methods.live import check_parts, draw, first_of
from mimfast.methods.official import flat, from_flat, use_official_names
from mimfast.targets import Kind, Pixels, Target


class MixMIM(nn.Module):
    """Masked image modelling without mask tokens in the encoder: another image fills the hidden places.

    The partner of image i of a batch is image B - 1 - i (of an odd batch the one in the middle is its own). Every token
    of the encoder belongs to one of the two and sees only its own image; the decoder reconstructs both, and so every
    pixel of every image is predicted once.

    `state_dict()` has the flat names of the authors' checkpoints: the encoder's at the top level, then `mask_token` and
    `decoder_*`; `load_state_dict()` takes them.

    Args:
        encoder: offers "mix".
        decoder: over the encoder's grid.
        target: with the encoder's stride as `patch`.
        ratio: share of hidden tokens, in [0, 1); exactly int(L ratio) are hidden, and belong to the partner.
        shared: one mask for the whole batch of a process, as published: the number of different masks in a step is
            that of processes and accumulated batches. False: one for each pair of images.
    """

    def __init__(
        self,
        encoder: encoders.Encoder,
        decoder: DualDecoder,
        target: Target,
        ratio: float = 0.5,
        shared: bool = True,
    ) -> None:
        super().__init__()
        check_parts("MixMIM", encoder, "mix", decoder, target, ratio)
        if decoder.grid != encoder.grid:
            found, wanted = (f"grid {part.grid[0]}x{part.grid[1]}" for part in (decoder, encoder))
            fail("MixMIM", "decoder", found, wanted, "it has a position for every token of the encoder")
        if getattr(encoder, "mask_token", None) is not None:
            reason = "mode 'mix' never uses it, and the official name mask_token is the decoder's"
            fail("MixMIM", "encoder", "a mask_token", "none", reason)
        self.encoder, self.decoder, self.target = encoder, decoder, target
        self.ratio, self.shared = ratio, shared
        use_official_names(self, flat, from_flat)

    @classmethod
    def build(
        cls,
        encoder: str = "mixswin_b",
        img_size: Size = 224,
        patch: int | None = None,
        ratio: float = 0.5,
        norm: bool = True,
        kind: Kind = "mse",
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int | None = None,
        shared: bool = True,
        **options: Any,
    ) -> "MixMIM":
        """A MixMIM from plain values.

        Args:
            encoder, patch: as in `mimfast.encoders.build`.
            norm: pixels standardised per token.
            kind: "mse", "l1" or "smooth_l1".
            decoder_heads: None: heads of 32 channels.
            options: further arguments of the encoder.
        """
        backbone: Any = encoders.build(encoder, img_size, patch, **options)
        heads = max(1, decoder_dim // 32) if decoder_heads is None else decoder_heads
        decoder = DualDecoder(backbone.dim, backbone.grid, backbone.stride, decoder_dim, decoder_depth, heads)
        return cls(backbone, decoder, Pixels(backbone.stride, norm, kind), ratio, shared)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "MixMIM":
        """The method that a `config` describes, with fresh weights."""
        encoder: Any = encoders.from_config(config["encoder"])
        decoder = DualDecoder(encoder.dim, encoder.grid, encoder.stride, **config["decoder"])
        target = targets.from_config(encoder.stride, config["target"])
        return cls(encoder, decoder, target, config["ratio"], config["shared"])

    @property
    def unit(self) -> int:
        """Side of a mask unit in pixels: one token of the last map."""
        return self.encoder.stride

    @property
    def config(self) -> dict[str, Any]:
        """The plain values that build this method again; written beside its weights."""
        return {
            "method": "MixMIM",
            "encoder": self.encoder.config,
            "decoder": self.decoder.config,
            "target": getattr(self.target, "config", {}),
            "ratio": self.ratio,
            "shared": self.shared,
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
        """Draw the mask of a batch, that of its first sample, or for each pair that of the first of the two.

        Args:
            sample_ids, seed, epoch, device: as of `Mask.random`.
            img_size: of the images, in pixels; None: the encoder's own, and there is no other.
        """
        size = self.encoder.img_size if img_size is None else img_size
        drawn = 1 if self.shared else (batch + 1) // 2
        mask = draw(
            "MixMIM", self, drawn, size, self.ratio, self.unit, self.unit, "hide_floor", first_of(sample_ids, drawn),
            seed, first_of(epoch, drawn), device,
        )  # fmt: skip
        if self.shared:
            return mask.expand(batch)
        i = torch.arange(batch, device=mask.hidden.device)
        return mask.rows(torch.minimum(i, batch - 1 - i))

    def predict(self, img: Tensor, mask: Mask) -> Tensor:
        """The prediction for every token of every image: (B, L, P), in image order."""
        return self.decoder(self.encoder(img, mask, mode="mix"), mask)

    def forward(self, img: Tensor, mask: Mask | None = None) -> Tensor:
        """The loss of a batch: over every token of every image.

        Args:
            img: (B, 3, H, W), uint8 (0..255) or floating point, normalised already, of the encoder's size.
            mask: over the tokens, the same for images i and B - 1 - i; None draws a random one from torch's generator.
        Returns:
            scalar fp32.
        """
        check_image("MixMIM", img)
        if mask is None:
            mask = self.sample_mask(img.shape[0], device=img.device)
        tokens = self.encoder(img, mask, mode="mix")
        rows = self.decoder.rows(mask)
        return self.target.loss(self.decoder(tokens, mask, rows), img, mask, rows)
