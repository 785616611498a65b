// What crop_resize_cpu.cpp and crop_gather_cpu.cpp share. 16 rows of a box are turned on their side, so that the same
// pixel of all of them lies side by side, and filtered along the row with one weight for 16 pixels; turned back, the
// filter down the columns has its 16 pixels side by side as they are. Neither needs a shuffle inside its sums.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "crop_resize.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace mimfast {
namespace crop {

// room for n values, without setting those that are there already
template <typename T>
T* room(std::vector<T>& memory, int64_t n) {
  if (memory.size() < static_cast<size_t>(n)) memory.resize(static_cast<size_t>(n));
  return memory.data();
}

// where the source pixels of each output pixel begin, how many there are, and their weights, `most` apart
struct Table {
  int64_t most = 0;
  std::vector<int32_t> first, count;
  std::vector<float> weights;

  void start(const CropSide& side, bool mirrored) {
    side_ = side;
    mirrored_ = mirrored;
    most = crop_most(side);
    room(first, side.out);
    room(count, side.out);
    room(weights, side.out * most);
    room(sums_, most);
  }
  void fill(int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t x = mirrored_ ? side_.out - 1 - i : i;
      const int32_t from = crop_first(side_, x), n = crop_end(side_, x) - from;
      int64_t total = 0, before = 0;  // as CropWeights, with the sums kept
      for (int32_t k = 0; k < n; ++k) sums_[static_cast<size_t>(k)] = total += crop_share(side_, x, from + k);
      const double per = (2 << kCropBits) / static_cast<double>(total);
      for (int32_t k = 0; k < n; ++k) {
        const int64_t upto = crop_upto(sums_[static_cast<size_t>(k)], per);
        weights[static_cast<size_t>(i * most + k)] = static_cast<float>(upto - before);
        before = upto;
      }
      first[static_cast<size_t>(i)] = from;
      count[static_cast<size_t>(i)] = n;
    }
  }

  int32_t first_of(int64_t i) const { return first[static_cast<size_t>(i)]; }
  int32_t end_of(int64_t i) const { return first_of(i) + count[static_cast<size_t>(i)]; }

 private:
  CropSide side_ = {};
  std::vector<int64_t> sums_;
  bool mirrored_ = false;
};

// to[j * to_pitch + i] = from[i][j] for i and j below 16
inline void transpose16(const uint8_t* const (&from)[16], uint8_t* to, int64_t to_pitch) {
#if defined(__SSE2__)
  __m128i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from[i]));
  for (int round = 0; round < 4; ++round) {  // each interleaves row i with row i + 8
    for (int i = 0; i < 8; ++i) {
      b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 8]);
      b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 8]);
    }
    std::copy(b, b + 16, a);
  }
  for (int i = 0; i < 16; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * to_pitch), a[i]);
#else
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) to[j * to_pitch + i] = from[i][j];
#endif
}

// the same of 16 rows of 16 pixels without gaps
inline void transpose16(const uint8_t* from, uint8_t* to, int64_t to_pitch) {
  const uint8_t* rows[16];
  for (int i = 0; i < 16; ++i) rows[i] = from + 16 * i;
  transpose16(rows, to, to_pitch);
}

// `n` bytes of 16 rows, each turned into a column of `to`: byte i of row r goes to to[16 * i + r]. Reads no byte more.
inline void turn(const uint8_t* const (&rows)[16], int64_t n, uint8_t* to) {
  const uint8_t* part[16];
  for (int64_t i = 0; i < n && n >= 16; i += 16) {
    const int64_t at = std::min(i, n - 16);  // the last 16 may overlap the ones before
    for (int r = 0; r < 16; ++r) part[r] = rows[r] + at;
    transpose16(part, to + 16 * at, 16);
  }
  for (int64_t i = 0; i < n && n < 16; ++i)
    for (int r = 0; r < 16; ++r) to[16 * i + r] = rows[r][i];
}

// 16 rows on their side: pixel (row r, colour c, column left + x of the box) is at[(c * colour + x * column) * 16 + r]
struct Tile {
  const uint8_t* at;
  int64_t colour, column;
  int32_t left;
};

// columns left .. right - 1 of 16 rows of a box, in `memory`
inline Tile turn(const CropSource& source, const int32_t (&lines)[16], int32_t left, int32_t right,
                 std::vector<uint8_t>& memory) {
  const int64_t width = right - left;
  const bool mixed = source.colour == 1 && source.column == 3;
  uint8_t* to = room(memory, 48 * width);
  const uint8_t* rows[16];
  for (int r = 0; r < 16; ++r) rows[r] = source.at + lines[r] * source.row + left * source.column;
  if (mixed) {
    turn(rows, 3 * width, to);
    return {memory.data(), 1, 3, left};
  }
  for (int c = 0; c < 3; ++c, to += 16 * width) {
    if (source.column == 1) {
      turn(rows, width, to);
    } else {
      for (int64_t x = 0; x < width; ++x)
        for (int r = 0; r < 16; ++r) to[16 * x + r] = rows[r][x * source.column];
    }
    for (int r = 0; r < 16; ++r) rows[r] += source.colour;
  }
  return {memory.data(), width, 1, left};
}

#define MIMFAST_LANES_FILE "crop_resize_lanes.h"
#include "each_lanes.h"

struct Loops {
  decltype(&base::across) across;
  decltype(&base::down) down;
  decltype(&base::normalize) normalize;
};

inline int simd_bits = 512;  // see crop_resize_simd_bits

// the widest instruction set of this machine that has at most simd_bits bits
inline Loops loops() {
#ifdef MIMFAST_X86
  if (lanes_here() >= 16 && simd_bits >= 512) return {avx512::across, avx512::down, avx512::normalize};
  if (lanes_here() >= 8 && simd_bits >= 256) return {avx2::across, avx2::down, avx2::normalize};
#endif
  return {base::across, base::down, base::normalize};
}

}  // namespace crop
}  // namespace mimfast
