#include "device.cuh"
#include "mask_pack.h"

namespace mimfast {
namespace {

constexpr int kThreads = 128;

// tokens of one image that are not hidden
__device__ __forceinline__ int count_kept(const bool* hidden, int64_t tokens, int* scratch) {
  int count = 0;
  for (int64_t l = threadIdx.x; l < tokens; l += kThreads) count += !hidden[l];
  return block_sum<kThreads>(count, scratch);
}

__global__ void __launch_bounds__(kThreads) mask_pack_count_kernel(MaskPack pack) {
  __shared__ int scratch[kThreads / 32];
  const int64_t b = blockIdx.x;
  const int kept = count_kept(pack.hidden + b * pack.tokens, pack.tokens, scratch);
  if (threadIdx.x == 0) pack.kept[b] = kept;
}

// One block writes one image. Packed, it adds up the counts of the images before its own (4 bytes each, from L2):
// cheaper than another launch for a prefix sum. The slots behind the last image are shared out so that image b fills as
// many of `keep` as it has hidden tokens, and of `hide` as it has kept ones: together exactly the slots that are left.
// registers: see bench/aot_native.json, no spills; floor: B * 17 L bytes / HBM bandwidth
template <bool kPacked>
__global__ void __launch_bounds__(kThreads) mask_pack_kernel(MaskPack pack) {
  __shared__ int scratch[kThreads / 32];
  const int64_t b = blockIdx.x, tokens = pack.tokens;
  const bool* hidden = pack.hidden + b * tokens;
  int64_t* inverse = pack.inverse + b * tokens;
  int kept;
  int64_t before = b * pack.visible, all = 0;
  if (kPacked) {
    int below = 0, total = 0;
    for (int64_t other = threadIdx.x; other < pack.batch; other += kThreads) {
      below += other < b ? pack.kept[other] : 0;
      total += pack.kept[other];
    }
    before = block_sum<kThreads>(below, scratch);
    all = block_sum<kThreads>(total, scratch);
    kept = pack.kept[b];
    if (threadIdx.x == 0) {
      pack.cu_seqlens[b + 1] = static_cast<int32_t>(before) + kept;
      if (b == 0) pack.cu_seqlens[0] = 0;
    }
  } else {
    kept = count_kept(hidden, tokens, scratch);
  }
  const int64_t hidden_before = b * tokens - before;
  const int64_t hide_slots = pack.batch * pack.most_hidden;

  int64_t kept_before = 0;  // kept tokens of the chunks already written
  for (int64_t chunk = 0; chunk < tokens; chunk += kThreads) {
    const int64_t l = chunk + threadIdx.x;
    const bool exists = l < tokens;
    const bool is_kept = exists && !hidden[l];
    const Rank rank = block_rank<kThreads>(is_kept, scratch);
    const int64_t seen = kept_before + rank.before, hid = l - seen;  // kept and hidden tokens of this image before l
    kept_before += rank.total;
    if (!exists) continue;
    inverse[l] = is_kept ? seen : kept + hid;
    if (kPacked) {
      const int64_t hide_slot = is_kept ? pack.batch * tokens - all + before + seen : hidden_before + hid;
      pack.keep[is_kept ? before + seen : all + hidden_before + hid] = is_kept ? l : -1;
      if (hide_slot < hide_slots) pack.hide[hide_slot] = is_kept ? -1 : l;
    } else {
      if (is_kept && seen < pack.visible) pack.keep[before + seen] = l;
      if (!is_kept && hid < tokens - pack.visible) pack.hide[hidden_before + hid] = l;
    }
  }
  if (!kPacked) {  // only where the caller's `visible` is wrong
    for (int64_t i = kept + threadIdx.x; i < pack.visible; i += kThreads) pack.keep[before + i] = -1;
    for (int64_t i = tokens - kept + threadIdx.x; i < tokens - pack.visible; i += kThreads)
      pack.hide[hidden_before + i] = -1;
  }
}

}  // namespace

void mask_pack_cuda(const MaskPack& pack, CUstream_st* stream) {
  if (pack.visible >= 0) return launch("mask_pack", mask_pack_kernel<false>, pack.batch, kThreads, stream, pack);
  launch("mask_pack", mask_pack_count_kernel, pack.batch, kThreads, stream, pack);
  launch("mask_pack", mask_pack_kernel<true>, pack.batch, kThreads, stream, pack);
}

}  // namespace mimfast
