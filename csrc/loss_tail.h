// What the losses over hidden tokens share: rows of predictions, which of them count, and what is made of the
// differences. pixel_loss and hog_loss bring the targets.
// B images, R rows of predictions per image, L tokens per image, D values per row.
#pragma once

#include <array>
#include <cstdint>

namespace mimfast {

enum class LossKind : int32_t { kMse, kL1, kSmoothL1 };

struct LossRows {
  // inputs
  const void* pred;  // [B, R, D] float32 or bfloat16, the last dimension dense
  bool pred_bf16;
  std::array<int64_t, 2> pred_stride;   // of images and rows, in elements
  const bool* map;                      // [B, R], R = L: row r predicts token r and counts where true; or null, then
  const int64_t* index;                 // [B, R]: row r predicts token index[b, r]; one outside 0..L-1 does not count
  int64_t batch, rows, tokens, values;  // B, R, L, D
  LossKind kind;
  float beta, upstream;  // upstream: gradient of the loss
  // outputs
  float* loss;  // [], or null
  void* grad;   // [B, R, D] dense, as pred, fully written; or null
};

}  // namespace mimfast
