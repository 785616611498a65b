"""FastMIM: paint hidden blocks, encode the whole small image, predict histograms of gradients. arXiv:2212.06593.

B batch, T tokens, M hidden tokens, H W pixels, P values per token
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from mimfast import encoders, targets
from mimfast._check import fail
from mimfast.encoders.block import EPS, init_mae
from mimfast.encoders.inputs import Size
from mimfast.encoders.paint import check_image
from mimfast.encoders.vit import ViT
from mimfast.heads import TokenDecoder
from mimfast.mask import Mask
from mimfast.methods.live import check_parts, check_size, draw, encoder_for, sides
from mimfast.methods.official import flat, from_nested, nested, use_official_names
from mimfast.targets import CELL, HOG, Kind, Pixels, Target


class FastMIM(nn.Module):
    """Masked image modelling for any backbone: hidden blocks are painted in one learned colour.

    The image may have any size that its blocks divide: the encoder and the mask follow `img`. Raising the size in the
    course of a run is FastMIM-P.

    The attention heads of a ViT leave no trace in its weights. The authors pre-train ViT-B with 6 heads of 128 channels
    and fine-tune it with 12 of 64: whoever loads released weights has to say 6, and `config` says what was trained.

    `state_dict()` has the names of the authors' checkpoints: over a ViT the encoder's names at the top level, over
    other backbones `encoder.*`; then `mask_token` (the colour) and `decoder_*`.

    Args:
        encoder: offers "paint".
        decoder: `TokenDecoder` for the encoder's width and the target's `dim`.
        target: `HOG`, or `Pixels`, with the encoder's stride as `patch`.
        ratio: share of hidden blocks, in [0, 1); of n blocks int(n (1 - ratio)) stay visible.
        block: side of a mask block in pixels; None: the encoder's stride. Larger ones are multiples of the stride;
            smaller ones divide it, are multiples of 8, and need `HOG`, which is then scored cell by cell.
    """

    def __init__(
        self,
        encoder: encoders.Encoder,
        decoder: TokenDecoder,
        target: Target,
        ratio: float = 0.75,
        block: int | None = None,
    ) -> None:
        super().__init__()
        check_parts("FastMIM", encoder, "paint", decoder, target, ratio)
        if getattr(encoder, "mask_token", None) is not None:
            reason = "mode 'paint' never uses it, and data-parallel training waits for the gradient of every parameter"
            fail("FastMIM", "encoder", "a mask_token", "none", reason)
        block = encoder.stride if block is None else block
        _check_block(encoder.stride, block, target)
        size = sides(encoder.img_size)
        check_size("FastMIM", size, block)
        blocks = size[0] // block * (size[1] // block)
        if int(blocks * (1 - ratio)) < 1:
            fail("FastMIM", "ratio", ratio, "at least one visible block", f"int({blocks} * (1 - {ratio})) = 0")
        self.encoder, self.decoder, self.target = encoder, decoder, target
        self.ratio, self.block = ratio, block
        self.mask_token = nn.Parameter(torch.empty(1, 3, 1, 1))
        nn.init.normal_(self.mask_token, std=0.02)
        if isinstance(encoder, ViT):
            use_official_names(self, flat, _in_tree)
        else:
            use_official_names(self, nested, from_nested)

    @classmethod
    def build(
        cls,
        encoder: str = "vit_b16",
        img_size: Size = 128,
        patch: int | None = None,
        ratio: float = 0.75,
        block: int | None = None,
        target: Literal["hog", "pixels"] = "hog",
        norm: bool = True,
        kind: Kind = "mse",
        gaussian_window: int = 0,
        decoder_dim: int = 256,
        decoder_depth: int | None = None,
        decoder_heads: int | None = None,
        dim: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        drop_last: int = 0,
        drop_path: float = 0.0,
        **options: Any,
    ) -> "FastMIM":
        """A FastMIM from plain values, initialised as the authors do: every Linear Xavier-uniform, zero biases.

        Args:
            encoder, patch, dim, depth, heads: as in `mimfast.encoders.build`.
            img_size: pixels, or (height, width), at the start of the run.
            target: "hog" or "pixels".
            norm: unit histograms, or pixels standardised per patch.
            kind: "mse", "l1" or "smooth_l1".
            gaussian_window: of `HOG`.
            decoder_depth: None: 1 over a ViT, 4 over others.
            decoder_heads: None: heads of 32 channels.
            drop_last: blocks left off the end of the encoder, which pre-training hardly needs; fine-tuning adds them.
            drop_path: highest rate of dropped residual branches, for encoders that drop any.
            options: further arguments of the encoder, as embed_dim of a Swin.
        """
        options |= {"drop_path": drop_path} if drop_path else {}
        options |= {} if encoder.startswith("timm:") else {"mask_token": False}
        backbone: Any = encoders.build(
            encoder, img_size, patch, dim=dim, depth=depth, heads=heads, drop_last=drop_last, **options
        )
        plain = isinstance(backbone, ViT)
        if not plain:
            init_mae(backbone)
        scored: Target = (
            HOG(backbone.stride, norm, gaussian_window, kind)
            if target == "hog"
            else Pixels(backbone.stride, norm, kind)
        )
        decoder_depth = (1 if plain else 4) if decoder_depth is None else decoder_depth
        eps = EPS if plain else 1e-5
        decoder = TokenDecoder(backbone.dim, scored.dim, decoder_dim, decoder_depth, decoder_heads, eps=eps)
        return cls(backbone, decoder, scored, ratio, block)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "FastMIM":
        """The method that a `config` describes, with fresh weights."""
        encoder: Any = encoders.from_config(config["encoder"])
        target = targets.from_config(encoder.stride, config["target"])
        decoder = TokenDecoder(encoder.dim, target.dim, **config["decoder"])
        return cls(encoder, decoder, target, config["ratio"], config["block"])

    @property
    def unit(self) -> int:
        """Side of a mask block in pixels."""
        return self.block

    @property
    def config(self) -> dict[str, Any]:
        """The plain values that build this method again; written beside its weights."""
        return {
            "method": "FastMIM",
            "encoder": self.encoder.config,
            "decoder": self.decoder.config,
            "target": getattr(self.target, "config", {}),
            "ratio": self.ratio,
            "block": self.block,
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
        """Draw a mask over cells of min(block, stride) px; see `Mask.random`.

        Args:
            img_size: of the images, in pixels; None: the encoder's own.
        """
        size = self.encoder.img_size if img_size is None else img_size
        cell = min(self.block, self.encoder.stride)
        return draw(
            "FastMIM", self, batch, size, self.ratio, self.block, cell, "keep_floor", sample_ids, seed, epoch, device
        )

    def predict(self, img: Tensor, mask: Mask) -> Tensor:
        """The prediction for every token, hidden or not: (B, T, P)."""
        return self.decoder(self._encode(img, mask), prefix=self.encoder.prefix)

    def forward(self, img: Tensor, mask: Mask | None = None) -> Tensor:
        """The loss of a batch.

        Args:
            img: (B, 3, H, W), uint8 (0..255) or floating point, normalised already; H and W are multiples of `block`.
            mask: over the tokens, or over a finer grid with `HOG`; None draws a random one from torch's generator.
        Returns:
            scalar fp32.
        """
        check_image("FastMIM", img)
        if mask is None:
            mask = self.sample_mask(img.shape[0], device=img.device, img_size=(img.shape[2], img.shape[3]))
        tokens = self._encode(img, mask)
        # only what is scored is predicted, unless a token is scored in parts
        rows = self._rows(img, mask)
        pred = self.decoder(tokens, rows, self.encoder.prefix)
        return self.target.loss(pred, img, mask, rows)

    def _encode(self, img: Tensor, mask: Mask) -> Tensor:
        return encoder_for(self.encoder, img)(img, mask, mode="paint", colour=self.mask_token)

    def _rows(self, img: Tensor, mask: Mask) -> Tensor | None:
        stride = self.encoder.stride
        whole = mask.grid == (img.shape[2] // stride, img.shape[3] // stride)
        return mask.hide if whole and mask.cu_seqlens is None and mask.hide.shape[1] else None


def _check_block(stride: int, block: int, target: Target) -> None:
    if block >= stride:
        if block % stride:
            fail("FastMIM", "block", block, f"a multiple of {stride}", f"it hides whole tokens of {stride} px")
    elif not isinstance(target, HOG):
        reason = f"a block hides a part of a token of {stride} px, and only HOG is scored in parts"
        fail("FastMIM", "block", block, f"{stride} or more for {type(target).__name__}", reason)
    elif block < CELL or block % CELL or stride % block:
        reason = f"a token of {stride} px is scored by whole histograms of {CELL} px, as many blocks as fit in it"
        fail("FastMIM", "block", block, f"a multiple of {CELL} that divides {stride}", reason)


def _in_tree(name: str) -> str:
    """The inverse of `flat`, where mask_token is the method's own."""
    if name == "mask_token" or name.startswith(("encoder.", "decoder.", "target.")):
        return name
    return from_nested(name) if name.startswith("decoder_") else f"encoder.{name}"
