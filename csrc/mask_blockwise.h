// mask_blockwise: random rectangles hide a share of a grid; see mimfast/ops/mask_blockwise.py for the rule.
// The arithmetic is in integers (and one exact square root), shared by host and device, so that both agree to the bit.
// B images, a map of rows x cols cells.
#pragma once

#include <cmath>
#include <cstdint>

#include "philox.h"

struct CUstream_st;  // cudaStream_t without the toolkit

namespace mimfast {

constexpr int kBlockTries = 10;
constexpr int kMaskBlockwiseMaxWordsCuda = 2048;  // words of the bit map of one image, in shared memory

struct MaskBlockwise {
  // inputs
  const int64_t* sample_ids;  // [B]
  const int64_t* epochs;      // [B], or null: `epoch` for every image
  int64_t epoch;
  int64_t batch;
  int32_t rows, cols;         // rows * cols <= 2^16
  int32_t count;              // cells to hide
  int32_t min_block;          // least area drawn, while there is room for it
  int32_t log_low, log_high;  // bounds of log2(height / width) times 2^24, within +-4
  bool exact;                 // fill up to `count` with single cells
  uint64_t seed;
  // output
  bool* hidden;  // [B, rows * cols]
};

void mask_blockwise_cpu(const MaskBlockwise& call, int threads);
void mask_blockwise_cuda(const MaskBlockwise& call, CUstream_st* stream);

struct Rectangle {
  int32_t top, left, height, width;  // height 0: none that fits
};

// 2^(x / 2^24) times 2^20, relative error below 5e-6; |x| <= 4 * 2^24
MIMFAST_HOST_DEVICE int64_t exp2_fixed(int64_t x) {
  constexpr int64_t kExp2[] = {1073745686, 744070390, 259438920, 55531496, 14693065};  // on [0, 1], times 2^30
  const int64_t fraction = x & 0xffffff, whole = x >> 24;
  int64_t series = kExp2[4];
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int k = 3; k >= 0; --k) series = kExp2[k] + (series * fraction >> 24);
  return series >> (10 - whole);
}

// sqrt(area * ratio) to the nearest integer; area times 2^12, ratio times 2^20
MIMFAST_HOST_DEVICE int32_t rounded_side(int64_t area, int64_t ratio) {
  const int64_t four_times = area * ratio >> 30;  // floor(4 * area * ratio) < 2^22
  const int64_t twice =
      static_cast<int64_t>(sqrt(static_cast<double>(four_times)));  // exact: sqrt is correctly rounded
  return static_cast<int32_t>((twice + 1) >> 1);
}

// one try: area, shape, top and left from the four words of a Philox block, with room for `room` more cells
MIMFAST_HOST_DEVICE Rectangle draw_rectangle(const MaskBlockwise& call, const PhiloxBlock& drawn, int32_t room) {
  const int64_t low = room < call.min_block ? room : call.min_block,
                high = room < call.min_block ? call.min_block : room;
  const int64_t area = (low << 12) + ((high - low) * int64_t{drawn.word[0]} >> 20);
  const int64_t log_ratio = call.log_low + ((int64_t{call.log_high} - call.log_low) * int64_t{drawn.word[1]} >> 32);
  const int32_t height = rounded_side(area, exp2_fixed(log_ratio)), width = rounded_side(area, exp2_fixed(-log_ratio));
  if (height >= call.rows || width >= call.cols) return {0, 0, 0, 0};
  const int64_t top = int64_t{drawn.word[2]} * (call.rows - height + 1) >> 32;
  const int64_t left = int64_t{drawn.word[3]} * (call.cols - width + 1) >> 32;
  return {static_cast<int32_t>(top), static_cast<int32_t>(left), height, width};
}

MIMFAST_HOST_DEVICE int words_per_row(const MaskBlockwise& call) { return (call.cols + 31) / 32; }

// the bits of word `index` of a row that lie in [left, left + width)
MIMFAST_HOST_DEVICE uint32_t bits_within(int32_t index, int32_t left, int32_t width) {
  const int32_t from = left - 32 * index, to = from + width;
  if (to <= 0 || from >= 32) return 0;
  const uint32_t below_to = to >= 32 ? 0xffffffffu : (1u << to) - 1;
  return from <= 0 ? below_to : below_to & ~((1u << from) - 1);
}

MIMFAST_HOST_DEVICE int count_bits(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __popc(bits);
#else
  return __builtin_popcount(bits);
#endif
}

// cells of the rectangle that the bit map [rows][words_per_row] does not hide yet
MIMFAST_HOST_DEVICE int32_t new_cells(const uint32_t* map, int words, const Rectangle& at) {
  int32_t found = 0;
  if (at.height == 0 || at.width == 0) return 0;
  for (int32_t y = at.top; y < at.top + at.height; ++y)
    for (int32_t i = at.left / 32; i <= (at.left + at.width - 1) / 32; ++i)
      found += count_bits(bits_within(i, at.left, at.width) & ~map[y * words + i]);
  return found;
}

}  // namespace mimfast
