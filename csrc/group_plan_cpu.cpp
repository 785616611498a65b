#include "group_plan.h"

#include <algorithm>
#include <limits>
#include <vector>

namespace mimfast {
namespace {

using Groups = std::vector<std::vector<int64_t>>;

// sums of window lengths that can be reached: bit `sum` of a row of words, one row after each window
class Sums {
 public:
  explicit Sums(int64_t most) : words_(most / 64 + 1), most_(most) {}

  void start() { rows_.assign(static_cast<size_t>(words_), 0), rows_[0] = 1; }

  void add(int64_t length) {  // row |= row << length, in a new row
    const size_t before = rows_.size() - static_cast<size_t>(words_);
    rows_.resize(rows_.size() + static_cast<size_t>(words_));
    const uint64_t* row = rows_.data() + before;
    uint64_t* next = rows_.data() + before + words_;
    const int64_t skip = length / 64, shift = length % 64;
    for (int64_t i = 0; i < words_; ++i) {
      uint64_t moved = i >= skip ? row[i - skip] << shift : 0;
      if (shift > 0 && i > skip) moved |= row[i - skip - 1] >> (64 - shift);
      next[i] = row[i] | moved;
    }
  }

  bool reached(int64_t row, int64_t sum) const {
    return rows_[static_cast<size_t>(row * words_ + sum / 64)] >> (sum % 64) & 1;
  }

  int64_t largest(int64_t row) const {
    int64_t sum = most_;
    while (!reached(row, sum)) --sum;
    return sum;
  }

 private:
  int64_t words_, most_;
  std::vector<uint64_t> rows_;
};

Groups pack(const std::vector<int64_t>& count, int64_t size) {
  std::vector<int64_t> left;
  for (size_t w = 0; w < count.size(); ++w)
    if (count[w] > 0) left.push_back(static_cast<int64_t>(w));
  Groups groups;
  Sums sums(size);
  while (!left.empty()) {
    sums.start();
    for (const int64_t w : left) sums.add(count[static_cast<size_t>(w)]);
    int64_t total = sums.largest(static_cast<int64_t>(left.size()));
    std::vector<int64_t> members, others;
    for (int64_t i = static_cast<int64_t>(left.size()) - 1; i >= 0; --i) {
      const int64_t w = left[static_cast<size_t>(i)];
      const bool taken = !sums.reached(i, total);
      if (taken) total -= count[static_cast<size_t>(w)];
      (taken ? members : others).push_back(w);
    }
    std::reverse(members.begin(), members.end());
    std::reverse(others.begin(), others.end());
    groups.push_back(std::move(members));
    left = std::move(others);
  }
  return groups;
}

}  // namespace

std::pair<int64_t, int64_t> group_plan_cpu(const int64_t* window, int64_t tokens, int64_t windows, int64_t limit,
                                           int64_t overhead, int64_t* slot) {
  std::vector<int64_t> count(static_cast<size_t>(windows), 0);
  for (int64_t t = 0; t < tokens; ++t) ++count[static_cast<size_t>(window[t])];
  const int64_t longest = *std::max_element(count.begin(), count.end());
  int64_t least = std::numeric_limits<int64_t>::max(), best_size = longest;
  Groups best;
  for (int64_t size = longest; size <= std::max(longest, std::min(limit, tokens)); ++size) {
    const int64_t each = size * (size + overhead);
    if ((tokens + size - 1) / size * each >= least) continue;  // not even full groups would be cheaper
    Groups groups = pack(count, size);
    const int64_t cost = static_cast<int64_t>(groups.size()) * each;
    if (cost < least) least = cost, best_size = size, best = std::move(groups);
  }
  // count becomes the next free slot of each window
  for (size_t g = 0; g < best.size(); ++g) {
    int64_t next = static_cast<int64_t>(g) * best_size;
    for (const int64_t w : best[g]) {
      const int64_t length = count[static_cast<size_t>(w)];
      count[static_cast<size_t>(w)] = next;
      next += length;
    }
  }
  for (int64_t t = 0; t < tokens; ++t) slot[t] = count[static_cast<size_t>(window[t])]++;
  return {static_cast<int64_t>(best.size()), best_size};
}

}  // namespace mimfast
