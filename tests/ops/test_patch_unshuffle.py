"""patch_unshuffle: parity with the reference, the reference itself, the contract, properties, messages."""

from functools import partial

import pytest
import torch
from torch import Tensor

from mimfast._check import UserError
from mimfast.ops.patch_unshuffle import IMPLS, patch_unshuffle, patch_unshuffle_ref
from mimfast.testing import assert_close_to_ref, poisoned, skip_unless
from mimfast.testing.patch_unshuffle import CASES, Case, make

SMALL = Case(3, 6, 2, 12, pos="learned")
KERNELS = [impl for impl in IMPLS if impl != "ref"]
NAMES = ("visible", "mask_token", "pos")


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case, impl, device):
    skip_unless(impl, device)
    args = make(case, device)
    if case.visible == "bf16" and device == "cpu":
        # Triton's interpreter truncates to bfloat16 where the hardware rounds: values it holds exactly, no gradient
        for name in NAMES:
            if args[name] is not None:
                args[name] = (args[name].detach() * 4).round() / 4
    with poisoned():
        assert_close_to_ref(partial(patch_unshuffle, impl=impl), patch_unshuffle_ref, args)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_agrees_with_the_formula_written_out(prefix, impl, device):
    skip_unless(impl, device)
    args = make(SMALL._replace(prefix=prefix), device)
    got = patch_unshuffle(**args, impl=impl)
    visible, pos, token = args["visible"], args["pos"], args["mask_token"].flatten()
    assert got.shape == (3, prefix + 6, 12)
    for b in range(3):
        for s in range(prefix):
            torch.testing.assert_close(got[b, s], visible[b, s] + pos[s])
        for place, k in enumerate(args["inverse"][b].tolist()):
            want = visible[b, prefix + k] if k < 2 else token
            torch.testing.assert_close(got[b, prefix + place], want + pos[prefix + place])


@pytest.mark.parametrize("impl", IMPLS)
def test_is_the_official_chain_of_concatenations(impl, device):
    skip_unless(impl, device)
    args = make(SMALL, device)
    visible, inverse = args["visible"], args["inverse"]
    pool = torch.cat([visible[:, 1:], args["mask_token"].expand(3, 4, -1)], dim=1)
    chain = pool.gather(1, inverse[:, :, None].expand(-1, -1, 12))
    want = torch.cat([visible[:, :1], chain], dim=1) + args["pos"]
    got = patch_unshuffle(**args, impl=impl)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    upstream, leaves = torch.randn_like(want), [args[name] for name in NAMES]
    for a, b in zip(torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(want, leaves, upstream)):
        torch.testing.assert_close(a, b)


