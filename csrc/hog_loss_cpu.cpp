// A thread takes rows of tokens. HogRows makes the values of all cells of their rows of cells, which are copied into
// the order of the predictions; the loss tail then scores token by token.
#include "hog_loss.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "loss_tail_cpu.h"

namespace mimfast {
namespace {

using namespace loss_tail;

constexpr int64_t kPixelsPerThread = 1 << 17;  // about 0.1 ms of work, several times the cost of a thread

// values of `across` tokens, of cells (dy, 0..) of one row of tokens, to targets [across, 27 u^2]. SIDE: u, or 0
template <int SIDE>
void spread(const float* values, int64_t pitch, int64_t across, int64_t u, int64_t dy, float* __restrict targets) {
  const int64_t side = SIDE != 0 ? SIDE : u;
  for (int64_t k = 0; k < 27; ++k, values += pitch) {
    float* to = targets + (k * side + dy) * side;
    for (int64_t x = 0; x < across; ++x, to += 27 * side * side)
      std::memcpy(to, values + x * side, static_cast<size_t>(side) * sizeof(float));
  }
}

// sets what does not count to zero: the cells of the visible parts of a token
template <typename Value>
MIMFAST_INLINE void zero_parts(const int32_t* counts, int64_t cells, Value* values) {
  for (int k = 0; k < 27; ++k, values += cells)
    for (int64_t cell = 0; cell < cells; ++cell) values[cell] = counts[cell] != 0 ? values[cell] : Value{};
}

MIMFAST_CLONES void zero_parts_of(const LossRows& rows, int64_t i, const int32_t* counts, int64_t cells,
                                  float* losses) {
  zero_parts(counts, cells, losses);
  if (rows.grad == nullptr) return;
  if (rows.pred_bf16)
    zero_parts(counts, cells, static_cast<uint16_t*>(rows.grad) + i * rows.values);
  else
    zero_parts(counts, cells, static_cast<float*>(rows.grad) + i * rows.values);
}

MIMFAST_CLONES void score_row_of(const LossRows& rows, int64_t i, const float* target, float weight, float* losses) {
  score_row(rows, i, target, 1.0f, weight, losses);
}

MIMFAST_CLONES float sum_of(const float* values, int64_t n) { return sum(values, n); }

// One for each thread.
class Scorer {
 public:
  Scorer(const HogLoss& call, float weight, float* losses)
      : call_(call),
        hog_(call.images),
        weight_(weight),
        losses_(losses),
        across_(call.images.width / call.images.cell / call.side),
        down_(call.images.height / call.images.cell / call.side),
        targets_(static_cast<size_t>(across_ * call.rows.values)),
        scratch_(static_cast<size_t>(call.rows.values)),
        counts_(static_cast<size_t>(call.side * call.side)),
        part_of_(counts_.size()),
        first_(static_cast<size_t>(down_)),
        next_(call.rows.index != nullptr ? static_cast<size_t>(call.rows.rows) : 0) {
    const int64_t u = call.side, v = call.parts, own = u / v;
    for (int64_t cell = 0; cell < u * u; ++cell)
      part_of_[static_cast<size_t>(cell)] = cell / u / own * across_ * v + cell % u / own;
  }

  // what is in row t of the tokens of image b
  void score(int64_t b, int64_t t) {
    const LossRows& rows = call_.rows;
    if (rows.index != nullptr) {
      if (b != image_) sort(b);
      if (t == 0) drop(b);
      if (first_[static_cast<size_t>(t)] < 0) return;
      describe(b, t);
      for (int64_t m = first_[static_cast<size_t>(t)]; m >= 0; m = next_[static_cast<size_t>(m)])
        score_token(b * rows.rows + m, rows.index[b * rows.rows + m] % across_, true);
      return;
    }
    described_ = false;
    for (int64_t x = 0; x < across_; ++x) {
      const int64_t i = b * rows.rows + t * across_ + x, hidden = count(b, t, x);
      if (hidden == 0) {
        losses_[i] = 0.0f;
        zero_row(rows, i);
        continue;
      }
      if (!described_) describe(b, t);
      score_token(i, x, hidden == static_cast<int64_t>(counts_.size()));
    }
  }

