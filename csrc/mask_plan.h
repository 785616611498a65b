// mask_plan: which tokens each image shows to the encoder; see mimfast/ops/mask_plan.py for the rule.
// B images, L = rows * cols tokens, U = L / unit^2 mask units, K = keep_units * unit^2 kept tokens.
#pragma once

#include <cstdint>

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
  uint64_t seed;
  uint32_t word_mask;  // words are taken & word_mask: all ones, or few bits in tests that need ties
  // outputs
  int64_t* keep;     // [B, K] ascending
  int64_t* inverse;  // [B, L]
  bool* hidden;      // [B, L]
};

void mask_plan_cpu(const MaskPlan& plan, int threads);
void mask_plan_cuda(const MaskPlan& plan, CUstream_st* stream);

}  // namespace mimfast
