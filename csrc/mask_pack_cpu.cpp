#include "mask_pack.h"

#include <algorithm>

#include "parallel.h"

namespace mimfast {
namespace {

constexpr int64_t kTokensPerThread = 1 << 16;

int64_t count_kept(const bool* hidden, int64_t tokens) { return std::count(hidden, hidden + tokens, false); }

// writes the lists of one image; room: slots of each list that belong to it
void emit(const bool* hidden, int64_t tokens, int64_t kept, int64_t* keep, int64_t keep_room, int64_t* hide,
          int64_t hide_room, int64_t* inverse) {
  int64_t seen = 0, hid = 0;
  for (int64_t l = 0; l < tokens; ++l) {
    if (hidden[l]) {
      inverse[l] = kept + hid;
      if (hid < hide_room) hide[hid] = l;
      ++hid;
    } else {
      inverse[l] = seen;
      if (seen < keep_room) keep[seen] = l;
      ++seen;
    }
  }
  std::fill(keep + std::min(seen, keep_room), keep + keep_room, -1);
  std::fill(hide + std::min(hid, hide_room), hide + hide_room, -1);
}

}  // namespace

void mask_pack_cpu(const MaskPack& pack, int threads) {
  const int64_t tokens = pack.tokens, grain = kTokensPerThread / (tokens + 1) + 1;
  if (pack.visible >= 0) {
    return parallel_for(pack.batch, grain, threads, [&pack, tokens](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const bool* hidden = pack.hidden + b * tokens;
        emit(hidden, tokens, count_kept(hidden, tokens), pack.keep + b * pack.visible, pack.visible,
             pack.hide + b * (tokens - pack.visible), tokens - pack.visible, pack.inverse + b * tokens);
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
    for (int64_t b = begin; b < end; ++b) {
      const int64_t kept = pack.kept[b], before = pack.cu_seqlens[b];
      const int64_t hide_before = std::min(b * tokens - before, hide_slots);
      emit(pack.hidden + b * tokens, tokens, kept, pack.keep + before, kept, pack.hide + hide_before,
           std::min(tokens - kept, hide_slots - hide_before), pack.inverse + b * tokens);
    }
  });
  const int64_t kept = pack.cu_seqlens[pack.batch];
  std::fill(pack.keep + kept, pack.keep + pack.batch * tokens, -1);
  std::fill(pack.hide + std::min(pack.batch * tokens - kept, hide_slots), pack.hide + hide_slots, -1);
}

}  // namespace mimfast
