// pixel_loss: predicted against true pixels of hidden patches, and the gradient of the prediction in the same pass; see
// mimfast/ops/pixel_loss.py for the rule.
// L = grid_rows * grid_cols patches of p x p pixels, D = 3 * p * p values; the rest as in loss_tail.h.
#pragma once

#include <array>
#include <cstdint>

#include "loss_tail.h"

namespace mimfast {

struct PixelLoss {
  LossRows rows;
  const void* img;  // [B, 3, H, W] uint8 or float32, any strides
  bool img_uint8;
  std::array<int64_t, 4> img_stride;  // in elements
  int32_t grid_cols, patch;
  bool norm, colour_major;         // values in (c, py, px) order, else in (py, px, c) order
  std::array<float, 3> mean, std;  // for uint8: (x / 255 - mean) / std
  float eps;
};

void pixel_loss_cpu(const PixelLoss& call, int threads);

}  // namespace mimfast
