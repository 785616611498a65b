// The CPU code of mask_plan and mask_guided: keep the units with the smallest (key, unit), then write the lists.
#pragma once

#include <algorithm>
#include <vector>

#include "mask_guided.h"
#include "parallel.h"

namespace mimfast {

constexpr int64_t kUnitsPerThread = 1 << 14;  // about 0.2 ms of work, several times the cost of a thread

struct UnitScratch {
  std::vector<uint64_t> key;    // [U] key << 32 | unit: one integer that orders by (key, unit)
  std::vector<uint8_t> hidden;  // [U]
};

template <bool kGuided>
void select_units(const MaskPlan& plan, int64_t b, int64_t keep_units, UnitScratch& scratch) {
  const int64_t units = static_cast<int64_t>(scratch.key.size());
  const int64_t epoch = plan.epochs != nullptr ? plan.epochs[b] : plan.epoch;
  for (int64_t first = 0; first < units; first += 4) {
    const PhiloxBlock block =
        philox_words(plan.seed, kStreamMask, epoch, plan.sample_ids[b], static_cast<uint32_t>(first / 4));
    for (int64_t u = first; u < std::min(first + 4, units); ++u)
      scratch.key[u] = uint64_t{unit_key<kGuided>(plan, b, u, block.word[u - first] & plan.word_mask)} << 32 |
                       static_cast<uint64_t>(u);
  }
  std::nth_element(scratch.key.begin(), scratch.key.begin() + keep_units - 1, scratch.key.end());
  std::fill(scratch.hidden.begin(), scratch.hidden.end(), uint8_t{1});
  for (int64_t i = 0; i < keep_units; ++i) scratch.hidden[static_cast<uint32_t>(scratch.key[i])] = 0;
}

inline void emit_tokens(const MaskPlan& plan, int64_t b, const MaskLists& lists, const UnitScratch& scratch) {
  const int64_t tokens = int64_t{plan.rows} * plan.cols;
  const int64_t units_per_row = plan.cols / plan.unit;
  int64_t* inverse = plan.inverse + b * tokens;
  bool* hidden = plan.hidden + b * tokens;
  int64_t l = 0, kept = 0, hid = 0;
  for (int64_t y = 0; y < plan.rows; ++y) {
    const uint8_t* of_row = scratch.hidden.data() + y / plan.unit * units_per_row;
    for (int64_t unit = 0; unit < units_per_row; ++unit) {
      for (int32_t x = 0; x < plan.unit; ++x, ++l) {
        hidden[l] = of_row[unit] != 0;
        inverse[l] = hidden[l] ? lists.kept + hid : kept;
        if (hidden[l])
          lists.hide[hid++] = l;
        else
          lists.keep[kept++] = l;
      }
    }
  }
}

template <bool kGuided>
void mask_select_cpu(const MaskPlan& plan, int threads) {
  const int64_t units = int64_t{plan.rows / plan.unit} * (plan.cols / plan.unit);
  parallel_for(plan.batch, kUnitsPerThread / units + 1, threads, [&plan, units](int64_t begin, int64_t end) {
    UnitScratch scratch{std::vector<uint64_t>(units), std::vector<uint8_t>(units)};
    for (int64_t b = begin; b < end; ++b) {
      const MaskLists lists = lists_of(plan, b);
      select_units<kGuided>(plan, b, lists.kept / (int64_t{plan.unit} * plan.unit), scratch);
      emit_tokens(plan, b, lists, scratch);
    }
  });
}

}  // namespace mimfast
