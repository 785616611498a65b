"""BEiT: equality with timm's, initialisation, masks, other sizes."""

import copy

import pytest
import torch

from mimfast import Mask, encoders
from mimfast._check import UserError
from mimfast._images import normalize
from mimfast.encoders import BEiT
from mimfast.encoders.relative import bias_of, entries, resized

TIMM = "timm is the peer of this test: pip install 'mimfast[timm]'"
KINDS = ["shared", "block", "none"]


def tiny(img_size=(32, 48), **options) -> BEiT:
    return BEiT(img_size, patch=8, dim=32, depth=2, heads=2, **options)


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Zeros and small scales would hide a mistake."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.3)
    return model


@pytest.mark.parametrize("relative", KINDS)
@pytest.mark.parametrize("positions", ["none", "learned"])
def test_equals_timm(relative: str, positions: str) -> None:
    beit = pytest.importorskip("timm.models.beit", reason=TIMM)
    ours = BEiT(
        (48, 32), patch=8, dim=96, depth=3, heads=3, relative=relative, positions=positions, mask_token=False
    )  # fmt: skip
    peer = beit.Beit(
        (48, 32), 8, num_classes=0, global_pool="token", embed_dim=96, depth=3, num_heads=3, init_values=0.1,
        use_abs_pos_emb=positions == "learned", use_rel_pos_bias=relative == "block",
        use_shared_rel_pos_bias=relative == "shared",
    )  # fmt: skip
    randomised(peer)
    ours.load_state_dict(peer.state_dict(), strict=True)
    img = torch.randn(2, 3, 48, 32)
    got, want = ours(img), peer.forward_features(img)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(got)
    got.backward(upstream)
    want.backward(upstream)
    mine = dict(ours.named_parameters())
    for name, parameter in peer.named_parameters():
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(mine[name].grad, parameter.grad, rtol=1e-4, atol=1e-5 * scale + 1e-5, msg=name)


