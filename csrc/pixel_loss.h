// pixel_loss: predicted against true pixels of hidden patches, and the gradient of the prediction in the same pass; see
// mimfast/ops/pixel_loss.py for the rule.
// B images, R rows of predictions per image, L = grid_rows * grid_cols patches of p x p pixels, D = 3 * p * p values in
// (py, px, c) order.
#pragma once

#include <array>
#include <cstdint>

namespace mimfast {

enum class PixelLossKind : int32_t { kMse, kL1, kSmoothL1 };

struct PixelLoss {
  // inputs
  const void* pred;  // [B, R, D] float32 or bfloat16, the last dimension dense
  bool pred_bf16;
  std::array<int64_t, 2> pred_stride;  // of images and rows, in elements
  const void* img;                     // [B, 3, H, W] uint8 or float32, any strides
  bool img_uint8;
  std::array<int64_t, 4> img_stride;  // in elements
  const bool* map;                    // [B, R], R = L: row r predicts patch r and counts where true; or null, then
  const int64_t* index;               // [B, R]: row r predicts patch index[b, r]; one outside 0..L-1 does not count
  int64_t batch, rows;                // B, R
  int32_t grid_rows, grid_cols, patch;
  bool norm;
  PixelLossKind kind;
  std::array<float, 3> mean, std;  // for uint8: (x / 255 - mean) / std
  float eps, beta, upstream;       // upstream: gradient of the loss
  // outputs
  float* loss;  // [], or null
  void* grad;   // [B, R, D] dense, as pred, fully written; or null
};

void pixel_loss_cpu(const PixelLoss& call, int threads);

}  // namespace mimfast
