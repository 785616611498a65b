"""mimfast.accelerate under what a training run puts around a model: compile, DDP, checkpointing, autocast, hooks."""

import copy
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mimfast
from mimfast import _native

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

PACKAGE = Path(mimfast.__file__).parent.parent
TIMM = {"img_size": 64, "embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4, "num_classes": 5}
HF = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4}


def timm_swin(**kwargs) -> nn.Module:
    return timm.models.SwinTransformer(**TIMM | {"drop_path_rate": 0.0} | kwargs)


def timm_swinv2(**kwargs) -> nn.Module:
    return timm.models.SwinTransformerV2(**TIMM | {"drop_path_rate": 0.0} | kwargs)


def timm_vit(**kwargs) -> nn.Module:
    sizes = {"img_size": 64, "patch_size": 16, "embed_dim": 64, "depth": 2, "num_heads": 4, "num_classes": 5}
    return timm.models.VisionTransformer(**sizes | kwargs)


def hf_swin(**kwargs) -> nn.Module:
    config = transformers.SwinConfig(**HF | {"drop_path_rate": 0.0} | kwargs)
    return transformers.SwinForImageClassification(config)


def hf_swinv2(**kwargs) -> nn.Module:
    config = transformers.Swinv2Config(**HF | {"drop_path_rate": 0.0} | kwargs)
    return transformers.Swinv2ForImageClassification(config)


def hf_mim(**kwargs) -> nn.Module:
    config = transformers.SwinConfig(**HF | {"drop_path_rate": 0.0, "encoder_stride": 4} | kwargs)
    return transformers.SwinForMaskedImageModeling(config)


def hf_mae(**kwargs) -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    sizes |= {f"decoder_{name}": size for name, size in sizes.items()}
    return transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(image_size=64, **sizes | kwargs))


MODELS = {
    "timm swin": timm_swin, "timm swinv2": timm_swinv2, "timm vit": timm_vit, "hf swin": hf_swin,
    "hf swinv2": hf_swinv2, "hf swin mim": hf_mim, "hf vit mae": hf_mae,
}  # fmt: skip
DROP_PATH = {"timm swin": "drop_path_rate", "timm swinv2": "drop_path_rate", "timm vit": "drop_path_rate"}
DROP_PATH |= {"hf swin": "drop_path_rate", "hf swinv2": "drop_path_rate"}


