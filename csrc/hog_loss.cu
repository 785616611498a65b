#include "hog_loss.h"

#include <type_traits>

#include "device.cuh"

namespace mimfast {
namespace {

using loss_tail::Bfloat16;
using loss_tail::narrow;
using loss_tail::penalty;
using loss_tail::widen;

// how a cell is read: 8 pixels as two aligned words, 8 pixels one by one, or a cell of any side
enum HogPath { kWords, kPixels, kAny };

template <int kPath, bool kWindow>
__device__ __forceinline__ void describe(const HogImages& in, int64_t b, int c, int i, int j, float* values) {
  if constexpr (kPath == kAny)
    hog_cell_any(in, b, c, i, j, values);
  else
    hog_cell<kPath == kWords, kWindow>(in, b, c, i, j, values);
}

__device__ __forceinline__ float loss_of(LossKind kind, float d, float beta, float& slope) {
  if (kind == LossKind::kMse) return penalty<LossKind::kMse>(d, beta, slope);
  if (kind == LossKind::kL1) return penalty<LossKind::kL1>(d, beta, slope);
  return penalty<LossKind::kSmoothL1>(d, beta, slope);
}

// sum over the block in an order that does not change; thread 0 has it
__device__ __forceinline__ float block_total(float value, float* scratch) {
  for (int by = 16; by > 0; by /= 2) value += __shfl_down_sync(kAllLanes, value, by);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  float total = 0.0f;
  for (int warp = 0; warp < kHogLossThreads / 32; ++warp) total += scratch[warp];
  return total;
}

// what a thread works on: colour c of cell (dy, dx) of the token of a row of predictions of image b
struct Place {
  int64_t b;
  int c, row, part, dy, dx;
};

__device__ __forceinline__ Place place_of(int side, int plane, int n) {
  const int part = n % (side * side);
  return {plane / 3, plane % 3, n / (side * side), part, part / side, part % side};
}

// One thread makes the nine values of one cell and colour, as in hog.cu, and compares them with their predictions while
// they are in registers: there is no target in memory. Threads of what is visible write zeros. A block leaves one
// partial loss, which torch adds up in a fixed order. Called for a backward (no partial) it returns at once when the
// forward's gradient is right already.
// registers: see bench/aot_native.json, no spills; floor: the instructions of hog.cu, and reading and writing D values
// of every hidden token
template <int kPath, bool kWindow, bool kBfloat16>
__global__ void __launch_bounds__(kHogLossThreads, kPath == kWords && !kWindow ? 6 : 1)
    hog_loss_kernel(HogLoss call, int cells, int blocks_per_plane) {
  using Pred = std::conditional_t<kBfloat16, Bfloat16, float>;
  __shared__ float scratch[kHogLossThreads / 32];
  const LossRows& rows = call.rows;
  if (call.partial == nullptr && !call.stale && *call.upstream == 1.0f) return;
  const int side = call.side, plane = blockIdx.x / blocks_per_plane;
  int n = blockIdx.x % blocks_per_plane * kHogLossThreads + threadIdx.x;
  bool counts = n < cells;
  float values[kHogBins] = {};
  if (counts) {
    const Place at = place_of(side, plane, n);
    const int across = call.images.width / call.images.cell / side;
    int token = at.row;
    if (rows.index != nullptr) {
      const int64_t index = rows.index[at.b * rows.rows + at.row];
      counts = index >= 0 && index < rows.tokens;
      token = counts ? static_cast<int>(index) : 0;
    }
    const int y = token / across, x = token % across;
    if (rows.index == nullptr) {
      const int v = call.parts, own = side / v;
      const bool* map = rows.map + at.b * rows.tokens * v * v;
      counts = map[int64_t{y * v + at.dy / own} * across * v + x * v + at.dx / own];
    }
    if (counts) describe<kPath, kWindow>(call.images, at.b, at.c, y * side + at.dy, x * side + at.dx, values);
  }
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(n));  // the place is found again: kept through the loops it would take registers from them
#endif
  float total = 0.0f;
  if (n < cells) {
    const Place at = place_of(side, plane, n);
    const int step = side * side;
    const int64_t first = 9 * at.c * step + at.part;
    const float upstream = call.upstream != nullptr ? *call.upstream : 1.0f;
    // a part has values / parts^2 entries
    const float entries = static_cast<float>(rows.values / (call.parts * call.parts));
    const float weight = 1.0f / (static_cast<float>(*call.count) * entries);
    const Pred* pred = static_cast<const Pred*>(rows.pred) + at.b * rows.pred_stride[0] + at.row * rows.pred_stride[1];
    Pred* grad = static_cast<Pred*>(rows.grad) + (at.b * rows.rows + at.row) * rows.values;
#pragma unroll
    for (int k = 0; k < kHogBins; ++k) {
      float slope = 0.0f;
      if (counts) total += loss_of(rows.kind, widen(pred[first + k * step]) - values[k], rows.beta, slope);
      if (rows.grad != nullptr) narrow(counts ? slope * (weight * upstream) : 0.0f, grad[first + k * step]);
    }
    total *= counts ? weight : 0.0f;
  }
  if (call.partial == nullptr) return;
  total = block_total(total, scratch);
  if (threadIdx.x == 0) call.partial[blockIdx.x] = total;
}

template <bool kBfloat16>
void start(const HogLoss& call, CUstream_st* stream) {
  const HogImages& in = call.images;
  const int64_t cells = call.rows.rows * call.side * call.side;
  if (cells > INT32_MAX - kHogLossThreads)
    throw std::runtime_error("hog_loss: rows has " + std::to_string(cells) +
                             " cells for an image, expected less than 2^31 because the kernel counts them in 31 bits");
  const int64_t blocks = (cells + kHogLossThreads - 1) / kHogLossThreads;
  const bool words = in.cell == 8 && in.stride[3] == 1 && reinterpret_cast<uintptr_t>(in.img) % 8 == 0 &&
                     in.stride[0] % 8 == 0 && in.stride[1] % 8 == 0 && in.stride[2] % 8 == 0;
  auto kernel = hog_loss_kernel<kAny, true, kBfloat16>;
  if (words)
    kernel = in.window > 0 ? hog_loss_kernel<kWords, true, kBfloat16> : hog_loss_kernel<kWords, false, kBfloat16>;
  else if (in.cell == 8 && in.window == 0)
    kernel = hog_loss_kernel<kPixels, false, kBfloat16>;
  launch("hog_loss", kernel, hog_loss_partials(call), kHogLossThreads, stream, call, static_cast<int>(cells),
         static_cast<int>(blocks));
}

}  // namespace

void hog_loss_cuda(const HogLoss& call, CUstream_st* stream) {
  call.rows.pred_bf16 ? start<true>(call, stream) : start<false>(call, stream);
}

}  // namespace mimfast
