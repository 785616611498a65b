#include <type_traits>

#include "device.cuh"
#include "hog.h"

namespace mimfast {
namespace {

constexpr int kThreads = 128;

// how a cell is read: 8 pixels as two aligned words, 8 pixels one by one, or a cell of any side
constexpr int kWords = 0, kPixels = 1, kAny = 2;

template <int kPath, bool kWindow>
__device__ __forceinline__ void describe(const HogImages& in, int64_t b, int c, int i, int j, float* values) {
  if constexpr (kPath == kAny)
    hog_cell_any(in, b, c, i, j, values);
  else
    hog_cell<kPath == kWords, kWindow>(in, b, c, i, j, values);
}

__device__ __forceinline__ void put(float* to, float x) { *to = x; }
__device__ __forceinline__ void put(uint16_t* to, float x) { *to = hog_bfloat16(x); }

// One thread makes the nine values of one cell and colour: it walks down the rows of the cell with two rows of partial
// gradients and nine sums in registers, so there is no shared memory, no shuffle and no atomic. Threads count
// through the cells of a token, then tokens, so that a warp reads and writes near addresses; the blocks of a colour of
// an image come one after the other. registers: see bench/aot_native.json, no spills; floor: bytes are few (49 MB for
// 256 x 3 x 224 x 224 to bf16, 11.5 us on an H200), so instructions decide
template <int kPath, bool kWindow, bool kBfloat16>
__global__ void __launch_bounds__(kThreads) hog_kernel(Hog call, int cells, int blocks_per_plane) {
  const int plane = blockIdx.x / blocks_per_plane, n = blockIdx.x % blocks_per_plane * kThreads + threadIdx.x;
  if (n >= cells) return;
  const int64_t b = plane / 3;
  const int c = plane % 3, w = call.in.width / call.in.cell, h = call.in.height / call.in.cell;
  int i, j;
  int64_t at, step;  // of the first value, and to the next
  bool exists = true;
  if (call.dense) {
    i = n / w;
    j = n % w;
    step = int64_t{h} * w;
    at = (b * 27 + 9 * c) * step + n;
  } else {
    const int per_token = call.side * call.side, row = n / per_token, part = n % per_token, across = w / call.side;
    int64_t token = row;
    if (call.index != nullptr) {
      token = call.index[b * call.rows + row];
      exists = token >= 0 && token < int64_t{h / call.side} * across;
    }
    const int place = exists ? static_cast<int>(token) : 0;
    i = place / across * call.side + part / call.side;
    j = place % across * call.side + part % call.side;
    step = per_token;
    at = ((b * call.rows + row) * 27 + 9 * c) * step + part;
  }
  float values[kHogBins] = {};
  if (exists) describe<kPath, kWindow>(call.in, b, c, i, j, values);
  using Out = std::conditional_t<kBfloat16, uint16_t, float>;
  Out* out = static_cast<Out*>(call.out) + at;
#pragma unroll
  for (int k = 0; k < kHogBins; ++k) put(out + k * step, values[k]);
}

template <bool kBfloat16>
void start(const Hog& call, CUstream_st* stream) {
  const HogImages& in = call.in;
  const int64_t w = in.width / in.cell, h = in.height / in.cell;
  const int64_t cells = call.dense ? h * w : call.rows * call.side * call.side;
  if (cells > INT32_MAX - kThreads)
    throw std::runtime_error("hog: rows has " + std::to_string(cells) +
                             " cells for an image, expected less than 2^31 because the kernel counts them in 31 bits");
  const int64_t blocks = (cells + kThreads - 1) / kThreads;
  const bool words = in.cell == 8 && in.stride[3] == 1 && reinterpret_cast<uintptr_t>(in.img) % 8 == 0 &&
                     in.stride[0] % 8 == 0 && in.stride[1] % 8 == 0 && in.stride[2] % 8 == 0;
  auto kernel = hog_kernel<kAny, true, kBfloat16>;
  if (words)
    kernel = in.window > 0 ? hog_kernel<kWords, true, kBfloat16> : hog_kernel<kWords, false, kBfloat16>;
  else if (in.cell == 8 && in.window == 0)
    kernel = hog_kernel<kPixels, false, kBfloat16>;
  launch("hog", kernel, in.batch * 3 * blocks, kThreads, stream, call, static_cast<int>(cells),
         static_cast<int>(blocks));
}

}  // namespace

void hog_cuda(const Hog& call, CUstream_st* stream) {
  call.out_bf16 ? start<true>(call, stream) : start<false>(call, stream);
}

}  // namespace mimfast
