#include <algorithm>
#include <vector>

#include "mask_plan.h"
#include "parallel.h"
#include "philox.h"

namespace mimfast {
namespace {

constexpr int64_t kUnitsPerThread = 1 << 14;  // about 0.2 ms of work, several times the cost of a thread

struct Scratch {
  std::vector<uint64_t> key;    // [U] word << 32 | unit: one integer that orders by (word, unit)
  std::vector<uint8_t> hidden;  // [U]
};

void select_units(const MaskPlan& plan, int64_t b, Scratch& scratch) {
  const int64_t units = static_cast<int64_t>(scratch.key.size());
  const int64_t epoch = plan.epochs != nullptr ? plan.epochs[b] : plan.epoch;
  for (int64_t first = 0; first < units; first += 4) {
    const PhiloxBlock block =
        philox_words(plan.seed, kStreamMask, epoch, plan.sample_ids[b], static_cast<uint32_t>(first / 4));
    for (int64_t u = first; u < std::min(first + 4, units); ++u)
      scratch.key[u] = uint64_t{block.word[u - first] & plan.word_mask} << 32 | static_cast<uint64_t>(u);
  }
  std::nth_element(scratch.key.begin(), scratch.key.begin() + plan.keep_units - 1, scratch.key.end());
  std::fill(scratch.hidden.begin(), scratch.hidden.end(), uint8_t{1});
  for (int32_t i = 0; i < plan.keep_units; ++i) scratch.hidden[static_cast<uint32_t>(scratch.key[i])] = 0;
}

void emit_tokens(const MaskPlan& plan, int64_t b, const Scratch& scratch) {
  const int64_t tokens = int64_t{plan.rows} * plan.cols;
  const int64_t kept = int64_t{plan.keep_units} * plan.unit * plan.unit;
  const int64_t units_per_row = plan.cols / plan.unit;
  int64_t* keep = plan.keep + b * kept;
  int64_t* inverse = plan.inverse + b * tokens;
  bool* hidden = plan.hidden + b * tokens;
  int64_t l = 0, next_kept = 0, next_hidden = kept;
  for (int64_t y = 0; y < plan.rows; ++y) {
    const uint8_t* of_row = scratch.hidden.data() + y / plan.unit * units_per_row;
    for (int64_t unit = 0; unit < units_per_row; ++unit) {
      for (int32_t x = 0; x < plan.unit; ++x, ++l) {
        hidden[l] = of_row[unit] != 0;
        inverse[l] = hidden[l] ? next_hidden++ : next_kept;
        if (!hidden[l]) keep[next_kept++] = l;
      }
    }
  }
}

}  // namespace

void mask_plan_cpu(const MaskPlan& plan, int threads) {
  const int64_t units = int64_t{plan.rows / plan.unit} * (plan.cols / plan.unit);
  parallel_for(plan.batch, kUnitsPerThread / units + 1, threads, [&plan, units](int64_t begin, int64_t end) {
    Scratch scratch{std::vector<uint64_t>(units), std::vector<uint8_t>(units)};
    for (int64_t b = begin; b < end; ++b) {
      select_units(plan, b, scratch);
      emit_tokens(plan, b, scratch);
    }
  });
}

}  // namespace mimfast
