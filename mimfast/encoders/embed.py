"""The patch embedding that looks at visible patches only: gather, then one matrix product.

ViT, arXiv:2010.11929, eq. 1; MAE, arXiv:2111.06377, section 3, which embeds every patch and drops the hidden ones.
B batch, H W pixels, K kept patches, D width, E = 3 p p values of a patch in (c, p, q) order, as the weight has them
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimfast._check import fail
from mimfast._images import IMAGENET_MEAN, IMAGENET_STD, Triple
from mimfast.ops.patch_gather import patch_gather


class PatchEmbedVisible(nn.Module):
    """A convolution with kernel = stride = patch, computed for the kept patches only.

    Its parameters are `proj.weight` (D, 3, p, p) and `proj.bias` (D,), the names and shapes of timm's PatchEmbed and of
    the official ViT, MAE, BEiT and SimMIM code, so their state dicts load.

    Args:
        patch: side of a patch in pixels.
        dim: width D.
        bias: whether there is a `proj.bias`.
        mean: per channel, of values in 0..1; for uint8 images.
        std: per channel, of values in 0..1; for uint8 images.
    """

    def __init__(
        self, patch: int, dim: int, *, bias: bool = True, mean: Triple = IMAGENET_MEAN, std: Triple = IMAGENET_STD
    ) -> None:
        super().__init__()
        self.mean, self.std = mean, std
        self.proj = nn.Conv2d(3, dim, patch, patch, bias=bias)

    @classmethod
    def from_conv(
        cls, conv: nn.Conv2d, *, mean: Triple = IMAGENET_MEAN, std: Triple = IMAGENET_STD
    ) -> "PatchEmbedVisible":
        """Take over a patch convolution: its parameters are shared, not copied, so an optimizer keeps holding them.

        Args:
            conv: as `vit.patch_embed.proj` of timm or the official models.
            mean: per channel, of values in 0..1; for uint8 images.
            std: per channel, of values in 0..1; for uint8 images.
        Raises:
            UserError: a convolution that does not cut 3-channel images into square patches.
        """
        _check_conv(conv)
        with torch.device("meta"):  # neither memory nor random numbers for weights that are replaced at once
            embed = cls(conv.kernel_size[0], conv.out_channels, bias=conv.bias is not None, mean=mean, std=std)
        embed.proj = conv
        return embed.train(conv.training)

    def forward(
        self, img: Tensor, keep: Tensor | None = None, flip: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Embed the kept patches.

        Args:
            img: (B, 3, H, W) uint8, normalised here, or floating point, taken as normalised already; any strides.
            keep: (B, K) int64, or None for all patches; with `cu_seqlens` (T,), all images one after the other.
            flip: (B,) bool, True = embed the horizontally flipped image.
            cu_seqlens: (B + 1,) int32: image b owns rows cu_seqlens[b] to cu_seqlens[b + 1].
        Returns:
            (B, K, D), or (T, D) when packed, in the dtype of the weight, or of autocast where it is on.
        Raises:
            UserError: as ops.patch_gather.
        """
        weight, device = self.proj.weight, img.device.type
        # autocast would cast the rows for the product anyway: they are written in its type at once
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        patch = self.proj.kernel_size[0]
        rows_BKE = patch_gather(
            img, keep, patch=patch, mean=self.mean, std=self.std, flip=flip, cu_seqlens=cu_seqlens, dtype=dtype
        )
        return F.linear(rows_BKE, weight.flatten(1), self.proj.bias)

    def colour(self, colour: Tensor) -> Tensor:
        """The embedding of a patch of one colour: the sums of the weight over the patch, times the colour, plus bias.

        Args:
            colour: 3 values in normalised colour space, of any shape, for example (1, 3, 1, 1).
        Returns:
            (D,) in float32 or wider, also under autocast; gradients reach weight, bias and colour.
        """
        wide = torch.promote_types(self.proj.weight.dtype, torch.float32)
        sums_D3 = self.proj.weight.sum((2, 3), dtype=wide)
        row_D = (sums_D3 * colour.reshape(3).to(wide)).sum(1)  # no product: autocast would round it
        return row_D if self.proj.bias is None else row_D + self.proj.bias


def _check_conv(conv: nn.Conv2d) -> None:
    side, because = conv.kernel_size[0], "its weights are applied to whole patches, each cut out once"
    found = f"{conv.in_channels} channels, kernel {conv.kernel_size}, stride {conv.stride}, padding {conv.padding}"
    wanted = f"3 channels, kernel and stride ({side}, {side}), no padding, dilation or groups"
    plain = conv.padding in ((0, 0), 0, "valid") and conv.dilation == (1, 1) and conv.groups == 1
    if conv.in_channels != 3 or conv.kernel_size != (side, side) or conv.stride != (side, side) or not plain:
        more = f", dilation {conv.dilation}, groups {conv.groups}"
        fail("PatchEmbedVisible", "conv", found + more, wanted, because)
