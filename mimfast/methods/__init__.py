"""Pre-training methods: one readable file each, built from an encoder, a decoder and a target."""

from mimfast.methods.mae import MAE as MAE

__all__ = ["MAE"]
