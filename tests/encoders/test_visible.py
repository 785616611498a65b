"""Mode "drop" of Swin: equal to a dense Swin whose hidden tokens are out of every attention; plans, devices, errors."""

import pytest
import torch
from torch import nn

from mimfast import Mask
from mimfast._check import UserError
from mimfast.encoders import Swin, SwinV2
from mimfast.encoders.visible import PlannedMask, inside
from mimfast.testing.window_attention import eager

SIZES = {"embed_dim": 16, "depths": (2, 2, 1, 2), "heads": (1, 2, 2, 4)}


def tiny(img_size: int | tuple[int, int] = 224, **kwargs: object) -> Swin:
    torch.manual_seed(0)
    swin = Swin(img_size, **{**SIZES, **kwargs})  # type: ignore[arg-type]
    for name, parameter in swin.named_parameters():  # zeros and small tables would hide a mistake
        if "norm" not in name:
            nn.init.normal_(parameter, std=1 if "table" in name else 0.1)
    return swin


def shared(batch: int, grid: tuple[int, int] = (7, 7), ratio: float = 0.75) -> Mask:
    return Mask.random(1, grid, ratio).expand(batch)


def dense(swin: Swin, img: torch.Tensor, mask: Mask) -> torch.Tensor:
    """Every token is computed; hidden ones are a group of their own. Rolled, cut and masked step by step."""
    x = swin.patch_embed(img)
    for stage, (size, window, shift) in zip(swin.layers, swin.places):
        times = size[0] // mask.grid[0]
        hidden = mask.hidden.view(-1, *mask.grid).repeat_interleave(times, 1).repeat_interleave(times, 2)
        for j, block in enumerate(stage.blocks):
            attn = block.attn
            qkv = attn.qkv(block.norm1(x)).unflatten(1, size)
            y = eager(qkv, attn.table(window), window, shift * (j % 2), attn.heads, group=hidden.long())
            x = x + attn.proj(y.flatten(1, 2))
            x = x + block.mlp(block.norm2(x))
        if stage.downsample is not None:
            x = stage.downsample(x, size)
    x = swin.norm(x)
    return x.gather(1, mask.keep[..., None].expand(-1, -1, x.shape[-1]))


@pytest.mark.parametrize(
    ("size", "window", "ratio"),
    [(224, 7, 0.75), (224, 14, 0.75), (224, 7, 0.0), ((128, 192), 2, 0.6), ((64, 128), 4, 0.4), (192, 6, 0.97)],
)
def test_equals_a_dense_swin_without_the_hidden_tokens(size, window: int, ratio: float) -> None:
    swin = tiny(size, window=window)
    img = torch.randn(2, 3, *swin.img_size)
    mask = shared(2, swin.grid, ratio)
    found, wanted = swin(img, mask, "drop"), dense(swin, img, mask)
    assert found.shape == (2, mask.visible, 128)
    assert torch.allclose(found, wanted, atol=1e-5)
    weight = torch.randn_like(found)
    parameters = list(swin.parameters())
    grads = [torch.autograd.grad((y * weight).sum(), parameters) for y in (found, wanted)]
    for a, b, (name, _) in zip(*grads, swin.named_parameters()):
        assert torch.allclose(a, b, atol=1e-5 * b.abs().max().item() + 1e-5), name


def test_without_hidden_tokens_it_is_the_plain_swin() -> None:
    swin, img = tiny(), torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    assert torch.allclose(swin(img, shared(2, ratio=0.0), "drop"), swin(img), atol=1e-5)


def test_hidden_pixels_do_not_reach_the_encoder_and_images_stay_apart() -> None:
    swin, mask, img = tiny(), shared(3), torch.randn(3, 3, 224, 224)
    pixels = mask.hidden.view(3, 1, 7, 7).repeat_interleave(32, 2).repeat_interleave(32, 3)
    found = swin(img, mask, "drop")
    assert torch.equal(found, swin(img.masked_fill(pixels, float("nan")), mask, "drop"))
    other = img.clone()
    other[0] = torch.randn(3, 224, 224)
    assert torch.equal(found[1:], swin(other, mask, "drop")[1:])


