#include "mask_pack.h"

#include <algorithm>
#include <vector>

#include "parallel.h"

namespace mimfast {
namespace {

constexpr int64_t kTokensPerThread = 1 << 16;

int64_t count_kept(const bool* hidden, int64_t tokens) { return std::count(hidden, hidden + tokens, false); }

// a list of `count` tokens into the `room` slots of an image: cut, or filled up with -1
void fit(const int64_t* from, int64_t count, int64_t* to, int64_t room) {
  count = std::min(count, room);
  std::copy(from, from + count, to);
  std::fill(to + count, to + room, -1);
}

// writes the inverse of one image and returns its tokens in `order`: kept ones, then hidden ones
void sort_tokens(const bool* hidden, int64_t tokens, int64_t kept, int64_t* inverse, int64_t* order) {
  int64_t hid = 0;
  for (int64_t l = 0; l < tokens; ++l) {  // no branch: which way it goes is random
    const int64_t place = hidden[l] ? kept + hid : l - hid;
    inverse[l] = place;
    order[place] = l;
    hid += hidden[l];
  }
}

}  // namespace

void mask_pack_cpu(const MaskPack& pack, int threads) {
  const int64_t tokens = pack.tokens, grain = kTokensPerThread / (tokens + 1) + 1;
  if (pack.visible >= 0) {
    return parallel_for(pack.batch, grain, threads, [&pack, tokens](int64_t begin, int64_t end) {
      std::vector<int64_t> order(tokens);
      for (int64_t b = begin; b < end; ++b) {
        const bool* hidden = pack.hidden + b * tokens;
        const int64_t kept = count_kept(hidden, tokens), room = tokens - pack.visible;
        sort_tokens(hidden, tokens, kept, pack.inverse + b * tokens, order.data());
        fit(order.data(), kept, pack.keep + b * pack.visible, pack.visible);
        fit(order.data() + kept, tokens - kept, pack.hide + b * room, room);
      }
    });
  }
  parallel_for(pack.batch, grain, threads, [&pack, tokens](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      pack.kept[b] = static_cast<int32_t>(count_kept(pack.hidden + b * tokens, tokens));
  });
  pack.cu_seqlens[0] = 0;
  for (int64_t b = 0; b < pack.batch; ++b) pack.cu_seqlens[b + 1] = pack.cu_seqlens[b] + pack.kept[b];
  const int64_t hide_slots = pack.batch * pack.most_hidden;
  parallel_for(pack.batch, grain, threads, [&pack, tokens, hide_slots](int64_t begin, int64_t end) {
    std::vector<int64_t> order(tokens);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t kept = pack.kept[b], before = pack.cu_seqlens[b];
      const int64_t hide_before = std::min(b * tokens - before, hide_slots);
      sort_tokens(pack.hidden + b * tokens, tokens, kept, pack.inverse + b * tokens, order.data());
      fit(order.data(), kept, pack.keep + before, kept);
      fit(order.data() + kept, tokens - kept, pack.hide + hide_before,
          std::min(tokens - kept, hide_slots - hide_before));
    }
  });
  const int64_t kept = pack.cu_seqlens[pack.batch];
  std::fill(pack.keep + kept, pack.keep + pack.batch * tokens, -1);
  std::fill(pack.hide + std::min(pack.batch * tokens - kept, hide_slots), pack.hide + hide_slots, -1);
}

}  // namespace mimfast
