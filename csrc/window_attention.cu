#include "window_attention.h"

#include <algorithm>
#include <string>

#include "window_attention_tiles.cuh"

namespace mimfast {
namespace {

using window_tiles::Frame;
using window_tiles::Shape;
using window_tiles::Windows;

constexpr int kFoldColumns = 32, kFoldRows = 8;

// A block stays with a pair of heads and walks through windows part, part + parts, ...: the bias of its scores is
// gathered once, into registers, and the next window is on its way while one is worked on. Registers: see
// bench/aot_native.json, no spills; floor: q, k, v in and the result out.
template <bool kBf16, bool kCosine, int kD, int kTiles>
__global__ void __launch_bounds__(Shape<kD, kTiles, 3, kCosine>::kThreads, Shape<kD, kTiles, 3, kCosine>::kBlocks)
    window_attention_fwd_kernel(WindowAttention call, Windows windows) {
  using S = Shape<kD, kTiles, 3, kCosine>;
  Frame<kBf16, S> frame(call, windows);
  float bias[2][2 * kTiles];
#pragma unroll
  for (int i = 0; i < 2 * kTiles; ++i)
    for (int half = 0; half < 2; ++half) bias[half][i] = frame.bias(half, i);
  if (frame.part < windows.count) frame.load(frame.part, 0);
  copy_commit();
  int stage = 0;
  for (int32_t window = frame.part; window < windows.count; window += windows.parts, stage ^= 1) {
    if (window + windows.parts < windows.count) frame.load(window + windows.parts, stage ^ 1);
    copy_commit();
    copy_wait<1>();
    __syncthreads();
    frame.renew();
    if constexpr (kCosine) frame.fill_inverses(stage);
    if (frame.present) {
      float s[kTiles][4], total[2], out[S::kChunks][4];
      frame.multiply_rows(frame.tile(stage, 0, frame.own), frame.tile(stage, 1, frame.own), s);
      frame.finish_scores(window, stage, s, [&](int half, int i) { return bias[half][i]; });
      frame.exponentials(s, total);
      frame.multiply_scores(s, frame.tile(stage, 2, frame.own), out);
      uint32_t packed[S::kChunks][2];
      frame.pack_rows(out, 1.0f / total[0], 1.0f / total[1], packed);
      const int64_t width = int64_t{call.heads} * call.head, image = window / windows.per_image;
      uint16_t* to = static_cast<uint16_t*>(call.out) + image * call.rows * call.cols * width;
      frame.store(frame.tile(stage, 0, frame.own), packed, stage, to + frame.head * call.head, width);
    }
    __syncthreads();  // the stage may be written again
  }
}

// The same walk with one head: blocks of four warps fill a multiprocessor better than pairs do with the registers that
// this takes. Five products for each window. P and dS go through shared memory, because dv and dk add up over the
// queries of all warps. dS of all windows is added up in registers in float32; at the end a block folds the pairs of
// each offset, and window_attention_fold_kernel adds up the blocks, both in an order that does not change. Registers:
// see bench/aot_native.json, no spills; floor: q, k, v and the gradient in, three gradients out.
template <bool kBf16, bool kCosine, int kD, int kTiles>
__global__ void __launch_bounds__(Shape<kD, kTiles, 4, kCosine>::kThreads, Shape<kD, kTiles, 4, kCosine>::kBlocks)
    window_attention_bwd_kernel(WindowAttention call, Windows windows) {
  using S = Shape<kD, kTiles, 4, kCosine>;
  Frame<kBf16, S> frame(call, windows);
  float d_scores[kTiles][4] = {}, d_factor = 0.0f;
  if (frame.part < windows.count) frame.load(frame.part, 0);
  copy_commit();
  int stage = 0;
  for (int32_t window = frame.part; window < windows.count; window += windows.parts, stage ^= 1) {
    if (window + windows.parts < windows.count) frame.load(window + windows.parts, stage ^ 1);
    copy_commit();
    copy_wait<1>();
    __syncthreads();
    frame.renew();
    if constexpr (kCosine) frame.fill_inverses(stage);
    Chunk *q = frame.tile(stage, 0, frame.own), *k = frame.tile(stage, 1, frame.own),
          *v = frame.tile(stage, 2, frame.own), *grad = frame.tile(stage, 3, frame.own);
    uint32_t packed[S::kChunks][2];
    float p[kTiles][4], d_p[kTiles][4], total[2], delta[2] = {};
    frame.multiply_rows(q, k, p);
    frame.finish_scores(window, stage, p, [&](int half, int i) { return frame.bias(half, i); });
    frame.exponentials(p, total);
    for (int half = 0; half < 2; ++half) total[half] = frame.row + 8 * half < frame.n ? 1.0f / total[half] : 0.0f;
    frame.renew();
    frame.multiply_rows(grad, v, d_p);
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
      for (int e = 0; e < 4; ++e) {
        p[j][e] *= total[e / 2];
        delta[e / 2] += p[j][e] * d_p[j][e];
      }
    frame.renew();
    frame.put_scores(0, p);
    frame.add_quads(delta);
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
      for (int e = 0; e < 4; ++e) {
        p[j][e] *= d_p[j][e] - delta[e / 2];
        d_scores[j][e] += p[j][e];
      }
    if constexpr (kCosine) {
      frame.put_scores(1, p, frame.row < frame.n ? frame.slope(frame.inverses(0)[frame.row]) : 0.0f,
                       frame.row + 8 < frame.n ? frame.slope(frame.inverses(0)[frame.row + 8]) : 0.0f);
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
        for (int e = 0; e < 4; ++e) p[j][e] *= frame.slope(frame.inverses(1)[8 * j + frame.lane % 4 * 2 + e % 2]);
    } else {
      frame.put_scores(1, p);
    }
    frame.renew();
    float d_q[S::kChunks][4];
    frame.multiply_scores(p, k, d_q);
    if constexpr (kCosine) d_factor += frame.through_norm(d_q, q, 0);
    frame.pack_rows(d_q, frame.factor(), frame.factor(), packed);
    __syncthreads();  // P and dS are there; nobody needs v any more
    frame.renew();
    const int64_t width = int64_t{call.heads} * call.head, image = window / windows.per_image;
    uint16_t* to = static_cast<uint16_t*>(call.d_qkv) + image * call.rows * call.cols * 3 * width;
    to += frame.head * call.head;
    float d[S::kChunks][4];
    frame.store(v, packed, stage, to, 3 * width);
    frame.multiply_turned(frame.scores_tile(0), grad, d);
    frame.pack_rows(d, 1.0f, 1.0f, packed);
    frame.add_padding(1, d, 1.0f, stage);
    frame.store(v, packed, stage, to + 2 * width, 3 * width);
    frame.renew();
    frame.multiply_turned(frame.scores_tile(1), q, d);
    if constexpr (kCosine) frame.through_norm(d, k, 1);
    frame.pack_rows(d, frame.factor(), frame.factor(), packed);
    frame.add_padding(0, d, frame.factor(), stage);
    frame.store(v, packed, stage, to + width, 3 * width);
    __syncthreads();  // the stage may be written again
  }
  if (windows.partial != nullptr) frame.store_partial(d_scores, d_factor);
}

// d_table, d_bias and d_head_scale from what the blocks have: one block has kFoldColumns of a head, and kFoldRows
// threads share the parts of each
__global__ void __launch_bounds__(kFoldColumns* kFoldRows)
    window_attention_fold_kernel(WindowAttention call, Windows windows, int32_t offsets, int32_t blocks_per_head) {
  __shared__ float sums[kFoldRows][kFoldColumns];
  const int x = threadIdx.x % kFoldColumns, y = threadIdx.x / kFoldColumns;
  const int32_t head = blockIdx.x / blocks_per_head, at = blockIdx.x % blocks_per_head * kFoldColumns + x;
  const int32_t columns = offsets + 2 * call.head + (call.head_scale != nullptr ? 1 : 0);
  float sum = 0.0f;
  if (at < columns)
#pragma unroll 4
    for (int32_t part = y; part < windows.parts; part += kFoldRows)
      sum += windows.partial[(int64_t{part} * call.heads + head) * columns + at];
  sums[y][x] = sum;
  __syncthreads();
  if (y > 0) return;
  for (int i = 1; i < kFoldRows; ++i) sum += sums[i][x];
  if (call.d_bias != nullptr && at < call.head) call.d_bias[head * call.head + at] = 0.0f;  // no query is padding
  if (at < offsets) {
    if (call.d_table != nullptr) call.d_table[int64_t{at} * call.heads + head] = sum;
  } else if (at < offsets + 2 * call.head) {
    const int32_t which = (at - offsets) / call.head, d = (at - offsets) % call.head;
    if (call.d_bias != nullptr) call.d_bias[((which + 1) * call.heads + head) * call.head + d] = sum;
  } else if (at < columns && call.d_head_scale != nullptr) {
    call.d_head_scale[head] = sum;
  }
}

struct Kernel {
  void (*run)(WindowAttention, Windows);
  int threads, shared, heads;
};

template <bool kBf16, bool kCosine, int kD, int kTiles>
Kernel kernel_of(const WindowAttention& call) {
  using Forward = Shape<kD, kTiles, 3, kCosine>;
  using Backward = Shape<kD, kTiles, 4, kCosine>;
  static_assert(Backward::kBytes <= 99 * 1024, "what a block may have on sm_86, 89 and 120");
  static_assert((Forward::kBytes + 1024) * Forward::kBlocks <= 228 * 1024, "what blocks together have on sm_90");
  static_assert((Backward::kBytes + 1024) * Backward::kBlocks <= 228 * 1024, "the same");
  if (call.d_qkv == nullptr)
    return {window_attention_fwd_kernel<kBf16, kCosine, kD, kTiles>, Forward::kThreads, Forward::kBytes,
            Forward::kHeads};
  return {window_attention_bwd_kernel<kBf16, kCosine, kD, kTiles>, Backward::kThreads, Backward::kBytes,
          Backward::kHeads};
}

template <bool kBf16>
Kernel kernel_for(const WindowAttention& call) {
  const int32_t tokens = call.window[0] * call.window[1];
  if (call.head_scale != nullptr)
    return call.head <= 32 ? kernel_of<kBf16, true, 32, 8>(call) : kernel_of<kBf16, true, 64, 8>(call);
  if (call.head <= 16) return kernel_of<kBf16, false, 16, 8>(call);
  if (call.head > 48) return kernel_of<kBf16, false, 64, 8>(call);
  if (call.head > 32) return kernel_of<kBf16, false, 48, 8>(call);
  if (tokens <= 16) return kernel_of<kBf16, false, 32, 2>(call);
  if (tokens <= 40) return kernel_of<kBf16, false, 32, 5>(call);
  if (tokens <= 56) return kernel_of<kBf16, false, 32, 7>(call);
  return kernel_of<kBf16, false, 32, 8>(call);
}

Kernel kernel_for(const WindowAttention& call) { return call.bf16 ? kernel_for<true>(call) : kernel_for<false>(call); }

Windows windows_of(const WindowAttention& call) {
  const int32_t across = (call.cols + call.window[1] - 1) / call.window[1];
  const int32_t per_image = (call.rows + call.window[0] - 1) / call.window[0] * across;
  const int64_t count = call.batch * per_image;
  if (count >= INT32_MAX / 2)
    throw std::runtime_error("window_attention: qkv has " + std::to_string(count) +
                             " windows, expected fewer than 2^30 because the kernel counts them in 31 bits");
  return {across, per_image, static_cast<int32_t>(count), 0, nullptr};
}

int64_t pairs_of(const WindowAttention& call, const Kernel& kernel) {
  return (call.heads + kernel.heads - 1) / kernel.heads;
}

}  // namespace

int window_attention_cuda_parts(const WindowAttention& call) {
  const Kernel kernel = kernel_for(call);
  const int64_t blocks = resident_blocks("window_attention", kernel.run, kernel.threads, kernel.shared);
  const int64_t parts = std::min<int64_t>(blocks / pairs_of(call, kernel), windows_of(call).count);
  return static_cast<int>(std::max<int64_t>(parts, 1));
}

void window_attention_cuda(const WindowAttention& call, int parts, float* partial, CUstream_st* stream) {
  const Kernel kernel = kernel_for(call);
  Windows windows = windows_of(call);
  windows.parts = parts;
  windows.partial = partial;
  launch_shared("window_attention", kernel.run, parts * pairs_of(call, kernel), kernel.threads, kernel.shared, stream,
                call, windows);
  if (partial == nullptr) return;
  const int32_t offsets = (2 * call.window[0] - 1) * (2 * call.window[1] - 1);
  const int32_t blocks = (offsets + 2 * call.head + 1 + kFoldColumns - 1) / kFoldColumns;
  launch("window_attention", window_attention_fold_kernel, int64_t{blocks} * call.heads, kFoldColumns * kFoldRows,
         stream, call, windows, offsets, blocks);
}

}  // namespace mimfast
