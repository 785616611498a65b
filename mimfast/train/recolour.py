"""Random colours for small image sets: a dozen photographs have few colours, and a network learns them by heart.

B batch, C channels, H W pixels. Runs where the images are, and is a pure function of (seed, epoch, sample id), like
crop and mask.
"""

import torch
from torch import Tensor

from mimfast import philox

# words of STREAM_COLOUR: order of channels, contrast, gain and offset of each channel
_WORDS = 8
_ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))


def recolour(img: Tensor, sample_ids: Tensor, epochs: Tensor, seed: int, strength: float) -> Tensor:
    """Swap the channels of each image, then change contrast, gain and offset.

    Args:
        img: (B, 3, H, W) uint8.
        sample_ids: (B,) int64.
        epochs: (B,) int64.
        seed: of the run.
        strength: s in [0, 1]; gains lie in 1 +- s, contrast in 1 +- 0.6 s, offsets in +- 0.4 s of the full range; 0
            returns `img`.
    Returns:
        (B, 3, H, W) uint8.
    """
    if strength == 0:
        return img
    draw_BN = philox.uniform(seed, philox.STREAM_COLOUR, epochs, sample_ids, _WORDS).float()
    signed_BN = strength * (2 * draw_BN - 1)
    orders = torch.stack([_full(order, img) for order in _ORDERS])
    order_BC = orders[(draw_BN[:, 0] * len(_ORDERS)).long().clamp_max(len(_ORDERS) - 1)]
    x_BCHW = img.gather(1, order_BC[:, :, None, None].expand_as(img)).float() / 255
    contrast_B = 1 + 0.6 * signed_BN[:, 1]
    gain_BC, offset_BC = 1 + signed_BN[:, 2:5], 0.4 * signed_BN[:, 5:8]
    x_BCHW = ((x_BCHW - 0.5) * contrast_B[:, None, None, None] + 0.5) * gain_BC[..., None, None]
    return ((x_BCHW + offset_BC[..., None, None]).clamp(0, 1) * 255).round().byte()


def _full(values: tuple[int, ...], like: Tensor) -> Tensor:
    # filled on the device, so that nothing is copied from the host within a step
    return torch.stack([torch.full((), value, dtype=torch.int64, device=like.device) for value in values])
