#include "crop_resize.h"

#include "crop_resize.cuh"

namespace mimfast {
namespace {

constexpr int kSide = 32;  // output pixels a side of a block
using Tile = CropTile<kSide>;

// One block makes 32 x 32 pixels of one image. registers: see bench/aot_native.json, no spills; floor: reads the box
// once from memory, neighbours' margins from L2
__global__ void __launch_bounds__(Tile::kThreads, 2) crop_resize_kernel(CropResize call, int32_t tiles) {
  __shared__ Tile tile;
  const int column = threadIdx.x % kSide, row = threadIdx.x / kSide;
  const int64_t b = blockIdx.x / tiles / tiles;
  const int32_t size = call.size, x0 = blockIdx.x % tiles * kSide, y0 = blockIdx.x / tiles % tiles * kSide;
  const int32_t x = crop_limit(x0 + column, 0, size - 1), last = crop_limit(y0 + kSide - 1, 0, size - 1);
  const CropSource source = crop_source(call, b);
  float sums[Tile::kMine][3] = {};
  if (source.at != nullptr) crop_tile(source, size, call.bicubic, x, y0, last, tile, sums);
  if (x0 + column >= size) return;
  const bool flip = call.flip != nullptr && call.flip[b];
  for (int r = 0; r < Tile::kMine; ++r) {
    const int32_t y = y0 + r * Tile::kRows + row;
    if (y >= size) continue;
    for (int c = 0; c < 3; ++c)
      call.out[((b * 3 + c) * size + y) * size + (flip ? size - 1 - x : x)] = crop_pixel(sums[r][c]);
  }
}

}  // namespace

void crop_resize_cuda(const CropResize& call, CUstream_st* stream) {
  const int32_t tiles = (call.size + kSide - 1) / kSide;
  launch("crop_resize", crop_resize_kernel, call.batch * tiles * tiles, Tile::kThreads, stream, call, tiles);
}

}  // namespace mimfast
