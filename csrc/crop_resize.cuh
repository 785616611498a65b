// One tile of a resampled box, for the kernels of crop_resize and crop_gather.
#pragma once

#include "crop_resize.h"
#include "device.cuh"

namespace mimfast {

constexpr int kCropTaps = 64;  // source columns whose weights are in shared memory at once

// A block of kTile columns of threads, kRows of them, of which each makes kMine pixels; a tile has kTile x kTile.
template <int kTile>
struct CropTile {
  static constexpr int kRows = 8, kThreads = kTile * kRows, kMine = kTile / kRows;

  float across[kCropTaps][kTile], down[kTile][kTile];
  uint8_t rows[kTile][3][kTile];
  int32_t starts[kTile], ends[kTile];  // source rows of each output row
};

// Sums of column x of the square and its rows y0 + r * kRows + threadIdx.x / kTile (those behind y_last are y_last), x
// being the same for all threads of a column. From the top of what the tile needs down, kTile source rows at a time are
// filtered along the row into shared memory, with rounding, and added to the sums of the output rows that they reach.
// Weights are computed by one warp each: those of the columns once, unless more than kCropTaps, those of the rows with
// each kTile.
template <int kTile>
__device__ __forceinline__ void crop_tile(const CropSource& source, int32_t size, bool bicubic, int32_t x, int32_t y0,
                                          int32_t y_last, CropTile<kTile>& tile,
                                          float (&sums)[CropTile<kTile>::kMine][3]) {
  constexpr int kRows = CropTile<kTile>::kRows, kMine = CropTile<kTile>::kMine;
  const int column = threadIdx.x % kTile, row = threadIdx.x / kTile;
  const bool weighs_across = threadIdx.x < kTile, weighs_down = threadIdx.x / 32 == 1 && threadIdx.x < 32 + kTile;
  const CropSide wide = crop_side(source.width, size, bicubic), tall = crop_side(source.height, size, bicubic);
  const int32_t first = crop_first(wide, x), taps = crop_end(wide, x) - first;
  const int32_t most = static_cast<int32_t>(crop_most(wide));
  const int32_t top = crop_first(tall, y0), bottom = crop_end(tall, y_last);
  const int32_t y = crop_limit(y0 + column, 0, y_last);
  // one object for both uses: warp 0 runs along the columns, warp 1 down the rows
  CropWeights weights(weighs_across ? wide : tall, weighs_across ? x : y);
  if (weighs_down) {
    tile.starts[column] = crop_first(tall, y);
    tile.ends[column] = crop_end(tall, y);
  }
  for (int32_t j0 = top; j0 < bottom; j0 += kTile) {
    float found[kMine][3] = {};
    if (weighs_down)
#pragma unroll 1
      for (int32_t j = 0; j < kTile; ++j) {
        const bool inside = j0 + j >= tile.starts[column] && j0 + j < tile.ends[column];
        tile.down[j][column] = inside ? weights.next(tall, y, j0 + j) : 0.0f;
      }
    if (weighs_across && most > kCropTaps) weights.restart();
    for (int32_t k0 = 0; k0 < most; k0 += kCropTaps) {
      const int32_t part = crop_limit(most - k0, 0, kCropTaps);
      if (weighs_across && (most > kCropTaps || j0 == top))
#pragma unroll 1
        for (int32_t k = 0; k < part; ++k)
          tile.across[k][column] = k0 + k < taps ? weights.next(wide, x, first + k0 + k) : 0.0f;
      __syncthreads();
      const int32_t mine = crop_limit(taps - k0, 0, part);
      for (int r = 0; r < kMine; ++r) {
        const int32_t j = j0 + r * kRows + row;
        if (j >= bottom) continue;
        const uint8_t* pixel = source.at + j * source.row + (first + k0) * source.column;
#pragma unroll 2
        for (int32_t k = 0; k < mine; ++k, pixel += source.column)
          for (int c = 0; c < 3; ++c)
            found[r][c] += static_cast<float>(pixel[c * source.colour]) * tile.across[k][column];
      }
      __syncthreads();
    }
    for (int r = 0; r < kMine; ++r)
      for (int c = 0; c < 3; ++c) tile.rows[r * kRows + row][c][column] = crop_pixel(found[r][c]);
    __syncthreads();
    for (int r = 0; r < kMine; ++r) {
      const int32_t at = r * kRows + row;
      const int32_t from = crop_limit(tile.starts[at] - j0, 0, kTile), to = crop_limit(tile.ends[at] - j0, 0, kTile);
#pragma unroll 2
      for (int32_t j = from; j < to; ++j)
        for (int c = 0; c < 3; ++c) sums[r][c] += static_cast<float>(tile.rows[j][c][column]) * tile.down[j][at];
    }
    __syncthreads();  // all three may be written again
  }
}

}  // namespace mimfast
