// A thread takes a chunk of neighbouring windows for one head and writes everything of theirs, asking for the next
// window while it computes one: 128 bytes here and there are nothing the hardware would foresee. What all windows share
// (the gradients of table, bias and scale) is summed within a chunk first, then over chunks in their order. Chunks
// depend on the shape alone, so the result does not depend on the number of threads.
#include "window_attention.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "attention_types.h"
#include "parallel.h"

namespace mimfast {
namespace {

constexpr int64_t kItems = 128;   // chunks times heads to aim at: some for each core of a large machine
constexpr int64_t kLongest = 16;  // windows of a chunk: their tokens stay in the second cache from head to head
constexpr int64_t kProductsPerThread = 1 << 20;  // about 0.05 ms of work, several times the cost of a thread

// of the rolled map, padded to whole windows: where each row and column comes from (-1: padding), and its region; a
// pair whose regions differ was brought together by the roll
struct Map {
  std::vector<int32_t> row_source, row_label, col_source, col_label;
  int64_t across, windows;  // windows side by side, windows of an image

  explicit Map(const WindowAttention& call) {
    const int64_t down = axis(call, 0, call.rows, row_source, row_label);
    across = axis(call, 1, call.cols, col_source, col_label);
    windows = down * across;
  }

  static int64_t axis(const WindowAttention& call, size_t side, int32_t size, std::vector<int32_t>& source,
                      std::vector<int32_t>& label) {
    const int32_t window = call.window[side], shift = call.shift[side];
    const int32_t count = (size + window - 1) / window, whole = count * window, ring = call.roll_first ? size : whole;
    for (int32_t i = 0; i < whole; ++i) {
      const int32_t from = i < ring ? (i + shift) % ring : -1;
      source.push_back(from < size ? from : -1);
      label.push_back((i >= whole - window ? 1 : 0) + (i >= whole - shift ? 1 : 0));
    }
    return count;
  }
};

// sums of one item of work
struct Partial {
  float *table, *bias, *head_scale;  // [O], [3, d] and one value; null where not wanted
};

struct Plan {
  int64_t windows, chunk, items, offsets;
  std::vector<float> table;  // [h, O]; empty without a table
  std::vector<float> sums;   // [items, width]: table, bias, scale
  int64_t head3;             // 3 * d
  bool with_table, with_bias, with_scale;

  Plan(const WindowAttention& call, const Map& map) {
    windows = call.batch * map.windows;
    chunk = std::max<int64_t>(1, std::min<int64_t>(kLongest, windows * call.heads / kItems));
    items = (windows + chunk - 1) / chunk * call.heads;
    offsets = (int64_t{2} * call.window[0] - 1) * (int64_t{2} * call.window[1] - 1);
    head3 = int64_t{3} * call.head;
    if (call.table != nullptr)
      for (int64_t h = 0; h < call.heads; ++h)
        for (int64_t o = 0; o < offsets; ++o) table.push_back(call.table[o * call.heads + h]);
    with_table = call.d_table != nullptr;
    with_bias = call.d_bias != nullptr;
    with_scale = call.d_qkv != nullptr && call.head_scale != nullptr;
    sums.assign(static_cast<size_t>(items * width()), 0.0f);
  }

  int64_t width() const { return (with_table ? offsets : 0) + (with_bias ? head3 : 0) + (with_scale ? 1 : 0); }

  const float* table_of(int64_t head) const { return table.empty() ? nullptr : table.data() + head * offsets; }

  Partial partial(int64_t item) const {
    float* at = const_cast<float*>(sums.data()) + item * width();  // every item has its own
    float* bias = at + (with_table ? offsets : 0);
    return {with_table ? at : nullptr, with_bias ? bias : nullptr,
            with_scale ? bias + (with_bias ? head3 : 0) : nullptr};
  }

  // value `index` of a head's sums, over all chunks
  float total(const WindowAttention& call, int64_t head, int64_t index) const {
    double sum = 0.0;
    for (int64_t item = head; item < items; item += call.heads)
      sum += sums[static_cast<size_t>(item * width() + index)];
    return static_cast<float>(sum);
  }
};

#define MIMFAST_LANES_FILE "window_attention_lanes.h"
#include "each_lanes.h"

template <typename T>
void run(const WindowAttention& call, const Map& map, const Plan& plan, int most, std::atomic<int64_t>& free_item) {
#ifdef MIMFAST_X86
  if (most >= 16 && lanes_here() >= 16) return avx512::run_items<T>(call, map, plan, free_item);
  if (most >= 8 && lanes_here() >= 8) return avx2::run_items<T>(call, map, plan, free_item);
#endif
  static_cast<void>(most);
  base::run_items<T>(call, map, plan, free_item);
}

}  // namespace

void window_attention_cpu(const WindowAttention& call, int threads, int lanes) {
  const Map map(call);
  const Plan plan(call, map);
  const int64_t n = int64_t{call.window[0]} * call.window[1], products = plan.chunk * n * n * call.head;
  // handed out one by one, because the threads of the caller's other work may still hold a core
  std::atomic<int64_t> free_item{0};
  parallel_for(plan.items, kProductsPerThread / products + 1, threads, [&](int64_t, int64_t) {
    if (call.bf16)
      run<Bfloat16>(call, map, plan, lanes, free_item);
    else
      run<float>(call, map, plan, lanes, free_item);
  });
  for (int64_t h = 0; h < call.heads; ++h) {
    int64_t index = 0;
    for (int64_t o = 0; call.d_table != nullptr && o < plan.offsets; ++o, ++index)
      call.d_table[o * call.heads + h] = plan.total(call, h, index);
    for (int64_t c = 0; call.d_bias != nullptr && c < plan.head3; ++c, ++index)
      call.d_bias[(c / call.head * call.heads + h) * call.head + c % call.head] = plan.total(call, h, index);
    if (plan.with_scale && call.d_head_scale != nullptr) call.d_head_scale[h] = plan.total(call, h, index);
  }
}

}  // namespace mimfast
