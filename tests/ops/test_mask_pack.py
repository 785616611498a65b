"""mask_pack: every implementation equals the reference to the bit, and the reference equals the rule."""

from functools import partial

import pytest
import torch
from torch import Tensor

from mimfast._check import UserError
from mimfast.ops.mask_pack import IMPLS, mask_pack, mask_pack_ref, run_native
from mimfast.testing import poisoned, skip_unless
from mimfast.testing.mask_pack import CASES, make
from mimfast.testing.mask_plan import assert_same, garbage, native_core

KERNELS = [impl for impl in IMPLS if impl != "ref"]


def run_impl(impl: str, device: str, hidden: Tensor, visible: int | None, most_hidden: int):
    """A native implementation into memory that holds garbage."""
    core, name = native_core(impl, device)
    wanted = mask_pack_ref(hidden, visible, most_hidden)
    bounds = torch.empty(0, dtype=torch.int32) if wanted.cu_seqlens is None else wanted.cu_seqlens
    keep, inverse, hide, bounds = garbage([wanted.keep, wanted.inverse, wanted.hide, bounds])
    run_native(core, name, hidden, -1 if visible is None else visible, most_hidden, (keep, inverse, hide, bounds))
    return wanted._replace(keep=keep, inverse=inverse, hide=hide, cu_seqlens=bounds if visible is None else None)


@pytest.mark.parametrize("impl", ["emulated", *KERNELS])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_ref(case, impl, device):
    device = "cpu" if impl == "emulated" else device
    args = make(case, device)
    most_hidden = case.tokens if case.most_hidden is None else case.most_hidden
    wanted = mask_pack_ref(args["hidden"], case.visible, most_hidden)
    assert_same(run_impl(impl, device, args["hidden"], case.visible, most_hidden), wanted)
    if impl != "emulated":
        with poisoned():
            found = mask_pack(**args, impl=impl)
        assert_same(found, wanted)
        assert found.hidden is args["hidden"]


@pytest.mark.parametrize("impl", ["ref", "emulated", *KERNELS])
def test_follows_the_rule(impl, device):
    """The lists once more in plain Python, rows with nothing and with everything hidden among them."""
    device = "cpu" if impl == "emulated" else device
    hidden = torch.rand(9, 37, device=device) < torch.linspace(0, 1, 9, device=device)[:, None]
    hidden[3] = True
    most = int(hidden.sum(1).max())
    found = mask_pack_ref(hidden, None, most) if impl == "ref" else run_impl(impl, device, hidden, None, most)
    keeps = [(~row).nonzero().flatten().tolist() for row in hidden]
    hides = [row.nonzero().flatten().tolist() for row in hidden]
    flat_keep, flat_hide = [t for row in keeps for t in row], [t for row in hides for t in row]
    assert found.keep.tolist() == flat_keep + [-1] * (9 * 37 - len(flat_keep))
    assert found.hide.tolist() == flat_hide + [-1] * (9 * most - len(flat_hide))
    assert found.cu_seqlens.tolist() == [sum(map(len, keeps[:b])) for b in range(10)]
    for b, row in enumerate(found.inverse):
        assert row.argsort().tolist() == keeps[b] + hides[b]


@pytest.mark.parametrize("impl", ["ref", "emulated", *KERNELS])
@pytest.mark.parametrize("visible", [0, 2, 5, 6])
def test_a_broken_promise_cuts_or_fills_up(visible, impl, device):
    """Rows that keep another number than they should: nothing is written outside, no memory stays as it was."""
    device = "cpu" if impl == "emulated" else device
    hidden = torch.tensor([[1, 0, 1, 1, 0, 1], [0] * 6, [1] * 6], dtype=torch.bool, device=device)
    found = mask_pack_ref(hidden, visible, 6) if impl == "ref" else run_impl(impl, device, hidden, visible, 6)
    for b, row in enumerate(hidden):
        keep, hide = (~row).nonzero().flatten().tolist(), row.nonzero().flatten().tolist()
        assert found.keep[b].tolist() == (keep + [-1] * 6)[:visible]
        assert found.hide[b].tolist() == (hide + [-1] * 6)[: 6 - visible]
    with pytest.raises(UserError, match=rf"visible tokens in row \d, expected {visible} because visible is {visible}"):
        mask_pack(hidden, visible, checked=True)
    for most in (0, 3):
        packed = mask_pack_ref(hidden, None, most)
        assert packed.hide.shape == (3 * most,)
        assert_same(packed if impl == "ref" else run_impl(impl, device, hidden, None, most), packed)
        with pytest.raises(UserError, match=rf"hidden tokens in row \d, expected at most {most}"):
            mask_pack(hidden, most_hidden=most, checked=True)


@pytest.mark.parametrize("impl", ["auto", "ref", *KERNELS])
def test_other_strides(impl, device):
    skip_unless(impl, device)
    hidden = torch.rand(6, 50, device=device) < 0.5
    for view in (hidden[::2, 1::3], hidden.T, hidden[:1].expand(4, -1), hidden.flatten()[1:].view(1, -1)):
        assert_same(mask_pack(view, impl=impl), mask_pack_ref(view.contiguous(), None, view.shape[1]))


@pytest.mark.parametrize("impl", KERNELS)
def test_contract(impl, device):
    skip_unless(impl, device)
    hidden = torch.rand(5, 12, device=device).argsort(1) >= 7
    for visible in (-1, 7):
        torch.library.opcheck(torch.ops.mimfast.mask_pack, (hidden, visible, 5, impl))


@pytest.mark.parametrize("impl", ["auto", "ref", *KERNELS])
def test_compiles_without_a_graph_break(impl, device):
    skip_unless(impl, device)
    compiled = torch.compile(partial(mask_pack, impl=impl), backend="aot_eager", fullgraph=True)
    hidden = torch.rand(5, 12, device=device).argsort(1) >= 7
    for kwargs in ({"visible": 7}, {}, {"most_hidden": 5}):
        assert_same(compiled(hidden, **kwargs), mask_pack(hidden, impl="ref", **kwargs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(4, dtype=torch.bool)}, r"mask_pack: hidden has shape \(4,\), expected \(any, any\)"),
        ({"hidden": torch.zeros(2, 4)}, "hidden has dtype float32, expected bool because True must mean hidden"),
        ({"visible": 5}, "visible has 5, expected 0 to 4 because each image has 4 tokens"),
        ({"visible": -1}, "visible has -1, expected 0 to 4"),
        ({"most_hidden": 5}, "most_hidden has 5, expected 0 to 4"),
        ({"impl": "triton"}, "impl has 'triton', expected one of 'auto', 'cuda', 'cpu', 'ref'"),
    ],
)
def test_says_what_is_wrong(change, message):
    with pytest.raises(UserError, match=message):
        mask_pack(**({"hidden": torch.zeros(2, 4, dtype=torch.bool)} | change))
