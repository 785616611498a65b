"""SimMIM: replace hidden tokens, encode them all, predict raw pixels with one linear layer. arXiv:2111.09886.

B batch, T tokens, M hidden tokens, H W pixels, P values per token
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from mimfast import encoders, targets
from mimfast._check import fail
from mimfast.encoders.inputs import Size
from mimfast.encoders.paint import check_image
from mimfast.heads import PixelHead
from mimfast.mask import Mask
from mimfast.methods.live import check_parts, check_size, draw, encoder_for, sides
from mimfast.targets import Kind, LocalNormPixels, Pixels, Target

# the authors exempt these from weight decay; what else they list, the bias tables, their code decays all the same
NO_DECAY = ("absolute_pos_embed", "cls_token", "pos_embed")
SWIN_NO_DECAY = (*NO_DECAY, "mask_token")


class SimMIM(nn.Module):
    """Mask tokens inside the encoder, L1 loss of the pixels under them.

    The loss is the mean over hidden pixels and colours. (The authors' code divides by 1e-5 more than the number of
    hidden pixels: 1e-10 of it.)

    `state_dict()` has the names of the authors' checkpoints: `encoder.*`, `decoder.0.*`.

    Args:
        encoder: offers "replace".
        decoder: `PixelHead` for the encoder's width and the target's `dim`.
        target: `Pixels(norm=False, kind="l1", order="cpq")`, or `LocalNormPixels` as for Swin V2, with the encoder's
            stride as `patch`.
        ratio: share of hidden blocks, in [0, 1); of n blocks ceil(n ratio) are hidden.
        block: side of a mask block in pixels, a multiple of the encoder's stride.
    """

    def __init__(
        self, encoder: encoders.Encoder, decoder: PixelHead, target: Target, ratio: float = 0.6, block: int = 32
    ) -> None:
        super().__init__()
        check_parts("SimMIM", encoder, "replace", decoder, target, ratio)
        if isinstance(target, Pixels) and target.order != "cpq":
            reason = "the head predicts colour by colour, as its PixelShuffle does"
            fail("SimMIM", "target", f"order {target.order!r}", "order 'cpq'", reason)
        if block < encoder.stride or block % encoder.stride:
            reason = f"a mask token stands for a whole token of {encoder.stride} px"
            fail("SimMIM", "block", block, f"a multiple of {encoder.stride}", reason)
        size = sides(encoder.img_size)
        check_size("SimMIM", size, block)
        self.encoder, self.decoder, self.target = encoder, decoder, target
        self.ratio, self.block = ratio, block

    @classmethod
    def build(
        cls,
        encoder: str = "swin_b",
        img_size: Size = 192,
        patch: int | None = None,
        ratio: float = 0.6,
        block: int = 32,
        target: Literal["pixels", "local"] = "pixels",
        kind: Kind = "l1",
        window: int = 47,
        dim: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        drop_path: float = 0.0,
        attention_window: int | None = None,
        **options: Any,
    ) -> "SimMIM":
        """A SimMIM from plain values.

        Args:
            encoder, patch, dim, depth, heads: as in `mimfast.encoders.build`; it gets a mask token.
            target: "pixels", or "local" for pixels standardised in windows (`LocalNormPixels`).
            kind: "mse", "l1" or "smooth_l1".
            window: of "local", in pixels.
            drop_path: highest rate of dropped residual branches, for encoders that drop any.
            attention_window: the encoder's own `window`, in tokens, of a Swin.
            options: further arguments of the encoder, as embed_dim of a Swin.
        """
        options |= {"drop_path": drop_path} if drop_path else {}
        options |= {"window": attention_window} if attention_window else {}
        backbone: Any = encoders.build(
            encoder, img_size, patch, dim=dim, depth=depth, heads=heads, mask_token=True, **options
        )
        stride = backbone.stride
        scored: Target = (
            Pixels(stride, norm=False, kind=kind, order="cpq")
            if target == "pixels"
            else LocalNormPixels(stride, window, kind)
        )
        return cls(backbone, PixelHead(backbone.dim, scored.dim), scored, ratio, block)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SimMIM":
        """The method that a `config` describes, with fresh weights."""
        encoder: Any = encoders.from_config(config["encoder"])
        target = targets.from_config(encoder.stride, config["target"])
        return cls(encoder, PixelHead(encoder.dim, target.dim), target, config["ratio"], config["block"])

    @property
    def unit(self) -> int:
        """Side of a mask block in pixels."""
        return self.block

    @property
    def config(self) -> dict[str, Any]:
        """The plain values that build this method again; written beside its weights."""
        return {
            "method": "SimMIM",
            "encoder": self.encoder.config,
            "target": getattr(self.target, "config", {}),
            "ratio": self.ratio,
            "block": self.block,
        }

    @property
    def no_decay(self) -> frozenset[str]:
        """Parameters, by name, that the authors exempt from weight decay beside biases and one-dimensional ones.

        Their list also has the tables of relative positions, under names that never match: those are decayed, here
        too. The mask token is exempt in a Swin and decayed in a ViT.
        """
        exempt = NO_DECAY if hasattr(self.encoder, "cls_token") else SWIN_NO_DECAY
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return frozenset(trained & {f"encoder.{name}" for name in exempt})

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
        """Draw a mask over the tokens in blocks; see `Mask.random`.

        Args:
            img_size: of the images, in pixels; None: the encoder's own.
        """
        size = self.encoder.img_size if img_size is None else img_size
        stride = self.encoder.stride
        return draw(
            "SimMIM", self, batch, size, self.ratio, self.block, stride, "hide_ceil", sample_ids, seed, epoch, device
        )

    def predict(self, img: Tensor, mask: Mask) -> Tensor:
        """The prediction for every token, hidden or not: (B, T, P)."""
        return self.decoder(self._encode(img, mask), prefix=self.encoder.prefix)

    def forward(self, img: Tensor, mask: Mask | None = None) -> Tensor:
        """The loss of a batch.

        Args:
            img: (B, 3, H, W), uint8 (0..255) or floating point, normalised already; H and W are multiples of `block`.
            mask: over the tokens; None draws a random one from torch's generator.
        Returns:
            scalar fp32.
        """
        check_image("SimMIM", img)
        if mask is None:
            mask = self.sample_mask(img.shape[0], device=img.device, img_size=(img.shape[2], img.shape[3]))
        tokens = self._encode(img, mask)
        # only what is scored is predicted
        rows = mask.hide if mask.cu_seqlens is None and mask.hide.shape[1] else None
        pred = self.decoder(tokens, rows, self.encoder.prefix)
        return self.target.loss(pred, img, mask, rows)

    def _encode(self, img: Tensor, mask: Mask) -> Tensor:
        return encoder_for(self.encoder, img)(img, mask, mode="replace")
