// The CPU code of mask_plan and mask_guided: keep the units with the smallest (key, unit), then write the lists.
#pragma once

#include <algorithm>
#include <vector>

#include "mask_guided.h"
#include "parallel.h"

namespace mimfast {

constexpr int64_t kUnitsPerThread = 1 << 14;  // about 0.2 ms of work, several times the cost of a thread

struct UnitScratch {
  std::vector<uint32_t> key;    // [U]
  std::vector<uint8_t> hidden;  // [U]
  std::vector<int64_t> order;   // [L] kept tokens, then hidden ones
};

inline int64_t count_below(const std::vector<uint32_t>& key, uint32_t threshold) {
  int64_t count = 0;
  for (const uint32_t k : key) count += k < threshold;
  return count;
}

// The threshold with keep_units keys below it, bit by bit from the top, as in mask_select.cuh: passes that vectorise
// and do not branch on the keys, where a partial sort mispredicts every other comparison.
inline void hide_units(const std::vector<uint32_t>& key, int64_t keep_units, std::vector<uint8_t>& hidden) {
  uint32_t threshold = 0;
  int64_t below = 0;
  for (uint32_t bit = 1u << 31; bit != 0 && below != keep_units; bit >>= 1) {
    const int64_t count = count_below(key, threshold | bit);
    if (count > keep_units) continue;
    threshold |= bit;
    below = count;
  }
  for (size_t u = 0; u < key.size(); ++u) hidden[u] = key[u] >= threshold;
  for (size_t u = 0; below < keep_units; ++u) {  // equal keys across the boundary: the lowest units
    if (key[u] != threshold) continue;
    hidden[u] = 0;
    ++below;
  }
}

template <bool kGuided>
void select_units(const MaskPlan& plan, int64_t b, int64_t keep_units, UnitScratch& scratch) {
  const int64_t units = static_cast<int64_t>(scratch.key.size());
  const int64_t epoch = plan.epochs != nullptr ? plan.epochs[b] : plan.epoch;
  const float* importance = kGuided ? plan.importance + b * units : nullptr;
  for (int64_t first = 0; first < units; first += 4) {
    const PhiloxBlock block =
        philox_words(plan.seed, kStreamMask, epoch, plan.sample_ids[b], static_cast<uint32_t>(first / 4));
    for (int64_t u = first; u < std::min(first + 4, units); ++u)
      scratch.key[u] = unit_key<kGuided>(block.word[u - first] & plan.word_mask, importance, u);
  }
  hide_units(scratch.key, keep_units, scratch.hidden);
}

inline void emit_tokens(const MaskPlan& plan, int64_t b, const MaskLists& lists, UnitScratch& scratch) {
  const int64_t tokens = int64_t{plan.rows} * plan.cols;
  const int64_t units_per_row = plan.cols / plan.unit;
  int64_t* inverse = plan.inverse + b * tokens;
  bool* hidden = plan.hidden + b * tokens;
  int64_t* order = scratch.order.data();
  int64_t l = 0, hid = 0;
  for (int64_t y = 0; y < plan.rows; ++y) {
    const uint8_t* of_row = scratch.hidden.data() + y / plan.unit * units_per_row;
    for (int64_t unit = 0; unit < units_per_row; ++unit) {
      const int64_t is_hidden = of_row[unit];
      for (int32_t x = 0; x < plan.unit; ++x, ++l) {  // no branch: which way it goes is random
        const int64_t place = is_hidden ? lists.kept + hid : l - hid;
        hidden[l] = is_hidden != 0;
        inverse[l] = place;
        order[place] = l;
        hid += is_hidden;
      }
    }
  }
  std::copy(order, order + lists.kept, lists.keep);
  std::copy(order + lists.kept, order + tokens, lists.hide);
}

template <bool kGuided>
void mask_select_cpu(const MaskPlan& plan, int threads) {
  const int64_t units = int64_t{plan.rows / plan.unit} * (plan.cols / plan.unit);
  parallel_for(plan.batch, kUnitsPerThread / units + 1, threads, [&plan, units](int64_t begin, int64_t end) {
    const int64_t tokens = int64_t{plan.rows} * plan.cols;
    UnitScratch scratch{std::vector<uint32_t>(units), std::vector<uint8_t>(units), std::vector<int64_t>(tokens)};
    for (int64_t b = begin; b < end; ++b) {
      const MaskLists lists = lists_of(plan, b);
      select_units<kGuided>(plan, b, lists.kept / (int64_t{plan.unit} * plan.unit), scratch);
      emit_tokens(plan, b, lists, scratch);
    }
  });
}

}  // namespace mimfast