@pytest.mark.parametrize(
    ("name", "timm_name"), [("beit_b16", "beit_base_patch16_224"), ("beit_l16", "beit_large_patch16_224")]
)
def test_published_sizes_have_the_names_and_shapes_of_timm(name: str, timm_name: str) -> None:
    timm = pytest.importorskip("timm", reason=TIMM)
    with torch.device("meta"):
        ours = encoders.build(name, 224, relative="block", mask_token=False)
        theirs = timm.create_model(timm_name, num_classes=0, global_pool="token")
    shapes = [{key: tuple(value.shape) for key, value in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert ours.blocks[0].gamma_1.shape == (ours.dim,)
    assert ours.layer_scale == theirs.blocks[0].init_values


def test_the_names_of_simmim() -> None:
    with torch.device("meta"):
        state = encoders.build("beit_b16", 224).state_dict()
    assert state["rel_pos_bias.relative_position_bias_table"].shape == (732, 12)
    assert {name.removeprefix("blocks.0.") for name in state if name.startswith("blocks.0.")} == {
        "gamma_1", "gamma_2", "norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias",
        "attn.q_bias", "attn.v_bias", "attn.qkv.weight", "attn.proj.weight", "attn.proj.bias",
        "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias",
    }  # fmt: skip
    rest = {name for name in state if not name.startswith(("blocks.", "patch_embed.", "norm."))}
    assert rest == {"cls_token", "mask_token", "rel_pos_bias.relative_position_bias_table"}


def test_initialisation() -> None:
    beit = BEiT(32, patch=8, dim=128, depth=4, heads=2, positions="learned")
    for tensor in (beit.cls_token, beit.mask_token, beit.pos_embed, beit.patch_embed.proj.weight):
        assert 0.019 < tensor.abs().max() <= 0.02
    for layer, block in enumerate(beit.blocks, start=1):
        assert 0.0199 < block.attn.qkv.weight.abs().max() <= 0.02
        for last in (block.attn.proj, block.mlp.fc2):
            bound = 0.02 / (2 * layer) ** 0.5
            assert 0.99 * bound < last.weight.abs().max() <= bound
        assert block.gamma_1.unique().tolist() == block.gamma_2.unique().tolist() == [pytest.approx(0.1)]
    for name, parameter in beit.named_parameters():
        if name.endswith(("bias", "table")):
            assert parameter.abs().max() == 0, name
    # normal with std s, cut at +-s: std 0.54 s
    assert beit.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.0108, rel=0.02)


def test_bias_by_its_definition() -> None:
    grid, table = (2, 3), torch.randn(entries((2, 3)), 4)
    bias = bias_of(table, grid)
    assert bias.shape == (4, 7, 7)
    for query in range(6):
        for key in range(6):
            row, column = query // 3 - key // 3, query % 3 - key % 3
            assert torch.equal(bias[:, 1 + query, 1 + key], table[(row + 1) * 5 + column + 2])
    assert torch.equal(bias[:, 0, 3], table[-3])
    assert torch.equal(bias[:, 3, 0], table[-2])
    assert torch.equal(bias[:, 0, 0], table[-1])


def test_drop_path() -> None:
    beit = randomised(BEiT(16, patch=8, dim=32, depth=3, heads=2, drop_path=0.5))
    assert [block.drop_path for block in beit.blocks] == [0, 0.25, 0.5]
    img = torch.randn(1, 3, 16, 16).expand(512, -1, -1, -1)
    x = beit.embed(img)
    block, still = beit.blocks[-1], beit.eval()(img)
    assert torch.equal(beit(img), still)
    beit.train()
    branch = torch.ones(4000, 2, 2)
    dropped = block._dropped(branch)
    assert dropped.unique().tolist() == [0, 2]
    assert dropped.mean() == pytest.approx(1, abs=0.1)
    assert (dropped == dropped[:, :1, :1]).all()
    outputs = block(x, None)[:, 0].detach()
    assert len(outputs.mul(1e4).round().unique(dim=0)) == 4  # either branch there or not
    assert torch.equal(beit.blocks[0](x, None), beit.blocks[0].eval()(x, None))


@pytest.mark.parametrize("relative", KINDS)
def test_replace_is_a_mask_token_in_the_place_of_hidden_patches(relative: str) -> None:
    beit = randomised(tiny(relative=relative, positions="learned"))
    img = torch.randint(0, 256, (3, 3, 32, 48), dtype=torch.uint8)
    hidden = torch.rand(3, 24) < 0.5
    hidden[:, 0], hidden[:, 1] = True, False
    hidden[:, 2:] |= torch.tensor([[True], [False], [False]])
    mask = Mask.from_hidden(hidden, (4, 6), ragged=True)
    x = torch.where(hidden[:, :, None], beit.mask_token, beit.patch_embed.proj(normalize(img)).flatten(2).mT)
    x = torch.cat([beit.cls_token.expand(3, -1, -1), x], dim=1) + beit.pos_embed
    for block, bias in zip(beit.blocks, beit._biases(), strict=True):
        x = block(x, bias)
    torch.testing.assert_close(beit(img, mask), beit.norm(x), rtol=1e-4, atol=1e-4)
    one = Mask.from_hidden(hidden[:1], (4, 6))
    torch.testing.assert_close(beit(img[:1], one), beit.norm(x)[:1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grid", [(8, 12), (4, 6), (2, 3)])
def test_paint_equals_encoding_the_painted_image(grid: tuple[int, int]) -> None:
    beit, colour = randomised(tiny(mask_token=False)), torch.randn(1, 3, 1, 1, requires_grad=True)
    img, mask = torch.randn(2, 3, 32, 48), Mask.random(2, grid, 0.5)
    n = 32 // grid[0]
    pixels = mask.hidden.view(2, 1, *grid).repeat_interleave(n, 2).repeat_interleave(n, 3)
    got, want = beit(img, mask, "paint", colour=colour), beit(torch.where(pixels, colour, img))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    leaves = [colour, *beit.parameters()]
    upstream = torch.randn_like(got)
    for a, b in zip(*(torch.autograd.grad(y, leaves, upstream) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1, b.abs().max().item()))


@pytest.mark.parametrize("relative", KINDS)
def test_another_size_shares_the_weights_and_resizes_the_tables(relative: str) -> None:
    beit = randomised(tiny(relative=relative, positions="learned"))
    other = beit.at((64, 24))
    assert other.grid == (8, 3)
    assert (beit.img_size, beit.grid) == ((32, 48), (4, 6))
    assert other.blocks[0].mlp.fc1.weight is beit.blocks[0].mlp.fc1.weight
    other(torch.randn(2, 3, 64, 24)).sum().backward()
    for name, parameter in beit.named_parameters():
        assert name == "mask_token" or parameter.grad.abs().max() > 0, name
    assert sorted(other.state_dict()) == sorted(beit.state_dict())
    again = BEiT(**other.config)
    again.load_state_dict(other.state_dict(), strict=True)
    img = torch.randn(1, 3, 64, 24)
    assert torch.equal(again(img), other(img))
    twice = beit.at((32, 48))
    img = torch.randn(1, 3, 32, 48)
    assert torch.equal(twice(img), beit(img))
    with pytest.raises(UserError, match="BEiT: img has size 32x48, expected 64x24"):
        other(img)


def test_resized_table() -> None:
    table = torch.randn(entries((4, 4)), 3, dtype=torch.float64, requires_grad=True)
    other = resized(table, (4, 4), (7, 7))
    assert other.shape == (entries((7, 7)), 3)
    assert torch.equal(other[-3:], table[-3:])
    square = other[:-3].view(13, 13, 3)
    torch.testing.assert_close(square[6, 6], table[24])  # no offset
    corners = table[:-3].view(7, 7, 3)[::6, ::6]
    torch.testing.assert_close(square[::12, ::12], corners)  # the farthest ones
    torch.testing.assert_close(square[6, 7], table[25])  # a neighbour
    other.sum().backward()
    assert table.grad[-3:].unique().tolist() == [1]


def test_config_makes_it_again() -> None:
    options = {"relative": "block", "positions": "learned", "layer_scale": 1e-5, "drop_path": 0.1, "mask_token": False}
    beit = tiny(**options)
    again = BEiT(**beit.config)
    assert again.config == beit.config
    assert again.config.items() >= options.items()
    again.load_state_dict(beit.state_dict(), strict=True)


def test_build_knows_it() -> None:
    assert {"beit_b16", "beit_l16", "beit_nano", "vit_b16"} <= set(encoders.names())
    beit = encoders.build("beit_nano", 64, drop_path=0.1, drop_last=1)
    assert (beit.depth, beit.stride, beit.prefix, beit.grid) == (3, 8, 1, (8, 8))
    assert beit.mask_modes == {"paint", "replace"}
    assert beit(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).shape == (2, 65, 128)
    assert encoders.build("beit", 32, depth=1, dim=64).heads == 1
    with torch.device("meta"):
        large = encoders.build("beit_l16", 224)
    assert (large.layer_scale, large.depth, large.heads) == (1e-5, 24, 16)


def test_copies_and_half_precision() -> None:
    beit = tiny()
    twin, img = copy.deepcopy(beit), torch.randn(2, 3, 32, 48)
    want = beit(img)
    assert torch.equal(twin(img), want)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(beit(img).float(), want, rtol=0.05, atol=0.05)
    half = twin.to(torch.bfloat16)(img.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), want, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("relative", ["shared", "block"])
def test_compiles_without_a_graph_break(relative: str) -> None:
    beit, img, mask = randomised(tiny(relative=relative)), torch.randn(2, 3, 32, 48), Mask.random(2, (4, 6), 0.5)
    compiled = torch.compile(beit, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(img, mask), beit(img, mask))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"relative": "both"}, "BEiT: relative has 'both', expected 'shared', 'block' or 'none'"),
        ({"positions": "sincos"}, "BEiT: positions has 'sincos', expected 'learned' or 'none'"),
        ({"drop_path": 1.0}, r"BEiT: drop_path has 1.0, expected a number in \[0, 1\)"),
        ({"img_size": 30}, "BEiT: img_size has 30, expected a multiple of 8"),
    ],
)
def test_refuses_options(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny(**options)


def test_refuses_masks_and_modes() -> None:
    img, mask = torch.zeros(2, 3, 32, 48), Mask.random(2, (4, 6), 0.5)
    with pytest.raises(UserError, match=r"BEiT: mode has 'drop', expected one of \['paint', 'replace'\]"):
        tiny()(img, mask, "drop")
    with pytest.raises(UserError, match=r"BEiT: mode has 'replace', expected one of \['paint'\] because BEiT"):
        tiny(mask_token=False)(img, mask)
    with pytest.raises(UserError, match="BEiT: mask has grid 2x3, expected 4x6"):
        tiny()(img, Mask.random(2, (2, 3), 0.5))


def test_features() -> None:
    beit, img = tiny(), torch.randn(2, 3, 32, 48)
    found = beit.features(img)
    assert len(found) == 3
    assert torch.equal(beit.norm(found[-1]), beit(img))
