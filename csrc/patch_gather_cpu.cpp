#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "parallel.h"
#include "patch_gather.h"

namespace mimfast {
namespace {

constexpr int64_t kValuesPerThread = 1 << 18;  // about 0.1 ms of work, several times the cost of a thread

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename To, typename From>
inline To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From), "a value has the bits of another of its size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// selects instead of branches, so that loops over these become vector code

inline float widen(float x) { return x; }
inline float widen(uint8_t x) { return static_cast<float>(x); }
inline float widen(Bfloat16 x) { return bits_of<float>(uint32_t{x.bits} << 16); }
inline float widen(Float16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, rest = (x.bits & 0x7fffu) << 13;
  const float subnormal = bits_of<float>(rest + 0x38800000u) - bits_of<float>(0x38800000u);  // m * 2^-24, exact
  const uint32_t exponent = rest >= (0x7c00u << 13) ? 0x70000000u : 0x38000000u;             // infinity and NaN; others
  const uint32_t magnitude = rest < (0x0400u << 13) ? bits_of<uint32_t>(subnormal) : rest + exponent;
  return bits_of<float>(sign | magnitude);
}

// to nearest, ties to even; NaN stays NaN
template <typename To>
inline To narrow(float x);
template <>
inline float narrow<float>(float x) {
  return x;
}
template <>
inline Bfloat16 narrow<Bfloat16>(float x) {
  const uint32_t bits = bits_of<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
}
template <>
inline Float16 narrow<Float16>(float x) {
  const uint32_t bits = bits_of<uint32_t>(x), size = bits & 0x7fffffffu;
  const uint32_t normal = (size - 0x38000000u + 0xfffu + (size >> 13 & 1u)) >> 13;
  const uint32_t subnormal = bits_of<uint32_t>(bits_of<float>(size) + 0.5f) - 0x3f000000u;  // 0.5 has units of 2^-24
  uint32_t half = size < 0x38800000u ? subnormal : normal;
  half = size >= 0x477ff000u ? 0x7c00u : half;
  half = size > 0x7f800000u ? 0x7e00u : half;
  return {static_cast<uint16_t>((bits >> 16 & 0x8000u) | half)};
}

// one pixel into one value; for uint8 the reference's operations in its order, so that the bits agree
template <typename In, typename Out>
inline Out value_of(In x, float mean, float std) {
  if constexpr (std::is_same<In, Out>::value) return x;
  if constexpr (std::is_same<In, uint8_t>::value) return narrow<Out>((widen(x) / 255.0f - mean) / std);
  return narrow<Out>(widen(x));
}

// SIDE and STEP are the patch and the distance of neighbours in x where known, 0 where not
template <int SIDE, int STEP, typename In, typename Out>
void line(const In* from, int64_t step, int32_t patch, float mean, float std, Out* to) {
  const int64_t count = SIDE != 0 ? SIDE : patch, by = STEP != 0 ? STEP : step;
  for (int64_t x = 0; x < count; ++x) to[x] = value_of<In, Out>(from[x * by], mean, std);
}

struct Strides {
  int64_t c, y, x;
};

template <int SIDE, int STEP, typename In, typename Out>
void planar_row(const PatchGather& call, const In* corner, const Strides& stride, Out* to) {
  const int32_t patch = SIDE != 0 ? SIDE : call.patch;
  for (int c = 0; c < 3; ++c) {
    const float mean = call.mean[c], std = call.std[c];
    for (int32_t y = 0; y < patch; ++y, to += patch)
      line<SIDE, STEP>(corner + c * stride.c + y * stride.y, stride.x, patch, mean, std, to);
  }
}

// each line of the patch is converted by channel, where it is vector code, then interleaved
template <int SIDE, int STEP, typename In, typename Out>
void interleaved_row(const PatchGather& call, const In* corner, const Strides& stride, Out* lines, Out* to) {
  const int32_t patch = SIDE != 0 ? SIDE : call.patch;
  for (int32_t y = 0; y < patch; ++y, to += 3 * patch) {
    for (int c = 0; c < 3; ++c)
      line<SIDE, STEP>(corner + c * stride.c + y * stride.y, stride.x, patch, call.mean[c], call.std[c],
                       lines + c * patch);
    for (int32_t x = 0; x < patch; ++x)
      for (int c = 0; c < 3; ++c) to[3 * x + c] = lines[c * patch + x];
  }
}

template <int SIDE, int STEP, typename In, typename Out>
void row(const PatchGather& call, const In* corner, const Strides& stride, Out* lines, Out* to) {
  if (call.channels_last)
    interleaved_row<SIDE, STEP>(call, corner, stride, lines, to);
  else
    planar_row<SIDE, STEP>(call, corner, stride, to);
}

// the rows [first, last) of image b, or of none when b is outside the batch
template <typename In, typename Out>
void image_rows(const PatchGather& call, int64_t b, int64_t first, int64_t last, Out* lines) {
  const int64_t tokens = int64_t{call.grid_rows} * call.grid_cols, patch = call.patch, width = 3 * patch * patch;
  Out* to = static_cast<Out*>(call.out) + first * width;
  const bool known = b >= 0 && b < call.batch, flipped = known && call.flip != nullptr && call.flip[b];
  const Strides stride{call.stride[1], call.stride[2], flipped ? -call.stride[3] : call.stride[3]};
  const bool square16 = patch == 16, dense = stride.x == 1;
  for (int64_t r = first; r < last; ++r, to += width) {
    const int64_t token = call.keep != nullptr ? call.keep[r] : r % tokens;
    if (!known || token < 0 || token >= tokens) {
      std::memset(static_cast<void*>(to), 0, static_cast<size_t>(width) * sizeof(Out));
      continue;
    }
    const int64_t left = token % call.grid_cols * patch;
    const int64_t x = flipped ? call.grid_cols * patch - 1 - left : left, y = token / call.grid_cols * patch;
    const In* corner = static_cast<const In*>(call.img) + b * call.stride[0] + y * stride.y + x * call.stride[3];
    if (square16)
      dense ? row<16, 1>(call, corner, stride, lines, to) : row<16, 0>(call, corner, stride, lines, to);
    else
      dense ? row<0, 1>(call, corner, stride, lines, to) : row<0, 0>(call, corner, stride, lines, to);
  }
}

template <typename In, typename Out>
void rows_of(const PatchGather& call, int64_t begin, int64_t end) {
  std::vector<Out> lines(3 * static_cast<size_t>(call.patch));
  const int64_t each = call.cu_seqlens == nullptr ? call.rows / call.batch : 0;
  for (int64_t r = begin; r < end;) {
    int64_t b, next;
    if (call.cu_seqlens == nullptr) {
      b = r / each;
      next = (b + 1) * each;
    } else {  // the last image that starts at or before the row, as the reference searches
      const int32_t* bounds = call.cu_seqlens;
      b = std::upper_bound(bounds, bounds + call.batch + 1, r) - bounds - 1;
      next = b < call.batch ? bounds[b + 1] : end;
    }
    next = std::min(std::max(next, r + 1), end);  // bounds that do not ascend still come to an end
    image_rows<In, Out>(call, b, r, next, lines.data());
    r = next;
  }
}

template <typename In, typename Out>
void run(const PatchGather& call, int threads) {
  const int64_t width = int64_t{3} * call.patch * call.patch;
  parallel_for(call.rows, kValuesPerThread / width + 1, threads,
               [&call](int64_t begin, int64_t end) { rows_of<In, Out>(call, begin, end); });
}

template <typename In>
void run_from(const PatchGather& call, int threads) {
  switch (call.out_type) {
    case PixelType::kBfloat16:
      return run<In, Bfloat16>(call, threads);
    case PixelType::kFloat16:
      return run<In, Float16>(call, threads);
    default:
      return run<In, float>(call, threads);
  }
}

}  // namespace

void patch_gather_cpu(const PatchGather& call, int threads) {
  if (call.rows == 0) return;
  switch (call.img_type) {
    case PixelType::kUint8:
      return run_from<uint8_t>(call, threads);
    case PixelType::kBfloat16:
      return run_from<Bfloat16>(call, threads);
    case PixelType::kFloat16:
      return run_from<Float16>(call, threads);
    case PixelType::kFloat32:
      return run_from<float>(call, threads);
  }
}

}  // namespace mimfast
