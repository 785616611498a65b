// A thread takes whole heads of whole groups and writes everything of theirs: no sum crosses threads, so the result
// does not depend on their number. q, k and v of a head are copied into the second cache; the backward computes the
// scores again, which takes less time than to read them.
#include "short_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "attention_types.h"
#include "parallel.h"

namespace mimfast {
namespace {

constexpr int64_t kProductsPerThread = 1 << 21;  // about 0.05 ms of work, several times the cost of a thread

// where a group begins, and its length; lengths that lie give wrong rows, never an access outside
struct Group {
  int64_t image, first, length;
};

inline Group group_of(const ShortAttention& call, int64_t g) {
  if (call.cu_seqlens == nullptr) return {g, 0, call.tokens};
  const int64_t first = std::min<int64_t>(std::max(call.cu_seqlens[g], 0), call.tokens);
  return {0, first, std::min<int64_t>(std::max<int64_t>(call.cu_seqlens[g + 1], first), call.tokens) - first};
}

#define MIMFAST_LANES_FILE "short_attention_lanes.h"
#include "each_lanes.h"

template <typename T>
void run(const ShortAttention& call, int64_t longest, int64_t begin, int64_t end) {
#ifdef MIMFAST_X86
  if (lanes_here() >= 16) return avx512::run_heads<T>(call, longest, begin, end);
  if (lanes_here() >= 8) return avx2::run_heads<T>(call, longest, begin, end);
#endif
  base::run_heads<T>(call, longest, begin, end);
}

// rows that belong to no group
void clear_outside(const ShortAttention& call) {
  if (call.cu_seqlens == nullptr) return;
  const int64_t width = int64_t{call.heads} * call.head * (call.d_qkv != nullptr ? 3 : 1) * (call.bf16 ? 2 : 4);
  char* rows = static_cast<char*>(call.d_qkv != nullptr ? call.d_qkv : call.out);
  int64_t last = 0;
  for (int64_t g = 0; g < call.groups; ++g) {
    const Group group = group_of(call, g);
    if (group.first > last) std::memset(rows + last * width, 0, static_cast<size_t>((group.first - last) * width));
    last = std::max(last, group.first + group.length);
  }
  if (call.tokens > last) std::memset(rows + last * width, 0, static_cast<size_t>((call.tokens - last) * width));
}

}  // namespace

void short_attention_cpu(const ShortAttention& call, int threads) {
  int64_t longest = 0, products = 0;
  for (int64_t g = 0; g < call.groups; ++g) {
    const int64_t length = group_of(call, g).length;
    longest = std::max(longest, length);
    products += length * length * call.head;
  }
  clear_outside(call);
  if (longest == 0) return;
  const int64_t mean = products / call.groups + 1;  // of one head
  parallel_for(call.groups * call.heads, kProductsPerThread / mean + 1, threads, [&](int64_t begin, int64_t end) {
    if (call.bf16)
      run<Bfloat16>(call, longest, begin, end);
    else
      run<float>(call, longest, begin, end);
  });
}

}  // namespace mimfast
