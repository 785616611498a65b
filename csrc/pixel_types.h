// Types of pixels and of what is made of them, and their conversions, the same bits on CPU and GPU.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define PIXEL_BOTH __host__ __device__ __forceinline__
#else
#define PIXEL_BOTH inline
#endif

namespace mimfast {

enum class PixelType : int32_t { kUint8, kFloat32, kBfloat16, kFloat16 };

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename To, typename From>
PIXEL_BOTH To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From), "a value has the bits of another of its size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// selects instead of branches, so that loops over these become vector code

PIXEL_BOTH float widen(float x) { return x; }
PIXEL_BOTH float widen(uint8_t x) { return static_cast<float>(x); }
PIXEL_BOTH float widen(Bfloat16 x) { return bits_of<float>(uint32_t{x.bits} << 16); }
PIXEL_BOTH float widen(Float16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, rest = (x.bits & 0x7fffu) << 13;
  const float subnormal = bits_of<float>(rest + 0x38800000u) - bits_of<float>(0x38800000u);  // m * 2^-24, exact
  const uint32_t exponent = rest >= (0x7c00u << 13) ? 0x70000000u : 0x38000000u;             // infinity and NaN; others
  const uint32_t magnitude = rest < (0x0400u << 13) ? bits_of<uint32_t>(subnormal) : rest + exponent;
  return bits_of<float>(sign | magnitude);
}

// to nearest, ties to even; NaN stays NaN
template <typename To>
PIXEL_BOTH To narrow(float x);
template <>
PIXEL_BOTH float narrow<float>(float x) {
  return x;
}
template <>
PIXEL_BOTH Bfloat16 narrow<Bfloat16>(float x) {
  const uint32_t bits = bits_of<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
}
template <>
PIXEL_BOTH Float16 narrow<Float16>(float x) {
  const uint32_t bits = bits_of<uint32_t>(x), size = bits & 0x7fffffffu;
  const uint32_t normal = (size - 0x38000000u + 0xfffu + (size >> 13 & 1u)) >> 13;
  const uint32_t subnormal = bits_of<uint32_t>(bits_of<float>(size) + 0.5f) - 0x3f000000u;  // 0.5 has units of 2^-24
  uint32_t half = size < 0x38800000u ? subnormal : normal;
  half = size >= 0x477ff000u ? 0x7c00u : half;
  half = size > 0x7f800000u ? 0x7e00u : half;
  return {static_cast<uint16_t>((bits >> 16 & 0x8000u) | half)};
}

// an 8-bit pixel normalised; the reference's operations in its order, so that the bits agree
PIXEL_BOTH float normalize(uint8_t x, float mean, float std) { return (widen(x) / 255.0f - mean) / std; }

}  // namespace mimfast
