// patch_gather: the kept patches of images as rows of a matrix; see mimfast/ops/patch_gather.py for the rule.
// B images, C = 3 channels, H = grid_rows * p and W = grid_cols * p pixels, L = grid_rows * grid_cols patches of p x p
// pixels.
#pragma once

#include <array>
#include <cstdint>

#include "pixel_types.h"

namespace mimfast {

struct PatchGather {
  // inputs
  const void* img;  // [B, C, H, W], any strides
  PixelType img_type;
  std::array<int64_t, 4> stride;  // of img, in elements
  int64_t batch;
  int32_t grid_rows, grid_cols, patch;
  const int64_t*
      keep;          // [rows], or null: every patch in order, `rows` = B * L; one outside 0..L-1 gives a row of zeros
  const bool* flip;  // [B], or null: no image is flipped
  const int32_t* cu_seqlens;  // [B + 1], first row of each image, or null: every image has rows / B of them
  int64_t rows;
  bool channels_last;              // a row is (p, q, c), not (c, p, q)
  std::array<float, 3> mean, std;  // for uint8: (x / 255 - mean) / std
  // outputs
  void* out;  // [rows, 3 * p * p]
  PixelType out_type;
};

void patch_gather_cpu(const PatchGather& call, int threads);

}  // namespace mimfast
