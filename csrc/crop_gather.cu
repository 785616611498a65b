#include "crop_gather.h"

#include "crop_resize.cuh"

namespace mimfast {
namespace {

__device__ __forceinline__ void store(void* out, PixelType type, int64_t at, float value) {
  if (type == PixelType::kFloat32)
    static_cast<float*>(out)[at] = value;
  else if (type == PixelType::kBfloat16)
    static_cast<Bfloat16*>(out)[at] = narrow<Bfloat16>(value);
  else
    static_cast<Float16*>(out)[at] = narrow<Float16>(value);
}

// One block makes a kTile x kTile part of one kept patch, the whole patch as a rule, from the pixels that reach it, and
// normalises it on the way out. registers: see bench/aot_native.json, no spills; floor: reads what the kept patches
// need, writes their rows once
template <int kTile>
__global__ void __launch_bounds__(CropTile<kTile>::kThreads, kTile == 32 ? 2 : 4)
    crop_gather_kernel(CropGather call, int32_t tiles) {
  using Tile = CropTile<kTile>;
  __shared__ Tile tile;
  const int column = threadIdx.x % kTile, row = threadIdx.x / kTile;
  const int32_t k = blockIdx.x / tiles / tiles, b = k / static_cast<int32_t>(call.kept);  // blocks fit into 31 bits
  const int32_t size = call.crop.size, patch = call.patch, grid = size / patch;
  const int32_t q0 = blockIdx.x % tiles * kTile, p0 = blockIdx.x / tiles % tiles * kTile;
  const int64_t token = call.keep[k];
  const bool known = token >= 0 && token < int64_t{grid} * grid;
  float sums[Tile::kMine][3] = {};
  const CropSource source = crop_source(call.crop, b);
  if (known && source.at != nullptr) {
    const int32_t left = static_cast<int32_t>(token % grid) * patch, top = static_cast<int32_t>(token / grid) * patch;
    const int32_t x = left + crop_limit(q0 + column, 0, patch - 1), last = crop_limit(p0 + kTile - 1, 0, patch - 1);
    const bool flip = call.crop.flip != nullptr && call.crop.flip[b];
    crop_tile(source, size, call.crop.bicubic, flip ? size - 1 - x : x, top + p0, top + last, tile, sums);
  }
  const int32_t q = q0 + column;
  if (q >= patch) return;
  for (int r = 0; r < Tile::kMine; ++r) {
    const int32_t p = p0 + r * Tile::kRows + row;
    if (p >= patch) continue;
    for (int c = 0; c < 3; ++c) {
      const float value = normalize(crop_pixel(sums[r][c]), call.mean[c], call.std[c]);
      const int64_t at = call.channels_last ? (int64_t{p} * patch + q) * 3 + c : (int64_t{c} * patch + p) * patch + q;
      store(call.out, call.out_type, int64_t{3} * patch * patch * k + at, known ? value : 0.0f);
    }
  }
}

template <int kTile>
void start(const CropGather& call, CUstream_st* stream) {
  const int32_t tiles = (call.patch + kTile - 1) / kTile;
  launch("crop_gather", crop_gather_kernel<kTile>, call.crop.batch * call.kept * tiles * tiles,
         CropTile<kTile>::kThreads, stream, call, tiles);
}

}  // namespace

void crop_gather_cuda(const CropGather& call, CUstream_st* stream) {
  call.patch > 16 ? start<32>(call, stream) : start<16>(call, stream);
}

}  // namespace mimfast
