#include "crop_resize.h"

#include "device.cuh"

namespace mimfast {
namespace {

constexpr int kTile = 32;              // output pixels a side of a block, and source rows in shared memory
constexpr int kWarps = 8;              // a lane is an output column; warps share out the rows
constexpr int kTaps = 64;              // source columns whose weights are in shared memory at once
constexpr int kMine = kTile / kWarps;  // rows of a thread

// One block makes 32 x 32 pixels of one image, from the top of what it needs down: 32 source rows at a time are
// filtered along the row into shared memory, with rounding, and added to the sums of the output rows that they reach.
// Weights are computed by one warp each: those of the columns once, unless more than kTaps, those of the rows with
// each 32. registers: see bench/aot_native.json, no spills; floor: reads the box once from memory, neighbours' margins
// from L2
__global__ void __launch_bounds__(32 * kWarps, 2) crop_resize_kernel(CropResize call, int32_t tiles) {
  __shared__ float across[kTaps][kTile], down[kTile][kTile];
  __shared__ uint8_t rows[kTile][3][kTile];
  __shared__ int32_t starts[kTile], ends[kTile];  // source rows of each output row
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t b = blockIdx.x / tiles / tiles;
  const int32_t size = call.size, x0 = blockIdx.x % tiles * kTile, y0 = blockIdx.x / tiles % tiles * kTile;
  const int32_t x = crop_limit(x0 + lane, 0, size - 1), last = crop_limit(y0 + kTile - 1, 0, size - 1);
  const CropSource source = crop_source(call, b);
  float sums[kMine][3] = {};
  if (source.at != nullptr) {
    const CropSide wide = crop_side(source.width, size, call.bicubic),
                   tall = crop_side(source.height, size, call.bicubic);
    const int32_t first = crop_first(wide, x), taps = crop_end(wide, x) - first;
    const int32_t most = static_cast<int32_t>(crop_most(wide));
    const int32_t top = crop_first(tall, y0), bottom = crop_end(tall, last);
    const int32_t y = crop_limit(y0 + lane, 0, size - 1);
    // one object for both uses: warp 0 runs along the columns, warp 1 down the rows
    CropWeights weights(warp == 0 ? wide : tall, warp == 0 ? x : y);
    if (warp == 1) {
      starts[lane] = crop_first(tall, y);
      ends[lane] = crop_end(tall, y);
    }
    for (int32_t j0 = top; j0 < bottom; j0 += kTile) {
      float found[kMine][3] = {};
      if (warp == 1)
#pragma unroll 1
        for (int32_t j = 0; j < kTile; ++j) {
          const bool inside = j0 + j >= starts[lane] && j0 + j < ends[lane];
          down[j][lane] = inside ? weights.next(tall, y, j0 + j) : 0.0f;
        }
      if (warp == 0 && most > kTaps) weights.restart();
      for (int32_t k0 = 0; k0 < most; k0 += kTaps) {
        const int32_t part = crop_limit(most - k0, 0, kTaps);
        if (warp == 0 && (most > kTaps || j0 == top))
#pragma unroll 1
          for (int32_t k = 0; k < part; ++k)
            across[k][lane] = k0 + k < taps ? weights.next(wide, x, first + k0 + k) : 0.0f;
        __syncthreads();
        const int32_t mine = crop_limit(taps - k0, 0, part);
        for (int r = 0; r < kMine; ++r) {
          const int32_t j = j0 + r * kWarps + warp;
          if (j >= bottom) continue;
          const uint8_t* pixel = source.at + j * source.row + (first + k0) * source.column;
#pragma unroll 2
          for (int32_t k = 0; k < mine; ++k, pixel += source.column)
            for (int c = 0; c < 3; ++c) found[r][c] += static_cast<float>(pixel[c * source.colour]) * across[k][lane];
        }
        __syncthreads();
      }
      for (int r = 0; r < kMine; ++r)
        for (int c = 0; c < 3; ++c) rows[r * kWarps + warp][c][lane] = crop_pixel(found[r][c]);
      __syncthreads();
      for (int r = 0; r < kMine; ++r) {
        const int32_t row = r * kWarps + warp;
        const int32_t from = crop_limit(starts[row] - j0, 0, kTile), to = crop_limit(ends[row] - j0, 0, kTile);
#pragma unroll 2
        for (int32_t j = from; j < to; ++j)
          for (int c = 0; c < 3; ++c) sums[r][c] += static_cast<float>(rows[j][c][lane]) * down[j][row];
      }
      __syncthreads();  // all three may be written again
    }
  }
  if (x0 + lane >= size) return;
  const bool flip = call.flip != nullptr && call.flip[b];
  for (int r = 0; r < kMine; ++r) {
    const int32_t y = y0 + r * kWarps + warp;
    if (y >= size) continue;
    for (int c = 0; c < 3; ++c)
      call.out[((b * 3 + c) * size + y) * size + (flip ? size - 1 - x : x)] = crop_pixel(sums[r][c]);
  }
}

}  // namespace

void crop_resize_cuda(const CropResize& call, CUstream_st* stream) {
  const int32_t tiles = (call.size + kTile - 1) / kTile;
  launch("crop_resize", crop_resize_kernel, call.batch * tiles * tiles, 32 * kWarps, stream, call, tiles);
}

}  // namespace mimfast
