"""The native core: what it says when it is missing, its sources' hashes, and its kernels emulated on the CPU."""

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mimfast import _native
from mimfast.ops.mask_plan import MAX_UNITS_CUDA
from mimfast.testing import emulated

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
OPS = sorted(path.stem for path in CSRC.glob("*.cu"))


def core():
    if _native.core() is None:
        pytest.skip(_native.why_missing())
    return _native.core()


def emulated_core():
    if emulated.why_not() is not None:
        pytest.skip(emulated.why_not())
    return emulated.core()


def test_loading_needs_no_torch():
    code = "import sys; from mimfast import _native as n; n.core(), n.why_no_cuda(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("note", "message"),
    [
        (None, "mimfast._core was not built: this copy was installed or is run without its native part; install g++"),
        ("cmake was not found; install it\n", "mimfast._core was not built: cmake was not found; install it"),
    ],
)
def test_says_why_it_is_missing(note, message, monkeypatch, tmp_path):
    def absent(name):
        raise ModuleNotFoundError(name=name)

    path = tmp_path / "_core.txt"
    if note is not None:
        path.write_text(note)
    monkeypatch.setattr(_native, "import_module", absent)
    monkeypatch.setattr(_native, "NOTE", path)
    _native._load.cache_clear()
    try:
        assert _native.core() is None
        assert not _native.has_cuda()
        assert _native.source_hash("noop") is None
        assert _native.why_missing().startswith(message)
        assert _native.why_no_cuda() == _native.why_missing()
    finally:
        _native._load.cache_clear()


def test_cuda_functions_exist_only_when_compiled_in():
    archs = core().cuda_archs()
    assert bool(archs) == _native.has_cuda() == (not core().cuda_missing())
    assert all(hasattr(core(), f"{op}_cpu") and hasattr(core(), f"{op}_cuda") == bool(archs) for op in OPS)
    assert (
        re.fullmatch(r"(\d+ )*\d+", archs) if archs else "reinstall with MIMFAST_NATIVE=cuda" in _native.why_no_cuda()
    )
    assert core().MASK_PLAN_MAX_UNITS_CUDA == MAX_UNITS_CUDA


def sources(name: str) -> set[str]:
    """`name` and the csrc headers it reaches; the emulation is not part of a CUDA kernel."""
    if name == "emulate.h":
        return set()
    included = re.findall(r'^#include "(.+)"', (CSRC / name).read_text(), re.MULTILINE)
    return {name}.union(*map(sources, included))


@pytest.mark.parametrize("op", OPS)
def test_source_hash_is_that_of_the_present_sources(op):
    digests = [hashlib.sha256((CSRC / name).read_bytes()).hexdigest() for name in sorted(sources(f"{op}.cu"))]
    wanted = hashlib.sha256("".join(digests).encode()).hexdigest()
    assert core().source_hash(op) == wanted, "the core was built from other sources; build it again (csrc/README.md)"
    assert core().source_hash("nothing") is None


def test_no_torch_in_csrc():
    for path in CSRC.iterdir():
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)", path.read_text()), path.name


@pytest.mark.parametrize("n", [0, 1, 255, 1024, 1025, 5000])
def test_noop_emulated(n):
    x, y = torch.randn(n), torch.full((n + 1,), torch.nan)
    emulated_core().noop_cuda(x.data_ptr(), y.data_ptr(), n, 0)
    assert torch.equal(y[:n], x)
    assert y[n].isnan()  # nothing behind the end


def test_a_refused_launch_is_a_sentence():
    if not _native.has_cuda() or torch.cuda.is_available():
        pytest.skip("needs CUDA kernels and no CUDA device")
    with pytest.raises(RuntimeError, match="noop: CUDA launch of 1 blocks of 256 threads failed because"):
        core().noop_cuda(0, 0, 5, 0)


