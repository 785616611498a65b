// Each hidden patch is read once into a buffer in the order of the prediction, which stays in the first cache; the loss
// of a row and its gradient come from one pass over it. A thread writes whole rows and their losses; one thread adds
// the losses up in the order of the rows, so the result does not depend on the number of threads.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "parallel.h"
#include "pixel_loss.h"

// compiled for each of these and chosen when the module is loaded, where compiler and C library can do that
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define MIMFAST_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#define MIMFAST_INLINE inline __attribute__((always_inline))  // a function left outside would be the default one
#else
#define MIMFAST_CLONES
#define MIMFAST_INLINE inline
#endif

namespace mimfast {
namespace {

constexpr int64_t kValuesPerThread = 1 << 17;  // about 0.05 ms of work, several times the cost of a thread
constexpr int kLanes = 8;  // of a vector of partial sums: two such vectors hide the latency of an addition

struct Bfloat16 {
  uint16_t bits;
};

MIMFAST_INLINE float widen(float x) { return x; }
MIMFAST_INLINE float widen(Bfloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}

MIMFAST_INLINE void narrow(float x, float& to) { to = x; }
MIMFAST_INLINE void narrow(float x, Bfloat16& to) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  to.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// the value of every byte in every channel: one load is quicker than a conversion and a multiplication
using Table = std::array<std::array<float, 256>, 3>;

MIMFAST_INLINE float pixel(uint8_t x, const float* values) { return values[x]; }
MIMFAST_INLINE float pixel(float x, const float*) { return x; }

// the patch in (py, px, c) order. SIDE and STEP are p and the distance of neighbours in x where known, 0 where not
template <int SIDE, int STEP, typename Pixel>
MIMFAST_INLINE void load(const PixelLoss& call, const Table& table, const Pixel* __restrict corner,
                         float* __restrict target) {
  const int64_t patch = SIDE != 0 ? SIDE : call.patch, step = STEP != 0 ? STEP : call.img_stride[3];
  for (int64_t y = 0; y < patch; ++y, target += 3 * patch) {
    const Pixel* red = corner + y * call.img_stride[2];
    const Pixel *green = red + call.img_stride[1], *blue = green + call.img_stride[1];
    for (int64_t x = 0; x < patch; ++x) {
      target[3 * x] = pixel(red[x * step], table[0].data());
      target[3 * x + 1] = pixel(green[x * step], table[1].data());
      target[3 * x + 2] = pixel(blue[x * step], table[2].data());
    }
  }
}

template <typename Pixel>
MIMFAST_INLINE void load_patch(const PixelLoss& call, const Table& table, int64_t b, int64_t token, float* target) {
  const int64_t y = token / call.grid_cols * call.patch, x = token % call.grid_cols * call.patch;
  const Pixel* corner =
      static_cast<const Pixel*>(call.img) + b * call.img_stride[0] + y * call.img_stride[2] + x * call.img_stride[3];
  if (call.img_stride[3] != 1)
    load<0, 0>(call, table, corner, target);
  else if (call.patch == 16)
    load<16, 1>(call, table, corner, target);
  else
    load<0, 1>(call, table, corner, target);
}

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

// subtracts the mean and returns 1 / sqrt(var + eps); a second pass for the variance, so that a constant patch has none
MIMFAST_INLINE float centre(float* __restrict target, float* __restrict squares, int64_t n, float eps) {
  const float mean = sum(target, n) / static_cast<float>(n);
  for (int64_t i = 0; i < n; ++i) {
    const float centred = target[i] - mean;
    target[i] = centred;
    squares[i] = centred * centred;
  }
  return 1.0f / std::sqrt(sum(squares, n) / static_cast<float>(n - 1) + eps);
}

// f(d), and its derivative in `slope`; without branches, and such that NaN stays NaN
template <PixelLossKind KIND>
MIMFAST_INLINE float penalty(float d, float beta, float& slope) {
  const float size = std::fabs(d);
  if constexpr (KIND == PixelLossKind::kMse) {
    slope = 2.0f * d;
    return d * d;
  } else if constexpr (KIND == PixelLossKind::kL1) {
    slope = size > 0.0f ? std::copysign(1.0f, d) : d;
    return size;
  } else {
    const float part = size > beta ? beta : size;  // d^2 / (2 beta) up to beta, |d| - beta / 2 from there on
    slope = std::copysign(part, d) / beta;
    return part * (size - 0.5f * part) / beta;
  }
}

// the losses of the values, and their gradients unless `grad` is null
template <PixelLossKind KIND, typename Pred>
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

template <typename Pred>
MIMFAST_INLINE void score_row(const PixelLoss& call, int64_t b, int64_t r, const float* target, float factor,
                              float weight, float* losses) {
  const int64_t n = int64_t{3} * call.patch * call.patch;
  const Pred* pred = static_cast<const Pred*>(call.pred) + b * call.pred_stride[0] + r * call.pred_stride[1];
  Pred* grad = call.grad != nullptr ? static_cast<Pred*>(call.grad) + (b * call.rows + r) * n : nullptr;
  switch (call.kind) {
    case PixelLossKind::kMse:
      return score<PixelLossKind::kMse>(pred, target, n, factor, call.beta, weight, losses, grad);
    case PixelLossKind::kL1:
      return score<PixelLossKind::kL1>(pred, target, n, factor, call.beta, weight, losses, grad);
    default:
      return score<PixelLossKind::kSmoothL1>(pred, target, n, factor, call.beta, weight, losses, grad);
  }
}

// the patch that row i of all B * R predicts, or -1 when it does not count
inline int64_t patch_of(const PixelLoss& call, int64_t i) {
  if (call.index == nullptr) return call.map[i] ? i % call.rows : -1;
  const int64_t token = call.index[i];
  return token >= 0 && token < int64_t{call.grid_rows} * call.grid_cols ? token : -1;
}

// rows [begin, end) of all B * R; the gradient of the loss with respect to f(d) of any value is `weight`
MIMFAST_CLONES void score_rows(const PixelLoss& call, const Table& table, int64_t begin, int64_t end, float weight,
                               float* target, float* scratch, float* losses) {
  const int64_t n = int64_t{3} * call.patch * call.patch;
  const int64_t bytes = n * static_cast<int64_t>(call.pred_bf16 ? sizeof(Bfloat16) : sizeof(float));
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / call.rows, r = i % call.rows, token = patch_of(call, i);
    if (token < 0) {
      losses[i] = 0.0f;
      if (call.grad != nullptr) std::memset(static_cast<char*>(call.grad) + i * bytes, 0, static_cast<size_t>(bytes));
      continue;
    }
    if (call.img_uint8)
      load_patch<uint8_t>(call, table, b, token, target);
    else
      load_patch<float>(call, table, b, token, target);
    const float factor = call.norm ? centre(target, scratch, n, call.eps) : 1.0f;
    if (call.pred_bf16)
      score_row<Bfloat16>(call, b, r, target, factor, weight, scratch);
    else
      score_row<float>(call, b, r, target, factor, weight, scratch);
    losses[i] = sum(scratch, n);
  }
}

// glibc takes memory of this size fresh from the system every time; faulting it in by pages of 4 KB would take longer
// than the arithmetic. Advice only: where it is not heeded nothing else changes.
void ask_for_large_pages(void* memory, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kFrom = 1 << 25, kPage = 1 << 21;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory), end = begin + static_cast<uintptr_t>(bytes);
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  if (end - begin >= kFrom) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  static_cast<void>(memory), static_cast<void>(bytes);
#endif
}

}  // namespace

