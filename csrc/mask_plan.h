// mask_plan: which tokens each image shows to the encoder; see mimfast/ops/mask_plan.py for the rule.
// B images, L = rows * cols tokens, U = L / unit^2 mask units, K = keep_units * unit^2 kept tokens.
#pragma once

#include <cstdint>

#include "philox.h"

struct CUstream_st;  // cudaStream_t without the toolkit

namespace mimfast {

constexpr int64_t kMaskPlanMaxUnitsCuda = 8192;

struct MaskPlan {
  // inputs
  const int64_t* sample_ids;  // [B]
  const int64_t* epochs;      // [B], or null: `epoch` for every image
  int64_t epoch;
  int64_t batch;
  int32_t rows, cols, unit, keep_units;  // unit divides rows and cols; 1 <= keep_units <= U
  const int32_t* cu_seqlens;             // [B + 1] kept tokens before each image, then keep_units is not read; or null
  const float* importance;               // [B, U] for mask_guided, else null
  uint64_t seed;
  uint32_t word_mask;  // words are taken & word_mask: all ones, or few bits in tests that need ties
  // outputs; with cu_seqlens, keep and hide hold the images one after the other
  int64_t* keep;     // [B, K] ascending
  int64_t* inverse;  // [B, L]
  bool* hidden;      // [B, L]
  int64_t* hide;     // [B, L - K] ascending
};

void mask_plan_cpu(const MaskPlan& plan, int threads);
void mask_plan_cuda(const MaskPlan& plan, CUstream_st* stream);

// where the lists of one image stand
struct MaskLists {
  int64_t kept;  // tokens this image keeps
  int64_t* keep;
  int64_t* hide;
};

MIMFAST_HOST_DEVICE MaskLists lists_of(const MaskPlan& plan, int64_t b) {
  const int64_t tokens = int64_t{plan.rows} * plan.cols;
  int64_t kept = int64_t{plan.keep_units} * plan.unit * plan.unit, before = b * kept;
  if (plan.cu_seqlens != nullptr) {
    before = plan.cu_seqlens[b];
    kept = plan.cu_seqlens[b + 1] - before;
  }
  return {kept, plan.keep + before, plan.hide + (b * tokens - before)};
}

}  // namespace mimfast