def test_two_runs_have_the_same_gradients_to_the_bit() -> None:
    swin, mask, img = tiny(), tiny().plan(shared(2)), torch.randn(2, 3, 224, 224)
    runs = [torch.autograd.grad(swin(img, mask, "drop").square().sum(), list(swin.parameters())) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_a_plan_is_a_mask_that_travels_whole() -> None:
    swin, mask = tiny(), shared(4)
    planned = swin.plan(mask)
    assert isinstance(planned, Mask)
    assert planned.check() is planned
    moved = planned.to("cpu")
    assert isinstance(moved, PlannedMask)
    assert moved.check() is moved
    assert (moved.grid, moved.places) == (planned.grid, planned.places)
    for name in ("keep", "inverse", "hidden", "hide", "patches"):
        assert torch.equal(getattr(moved, name), getattr(planned, name)), name
    pairs = [pair for stages in zip(moved.groups, planned.groups) for pair in zip(*stages)]
    assert len(pairs) == 8
    assert sum(a is None for a, _ in pairs) == sum(b is None for _, b in pairs) == 2  # one block, and one window
    assert all(torch.equal(s, t) for a, b in pairs if a and b for s, t in zip(a, b))
    img = torch.randn(4, 3, 224, 224)
    assert torch.equal(swin(img, moved, "drop"), swin(img, mask, "drop"))
    assert planned.to("meta").patches.device.type == "meta"


def test_neighbours_lie_together_at_every_level() -> None:
    assert [t.tolist() for t in inside(0)] == [[0], [0]]
    assert [t.tolist() for t in inside(1)] == [[0, 1, 0, 1], [0, 0, 1, 1]]
    for levels in (2, 3):
        row, column = inside(levels)
        assert (row * 2**levels + column).unique().numel() == 4**levels
        for part, child in ((row, inside(levels - 1)[0]), (column, inside(levels - 1)[1])):
            fours = (part // 2).view(-1, 4)
            assert (fours == fours[:, :1]).all()
            assert torch.equal(fours[:, 0], child)


def test_groups_hold_every_token_once_and_few_others() -> None:
    swin, slots, tokens = tiny(window=7), 0, 0
    for _ in range(20):
        for plain, shifted in swin.plan(shared(1)).groups[:2]:
            for groups in (plain, shifted):
                assert groups is not None
                for there, back in ((groups.there, groups.back), (groups.spread, groups.out)):
                    assert torch.equal(there.flatten()[back.flatten()], torch.arange(back.numel()))
                slots, tokens = slots + groups.there.numel(), tokens + groups.back.numel()
    assert tokens / slots > 0.9


def test_traces_without_graph_breaks() -> None:
    """A look at a tensor's values, which waits for the device, would break the graph."""
    swin, img = tiny(64, depths=(2, 0), heads=(1, 2)), torch.randn(2, 3, 64, 64)
    planned = swin.plan(shared(2, (8, 8)))
    compiled = torch.compile(swin, backend="eager", fullgraph=True, dynamic=False)
    assert torch.allclose(compiled(img, planned, "drop"), swin(img, planned, "drop"), atol=1e-6)


def test_autocast_and_drop_path() -> None:
    swin, mask, img = tiny(drop_path=0.5), shared(4), torch.randn(4, 3, 224, 224)
    swin.eval()
    wanted = swin(img, mask, "drop")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = swin(img, mask, "drop")
    assert (half - wanted).square().mean() < 1e-3 * wanted.square().mean()
    swin.train()
    assert not torch.equal(swin(img, mask, "drop"), swin(img, mask, "drop"))


def test_refuses() -> None:
    swin, img = tiny(), torch.zeros(2, 3, 224, 224)
    with pytest.raises(UserError, match=r"Swin: mask has rows that differ, expected the same mask for every image"):
        swin(img, Mask.random(2, (7, 7), 0.75), "drop")
    with pytest.raises(UserError, match=r"Swin: mask has rows that differ"):
        swin.plan(Mask.random(2, (7, 7), [0.5, 0.75]))
    with pytest.raises(UserError, match=r"Swin: mask has grid 14x14, expected 7x7"):
        swin(img, shared(2, (14, 14)), "drop")
    with pytest.raises(UserError, match=r"Swin: mask has grid 14x14, expected grid 7x7 because a token of the last"):
        swin.plan(shared(2, (14, 14)))
    with pytest.raises(UserError, match=r"Swin: mask has batch 3, expected 2"):
        swin(img, shared(3), "drop")
    with pytest.raises(UserError, match=r"Swin: mask has a plan for other maps or windows, expected one of plan\(\)"):
        swin(img, tiny(window=14).plan(shared(2)), "drop")
    with pytest.raises(UserError, match=r"Swin: mask has device meta, expected the CPU because groups are planned"):
        swin.plan(shared(2).to("meta"))
    with pytest.raises(UserError, match=r"SwinV2: mode has 'drop', expected one of \['paint'\]"):
        SwinV2(64, 16, (1, 1), (1, 1))(torch.zeros(1, 3, 64, 64), shared(1, (8, 8)), "drop")