def made(name: str, **kwargs) -> nn.Module:
    """The model with noise on parameters that begin at 0 or 1, which would hide mistakes."""
    torch.manual_seed(0)
    model = MODELS[name](**kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def fast_twin(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    assert any(row.fused for row in mimfast.accelerate(twin, verify=False, report=False))
    return twin


def images(name: str, count: int = 2) -> Tensor:
    side = 32 if name in ("hf swin", "hf swinv2", "hf swin mim") else 64
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def loss_of(name: str, model: nn.Module, img: Tensor) -> Tensor:
    if name == "hf vit mae":
        return model(img, noise=torch.linspace(0, 1, 16).expand(len(img), -1)).loss
    if name == "hf swin mim":
        hidden = torch.arange((HF["image_size"] // HF["patch_size"]) ** 2).expand(len(img), -1) % 3 == 0
        return model(img, bool_masked_pos=hidden).loss
    out = model(img)
    return (out if isinstance(out, Tensor) else out.logits).square().mean()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def learn(name: str, model: nn.Module, img: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = loss_of(name, model, img)
    loss.backward()
    return loss.detach(), gradients(model)


def assert_same(got: tuple[Tensor, dict[str, Tensor]], want: tuple[Tensor, dict[str, Tensor]], share: float) -> None:
    """Loss and gradients, each within `share` of the largest of its tensor (of the largest of all by a thousandth)."""
    torch.testing.assert_close(got[0], want[0], rtol=share, atol=share)
    assert got[1].keys() == want[1].keys()
    largest = max(float(g.abs().max()) for g in want[1].values())
    for name, grad in want[1].items():
        scale = max(float(grad.abs().max()), 1e-3 * largest)
        assert float((got[1][name] - grad).abs().max()) <= share * scale, name


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in ("hf swin mim", "hf swinv2") else n for n in MODELS]
)
def test_swapped_modules_compile_without_a_graph_break(name):
    """The whole model where it can be one graph without us; its swapped modules in any case."""
    plain = made(name).train()
    fast, img = fast_twin(plain), images(name)
    wanted = learn(name, plain, img)
    swapped = [
        module for module in fast.modules() if hasattr(module, "_mixin") and type(module)._plain is not nn.Linear
    ]
    torch._dynamo.reset()
    for module in swapped:
        module.compile(fullgraph=True, backend="aot_eager")
    assert_same(learn(name, fast, img), wanted, 1e-4)
    torch._dynamo.reset()
    if name in ("timm swin", "timm swinv2", "timm vit"):
        whole = fast_twin(plain)
        whole.compile(fullgraph=True, backend="aot_eager")
        assert_same(learn(name, whole, img), wanted, 1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_activation_checkpointing_recomputes_the_fused_path(name):
    plain = made(name).train()
    fast, img, counts = fast_twin(plain), images(name), []
    wanted = learn(name, plain, img)
    for model in (plain, fast):
        if hasattr(model, "set_grad_checkpointing"):
            model.set_grad_checkpointing(True)
        else:
            model.gradient_checkpointing_enable()
        blocks = [m for m in fast.modules() if hasattr(m, "_mixin") and type(m)._plain is not nn.Linear]
        block, calls = model.get_submodule(_name(fast, blocks[0])), []
        block.register_forward_pre_hook(lambda *_, c=calls: c.append(1))
        assert_same(learn(name, model, img), wanted, 1e-4)
        counts.append(len(calls))
    assert counts[1] == counts[0] > 1, "the first block was not run again"


def _name(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, other in model.named_modules() if other is module)


@pytest.mark.parametrize("name", MODELS)
def test_autocast_in_bf16(name):
    """As far from the float32 model as the plain one is under autocast, and gradients in the dtype of parameters."""
    plain = made(name).train()
    fast, img = fast_twin(plain), images(name)
    truth = learn(name, plain, img)[1]
    found = []
    for model in (plain, fast):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(learn(name, model, img)[1])
    size = sum(float(g.square().sum()) for g in truth.values()) ** 0.5
    apart = [sum(float((g[k] - truth[k]).square().sum()) for k in truth) ** 0.5 / size for g in found]
    print(f"relative error of the gradient: plain {apart[0]:.2e}, fused {apart[1]:.2e}")
    assert apart[1] <= 2 * apart[0]
    assert all(g.dtype == torch.float32 for g in found[1].values())


@pytest.mark.parametrize("name", DROP_PATH)
def test_drop_path_draws_the_same_numbers(name):
    plain = made(name, **{DROP_PATH[name]: 0.5}).train()
    fast, img = fast_twin(plain), images(name, 4)
    results = []
    for model in (plain, fast):
        torch.manual_seed(7)
        results.append(learn(name, model, img))
    assert_same(results[1], results[0], 1e-4)
    torch.manual_seed(8)
    assert not torch.allclose(learn(name, fast, img)[0], results[1][0], rtol=1e-3)
    outs = [loss_of(name, model.eval(), img) for model in (plain, fast)]
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_hooks_on_swapped_modules_and_their_parts_are_called(name):
    plain = made(name).train()
    fast, img = fast_twin(plain), images(name)
    seen: dict[str, list[str]] = {"plain": [], "fast": []}
    for model, which in ((plain, "plain"), (fast, "fast")):
        for part, module in model.named_modules():
            if isinstance(module, nn.LayerNorm) or hasattr(fast.get_submodule(part), "_mixin"):
                module.register_forward_pre_hook(lambda *_, p=part, w=which: seen[w].append(p))
                module.register_full_backward_hook(lambda *_, p=part, w=which: seen[w].append("back " + p))
        learn(name, model, img)
    assert set(seen["fast"]) <= set(seen["plain"])
    blocks = {p for p, m in fast.named_modules() if hasattr(m, "_mixin") and type(m)._plain is not nn.Linear}
    norms = {p for p, m in plain.named_modules() if isinstance(m, nn.LayerNorm)}
    called = set(seen["plain"])
    for part in (blocks | norms) & called:
        assert part in seen["fast"], part
        assert ("back " + part in seen["fast"]) == ("back " + part in seen["plain"]), part


def test_frozen_parameters_and_inference_mode():
    plain = made("timm swin").train()
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_("relative_position_bias_table" not in name and "layers.0" not in name)
    fast, img = fast_twin(plain), images("timm swin")
    assert_same(learn("timm swin", fast, img), learn("timm swin", plain, img), 1e-4)
    with torch.inference_mode():
        torch.testing.assert_close(fast.eval()(img), plain.eval()(img), rtol=1e-4, atol=1e-5)


# the gradients of rank argv[1] of 2 after DDP has averaged them, or of one process on the whole batch, to argv[2]
CODE = """
import importlib.util, sys, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
spec = importlib.util.spec_from_file_location("training", sys.argv[3])
training = importlib.util.module_from_spec(spec)
spec.loader.exec_module(training)
import mimfast
from mimfast import _native
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, name = dist.get_rank(), sys.argv[1]
model = training.made(name).train()
mimfast.accelerate(model, report=False)
model = DistributedDataParallel(model, find_unused_parameters=name == "hf vit mae")
for _ in range(2):  # the second one with the buckets of DDP in the order of the first
    loss, grads = training.learn(name, model, training.images(name, 4)[2 * rank : 2 * rank + 2])
torch.save({k.removeprefix("module."): v for k, v in grads.items()}, sys.argv[2] + str(rank))
dist.destroy_process_group()
"""


@pytest.mark.parametrize("name", ["timm swin", pytest.param("hf swinv2", marks=pytest.mark.slow)])
def test_two_processes_average_to_the_gradients_of_one(name, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"PYTHONPATH": str(PACKAGE), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-c", CODE, name, str(tmp_path / "rank"), __file__]
    ranks = [subprocess.Popen(command, env={**os.environ, **shared, "RANK": str(rank)}) for rank in range(2)]
    assert [process.wait(timeout=240) for process in ranks] == [0, 0]
    first, second = (torch.load(tmp_path / f"rank{rank}", weights_only=True) for rank in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    for model in (made(name).train(), fast_twin(made(name).train())):
        wanted = learn(name, model, images(name, 4))
        assert_same((wanted[0], first), wanted, 1e-4)


@pytest.mark.parametrize("name", ["timm swin", "timm swinv2", "hf swin", "hf swinv2"])
def test_without_native_code_torchs_attention_takes_over(name, monkeypatch):
    """As on a GPU none of whose kernels is verified."""
    monkeypatch.setattr(_native, "why_missing", lambda: "no compiler was there")
    plain = made(name).train()
    fast, img = copy.deepcopy(plain), images(name)
    rows = mimfast.accelerate(fast, report=False)
    assert {row.fused for row in rows} == {f"window_attention{'_v2' if 'v2' in name else ''} (sdpa)"}
    assert_same(learn(name, fast, img), learn(name, plain, img), 1e-4)