void pixel_loss_cpu(const PixelLoss& call, int threads) {
  const int64_t rows = call.batch * call.rows, values = int64_t{3} * call.patch * call.patch;
  int64_t count = 0;
  for (int64_t i = 0; i < rows; ++i) count += patch_of(call, i) >= 0 ? 1 : 0;
  const double share = 1.0 / (static_cast<double>(std::max<int64_t>(count, 1)) * static_cast<double>(values));
  const float weight = static_cast<float>(share * call.upstream);
  Table table;
  for (size_t c = 0; c < 3; ++c)
    for (size_t x = 0; x < 256; ++x)
      table[c][x] = (static_cast<float>(x) / 255.0f - call.mean[c]) / call.std[c];  // as the reference does
  const int64_t width = static_cast<int64_t>(call.pred_bf16 ? sizeof(Bfloat16) : sizeof(float));
  if (call.grad != nullptr) ask_for_large_pages(call.grad, rows * values * width);
  std::vector<float> losses(static_cast<size_t>(rows));
  parallel_for(rows, kValuesPerThread / values + 1, threads, [&](int64_t begin, int64_t end) {
    std::vector<float> target(static_cast<size_t>(values)), scratch(target.size());
    score_rows(call, table, begin, end, weight, target.data(), scratch.data(), losses.data());
  });
  if (call.loss == nullptr) return;
  double total = 0.0;
  for (const float loss : losses) total += loss;
  *call.loss = static_cast<float>(total * share);
}

}  // namespace mimfast
