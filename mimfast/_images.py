"""Constants and arithmetic of image values.   B batch, C channels (3: red, green, blue), H W pixels."""

import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Triple = tuple[float, float, float]


def normalize(
    img: Tensor, mean: Triple = IMAGENET_MEAN, std: Triple = IMAGENET_STD, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Turn uint8 pixels into normalised floats, (x / 255 - mean) / std per channel; floats pass through unchanged.

    Args:
        img: (B, 3, H, W), uint8 (0..255), or floating point that is normalised already.
        mean: per channel, of values in 0..1.
        std: per channel, of values in 0..1.
        dtype: of the result when `img` is uint8.
    Returns:
        (B, 3, H, W) in `dtype` (or `img` itself when it is floating point); never copies from the host.
    """
    if img.is_floating_point():
        return img
    return (img.to(dtype) / 255 - per_channel(mean, img.device, dtype)) / per_channel(std, img.device, dtype)


def per_channel(values: Triple, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Three numbers as a (3, 1, 1) tensor, filled on the device: a copy from the host breaks CUDA-graph capture."""
    return torch.stack([torch.full((1, 1), v, device=device, dtype=dtype) for v in values])
