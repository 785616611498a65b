"""mimfast.accelerate: what it swaps computes the same, keeps everything a user holds on to, and can be undone."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

import mimfast
from mimfast._check import UserError
from mimfast.dropin import swap

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")


def swin(**kwargs) -> nn.Module:
    sizes = {"img_size": 64, "patch_size": 2, "embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
    return timm.models.SwinTransformer(**{**sizes, "num_classes": 5, "drop_path_rate": 0.0, **kwargs})


def swinv2(**kwargs) -> nn.Module:
    sizes = {"img_size": 64, "patch_size": 4, "embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
    return timm.models.SwinTransformerV2(**{**sizes, "num_classes": 5, "drop_path_rate": 0.0, **kwargs})


def vit() -> nn.Module:
    return timm.models.VisionTransformer(img_size=64, patch_size=16, embed_dim=64, depth=2, num_heads=4, num_classes=5)


HF_SIZES = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4}


def hf_swin(**kwargs) -> nn.Module:
    config = transformers.SwinConfig(**{**HF_SIZES, "drop_path_rate": 0.0, **kwargs})
    return transformers.SwinModel(config)


def hf_swinv2() -> nn.Module:
    return transformers.Swinv2Model(transformers.Swinv2Config(**HF_SIZES, drop_path_rate=0.0))


def hf_mim() -> nn.Module:
    config = transformers.SwinConfig(**HF_SIZES, drop_path_rate=0.0, encoder_stride=4)
    return transformers.SwinForMaskedImageModeling(config)


def hf_mae() -> nn.Module:
    config = transformers.ViTMAEConfig(
        image_size=64, patch_size=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=64,
    )  # fmt: skip
    return transformers.ViTMAEForPreTraining(config)


def side(model: nn.Module) -> int:
    return 32 if isinstance(model, transformers.Swinv2PreTrainedModel | transformers.SwinPreTrainedModel) else 64


def run(model: nn.Module, img: Tensor) -> Tensor:
    """A scalar that depends on everything the model computes."""
    torch.manual_seed(1)
    if isinstance(model, transformers.ViTMAEForPreTraining):
        return model(img, noise=torch.linspace(0, 1, 16).expand(len(img), -1)).loss
    if isinstance(model, transformers.SwinForMaskedImageModeling):
        tokens = (side(model) // 2) ** 2
        hidden = torch.arange(tokens).expand(len(img), -1) % 3 == 0
        return model(img, bool_masked_pos=hidden).loss
    out = model(img)
    return (out if isinstance(out, Tensor) else out.last_hidden_state).square().mean()


def noisy(model: nn.Module) -> nn.Module:
    """Biases, tables and norms that begin at zero or one would hide mistakes."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