EMULATED_PROGRAM = r"""
#include "tensor_cores.cuh"
#include <cstdio>
#include <cstdlib>
using namespace mimfast;
#define EXPECT(c) do { if (!(c)) { std::printf("line %d: %s\n", __LINE__, #c); std::exit(1); } } while (0)

template <int kThreads> __global__ void sums(int* out) {
  __shared__ int scratch[32];
  const int t = threadIdx.x, lane = t % 32;
  EXPECT(block_sum<kThreads>(t, scratch) == kThreads * (kThreads - 1) / 2);
  const Rank rank = block_rank<kThreads>(t % 3 == 0, scratch);
  EXPECT(rank.before == (t + 2) / 3 && rank.total == (kThreads + 2) / 3);
  EXPECT(__syncthreads_count(t < 7) == 7);
  EXPECT(__syncthreads_count(t % 2) == kThreads / 2);
  EXPECT(__shfl_sync(kAllLanes, t, 5) == t - lane + 5);
  EXPECT(__shfl_xor_sync(kAllLanes, 0.5 * t, 16) == 0.5 * (t ^ 16));
  EXPECT(__shfl_down_sync(kAllLanes, t, 4) == (lane < 28 ? t + 4 : t));
  EXPECT(__shfl_up_sync(kAllLanes, t, 4) == (lane < 4 ? t : t - 4));
  EXPECT(__ballot_sync(kAllLanes, lane == 31) == 1u << 31);
  EXPECT(__reduce_add_sync(kAllLanes, -1) == -32);
  __shared__ int backward[kThreads];  // needs the barrier in either order of the threads
  backward[t] = t;
  __syncthreads();
  atomicAdd(&out[backward[kThreads - 1 - t]], static_cast<int>(blockIdx.x) + 1);
}
__global__ void leave_early(int* out) {
  if (threadIdx.x >= 40) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}
__global__ void diverge(int*) {
  if (threadIdx.x == 0) __syncwarp(); else __syncthreads();
}
__global__ void copies(const uint32_t* from) {
  Chunk* to = static_cast<Chunk*>(dynamic_shared());
  const int t = threadIdx.x;
  EXPECT(to[t].word[0] == 0xffffffffu);
  copy_async(&to[t], from + 4 * t);
  copy_commit();
  copy_async(&to[32 + t], from + 4 * t);
  copy_commit();
  EXPECT(to[t].word[3] == 0xffffffffu);  // not before it is waited for
  copy_wait<1>();
  EXPECT(to[t].word[3] == from[4 * t + 3] && to[32 + t].word[3] == 0xffffffffu);
  copy_wait<0>();
  EXPECT(to[32 + t].word[3] == from[4 * t + 3]);
}
template <bool kBf16> __global__ void products() {
  Chunk* rows = static_cast<Chunk*>(dynamic_shared());  // 16 x 16, one row in two chunks
  const int t = threadIdx.x, g = t / 4, c = t % 4 * 2;
  auto value = [](int row, int column) { return static_cast<float>((row * 7 + column * 5) % 11 - 5); };
  for (int i = 0; i < 4; ++i) {
    const int pair = t * 4 + i, row = pair / 8, column = pair % 8 * 2;
    rows[2 * row + column / 8].word[column % 8 / 2] = pack<kBf16>(value(row, column), value(row, column + 1));
  }
  __syncwarp();
  uint32_t a[4], b[4], turned[4];
  load_matrices<4, false>(a, shared_at(&rows[2 * (t % 16) + t / 16]));
  load_matrices<4, false>(b, shared_at(&rows[2 * (t % 8) + t / 8 % 2]));  // row n has column n of the right side
  load_matrices<2, true>(turned, shared_at(&rows[2 * (t % 16)]));
  float square[4] = {}, plain[4] = {1, 1, 1, 1}, narrow[4] = {};
  multiply_16<kBf16>(square, a, b);
  multiply_16<kBf16>(plain, a, turned);
  multiply_8<kBf16>(narrow, a, b);
  for (int e = 0; e < 4; ++e) {
    const int row = g + e / 2 * 8, column = c + e % 2;
    float squares = 0, plains = 1, narrows = 0;
    for (int k = 0; k < 16; ++k) {
      squares += value(row, k) * value(column, k);
      plains += value(row, k) * value(k, column);
      if (k < 8) narrows += value(row, k) * value(column, k);
    }
    EXPECT(square[e] == squares && plain[e] == plains && narrow[e] == narrows);
  }
  EXPECT(pack<true>(1.00390625f, 1.01171875f) == (0x3f82u << 16 | 0x3f80u));  // ties to even
  EXPECT(pack<false>(65536.0f, 2.98023224e-8f) == 0x7c00u);
  EXPECT(pack<false>(-6.0e-5f, 1.5f) == (0x3e00u << 16 | 0x83efu));
}
int main() {
  int out[256] = {};
  uint32_t from[128];
  for (uint32_t i = 0; i < 128; ++i) from[i] = i;
  launch_shared("copies", copies, 2, 32, 1024, nullptr, static_cast<const uint32_t*>(from));
  launch_shared("products", products<true>, 1, 32, 512, nullptr);
  launch_shared("products", products<false>, 1, 32, 512, nullptr);
  launch("sums", sums<32>, 3, 32, nullptr, &out[0]);
  launch("sums", sums<256>, 3, 256, nullptr, &out[0]);
  EXPECT(out[0] == 12 && out[255] == 6);
  launch("leave_early", leave_early, 1, 64, nullptr, &out[0]);
  EXPECT(out[39] == 1 && out[40] == 6);
  for (int threads : {64, 48}) {
    try { launch("diverge", diverge, 1, threads, nullptr, &out[0]); EXPECT(false); }
    catch (const std::runtime_error& error) { std::puts(error.what()); }
  }
  launch("sums", sums<256>, 1, 256, nullptr, &out[0]);  // usable after an error
}
"""


def test_the_emulator_itself(tmp_path):
    """Barriers, warp operations, products, copies, threads that leave, a deadlock, a bad block size, in one program."""
    if emulated.why_not() is not None:
        pytest.skip(emulated.why_not())
    (tmp_path / "program.cpp").write_text(EMULATED_PROGRAM)
    command = ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}", "program.cpp", "-o", "program"]
    subprocess.run(command, cwd=tmp_path, check=True)
    run = subprocess.run(["./program"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    stuck, size = run.stdout.splitlines()
    assert stuck == "emulate: block 0 cannot go on: 64 threads wait at barriers that the others do not reach"
    assert (
        size == "emulate: block has 48 threads, expected a multiple of 32 up to 1024 because warps are emulated whole"
    )
