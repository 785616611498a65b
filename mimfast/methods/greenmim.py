"""GreenMIM: a hierarchical encoder that sees visible tokens only, and a light decoder. arXiv:2205.13515.

B batch, L tokens of the last map, K visible ones, H W pixels, P values per token
"""

from typing import Any

import torch
from torch import Tensor, nn

from mimfast import encoders, targets
from mimfast._check import fail
from mimfast.decoders import ViTDecoder
from mimfast.encoders.inputs import Size
from mimfast.encoders.paint import check_image
from mimfast.encoders.swin import Swin
from mimfast.mask import Mask
from mimfast.methods.live import check_parts, draw, first_of
from mimfast.methods.official import from_nested, nested, use_official_names
from mimfast.targets import Kind, Pixels, Target


class GreenMIM(nn.Module):
    """MAE for a Swin: hidden tokens are left out of every map, and mask tokens come in at the decoder.

    The images of a batch have one mask, so that one plan of attention groups serves all. The plan is made on the CPU
    when the mask is drawn: with sample ids that are there already, nothing waits for the device.

    `state_dict()` has names as the authors': `encoder.*`, then `mask_token` and `decoder_*`.

    Args:
        encoder: a Swin.
        decoder: over the encoder's grid, without a class token.
        target: with the encoder's stride as `patch`.
        ratio: share of hidden tokens of the last map, in [0, 1); exactly int(L (1 - ratio)) stay visible.
    """

    # a loop that has sample ids on the CPU gives those to `sample_mask`
    plans_on_cpu = True

    def __init__(self, encoder: Swin, decoder: ViTDecoder, target: Target, ratio: float = 0.75) -> None:
        super().__init__()
        check_parts("GreenMIM", encoder, "drop", decoder, target, ratio)
        if not isinstance(encoder, Swin):
            fail("GreenMIM", "encoder", type(encoder).__name__, "a Swin", "groups are planned for its windows")
        if decoder.grid != encoder.grid:
            found, wanted = (f"grid {part.grid[0]}x{part.grid[1]}" for part in (decoder, encoder))
            fail("GreenMIM", "decoder", found, wanted, "it has a position for every token of the encoder")
        if decoder.prefix:
            fail("GreenMIM", "decoder", "a class token", "none", "a Swin has no class token")
        if encoder.mask_token is not None:
            reason = "mode 'drop' never uses it, and mask_token is the decoder's"
            fail("GreenMIM", "encoder", "a mask_token", "none", reason)
        tokens = encoder.grid[0] * encoder.grid[1]
        if int(tokens * (1 - ratio)) < 1:
            fail("GreenMIM", "ratio", ratio, "at least one visible token", f"int({tokens} * (1 - {ratio})) = 0")
        self.encoder, self.decoder, self.target, self.ratio = encoder, decoder, target, ratio
        use_official_names(self, _official, _in_tree)

    @classmethod
    def build(
        cls,
        encoder: str = "swin_b",
        img_size: Size = 224,
        patch: int | None = None,
        ratio: float = 0.75,
        norm: bool = True,
        kind: Kind = "mse",
        decoder_dim: int = 512,
        decoder_depth: int = 1,
        decoder_heads: int | None = None,
        **options: Any,
    ) -> "GreenMIM":
        """A GreenMIM from plain values.

        Args:
            encoder, patch: as in `mimfast.encoders.build`; a Swin.
            norm: pixels standardised per token.
            kind: "mse", "l1" or "smooth_l1".
            decoder_heads: None: heads of 32 channels.
            options: further arguments of the encoder, as `window`.
        """
        backbone: Any = encoders.build(encoder, img_size, patch, **options)
        heads = max(1, decoder_dim // 32) if decoder_heads is None else decoder_heads
        decoder = _decoder(backbone, dim=decoder_dim, depth=decoder_depth, heads=heads)
        return cls(backbone, decoder, Pixels(backbone.stride, norm, kind), ratio)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "GreenMIM":
        """The method that a `config` describes, with fresh weights."""
        encoder: Any = encoders.from_config(config["encoder"])
        target = targets.from_config(encoder.stride, config["target"])
        return cls(encoder, _decoder(encoder, **config["decoder"]), target, config["ratio"])

    @property
    def unit(self) -> int:
        """Side of a mask unit in pixels: one token of the last map."""
        return self.encoder.stride

    @property
    def config(self) -> dict[str, Any]:
        """The plain values that build this method again; written beside its weights."""
        return {
            "method": "GreenMIM",
            "encoder": self.encoder.config,
            "decoder": self.decoder.config,
            "target": getattr(self.target, "config", {}),
            "ratio": self.ratio,
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
        """Draw the mask of a batch, that of its first sample, and plan its groups, both on the CPU.

        Args:
            sample_ids, epoch: as of `Mask.random`; on a GPU the first ones are waited for.
            seed: as of `Mask.random`.
            device: of the result; None: that of the parameters.
            img_size: of the images, in pixels; None: the encoder's own, and there is no other.
        """
        size = self.encoder.img_size if img_size is None else img_size
        ids, epoch = (v.cpu() if isinstance(v, Tensor) else v for v in (first_of(sample_ids, 1), first_of(epoch, 1)))
        unit = self.unit
        mask = draw("GreenMIM", self, 1, size, self.ratio, unit, unit, "keep_floor", ids, seed, epoch, "cpu")
        device = next(self.parameters()).device if device is None else torch.device(device)
        planned = self.encoder.plan(mask.expand(batch))
        return planned if device.type == "cpu" else planned.to(device)

    def predict(self, img: Tensor, mask: Mask) -> Tensor:
        """The prediction for every token: (B, L, P), in the space of the target (standardised if that is)."""
        return self.decoder(self.encoder(img, mask, mode="drop"), mask)

    def forward(self, img: Tensor, mask: Mask | None = None) -> Tensor:
        """The loss of a batch.

        Args:
            img: (B, 3, H, W), uint8 (0..255) or floating point, normalised already, of the encoder's size.
            mask: the same for every image; on a GPU with its plan, as `sample_mask` gives it. None draws a random one
                from torch's generator.
        Returns:
            scalar fp32.
        """
        check_image("GreenMIM", img)
        if mask is None:
            mask = self.sample_mask(img.shape[0], device=img.device)
        tokens = self.encoder(img, mask, mode="drop")
        # only what is scored is predicted
        rows = self.decoder.rows(mask)
        return self.target.loss(self.decoder(tokens, mask, rows), img, mask, rows)


def _decoder(encoder: Any, **sizes: Any) -> ViTDecoder:
    return ViTDecoder(encoder.dim, encoder.grid, encoder.stride, **sizes, class_token=False)


def _official(name: str) -> str:
    return "mask_token" if name == "decoder.mask_token" else nested(name)


def _in_tree(name: str) -> str:
    return "decoder.mask_token" if name == "mask_token" else from_nested(name)
