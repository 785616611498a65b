// The loss tail on the CPU: the losses of a row and their gradients from one pass over prediction and target, and the
// sum in the order of the rows, so that the result does not depend on the number of threads. For one .cpp file per op,
// whose scoring function is MIMFAST_CLONES.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "clones.h"
#include "loss_tail.h"
#include "parallel.h"

namespace mimfast {
namespace loss_tail {

constexpr int64_t kValuesPerThread = 1 << 17;  // about 0.05 ms of work, several times the cost of a thread
constexpr int kLanes = 8;  // of a vector of partial sums: two such vectors hide the latency of an addition

// in lanes; vectors by name because the compiler would keep an array of partial sums in memory
MIMFAST_INLINE float sum(const float* values, int64_t n) {
  using Lanes = float __attribute__((vector_size(kLanes * sizeof(float))));
  using Loose = float __attribute__((vector_size(kLanes * sizeof(float)), aligned(alignof(float)), may_alias));
  Lanes even = {}, odd = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    even += *reinterpret_cast<const Loose*>(values + i);
    odd += *reinterpret_cast<const Loose*>(values + i + kLanes);
  }
  even += odd;
  float part[kLanes];
  std::memcpy(part, &even, sizeof(part));
  for (; i < n; ++i) part[i % kLanes] += values[i];
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int j = 0; j < width; ++j) part[j] += part[j + width];
  return part[0];
}

// the losses of the values, and their gradients unless `grad` is null
template <LossKind KIND, typename Pred>
MIMFAST_INLINE void score(const Pred* __restrict pred, const float* __restrict target, int64_t n, float factor,
                          float beta, float weight, float* __restrict losses, Pred* __restrict grad) {
  float slope;
  if (grad == nullptr) {
    for (int64_t i = 0; i < n; ++i) losses[i] = penalty<KIND>(widen(pred[i]) - target[i] * factor, beta, slope);
  } else {
    for (int64_t i = 0; i < n; ++i) {
      losses[i] = penalty<KIND>(widen(pred[i]) - target[i] * factor, beta, slope);
      narrow(slope * weight, grad[i]);
    }
  }
}

// one row of target, times `factor`, against its prediction: the losses of its values, and their gradients
template <typename Pred>
MIMFAST_INLINE void score_as(const LossRows& all, int64_t i, const float* target, float factor, float weight,
                             float* losses) {
  const int64_t n = all.values, b = i / all.rows, r = i % all.rows;
  const Pred* pred = static_cast<const Pred*>(all.pred) + b * all.pred_stride[0] + r * all.pred_stride[1];
  Pred* grad = all.grad != nullptr ? static_cast<Pred*>(all.grad) + i * n : nullptr;
  switch (all.kind) {
    case LossKind::kMse:
      return score<LossKind::kMse>(pred, target, n, factor, all.beta, weight, losses, grad);
    case LossKind::kL1:
      return score<LossKind::kL1>(pred, target, n, factor, all.beta, weight, losses, grad);
    default:
      return score<LossKind::kSmoothL1>(pred, target, n, factor, all.beta, weight, losses, grad);
  }
}

MIMFAST_INLINE void score_row(const LossRows& all, int64_t i, const float* target, float factor, float weight,
                              float* losses) {
  if (all.pred_bf16)
    score_as<Bfloat16>(all, i, target, factor, weight, losses);
  else
    score_as<float>(all, i, target, factor, weight, losses);
}

inline int64_t row_bytes(const LossRows& all) {
  return all.values * static_cast<int64_t>(all.pred_bf16 ? sizeof(Bfloat16) : sizeof(float));
}

// the gradient of a row that does not count
inline void zero_row(const LossRows& all, int64_t i) {
  const int64_t bytes = row_bytes(all);
  if (all.grad != nullptr) std::memset(static_cast<char*>(all.grad) + i * bytes, 0, static_cast<size_t>(bytes));
}

// the token that row i of all B * R predicts, or -1 when it does not count
inline int64_t token_of(const LossRows& all, int64_t i) {
  if (all.index == nullptr) return all.map[i] ? i % all.rows : -1;
  return all.index[i] >= 0 && all.index[i] < all.tokens ? all.index[i] : -1;
}

// glibc takes memory of this size fresh from the system every time; faulting it in by pages of 4 KB would take longer
// than the arithmetic. Advice only: where it is not heeded nothing else changes.
inline void ask_for_large_pages(void* memory, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kFrom = 1 << 25, kPage = 1 << 21;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory), end = begin + static_cast<uintptr_t>(bytes);
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  if (end - begin >= kFrom) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  static_cast<void>(memory), static_cast<void>(bytes);
#endif
}

// score(begin, end, weight, losses) for parts of [0, units), by at most `threads` threads with `grain` units each:
// together the parts write the losses and gradients of all B * R rows, where the gradient of the loss with respect to
// f(d) of any value is `weight`. `counted` values count.
template <typename Score>
void score_all(const LossRows& all, int64_t counted, int64_t units, int64_t grain, int threads, const Score& part) {
  const int64_t rows = all.batch * all.rows;
  const double share = 1.0 / static_cast<double>(std::max<int64_t>(counted, 1));
  const float weight = static_cast<float>(share * all.upstream);
  if (all.grad != nullptr) ask_for_large_pages(all.grad, rows * row_bytes(all));
  std::vector<float> losses(static_cast<size_t>(rows));
  parallel_for(units, grain, threads, [&](int64_t begin, int64_t end) { part(begin, end, weight, losses.data()); });
  if (all.loss == nullptr) return;
  double total = 0.0;
  for (const float loss : losses) total += loss;
  *all.loss = static_cast<float>(total * share);
}

}  // namespace loss_tail
}  // namespace mimfast
