"""The windows of Swin: index, mask and attention as the encoder asks for them, against the definition on the map."""

import pytest
import torch

from mimfast._check import UserError
from mimfast.encoders.windows import window_of
from mimfast.ops import window_attention
from mimfast.ops._windows import layout, pair_index

CPU = torch.device("cpu")


def masked(size: tuple[int, int], window: int, shift: int) -> torch.Tensor:
    """(windows, n, n) bool: pairs of another region of the rolled map."""
    label_wn = layout(size, (window, window), (shift, shift), "pad_then_roll", CPU).label_wn
    return label_wn[:, :, None] != label_wn[:, None]


def test_index_of_the_bias_table() -> None:
    index = pair_index((7, 7), CPU)
    assert (index[0, 0], index[0, 48], index[48, 0]) == (84, 0, 168)
    wanted = torch.empty(9, 9, dtype=torch.int64)
    for q in range(9):
        for k in range(9):
            wanted[q, k] = (q // 3 - k // 3 + 2) * 5 + q % 3 - k % 3 + 2
    assert torch.equal(pair_index((3, 3), CPU), wanted)


@pytest.mark.parametrize(("size", "window"), [((14, 14), 7), ((8, 12), 4), ((6, 6), 2), ((9, 15), 3)])
def test_the_mask_keeps_tokens_apart_that_the_roll_brought_together(size: tuple[int, int], window: int) -> None:
    shift = window // 2
    # the definition: a pair is kept apart when the roll changed how far one is from the other
    row, column = (t.flatten() for t in torch.meshgrid(*(torch.arange(side) for side in size), indexing="ij"))
    rolled = [t.view(size).roll((-shift, -shift), (0, 1)) for t in (row, column)]
    cut = [t.unfold(0, window, window).unfold(1, window, window).flatten(2).flatten(0, 1) for t in rolled]
    apart = torch.zeros(cut[0].shape[0], window**2, window**2, dtype=torch.bool)
    inside = torch.arange(window**2)
    for t, at in zip(cut, (inside // window, inside % window)):
        apart |= (t[:, :, None] - t[:, None, :]) != at[:, None] - at
    assert torch.equal(masked(size, window, shift), apart)


@pytest.mark.parametrize(("side", "windows", "share"), [(56, 15 / 64, 0.119), (28, 7 / 16, 0.23), (14, 3 / 4, 0.43)])
def test_share_of_masked_pairs(side: int, windows: float, share: float) -> None:
    mask = masked((side, side), 7, 3)
    assert mask.flatten(1).any(1).float().mean() == windows
    assert mask.float().mean().item() == pytest.approx(share, abs=0.005)


@pytest.mark.parametrize(("size", "window", "shift"), [((4, 6), 2, 0), ((4, 6), 2, 1), ((8, 4), 4, 2), ((3, 3), 3, 0)])
def test_attention_equals_the_definition_token_by_token(size: tuple[int, int], window: int, shift: int) -> None:
    (H, W), heads, d = size, 2, 4
    qkv = torch.randn(2, H, W, 3 * heads * d, dtype=torch.float64)
    table = torch.randn((2 * window - 1) ** 2, heads, dtype=torch.float64)
    found = window_attention(qkv, table, window, shift, heads)
    fast = window_attention(qkv.float(), table, window, shift, heads)
    assert torch.allclose(fast.double(), found, atol=1e-5)
    bias = table[pair_index((window, window), CPU)].permute(2, 0, 1)
    q, k, v = qkv.unflatten(-1, (3, heads, d)).unbind(3)

    def at(i: int, j: int) -> tuple[int, int]:  # in the rolled map
        return (i - shift) % H, (j - shift) % W

    for i in range(H):
        for j in range(W):
            r, c = at(i, j)
            others = [
                (y, x)
                for y in range(H)
                for x in range(W)
                if (at(y, x)[0] // window, at(y, x)[1] // window) == (r // window, c // window)
                and (at(y, x)[0] - r, at(y, x)[1] - c) == (y - i, x - j)
            ]
            for head in range(heads):
                scores = []
                for y, x in others:
                    ry, rx = at(y, x)
                    place = (r % window) * window + c % window, (ry % window) * window + rx % window
                    score = (q[:, i, j, head] * k[:, y, x, head]).sum(-1) / d**0.5
                    scores.append(score + bias[head][place])
                weight = torch.stack(scores, 1).softmax(1)
                values = torch.stack([v[:, y, x, head] for y, x in others], 1)
                wanted = (weight[..., None] * values).sum(1)
                assert torch.allclose(found[:, i, j, head * d : (head + 1) * d], wanted)


def test_window_of() -> None:
    assert window_of("Swin", (56, 56), 7) == (7, 3)
    assert window_of("Swin", (7, 7), 7) == (7, 0)
    assert window_of("Swin", (6, 12), 12) == (6, 0)
    assert window_of("Swin", (3, 3), 7) == (3, 0)
    with pytest.raises(
        UserError, match=r"Swin: window has 7, expected a divisor of both sides because .* 16x14 tokens"
    ):
        window_of("Swin", (16, 14), 7)
