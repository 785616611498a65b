"""Cosine attention inside the shifted windows of a map: the kernels of window_attention with COSINE.

Rows of q and k are read as they are and their products divided by both norms in float32, so that nothing is rounded to
a half type before the scores, which go up to 100. Norms are recomputed where they are needed. The gradient of a row
over its norm loses the part along the row, whose sum over queries is the gradient of the scale: each program of the
first launch of a backward writes its sum. Always two launches, with 7 products.
"""

from mimfast.kernels.window_attention import aot
from mimfast.kernels.window_attention import window_attention_bwd as window_attention_v2_bwd
from mimfast.kernels.window_attention import window_attention_fwd as window_attention_v2_fwd

__all__ = ["AOT", "window_attention_v2_bwd", "window_attention_v2_fwd"]

# what bench/aot_triton.py compiles for every architecture: name -> kernel, argument types, constants, warps
AOT = {
    **aot("bf16", 8, 32, cosine=True), **aot("bf16", 7, 32, rare=True, cosine=True), **aot("bf16", 16, 32, cosine=True),
    **aot("bf16", 12, 32, rare=True, cosine=True), **aot("fp32", 8, 32, cosine=True),
}  # fmt: skip
