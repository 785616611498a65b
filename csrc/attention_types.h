// What the attention of csrc/*_attention_cpu.cpp computes with: numbers of the caller widened to float32 and narrowed
// again. Unlike pixel_types.h's these are inlined into loops of any set of instructions, whose vectors they share.
#pragma once

#include <cstdint>
#include <cstring>

namespace mimfast {
namespace {

constexpr float kLog2e = 1.44269504088896341f;

struct Bfloat16 {
  uint16_t bits;
};

#define MIMFAST_INLINE inline __attribute__((always_inline))  // a function left outside would be without vectors

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

}  // namespace
}  // namespace mimfast