def test_gradient_of_ref():
    args = make(SMALL)
    leaves = [args.pop(name).detach().double().requires_grad_() for name in NAMES]
    assert torch.autograd.gradcheck(lambda v, m, p: patch_unshuffle_ref(v, m, pos=p, **args), leaves)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_repeat_bit_for_bit(impl, device):
    skip_unless(impl, device)
    args = make(Case(37, 7, 2, 5, pos="learned"), device)
    out = patch_unshuffle(**args, impl=impl)
    upstream = torch.randn_like(out)
    leaves = [args[name] for name in NAMES]
    first, second = (torch.autograd.grad(out, leaves, upstream, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("impl", IMPLS)
def test_strange_indices_are_mask_tokens_and_unused_rows_get_no_gradient(impl, device):
    skip_unless(impl, device)
    args = make(SMALL._replace(batch=1), device)
    args["inverse"] = torch.tensor([[-1, 2**40, 1, 2, -(2**50), 99]], device=device)
    with poisoned():
        got = patch_unshuffle(**args, impl=impl)
        grads = torch.autograd.grad(got.sum(), [args[n] for n in NAMES])
    want = args["mask_token"].view(1, -1).expand(6, -1).clone()
    want[2] = args["visible"][0, 2]
    torch.testing.assert_close(got[0, 1:], want + args["pos"][1:])
    assert grads[0][0, :, 0].tolist() == [1, 0, 1]  # class token, the unused row, the used one
    assert grads[1].flatten()[0] == 5


@pytest.mark.parametrize("impl", IMPLS)
def test_a_nan_stays_in_its_row(impl, device):
    skip_unless(impl, device)
    args = make(SMALL, device)
    args["visible"] = args["visible"].detach().clone()
    args["visible"][0, 1] = float("nan")
    args["visible"].requires_grad_()
    out = patch_unshuffle(**args, impl=impl)
    spoilt = out.isnan().any(-1)
    assert torch.equal(spoilt[:, 1:], (args["inverse"] == 0) & (torch.arange(3, device=device) == 0)[:, None])
    upstream = torch.where(spoilt[..., None], float("nan"), 1.0).expand_as(out)
    d_visible, d_token, _ = torch.autograd.grad(out, [args[n] for n in NAMES], upstream)
    assert d_visible.isnan().any(-1).nonzero().tolist() == [[0, 1]]
    assert d_token.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_an_empty_batch(impl, device):
    skip_unless(impl, device)
    args = make(SMALL, device)
    args |= {"visible": args["visible"].detach()[:0].requires_grad_(), "inverse": args["inverse"][:0]}
    out = patch_unshuffle(**args, impl=impl)
    assert out.shape == (0, 7, 12)
    grads = torch.autograd.grad(out.sum(), [args[n] for n in NAMES])
    assert [tuple(g.shape) for g in grads] == [(0, 3, 12), (1, 1, 12), (7, 12)]
    assert not grads[1].any()
    assert not grads[2].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_layouts_do_not_matter(impl, device):
    skip_unless(impl, device)
    args = make(SMALL, device)
    want = patch_unshuffle(**args, impl=impl)
    upstream = torch.randn(7, 3, 12, device=device).transpose(0, 1)
    grads = torch.autograd.grad(want, [args[n] for n in NAMES], upstream.contiguous())
    storage = torch.zeros(1 + args["visible"].numel(), device=device)
    offset = storage[1:].view(args["visible"].shape).copy_(args["visible"].detach()).requires_grad_()
    moved = args | {"visible": offset, "inverse": args["inverse"].t().contiguous().t(), "pos": args["pos"][None]}
    got = patch_unshuffle(**moved, impl=impl)
    assert torch.equal(got, want)
    again = torch.autograd.grad(got, [offset, args["mask_token"], args["pos"]], upstream)
    torch.testing.assert_close(again, grads)  # torch's own sums follow the strides
    (ones,) = torch.autograd.grad(patch_unshuffle(**args, impl=impl).sum(), args["visible"])  # an expanded scalar
    assert torch.equal(ones, torch.ones_like(ones))


@pytest.mark.parametrize("impl", IMPLS)
def test_type_of_the_result(impl, device):
    skip_unless(impl, device)
    args = make(Case(2, 6, 2, 12, "bf16", "fp32", pos="learned"), device)
    wide, half = (patch_unshuffle(**args, impl=impl, dtype=d) for d in (None, torch.bfloat16))
    assert (wide.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(half.float(), wide, rtol=8e-3, atol=0)
    leaves = [args[n] for n in NAMES]
    types = [g.dtype for g in torch.autograd.grad(half, leaves, torch.ones_like(half))]
    assert types == [torch.bfloat16, torch.float32, torch.float32]
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(patch_unshuffle(**args, impl=impl), wide)


def test_contract(device):
    skip_unless("triton", device)
    args = make(SMALL, device)
    visible, token, pos = (args[n].detach() for n in NAMES)
    for table in (pos, None):
        forward = (visible, token.flatten(), args["inverse"], table, 1, torch.float32, "triton")
        torch.library.opcheck(torch.ops.mimfast.patch_unshuffle_fwd, forward)
    upstream = torch.randn(3, 7, 12, device=device)
    for wanted in (True, False):
        backward = (upstream, args["inverse"], 3, 1, torch.float32, wanted, wanted, "triton")
        torch.library.opcheck(torch.ops.mimfast.patch_unshuffle_bwd, backward)


@pytest.mark.parametrize("impl", ["auto", *IMPLS])
def test_compiles_without_a_graph_break(impl, device):
    skip_unless(impl, device)
    args = make(SMALL, device)
    leaves = [args[n] for n in NAMES]

    @partial(torch.compile, backend="aot_eager", fullgraph=True)
    def step(visible: Tensor, token: Tensor, pos: Tensor) -> Tensor:
        return (patch_unshuffle(visible, token, args["inverse"], pos, impl=impl) * 3).square().sum()

    got = torch.autograd.grad(step(*leaves), leaves)
    want = torch.autograd.grad((patch_unshuffle(**args, impl="ref") * 3).square().sum(), leaves)
    torch.testing.assert_close(got, want)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_graph_replay_takes_new_indices(device):
    args = make(Case(16, 196, 49, 512, "bf16", pos="learned"), device)
    leaves, upstream = [args[n] for n in NAMES], torch.randn(16, 197, 512, device=device)

    def run() -> list[Tensor]:
        out = patch_unshuffle(**args, impl="triton")
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    args["inverse"].copy_(torch.rand(16, 196, device=device).argsort(-1))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, run()))


BAD = [
    (
        {"visible": torch.zeros(3, 3, 12, dtype=torch.int64)},
        r"visible has dtype int64, expected float32 or bfloat16 or",
    ),
    ({"visible": torch.zeros(3, 12)}, r"visible has shape \(3, 12\), expected \(any, any, any\) because"),
    ({"visible": torch.zeros(3, 1, 12)}, r"visible has 1 rows, expected at least 2 because 1 prefix rows"),
    ({"mask_token": torch.zeros(11)}, r"mask_token has shape \(11,\), expected \(12,\) or \(1, 1, 12\) because"),
    ({"inverse": torch.zeros(3, 6)}, r"inverse has dtype float32, expected int64 because"),
    ({"inverse": torch.zeros(2, 6, dtype=torch.int64)}, r"inverse has shape \(2, 6\), expected \(3, any\) because"),
    (
        {"pos": torch.zeros(6, 12)},
        r"pos has shape \(6, 12\), expected \(7, 12\) or \(1, 7, 12\) because 1 prefix",
    ),
    ({"pos": torch.zeros(7, 12, device="meta")}, r"pos has device meta, expected cpu because visible is there"),
    ({"prefix": -1}, r"prefix has -1, expected 0 or more because"),
    ({"dtype": torch.int32}, r"dtype has torch.int32, expected a floating-point type because"),
    ({"impl": "cuda"}, r"impl has 'cuda', expected one of 'auto', 'triton', 'ref' because"),
    ({"dtype": torch.float64, "impl": "triton"}, r"impl has 'triton', .* because .* float64"),
    ({"checked": True, "inverse": torch.tensor([[0, 0, 1, 2, 3, 4]] * 3)}, r"inverse has the index 0 twice, expected"),
    ({"checked": True, "inverse": torch.tensor([[0, 1, 2, 3, 4, 6]] * 3)}, r"inverse has the index 6, expected 0..5"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m[:24] for _, m in BAD])
def test_says_what_is_wrong(change, message):
    with pytest.raises(UserError, match="patch_unshuffle: .*" + message):
        patch_unshuffle(**make(SMALL) | change)


def test_checked_accepts_what_is_right():
    args = make(SMALL)
    assert torch.equal(patch_unshuffle(**args, checked=True), patch_unshuffle(**args))
