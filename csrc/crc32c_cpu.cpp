#include "crc32c.h"

#include <array>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#include <nmmintrin.h>
#define MIMFAST_SSE42 __attribute__((target("sse4.2")))
#endif

namespace mimfast {
namespace {

constexpr uint32_t kPolynomial = 0x82F63B78;  // 0x1EDC6F41 with its bits reversed

using Tables = std::array<std::array<uint32_t, 256>, 8>;

// tables[k][b]: the register after byte b and k zero bytes
constexpr Tables make_tables() {
  Tables tables{};
  for (uint32_t b = 0; b < 256; ++b) {
    uint32_t value = b;
    for (int bit = 0; bit < 8; ++bit) value = (value >> 1) ^ ((value & 1) ? kPolynomial : 0);
    tables[0][b] = value;
  }
  for (size_t k = 1; k < 8; ++k)
    for (size_t b = 0; b < 256; ++b) tables[k][b] = (tables[k - 1][b] >> 8) ^ tables[0][tables[k - 1][b] & 255];
  return tables;
}

constexpr Tables kTables = make_tables();

// eight bytes a step, one table for the distance of each from the end of the step
uint32_t by_tables(const uint8_t* data, int64_t n, uint32_t value) {
  for (; n >= 8; n -= 8, data += 8) {
    const uint32_t low =
        value ^ (uint32_t{data[0]} | uint32_t{data[1]} << 8 | uint32_t{data[2]} << 16 | uint32_t{data[3]} << 24);
    value = kTables[7][low & 255] ^ kTables[6][low >> 8 & 255] ^ kTables[5][low >> 16 & 255] ^ kTables[4][low >> 24] ^
            kTables[3][data[4]] ^ kTables[2][data[5]] ^ kTables[1][data[6]] ^ kTables[0][data[7]];
  }
  for (; n > 0; --n, ++data) value = (value >> 8) ^ kTables[0][(value ^ *data) & 255];
  return value;
}

#ifdef MIMFAST_SSE42
// Three runs of kRun bytes at a time, because the instruction takes three cycles but can start every cycle; the first
// two registers are then moved past the bytes behind them.
constexpr int64_t kRun = 1024;

// tables[k][b]: the register b << 8 k after kRun zero bytes
std::array<std::array<uint32_t, 256>, 4> make_skip() {
  std::array<uint8_t, kRun> zeros{};
  std::array<std::array<uint32_t, 256>, 4> skip{};
  for (uint32_t k = 0; k < 4; ++k)
    for (uint32_t b = 0; b < 256; ++b) skip[k][b] = by_tables(zeros.data(), kRun, b << 8 * k);
  return skip;
}

MIMFAST_SSE42 uint64_t step(const uint8_t* data, uint64_t value) {
  uint64_t word;
  std::memcpy(&word, data, 8);
  return _mm_crc32_u64(value, word);
}

MIMFAST_SSE42 uint32_t by_instruction(const uint8_t* data, int64_t n, uint32_t start) {
  static const auto skip = make_skip();
  const auto moved = [](uint64_t v) {
    return skip[0][v & 255] ^ skip[1][v >> 8 & 255] ^ skip[2][v >> 16 & 255] ^ skip[3][v >> 24 & 255];
  };
  uint64_t value = start;
  for (; n >= 3 * kRun; n -= 3 * kRun, data += 3 * kRun) {
    uint64_t second = 0, third = 0;
    for (int64_t i = 0; i < kRun; i += 8) {
      value = step(data + i, value);
      second = step(data + kRun + i, second);
      third = step(data + 2 * kRun + i, third);
    }
    value = moved(moved(value) ^ second) ^ third;
  }
  for (; n >= 8; n -= 8, data += 8) value = step(data, value);
  for (; n > 0; --n, ++data) value = _mm_crc32_u8(static_cast<uint32_t>(value), *data);
  return static_cast<uint32_t>(value);
}
#endif

}  // namespace

uint32_t crc32c_cpu(const uint8_t* data, int64_t n, uint32_t crc, bool portable) {
#ifdef MIMFAST_SSE42
  if (!portable && __builtin_cpu_supports("sse4.2")) return ~by_instruction(data, n, ~crc);
#endif
  (void)portable;
  return ~by_tables(data, n, ~crc);
}

}  // namespace mimfast
