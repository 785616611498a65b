// What the losses over hidden tokens share: rows of predictions, which of them count, and what is made of the
// differences. pixel_loss and hog_loss bring the targets.
// B images, R rows of predictions per image, L tokens per image, D values per row.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "clones.h"

#ifdef __CUDACC__
#define LOSS_BOTH __host__ __device__ __forceinline__
#else
#define LOSS_BOTH MIMFAST_INLINE
#endif

namespace mimfast {

enum class LossKind : int32_t { kMse, kL1, kSmoothL1 };

struct LossRows {
  // inputs
  const void* pred;  // [B, R, D] float32 or bfloat16, the last dimension dense
  bool pred_bf16;
  int64_t pred_stride[2];               // of images and rows, in elements
  const bool* map;                      // [B, R], R = L: row r predicts token r and counts where true; or null, then
  const int64_t* index;                 // [B, R]: row r predicts token index[b, r]; one outside 0..L-1 does not count
  int64_t batch, rows, tokens, values;  // B, R, L, D
  LossKind kind;
  float beta, upstream;  // upstream: gradient of the loss
  // outputs
  float* loss;  // [], or null
  void* grad;   // [B, R, D] dense, as pred, fully written; or null
};

namespace loss_tail {

struct Bfloat16 {
  uint16_t bits;
};

LOSS_BOTH float widen(float x) { return x; }
LOSS_BOTH float widen(Bfloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}

LOSS_BOTH void narrow(float x, float& to) { to = x; }
LOSS_BOTH void narrow(float x, Bfloat16& to) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  to.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// f(d), and its derivative in `slope`; without branches, and such that NaN stays NaN
template <LossKind KIND>
LOSS_BOTH float penalty(float d, float beta, float& slope) {
  const float size = std::fabs(d);
  if constexpr (KIND == LossKind::kMse) {
    slope = 2.0f * d;
    return d * d;
  } else if constexpr (KIND == LossKind::kL1) {
    slope = size > 0.0f ? std::copysign(1.0f, d) : d;
    return size;
  } else {
    const float part = size > beta ? beta : size;  // d^2 / (2 beta) up to beta, |d| - beta / 2 from there on
    slope = std::copysign(part, d) / beta;
    return part * (size - 0.5f * part) / beta;
  }
}

}  // namespace loss_tail
}  // namespace mimfast
