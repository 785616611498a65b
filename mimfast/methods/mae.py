"""Masked autoencoder: encode a quarter of the patches, predict the pixels of the rest. MAE, arXiv:2111.06377.

B batch, L patches, C channels, H W pixels, D width, P values per patch
"""

from typing import Any

import torch
from torch import Tensor, nn

from mimfast import encoders
from mimfast._check import fail
from mimfast.decoders import CrossDecoder, Decoder, ViTDecoder
from mimfast.encoders.inputs import Size
from mimfast.mask import Mask
from mimfast.methods.official import flat, from_flat, use_official_names
from mimfast.targets import Kind, Pixels, Target


class MAE(nn.Module):
    """Masked autoencoder over an encoder with mask mode "drop".

    `state_dict()` has the flat names of the official checkpoints: the encoder's at the top level, then `mask_token` and
    `decoder_*`; `load_state_dict()` takes them. (`named_parameters()` has the names of the module tree.)

    Args:
        encoder: offers "drop".
        decoder: over the encoder's grid: `ViTDecoder`, or `CrossDecoder`, which makes it CrossMAE.
        target: with `dim` equal to the decoder's `out_dim`.
        ratio: share of hidden patches, in [0, 1); exactly int(L (1 - ratio)) stay visible.
    """

    def __init__(self, encoder: encoders.Encoder, decoder: Decoder, target: Target, ratio: float = 0.75) -> None:
        super().__init__()
        encoders.require_mode("MAE", encoder, "drop")
        _check_pair(encoder, decoder, target, ratio)
        self.encoder, self.decoder, self.target, self.ratio = encoder, decoder, target, ratio
        use_official_names(self, flat, from_flat)

    @classmethod
    def build(
        cls,
        encoder: str = "vit_b16",
        img_size: Size = 224,
        patch: int | None = None,
        ratio: float = 0.75,
        norm: bool = True,
        kind: Kind = "mse",
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        dim: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
    ) -> "MAE":
        """A MAE from plain values; `encoder`, `dim`, `depth` and `heads` are those of `mimfast.encoders.build`."""
        vit = encoders.build(encoder, img_size, patch, dim=dim, depth=depth, heads=heads)
        decoder = ViTDecoder(vit.dim, vit.grid, vit.patch, decoder_dim, decoder_depth, decoder_heads)
        return cls(vit, decoder, Pixels(vit.patch, norm, kind), ratio)

    @property
    def unit(self) -> int:
        """Side of a mask unit in pixels: one patch."""
        return self.encoder.stride

    @property
    def config(self) -> dict[str, Any]:
        """The plain values that build this method again; written beside its weights."""
        target = {"norm": self.target.norm, "kind": self.target.kind} if isinstance(self.target, Pixels) else {}
        return {
            "method": "MAE",
            "encoder": self.encoder.config,
            "decoder": self.decoder.config,
            "ratio": self.ratio,
            **target,
        }

    def sample_mask(
        self,
        batch: int,
        *,
        sample_ids: Tensor | None = None,
        seed: int = 0,
        epoch: int | Tensor = 0,
        device: torch.device | str | None = None,
    ) -> Mask:
        """Draw a mask; see `Mask.random`. The device defaults to that of the parameters."""
        device = next(self.parameters()).device if device is None else device
        return Mask.random(
            batch, self.encoder.grid, self.ratio, sample_ids=sample_ids, seed=seed, epoch=epoch, device=device
        )

    def predict(self, img: Tensor, mask: Mask) -> Tensor:
        """The prediction for every patch: (B, L, P), in the space of the target (per-patch standardised if that is)."""
        return self.decoder(self._encode(img, mask), mask)

    def forward(self, img: Tensor, mask: Mask | None = None) -> Tensor:
        """The loss of a batch.

        Args:
            img: (B, 3, H, W), uint8 (0..255) or floating point, normalised already.
            mask: None draws a random one from torch's generator.
        Returns:
            scalar fp32.
        """
        mask = self.sample_mask(img.shape[0], device=img.device) if mask is None else mask
        tokens = self._encode(img, mask)
        # only what is scored is predicted
        rows = self.decoder.rows(mask)
        pred = self.decoder(tokens, mask, rows)
        return self.target.loss(pred, img, mask, rows)

    def _encode(self, img: Tensor, mask: Mask) -> Any:
        if self.decoder.wants_features:
            return self.encoder.features(img, mask, mode="drop")  # type: ignore[attr-defined]
        return self.encoder(img, mask, mode="drop")


def _check_pair(encoder: encoders.Encoder, decoder: Decoder, target: Target, ratio: float) -> None:
    """Raise when the parts do not fit together."""
    if decoder.grid != encoder.grid:
        found, wanted = (f"grid {part.grid[0]}x{part.grid[1]}" for part in (decoder, encoder))
        fail("MAE", "decoder", found, wanted, f"the encoder's tokens form {wanted}")
    if decoder.patch != encoder.stride:
        fail(
            "MAE",
            "decoder",
            f"patch {decoder.patch}",
            f"patch {encoder.stride}",
            f"a token of the encoder covers {encoder.stride} px",
        )
    if decoder.encoder_dim != encoder.dim:
        fail(
            "MAE",
            "decoder",
            f"encoder_dim {decoder.encoder_dim}",
            encoder.dim,
            f"the encoder's tokens are {encoder.dim} wide",
        )
    if encoder.prefix != 1:
        fail("MAE", "encoder", f"{encoder.prefix} class tokens", 1, "its decoder begins with it; GreenMIM takes a Swin")
    if getattr(encoder, "mask_token", None) is not None:
        reason = "mode 'drop' never uses it, and the official name mask_token is the decoder's"
        fail("MAE", "encoder", "a mask_token", "none", reason)
    if isinstance(decoder, CrossDecoder) and decoder.features != getattr(encoder, "depth", -1) + 1:
        wanted = f"{getattr(encoder, 'depth', 'no')} + 1 features"
        fail(
            "MAE", "decoder", f"{decoder.features} features", wanted, "it mixes the maps of every block and their input"
        )
    if target.dim != decoder.out_dim:
        reason = f"the decoder predicts {decoder.out_dim} values per patch"
        fail("MAE", "target", f"dim {target.dim}", decoder.out_dim, reason)
    if not 0 <= ratio < 1:
        fail(
            "MAE",
            "ratio",
            ratio,
            "a number in [0, 1)",
            "it is the share of hidden patches and at least one must stay visible",
        )
    tokens = encoder.grid[0] * encoder.grid[1]
    if int(tokens * (1 - ratio)) < 1:
        fail("MAE", "ratio", ratio, "at least one visible patch", f"int({tokens} * (1 - {ratio})) = 0")