MODELS = {
    "timm swin": (swin, 4),
    "timm swin, map not whole windows": (lambda: swin(img_size=60, patch_size=4, window_size=4), 4),
    "timm swinv2": (swinv2, 4),
    "timm vit": (vit, 2),
    "hf swin": (hf_swin, 4),
    "hf swin without qkv bias": (lambda: hf_swin(qkv_bias=False), 4),
    "hf swin, map not whole windows": (lambda: hf_swin(window_size=3), 4),
    "hf swinv2": (hf_swinv2, 4),
    "hf swin for masked image modeling": (hf_mim, 4),
    "hf vit mae": (hf_mae, 3),
}


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_stay_and_restore_gives_the_plain_model_back(name):
    make, count = MODELS[name]
    plain = noisy(make()).train()
    fast = copy.deepcopy(plain)
    keys = list(fast.state_dict())
    rows = mimfast.accelerate(fast, report=False)
    assert sum(bool(row.fused) for row in rows) == count, rows
    assert all(row.error is not None and row.speedup > 0 for row in rows)
    assert list(fast.state_dict()) == keys
    img = torch.randn(
        2, 3, 60 if "timm swin, map" in name else side(plain), 60 if "timm swin, map" in name else side(plain)
    )
    losses = [run(model, img) for model in (plain, fast)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    for (key, ours), theirs in zip(fast.named_parameters(), plain.parameters()):
        if theirs.grad is None:
            assert ours.grad is None, key
        else:
            scale = theirs.grad.abs().max().clamp(min=1e-6).item()
            assert (ours.grad - theirs.grad).abs().max().item() <= 1e-4 * max(scale, 1e-2), key
    assert mimfast.restore(fast) == count
    assert [type(m) for m in fast.modules()] == [type(m) for m in plain.modules()]
    assert torch.equal(run(fast, img), losses[0])


def test_a_wrong_fused_path_is_found_and_leaves_the_model_alone(monkeypatch):
    from mimfast.dropin import timm_kinds

    monkeypatch.setattr(timm_kinds, "window_attention", lambda qkv, *_, **__: qkv[..., : qkv.shape[-1] // 3] * 0.5)
    model = swin()
    with pytest.raises(
        UserError, match=r"accelerate: layers.0.blocks.0 has an error of .* expected at most .* untouched"
    ):
        mimfast.accelerate(model)
    assert mimfast.restore(model) == 0


def test_a_wrong_gradient_is_found(monkeypatch):
    from mimfast.dropin import timm_kinds

    right = timm_kinds.window_attention

    def detached(qkv, table, *args, **kwargs):
        return right(qkv, table.detach() + 0 * table, *args, **kwargs)

    monkeypatch.setattr(timm_kinds, "window_attention", detached)
    with pytest.raises(UserError, match="untouched"):
        mimfast.accelerate(swin(), report=False)


def test_an_unknown_model_is_refused_with_what_is_known_and_what_was_seen():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    with pytest.raises(
        UserError, match=r"model has none of them among Conv2d, ReLU, Sequential, expected at least one of"
    ):
        mimfast.accelerate(model)


def test_accelerating_twice_changes_nothing_more():
    model = swin()
    mimfast.accelerate(model, verify=False, report=False)
    rows = mimfast.accelerate(model, verify=False, report=False)
    assert {row.reason for row in rows} == {"it is accelerated already"}
    assert mimfast.restore(model) == 4


def test_float64_and_normalised_queries_are_left_with_a_reason():
    assert {row.reason for row in mimfast.accelerate(swin().double(), report=False)} == {
        "the fast paths compute in float32 and its weights are float64"
    }
    normed = timm.models.VisionTransformer(img_size=32, embed_dim=32, depth=1, num_heads=2, qk_norm=True)
    (row,) = mimfast.accelerate(normed, report=False)
    assert not row.fused
    assert row.reason == "it normalises queries and keys, which the op does not"


def test_hooks_on_the_attention_still_see_it_and_dropped_weights_take_the_plain_path():
    model = noisy(swin(attn_drop_rate=0.5)).train()
    mimfast.accelerate(model, report=False)
    seen = []
    handle = model.layers[0].blocks[0].attn.register_forward_hook(lambda *_: seen.append(1))
    img = torch.randn(1, 3, 64, 64)
    model.eval()(img)
    assert seen == [1]
    handle.remove()
    model(img)
    assert seen == [1]
    first, second = (model.train()(img) for _ in range(2))
    assert not torch.equal(first, second), "attention dropout was lost"


def test_copies_pickles_checkpointing_and_isinstance():
    from timm.models.swin_transformer import SwinTransformerBlock

    model = noisy(swin()).train()
    mimfast.accelerate(model, verify=False, report=False)
    img = torch.randn(1, 3, 64, 64)
    wanted = model(img)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        block = twin.layers[0].blocks[0]
        assert isinstance(block, SwinTransformerBlock)
        assert mimfast.restore(copy.deepcopy(twin)) == 4
        assert torch.equal(twin(img), wanted)
    model.set_grad_checkpointing(True)
    model(img).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_gradient_checkpointing_of_transformers_stays_on():
    counts = []
    for fast in (False, True):
        model = noisy(hf_swin()).train()
        if fast:
            mimfast.accelerate(model, verify=False, report=False)
        model.gradient_checkpointing_enable()
        layer, calls = model.encoder.layers[0].blocks[0], []
        original = layer._gradient_checkpointing_func
        layer._gradient_checkpointing_func = lambda *args, o=original, c=calls, **kw: c.append(1) or o(*args, **kw)
        run(model, torch.randn(1, 3, 32, 32)).backward()
        counts.append(len(calls))
    assert counts[1] == counts[0] > 0


def test_attention_weights_asked_for_take_the_plain_path():
    model = hf_swin(attn_implementation="eager").eval()
    img = torch.randn(1, 3, 32, 32)
    wanted = model(img, output_attentions=True).attentions
    mimfast.accelerate(model, verify=False, report=False)
    found = model(img, output_attentions=True).attentions
    assert len(found) == len(wanted)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, wanted))


def test_one_graph_under_compile_and_bf16_autocast():
    model = noisy(swin()).eval()
    img = torch.randn(1, 3, 64, 64)
    wanted = model(img)
    mimfast.accelerate(model, verify=False, report=False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(img), wanted, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(img).float(), wanted, rtol=0.1, atol=0.05)


def test_the_report_names_every_module(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    mimfast.accelerate(swin())
    text = capsys.readouterr().out
    assert "layers.1.blocks.1" in text
    assert "window_attention (cpu)" in text
    assert "4 of 4 modules accelerated" in text


class OfficialAttention(nn.Module):
    """The structure that microsoft/Swin-Transformer gives its window attention."""

    def __init__(self, dim: int, window: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.window_size, self.scale = heads, (window, window), (dim // heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads))
        place = torch.arange(window * window)
        dy, dx = (part[:, None] - part for part in (place // window, place % window))
        self.register_buffer("relative_position_index", (dy + window - 1) * (2 * window - 1) + dx + window - 1)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        score = q @ k.mT * self.scale + self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        if mask is not None:
            score = (score.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        return self.proj((score.softmax(-1) @ v).transpose(1, 2).flatten(2))


class OfficialBlock(nn.Module):
    """The structure of its block."""

    def __init__(self, dim: int = 32, side: int = 8, heads: int = 2, window: int = 4, shift: int = 2) -> None:
        super().__init__()
        self.input_resolution, self.window_size, self.shift_size = (side, side), window, shift
        self.attn = OfficialAttention(dim, window, heads)
        self.norm1, self.norm2, self.drop_path = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.Identity()
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.GELU())
        label = torch.zeros(side, side)
        for i, rows in enumerate((slice(0, -window), slice(-window, -shift), slice(-shift, None))):
            for j, cols in enumerate((slice(0, -window), slice(-window, -shift), slice(-shift, None))):
                label[rows, cols] = 3 * i + j
        label = self.cut(label[None, :, :, None])[..., 0]
        self.register_buffer("attn_mask", (label[:, :, None] != label[:, None]).float() * -100.0)

    def cut(self, x: Tensor) -> Tensor:
        w = self.window_size
        return x.unflatten(2, (-1, w)).unflatten(1, (-1, w)).transpose(2, 3).flatten(3, 4).flatten(0, 2)

    def forward(self, x: Tensor) -> Tensor:
        side, w, s = self.input_resolution[0], self.window_size, self.shift_size
        windows = self.cut(self.norm1(x).unflatten(1, (side, side)).roll((-s, -s), (1, 2)))
        y = self.attn(windows, self.attn_mask).unflatten(1, (w, w)).unflatten(0, (-1, side // w, side // w))
        y = y.transpose(2, 3).flatten(3, 4).flatten(1, 2).roll((s, s), (1, 2)).flatten(1, 2)
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x)))


def test_official_blocks_are_known_by_their_structure():
    torch.manual_seed(0)
    model = nn.Sequential(OfficialBlock(), OfficialBlock())
    x = torch.randn(2, 64, 32)
    wanted = model(x)
    rows = mimfast.accelerate(model, report=False)
    assert [row.plain for row in rows] == ["Swin-Transformer block"] * 2
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)


def test_the_proof_does_not_touch_the_random_state_or_the_model():
    model = swin()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    mimfast.accelerate(model, report=False)
    assert torch.equal(torch.rand(3), wanted)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_distance_counts_a_missing_gradient():
    one = torch.ones(3)
    assert swap._distance([one], [one.double(), one.double()]) == float("inf")
    assert swap._distance([one], [one.double()]) == 0.0


def test_distance_leaves_small_gradients_to_luck_only_where_they_are_close():
    many, few = torch.ones(64), torch.ones(2)
    truth = [many.double(), few.double()]
    assert swap._distance([many, few * (1 + 5e-5)], truth) == 0.0
    assert swap._distance([many, few * (1 + 1e-3)], truth) == pytest.approx(1e-3, rel=1e-3)
    assert swap._distance([many * (1 + 1e-5), few], truth) == pytest.approx(1e-5, rel=0.05)
    for spoilt in ([many, few * float("nan")], [many * float("nan"), few]):
        assert not swap._distance(spoilt, truth) <= 1.0


def test_a_checkpoint_saved_after_accelerate_loads_before_it():
    model = swin()
    mimfast.accelerate(model, verify=False, report=False)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    swin().load_state_dict(torch.load(file, weights_only=True), strict=True)
