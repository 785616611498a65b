"""Which windows a map has. Swin, arXiv:2103.14030, section 3.2; the attention is `mimfast.ops.window_attention`."""

from mimfast._check import fail


def window_of(op: str, size: tuple[int, int], window: int) -> tuple[int, int]:
    """Window and shift (of every second block) for a map: a map not larger than its window is one, without a shift.

    Raises:
        UserError: windows do not tile the map.
    """
    shift = window // 2
    if min(size) <= window:
        window, shift = min(size), 0
    if window < 1 or size[0] % window or size[1] % window:
        because = f"windows tile the map of {size[0]}x{size[1]} tokens without a rest"
        fail(op, "window", window, "a divisor of both sides", because)
    return window, shift
