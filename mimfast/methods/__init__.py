"""Pre-training methods: one readable file each, built from an encoder, a decoder and a target."""

from mimfast.methods.fastmim import FastMIM as FastMIM
from mimfast.methods.greenmim import GreenMIM as GreenMIM
from mimfast.methods.mae import MAE as MAE
from mimfast.methods.maskfeat import MaskFeat as MaskFeat
from mimfast.methods.mixmim import MixMIM as MixMIM
from mimfast.methods.simmim import SimMIM as SimMIM

__all__ = ["MAE", "FastMIM", "GreenMIM", "MaskFeat", "MixMIM", "SimMIM"]
