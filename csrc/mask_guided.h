// mask_guided: mask_plan with the key of a race weighted by importance; see mimfast/ops/mask_guided.py for the rule.
#pragma once

#include <cstring>

#include "mask_plan.h"

namespace mimfast {

void mask_guided_cpu(const MaskPlan& plan, int threads);
void mask_guided_cuda(const MaskPlan& plan, CUstream_st* stream);

MIMFAST_HOST_DEVICE int leading_zeros(uint32_t word) {
#ifdef __CUDA_ARCH__
  return __clz(static_cast<int>(word));
#else
  return word == 0 ? 32 : __builtin_clz(word);
#endif
}

// -log2((word + 1/2) / 2^32) times 2^33 in integers, the same on every machine; at least 1
MIMFAST_HOST_DEVICE int64_t minus_log2(uint32_t word) {
  constexpr int64_t kMinusLog2[] = {387270443, 193649513, 128517119,  105476003,
                                    14488705,  304857298, -419835780, 459449953};
  const int zeros = leading_zeros(word);
  const int64_t t = (int64_t{1} << 33) - ((2 * int64_t{word} + 1) << zeros);  // v = 2^-zeros * (1 - t), 0 < t <= 1/2
  int64_t series = kMinusLog2[7];
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int k = 6; k >= 0; --k) series = kMinusLog2[k] + (series * t >> 33);
  return (int64_t{zeros} << 33) + (series * t >> 28);
}

// what orders the units: the word itself in mask_plan, the time of arrival in mask_guided
template <bool kGuided>
MIMFAST_HOST_DEVICE uint32_t unit_key(uint32_t word, const float* importance_U, int64_t u) {
  if (!kGuided) return word;
  constexpr uint32_t kInfinity = 0x7f800000;
  const float importance = importance_U[u];
  uint32_t bits = kInfinity;
  if (importance > 0) {
    // exact up to the division: nothing for a compiler to contract or reorder
    const double time = static_cast<double>(minus_log2(word)) * 0x1p-33;
    const float arrival = static_cast<float>(time / static_cast<double>(importance));
    std::memcpy(&bits, &arrival, sizeof(bits));
  }
  return bits < kInfinity ? bits : kInfinity | word >> 9;
}

}  // namespace mimfast
