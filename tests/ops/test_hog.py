"""hog: every implementation equals the integer reference to the bit; the reference equals the rule; messages."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mimfast import _native
from mimfast._check import UserError
from mimfast._images import IMAGENET_STD, normalize
from mimfast.ops._hog import LARGEST, TANGENTS, fixed_point
from mimfast.ops.hog import IMPLS, hog, hog_ref, run_native
from mimfast.testing import emulated, poisoned, skip_unless
from mimfast.testing.hog import CASES, PICTURES, Case, layer, make, noise, smooth

KERNELS = [impl for impl in IMPLS if impl != "ref"]
ALL = ["emulated", *IMPLS]
RAW = {"normalize": False, "std": (1 / 255,) * 3}  # sums of the 8-bit image itself


def run(impl: str, device: str, **args) -> Tensor:
    """hog by an implementation that may also be the CUDA kernel emulated, then into memory that holds NaN."""
    if impl != "emulated":
        skip_unless(impl, device)
        with poisoned():
            return hog(**args, impl=impl)
    reason = emulated.why_not()
    if reason:
        pytest.skip(reason)
    out = torch.full(hog_ref(**args).shape, math.nan, dtype=args.get("dtype", torch.float32))
    hidden = args.get("hidden")
    rest = (args.get("cell", 8), args.get("normalize", True), args.get("stride") or 0, args.get("gaussian_window", 0))
    hidden = None if hidden is None else hidden.contiguous()
    if out.numel():
        run_native(emulated.core(), "cuda", args["img"], hidden, *rest, [*args.get("std", IMAGENET_STD)], out)
    return out


def on(impl: str, device: str) -> str:
    return "cpu" if impl == "emulated" else device


@pytest.mark.parametrize("impl", ["emulated", *KERNELS])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_ref_to_the_bit(case, impl, device):
    device = on(impl, device)
    args = make(case, device)
    want, got = hog_ref(**args), run(impl, device, **args)
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    if impl == "triton" and device == "cpu" and case.dtype == "bf16":
        # Triton's interpreter truncates to bfloat16 where the hardware rounds
        torch.testing.assert_close(got, want, rtol=2**-7, atol=0)
    else:
        assert torch.equal(got, want)


@pytest.mark.parametrize("bits", [512, 256, 128])
@pytest.mark.parametrize("case", [c for c in CASES if c.batch], ids=str)
def test_every_instruction_set_of_the_cpu_gives_the_same(case, bits):
    skip_unless("cpu", "cpu")
    args, core = make(case), _native.core()
    core.hog_simd_bits(bits)
    try:
        assert torch.equal(run("cpu", "cpu", **args), hog_ref(**args))
    finally:
        core.hog_simd_bits(512)


def test_threads_do_not_matter():
    skip_unless("cpu", "cpu")
    args = make(Case(8, 64, 64, stride=16, rows=5))
    threads, found = torch.get_num_threads(), []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        found.append(hog(**args, impl="cpu"))
    torch.set_num_threads(threads)
    assert all(torch.equal(f, found[0]) for f in found)


# x is the column and y the row of a pixel
RAMPS = [
    (lambda x, y: x + 0 * y, 4, 512.0, {4: 448.0}),
    (lambda x, y: y + 0 * x, 0, 512.0, {0: 448.0}),
    (lambda x, y: x + y, 2, 724.08, {0: 56.0, 2: 554.37, 4: 56.0}),
    (lambda x, y: x - y + 31, 6, 724.08, None),
    (lambda x, y: x + 2 * y, 1, 1144.87, None),
    (lambda x, y: 2 * x + y, 3, 1144.87, None),
]


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("ramp", "bin", "total", "corner"), RAMPS, ids=lambda v: str(v) if isinstance(v, int) else "")
def test_ramps(ramp, bin, total, corner, sign, impl, device):
    device = on(impl, device)
    values = ramp(torch.arange(32), torch.arange(32)[:, None])
    img = (values if sign > 0 else 255 - values).to(device, torch.uint8).expand(1, 3, 32, 32)
    hist = run(impl, device, img=img, **RAW)[0].view(3, 9, 4, 4)
    inside = torch.zeros(9)
    inside[bin] = total
    torch.testing.assert_close(
        hist[:, :, 1:3, 1:3].cpu(), inside.view(1, 9, 1, 1).expand(3, 9, 2, 2), rtol=0, atol=0.01
    )
    if corner is not None:
        wanted = torch.tensor([corner.get(k, 0.0) for k in range(9)])
        torch.testing.assert_close(hist[0, :, 0, 0].cpu(), wanted, rtol=0, atol=0.01)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("ramp", "bin", "total"), [r[:3] for r in RAMPS], ids=lambda v: "")
def test_ramps_in_floating_point(ramp, bin, total, sign):
    img = sign * ramp(torch.arange(32), torch.arange(32)[:, None]).float().expand(1, 3, 32, 32)
    hist = hog(img, compat="float", normalize=False)[0].view(3, 9, 4, 4)
    assert hist[1, bin, 1, 1].item() == pytest.approx(total, abs=0.01)
    assert hist[1, :, 1, 1].sum().item() == pytest.approx(total, abs=0.01)


def half_plane_bins(gx: np.ndarray, gy: np.ndarray) -> tuple[np.ndarray, float]:
    """Bins by the eight half-plane tests in fp64, and the smallest distance of a gradient to an edge."""
    fold = np.where((gx < 0) | ((gx == 0) & (gy < 0)), -1.0, 1.0)
    bins, closest = np.zeros(gx.shape, np.int8), math.inf
    for k in range(1, 9):
        angle = math.pi * k / 9
        distance = fold * (gx * math.cos(angle) - gy * math.sin(angle))
        bins += distance >= 0
        closest = min(closest, float(np.abs(distance[(gx != 0) | (gy != 0)]).min()))
    return bins, closest


def test_four_comparisons_give_the_exact_bin_of_every_integer_gradient():
    side = np.arange(-1020, 1021)
    gx, gy = (g.astype(np.float64) for g in np.meshgrid(side, side, indexing="ij"))
    want, closest = half_plane_bins(gx, gy)
    assert closest > 1e-5  # so that fp64 with its errors of 1e-13 decides right, and there are no ties
    x32, y32 = gx.astype(np.float32), gy.astype(np.float32)
    level = sum((np.abs(x32) >= np.abs(y32) * np.float32(t)).astype(np.int8) for t in TANGENTS)
    got = np.where(x32 * y32 < 0, 8 - level, level)
    some = (gx != 0) | (gy != 0)
    assert (got == want)[some].all()
    by_angle = np.floor(np.arctan2(gx, gy) / np.pi * 9).astype(int) % 9
    assert (by_angle == want)[gx != 0].all()
    assert (want[(gx == 0) & some] == 0).all()


def patches_of_every_gradient() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(n, 3, 3) pixels whose centres have gradients gx, gy, for nearly all pairs that pixels of 0..255 can have.

    gx = p - q + 2 l and gy = p + q + 2 t with the differences of the diagonals, p and q, of left and right, l, and of
    top and bottom, t, so that gx and gy are both odd or both even.
    """
    side = np.arange(-1020, 1021)
    gx, gy = (g.ravel() for g in np.meshgrid(side, side))
    even = (gx + gy) % 2 == 0
    gx, gy = gx[even], gy[even]
    p, q = np.clip((gx + gy) // 2, -254, 254), np.clip((gy - gx) // 2, -254, 254)
    p += (gx - p + q) % 2
    left, top = (gx - p + q) // 2, (gy - p - q) // 2
    fits = (np.abs(left) <= 255) & (np.abs(top) <= 255)
    out = np.zeros((len(gx), 3, 3), np.uint8)
    for a, b, difference in (((0, 0), (2, 2), p), ((0, 2), (2, 0), q), ((1, 0), (1, 2), left), ((0, 1), (2, 1), top)):
        out[:, a[0], a[1]], out[:, b[0], b[1]] = np.clip(difference, 0, 255), np.clip(-difference, 0, 255)
    return out[fits], gx[fits], gy[fits]


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["emulated", "cuda", "cpu"])
def test_images_of_every_gradient(impl, device):
    """1.5 million different gradients, each the centre of 3 x 3 pixels: the sums of all cells are those of ref."""
    device = on(impl, device)
    patches, gx, gy = patches_of_every_gradient()
    assert len(patches) > 1_500_000
    ours = patches.astype(int)
    assert ((ours[:, :, 0] - ours[:, :, 2]) @ [1, 2, 1] == gx).all()
    assert ((ours[:, 0] - ours[:, 2]) @ [1, 2, 1] == gy).all()
    across = 3 * 3 * 264 * 264  # of three planes of 264 x 264 patches
    for start in range(0, len(patches), across // 3):
        part = patches[start : start + across // 3]
        part = np.concatenate([part, patches[: across // 3 - len(part)]])
        tiles = torch.from_numpy(part.reshape(3, 264, 264, 3, 3)).permute(0, 1, 3, 2, 4).reshape(1, 3, 792, 792)
        args = {"img": tiles.to(device), "normalize": False}
        assert torch.equal(run(impl, device, **args), hog_ref(**args))


def test_sums_fit_in_31_bits():
    corners = np.array(list(itertools.product((0, 255), repeat=8))).astype(int)
    a, b, c, d, e, f, g, h = corners.T  # row by row without the centre; a convex function is largest at a corner
    gx, gy = a + 2 * d + f - c - 2 * e - h, a + 2 * b + c - f - 2 * g - h
    assert math.sqrt((gx**2 + gy**2).max()) <= LARGEST
    for cell, window in itertools.product((2, 4, 7, 8, 16, 64), (0, 2, 7, 16, 32)):
        unit, side = fixed_point(cell, window)
        tiled = np.tile(np.outer(side, side) if window else np.full((1, 1), unit), (2 * cell + 1,) * 2)
        worst = max(tiled[y:, x:][:cell, :cell].sum() for y in range(window or 1) for x in range(window or 1))
        assert LARGEST * worst < 2**31
    assert fixed_point(8, 0)[0] == 2.0**14


def test_the_root_of_the_gpu_is_correctly_rounded():
    """One step of Newton from any estimate within 3 units in the last place; the hardware's is within 2.1 (2^-22.9)."""
    for scale in (1.0, 2.0**28):
        x = np.arange(1, 2 * 1020**2 + 1).astype(np.float32) * np.float32(scale)
        want = np.sqrt(x.astype(np.float64)).astype(np.float32)
        nearest = (1 / np.sqrt(x.astype(np.float64))).astype(np.float32)
        for off in range(-3, 4):
            y = (nearest.view(np.int32) + off).view(np.float32)
            root = x * y
            rest = (x.astype(np.float64) - root.astype(np.float64) ** 2).astype(np.float32)  # exact, as fma
            got = (rest.astype(np.float64) * (np.float32(0.5) * y) + root).astype(np.float32)
            assert (got == want).all()


def distances(got: Tensor, want: Tensor) -> tuple[float, float]:
    """RMS of the difference, and mean cosine over cells and colours."""
    cosine = F.cosine_similarity(got.unflatten(1, (3, -1)), want.unflatten(1, (3, -1)), dim=2)
    return (got - want).square().mean().sqrt().item(), cosine.mean().item()


@pytest.mark.parametrize("window", [0, 16])
def test_float_is_the_usual_layer(window, device):
    img = normalize(smooth(4, 96, 128)).to(device)
    got = hog(img, compat="float", gaussian_window=window)
    rms, cosine = distances(got, layer(img, window=window))
    print(f"rms {rms:.1e}, cosine {cosine:.6f}")
    assert rms <= 0.01
    assert cosine >= 0.9995
    raw, want = hog(img, compat="float", gaussian_window=window, normalize=False), layer(img, window=window, norm=False)
    assert ((raw - want).norm() / want.norm()).item() < 0.02


@pytest.mark.parametrize("window", [0, 16])
@pytest.mark.parametrize("impl", ALL)
def test_integer_is_close_to_the_usual_layer(impl, window, device):
    """Normalised values, and raw sums in units of the normalised image."""
    device = on(impl, device)
    img = smooth(2, 96, 128).to(device)
    got = run(impl, device, img=img, gaussian_window=window)
    rms, cosine = distances(got, layer(normalize(img), window=window))
    print(f"rms {rms:.1e}, cosine {cosine:.6f}")
    assert rms <= 0.02
    assert cosine >= 0.999
    raw = run(impl, device, img=img, gaussian_window=window, normalize=False)
    want = layer(normalize(img), window=window, norm=False)
    assert ((raw - want).norm() / want.norm()).item() < 0.02
    total, wanted = (h.unflatten(1, (3, 9)).sum(2) for h in (raw, want))
    torch.testing.assert_close(total, wanted, rtol=1e-4, atol=1e-4)  # whatever the bins


def test_float_takes_other_numbers_of_bins_and_8_bit_images(device):
    img = smooth(2, 32, 32).to(device)
    got = hog(img, bins=6, cell=4, stride=8, compat="float")
    assert got.shape == (2, 16, 3 * 6 * 4)
    rms, cosine = distances(hog(img, bins=6, compat="float"), layer(normalize(img), bins=6))
    assert rms <= 0.02
    assert cosine >= 0.999


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("picture", ["flat", "noise"])
def test_norms_are_one_and_flat_cells_are_zeros(picture, impl, device):
    device = on(impl, device)
    img = PICTURES[picture](2, 16, 24).to(device)
    for window in (0, 8):
        norms = run(impl, device, img=img, gaussian_window=window).unflatten(1, (3, 9)).norm(dim=2)
        torch.testing.assert_close(norms, torch.full_like(norms, float(picture != "flat")))
    assert hog(img, compat="float").isfinite().all()


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("stride", [8, 16, 32])
def test_tokens_hold_the_cells_in_order(stride, impl, device):
    device = on(impl, device)
    img, u = noise(2, 32, 96).to(device), stride // 8
    dense = run(impl, device, img=img)
    tokens = run(impl, device, img=img, stride=stride)
    across, T = 96 // stride, (96 // stride) * (32 // stride)
    assert tokens.shape == (2, T, 27 * u * u)
    for token, k, dy, dx in itertools.product(range(T), (0, 11, 26), range(u), range(u)):
        cell = dense[:, k, token // across * u + dy, token % across * u + dx]
        assert torch.equal(tokens[:, token, (k * u + dy) * u + dx], cell)


@pytest.mark.parametrize("impl", ALL)
def test_hidden_picks_rows_in_any_order(impl, device):
    device = on(impl, device)
    img = noise(3, 32, 64).to(device)
    hidden = torch.tensor([[7, 0, 3, 3, 5], [-1, 8, 1, 2**40, -(2**40)], [6, 5, 4, -8, 2]], device=device)
    rows = run(impl, device, img=img, stride=16, hidden=hidden)
    tokens = hog_ref(img, stride=16)
    for b, m in itertools.product(range(3), range(5)):
        token = int(hidden[b, m])
        want = tokens[b, token] if 0 <= token < 8 else torch.zeros_like(rows[b, m])
        assert torch.equal(rows[b, m], want)
    assert torch.equal(run(impl, device, img=img, stride=16, hidden=hidden.T.contiguous().T), rows)
    assert run(impl, device, img=img, stride=16, hidden=hidden[:, :0]).shape == (3, 0, 108)


@pytest.mark.parametrize("impl", ALL)
def test_layouts_and_flips(impl, device):
    """Strides change nothing; a mirrored image has mirrored cells and bins, but for gx = 0."""
    device = on(impl, device)
    img = noise(2, 24, 40).to(device)
    want = run(impl, device, img=img)
    for other in (
        img.to(memory_format=torch.channels_last), img.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        img.transpose(2, 3).contiguous().transpose(2, 3), img.repeat(1, 2, 1, 1)[:, 3:],
    ):  # fmt: skip
        assert torch.equal(run(impl, device, img=other), want)
    one = img[:1, :1].expand(4, 3, -1, -1)
    assert torch.equal(run(impl, device, img=one), run(impl, device, img=one.contiguous()))
    cells = run(impl, device, img=img, **RAW).unflatten(1, (3, 9))
    mirrored = run(impl, device, img=img.flip(3), **RAW).unflatten(1, (3, 9))
    assert torch.equal(mirrored.flip(4)[:, :, 1:8], cells.flip(2)[:, :, 1:8])
    torch.testing.assert_close(mirrored.flip(4)[:, :, [0, 8]].sum(2), cells[:, :, [0, 8]].sum(2))


@pytest.mark.parametrize("impl", ALL)
def test_images_do_not_mix(impl, device):
    device = on(impl, device)
    img = noise(4, 16, 24).to(device)
    order = torch.tensor([2, 0, 3, 1], device=device)
    assert torch.equal(run(impl, device, img=img[order]), run(impl, device, img=img)[order])
    changed = img.clone()
    changed[:, 1] = 9  # no grey conversion: colours are apart
    assert torch.equal(run(impl, device, img=changed)[:, :9], run(impl, device, img=img)[:, :9])


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("case", [CASES[0], Case(2, 32, 32, stride=16, rows=3), Case(1, 16, 16, window=8)], ids=str)
def test_contract(case, impl, device):
    skip_unless(impl, device)
    a = make(case, device)
    rest = (a["cell"], a["normalize"], a["stride"] or 0, a["gaussian_window"], [*IMAGENET_STD], a["dtype"], impl)
    torch.library.opcheck(torch.ops.mimfast.hog, (a["img"], a["hidden"], *rest))


@pytest.mark.parametrize("impl", ["auto", *IMPLS])
@pytest.mark.parametrize("case", [Case(2, 16, 24), Case(2, 32, 32, stride=16, rows=3)], ids=str)
def test_compiles_without_a_graph_break(case, impl, device):
    skip_unless(impl, device)
    args = make(case, device)
    step = torch.compile(lambda img: 2 * hog(**args | {"img": img}, impl=impl), backend="aot_eager", fullgraph=True)
    assert torch.equal(step(args["img"]), 2 * hog_ref(**args))


def test_no_gradient_and_autocast(device):
    img = normalize(noise(1, 16, 16)).to(device).requires_grad_()
    assert not hog(img, compat="float").requires_grad
    with torch.autocast(device, torch.bfloat16):
        inside = hog(noise(1, 16, 16).to(device))
    assert inside.dtype == torch.float32


GOOD = Case(2, 32, 48)
BAD = [
    ({"img": torch.zeros(2, 3, 32, 44, dtype=torch.uint8)}, r"img has 32 x 44 pixels, expected multiples of 8 because"),
    ({"img": torch.zeros(2, 3, 0, 48, dtype=torch.uint8)}, r"img has 0 x 48 pixels, expected multiples of 8 because"),
    ({"img": torch.zeros(2, 1, 32, 48, dtype=torch.uint8)}, r"img has shape \(2, 1, 32, 48\), expected \(any, 3, any"),
    ({"img": torch.zeros(2, 3, 32, 48)}, r"img has dtype float32, expected uint8 because .*compat='float' takes"),
    (
        {"img": torch.zeros(2, 3, 32, 48, dtype=torch.int64), "compat": "float"},
        r"img has dtype int64, expected uint8 or",
    ),
    ({"cell": 1}, r"cell has 1, expected 2 or more because"),
    ({"bins": 8}, r"bins has 8, expected 9 because the half-plane tests .* compat='float' takes any number"),
    ({"stride": 12}, r"stride has 12, expected a multiple of 8 because a token is made of whole cells of 8 pixels"),
    ({"stride": 0}, r"stride has 0, expected a multiple of 8 because"),
    ({"stride": 32}, r"img has 32 x 48 pixels, expected multiples of 32 because tokens are 32 x 32"),
    (
        {"hidden": torch.zeros(2, 3, dtype=torch.int64)},
        r"stride has None, expected the side of a token in pixels because",
    ),
    (
        {"hidden": torch.zeros(2, 6, dtype=torch.bool), "stride": 16},
        r"hidden has dtype bool, expected int64 because rows are picked by index; mask_pack turns",
    ),
    (
        {"hidden": torch.zeros(3, 6, dtype=torch.int64), "stride": 16},
        r"hidden has shape \(3, 6\), expected \(2, any\) because it holds one row for each of 2 images",
    ),
    (
        {"hidden": torch.zeros(2, 6, dtype=torch.int64, device="meta"), "stride": 16},
        r"hidden has device meta, expected cpu because img is there",
    ),
    ({"gaussian_window": 12}, r"gaussian_window has 12, expected 0, or a divisor of the sides from 2 to 32 because"),
    ({"compat": "half"}, r"compat has 'half', expected 'integer' or 'float' because"),
    ({"std": (0.0, 1.0, 1.0)}, r"std has \(0.0, 1.0, 1.0\), expected three numbers above 0 because"),
    ({"dtype": torch.float16}, r"dtype has float16, expected float32 or bfloat16 because"),
    ({"compat": "float", "impl": "cpu"}, r"impl has 'cpu', .* kernels compute with integer gradients"),
    ({"impl": "sdpa"}, r"impl has 'sdpa', expected one of 'auto', 'cuda', 'triton', 'cpu', 'ref' because"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m[:24] for _, m in BAD])
def test_says_what_is_wrong(change, message):
    with pytest.raises(UserError, match="hog: .*" + message):
        hog(**make(GOOD) | change)
