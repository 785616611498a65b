#include "mask_blockwise.h"

#include <algorithm>
#include <vector>

#include "parallel.h"

namespace mimfast {
namespace {

constexpr int64_t kCellsPerThread = 1 << 13;

// hides one more rectangle: the first of ten tries that adds between 1 and `room` cells; returns how many it added
int32_t hide_block(const MaskBlockwise& call, int64_t epoch, int64_t sample_id, int round, int32_t room,
                   std::vector<uint32_t>& map) {
  const int words = words_per_row(call);
  for (int t = 0; t < kBlockTries; ++t) {
    const PhiloxBlock drawn = philox_words(call.seed, kStreamBlock, epoch, sample_id, round * kBlockTries + t);
    const Rectangle at = draw_rectangle(call, drawn, room);
    const int32_t added = new_cells(map.data(), words, at);
    if (added < 1 || added > room) continue;
    for (int32_t y = at.top; y < at.top + at.height; ++y)
      for (int32_t i = 0; i < words; ++i) map[y * words + i] |= bits_within(i, at.left, at.width);
    return added;
  }
  return 0;
}

// hides the `missing` visible cells of the smallest (word, cell)
void fill_up(const MaskBlockwise& call, int64_t epoch, int64_t sample_id, int32_t missing, bool* hidden) {
  std::vector<uint64_t> visible;
  const int32_t cells = call.rows * call.cols;
  PhiloxBlock drawn{};
  for (int32_t u = 0; u < cells; ++u) {
    if (u % 4 == 0) drawn = philox_words(call.seed, kStreamMask, epoch, sample_id, u / 4);
    if (!hidden[u]) visible.push_back(uint64_t{drawn.word[u % 4]} << 32 | static_cast<uint64_t>(u));
  }
  std::nth_element(visible.begin(), visible.begin() + missing - 1, visible.end());
  for (int32_t i = 0; i < missing; ++i) hidden[static_cast<uint32_t>(visible[i])] = true;
}

}  // namespace

void mask_blockwise_cpu(const MaskBlockwise& call, int threads) {
  const int64_t cells = int64_t{call.rows} * call.cols;
  parallel_for(call.batch, kCellsPerThread / cells + 1, threads, [&call, cells](int64_t begin, int64_t end) {
    const int words = words_per_row(call);
    std::vector<uint32_t> map(static_cast<size_t>(call.rows) * words);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t epoch = call.epochs != nullptr ? call.epochs[b] : call.epoch;
      std::fill(map.begin(), map.end(), 0u);
      int32_t room = call.count;
      for (int round = 0; room > 0; ++round) {
        const int32_t added = hide_block(call, epoch, call.sample_ids[b], round, room, map);
        if (added == 0) break;
        room -= added;
      }
      bool* hidden = call.hidden + b * cells;
      for (int32_t y = 0; y < call.rows; ++y)
        for (int32_t x = 0; x < call.cols; ++x) hidden[y * call.cols + x] = map[y * words + x / 32] >> x % 32 & 1;
      if (call.exact && room > 0) fill_up(call, epoch, call.sample_ids[b], room, hidden);
    }
  });
}

}  // namespace mimfast
