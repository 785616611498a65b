"""PatchEmbedVisible: parity with timm's PatchEmbed followed by a gather, values and gradients; what it refuses."""

import copy

import pytest
import timm.layers
import torch
from torch import Tensor, nn

from mimfast._check import UserError
from mimfast._images import normalize
from mimfast.encoders.embed import PatchEmbedVisible


def pair(bias: bool = True) -> tuple[nn.Module, PatchEmbedVisible, Tensor, Tensor]:
    """timm's module, ours with a copy of its convolution, images, indices."""
    theirs = timm.layers.PatchEmbed((32, 48), 8, 3, 24, bias=bias)
    ours = PatchEmbedVisible.from_conv(copy.deepcopy(theirs.proj))
    img = torch.randint(0, 256, (3, 3, 32, 48), dtype=torch.uint8)
    return theirs, ours, img, torch.rand(3, 24).argsort(1)[:, :7].sort(1).values


def gathered(x_BLD: Tensor, keep_BK: Tensor) -> Tensor:
    return x_BLD.gather(1, keep_BK[..., None].expand(-1, -1, x_BLD.shape[-1]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_equals_timm_followed_by_a_gather(kind, bias):
    theirs, ours, img, keep = pair(bias)
    pixels = normalize(img)
    want = gathered(theirs(pixels), keep)
    got = ours(img if kind == "uint8" else pixels, keep)
    torch.testing.assert_close(got, want)
    upstream = torch.randn_like(want)
    want_grads = torch.autograd.grad(want, list(theirs.parameters()), upstream)
    got_grads = torch.autograd.grad(got, list(ours.parameters()), upstream)
    for a, b in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(a, b)


def test_all_patches_in_place_of_timms_module():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5).eval()
    pixels = torch.randn(2, 3, 32, 32)
    want = model(pixels)
    model.patch_embed = PatchEmbedVisible.from_conv(model.patch_embed.proj)
    torch.testing.assert_close(model(pixels), want)


def test_state_dicts_are_interchangeable_and_weights_shared():
    theirs, ours, _, _ = pair()
    shared = PatchEmbedVisible.from_conv(theirs.proj)
    assert shared.proj.weight is theirs.proj.weight
    own = PatchEmbedVisible(8, 24)
    own.load_state_dict(theirs.state_dict())
    assert list(own.state_dict()) == ["proj.weight", "proj.bias"]
    assert torch.equal(own.proj.weight, ours.proj.weight)


def test_takes_no_random_numbers_when_it_takes_over():
    conv = nn.Conv2d(3, 8, 4, 4)
    before = torch.get_rng_state()
    PatchEmbedVisible.from_conv(conv)
    assert torch.equal(torch.get_rng_state(), before)


def test_flip_and_packed_rows():
    theirs, ours, img, keep = pair()
    flip = torch.tensor([True, False, True])
    flipped = torch.where(flip[:, None, None, None], img.flip(-1), img)
    want = gathered(theirs(normalize(flipped)), keep)
    torch.testing.assert_close(ours(img, keep, flip), want)
    packed = torch.cat([keep[0, :2], keep[2]])
    bounds = torch.tensor([0, 2, 2, 9], dtype=torch.int32)
    torch.testing.assert_close(ours(img, packed, flip, bounds), torch.cat([want[0, :2], want[2]]))


def test_statistics_of_the_user():
    _, ours, img, keep = pair()
    half = PatchEmbedVisible.from_conv(ours.proj, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    torch.testing.assert_close(half(img, keep), ours(img / 127.5 - 1, keep))


def test_gradient_of_a_float_image():
    theirs, ours, img, keep = pair()
    pixels = normalize(img).requires_grad_()
    (want,) = torch.autograd.grad(gathered(theirs(pixels), keep).square().sum(), pixels)
    (got,) = torch.autograd.grad(ours(pixels, keep).square().sum(), pixels)
    torch.testing.assert_close(got, want)


def test_autocast_and_half_weights():
    _, ours, img, keep = pair()
    exact = ours(img, keep)
    with torch.autocast("cpu", torch.bfloat16):
        inside = ours(img, keep)
    assert inside.dtype == torch.bfloat16
    torch.testing.assert_close(inside.float(), exact, rtol=0.02, atol=0.02)
    half = copy.deepcopy(ours).to(torch.bfloat16)
    assert half(img, keep).dtype == torch.bfloat16


def test_compiles_without_a_graph_break():
    _, ours, img, keep = pair()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(img, keep), ours(img, keep))


@pytest.mark.parametrize(
    ("conv", "found"),
    [
        (nn.Conv2d(4, 8, 4, 4), "4 channels"),
        (nn.Conv2d(3, 8, 7, 4, padding=3), r"kernel \(7, 7\), stride \(4, 4\), padding \(3, 3\)"),
        (nn.Conv2d(3, 8, (4, 8), (4, 8)), r"kernel \(4, 8\)"),
        (nn.Conv2d(3, 9, 4, 4, groups=3), "groups 3"),
    ],
)
def test_refuses_other_convolutions(conv, found):
    with pytest.raises(UserError, match=f"PatchEmbedVisible: conv has .*{found}.*, expected 3 channels, kernel"):
        PatchEmbedVisible.from_conv(conv)


@pytest.mark.parametrize("bias", [True, False])
def test_the_embedding_of_one_colour_is_that_of_a_painted_patch(bias):
    _, ours, _, _ = pair(bias)
    colour = torch.randn(1, 3, 1, 1, requires_grad=True)
    want = ours.proj(colour.expand(1, 3, 8, 8)).flatten()
    got = ours.colour(colour)
    torch.testing.assert_close(got, want)
    upstream, leaves = torch.randn_like(want), [*ours.parameters(), colour]
    for a, b in zip(*(torch.autograd.grad(y, leaves, upstream) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours.colour(colour), got)
    assert copy.deepcopy(ours).to(torch.bfloat16).colour(colour).dtype == torch.float32