 private:
  void describe(int64_t b, int64_t t) {
    const int64_t u = call_.side;
    for (int64_t dy = 0; dy < u; ++dy) {
      const float* values = hog_.row(b, static_cast<int32_t>(t * u + dy));
      const auto place = u == 1 ? spread<1> : u == 2 ? spread<2> : u == 4 ? spread<4> : spread<0>;
      place(values, hog_.pitch(), across_, u, dy, targets_.data());
    }
    described_ = true;
  }

  void score_token(int64_t i, int64_t x, bool whole) {
    const int64_t n = call_.rows.values;
    score_row_of(call_.rows, i, targets_.data() + x * n, weight_, scratch_.data());
    if (!whole) zero_parts_of(call_.rows, i, counts_.data(), static_cast<int64_t>(counts_.size()), scratch_.data());
    losses_[i] = sum_of(scratch_.data(), n);
  }

  // hidden cells of token (t, x), and which in counts_
  int64_t count(int64_t b, int64_t t, int64_t x) {
    const int64_t v = call_.parts;
    const bool* map = call_.rows.map + (b * down_ + t) * v * v * across_ + x * v;
    int64_t hidden = 0;
    for (size_t cell = 0; cell < counts_.size(); ++cell) hidden += counts_[cell] = map[part_of_[cell]] ? 1 : 0;
    return hidden;
  }

  // lists of the rows of image b by row of tokens
  void sort(int64_t b) {
    image_ = b;
    std::fill(first_.begin(), first_.end(), -1);
    for (int64_t m = call_.rows.rows - 1; m >= 0; --m) {
      const int64_t token = token_of(call_.rows, b * call_.rows.rows + m);
      if (token < 0) continue;
      next_[static_cast<size_t>(m)] = first_[static_cast<size_t>(token / across_)];
      first_[static_cast<size_t>(token / across_)] = m;
    }
  }

  // rows of indices outside the image
  void drop(int64_t b) {
    for (int64_t i = b * call_.rows.rows; i < (b + 1) * call_.rows.rows; ++i)
      if (token_of(call_.rows, i) < 0) losses_[i] = 0.0f, zero_row(call_.rows, i);
  }

  const HogLoss& call_;
  HogRows hog_;
  float weight_;
  float* losses_;
  int64_t across_, down_;
  std::vector<float> targets_, scratch_;  // [across, D], [D]
  std::vector<int32_t> counts_;           // [u, u]
  std::vector<int64_t> part_of_;          // [u, u], where the map has the part of a cell, from that of the first
  std::vector<int64_t> first_, next_;
  int64_t image_ = -1;
  bool described_ = false;
};

int64_t count_values(const HogLoss& call) {
  const LossRows& rows = call.rows;
  int64_t count = 0;
  if (rows.index != nullptr) {
    for (int64_t i = 0; i < rows.batch * rows.rows; ++i) count += token_of(rows, i) >= 0 ? 1 : 0;
    return count * rows.values;
  }
  const int64_t parts = int64_t{call.parts} * call.parts;
  for (int64_t i = 0; i < rows.batch * rows.rows * parts; ++i) count += rows.map[i] ? 1 : 0;
  return count * rows.values / parts;
}

}  // namespace

void hog_loss_cpu(const HogLoss& call, int threads) {
  const int64_t down = call.images.height / call.images.cell / call.side;
  const int64_t pixels = int64_t{3} * call.images.width * call.images.cell * call.side;
  const int64_t units = call.rows.rows > 0 ? call.rows.batch * down : 0;  // an empty tensor has no address
  score_all(call.rows, count_values(call), units, kPixelsPerThread / pixels + 1, threads,
            [&](int64_t begin, int64_t end, float weight, float* losses) {
              Scorer scorer(call, weight, losses);
              for (int64_t n = begin; n < end; ++n) scorer.score(n / down, n % down);
            });
}

}  // namespace mimfast
