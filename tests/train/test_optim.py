"""Decay groups as in MAE's code, and a step that skips itself when the gradient is not finite."""

import copy

import pytest
import torch

from mimfast import recipes
from mimfast.testing.runs import tiny_recipe
from mimfast.train.optim import guarded_step, make_optimizer, set_lr


def test_only_biases_and_one_dimensional_parameters_escape_decay(tmp_path):
    method = recipes.build(tiny_recipe(tmp_path, tmp_path))
    names = {id(p): name for name, p in method.named_parameters()}
    decayed, plain = make_optimizer(method, (0.9, 0.95), 0.05).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    assert all(p.ndim <= 1 or names[id(p)].endswith(".bias") for p in plain["params"])
    kept = {names[id(p)] for p in decayed["params"]}
    assert {"encoder.cls_token", "decoder.mask_token", "encoder.patch_embed.proj.weight"} <= kept
    # fixed sine-cosine positions are no parameters to train
    assert not any("pos_embed" in names[id(p)] for group in (decayed, plain) for p in group["params"])


def _trained_once():
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    optimizer = make_optimizer(layer, (0.9, 0.95), 0.05)
    set_lr(optimizer, 0.1)
    layer(torch.ones(4, 3)).sum().backward()
    guarded_step(optimizer, layer.parameters(), None)
    return layer, optimizer


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_gradient_that_is_not_finite_changes_nothing(bad, clip):
    layer, optimizer = _trained_once()
    weights, state = copy.deepcopy(layer.state_dict()), copy.deepcopy(optimizer.state_dict())
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    layer.bias.grad[1] = bad
    norm, skipped = guarded_step(optimizer, layer.parameters(), clip)
    assert skipped.item() == 1
    assert not torch.isfinite(norm)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, weights[name])
    for key, entry in optimizer.state_dict()["state"].items():
        for name, value in entry.items():
            assert torch.equal(value, state["state"][key][name]), f"{name} of parameter {key} moved"


def test_a_finite_step_equals_plain_adamw():
    layer, _ = _trained_once()
    torch.manual_seed(0)
    twin = torch.nn.Linear(3, 2)
    groups = [{"params": [twin.weight], "weight_decay": 0.05}, {"params": [twin.bias], "weight_decay": 0.0}]
    plain = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.95))
    twin(torch.ones(4, 3)).sum().backward()
    plain.step()
    for a, b in zip(layer.parameters(), twin.parameters()):
        torch.testing.assert_close(a, b)


def test_the_norm_is_that_before_clipping_and_the_gradient_is_clipped():
    layer, optimizer = _trained_once()
    for p in layer.parameters():
        p.grad = torch.full_like(p, 2.0)
    norm, skipped = guarded_step(optimizer, layer.parameters(), 0.5)
    assert norm.item() == pytest.approx(2 * 8**0.5)
    assert skipped.item() == 0
    assert torch.nn.utils.get_total_norm([p.grad for p in layer.parameters()]).item() == pytest.approx(0.5, rel=1e-4)
