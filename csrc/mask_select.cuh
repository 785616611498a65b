// The kernel of mask_plan and mask_guided: keep the units with the smallest (key, unit), then write the lists.
#pragma once

#include "device.cuh"
#include "mask_guided.h"

namespace mimfast {

// One block plans one image: the keys of its units stay in registers, kItems per thread, four to a Philox block.
//
// The threshold T with exactly keep_units keys below it is built bit by bit from the top. A step costs one block sum;
// the search ends at the first T that separates: for evenly spread words after about log2(U) + 3 steps instead of 32.
// Only when the boundary keys are equal does no T separate; the lowest units among the equal ones then fill the rest.
//
// U <= 256 takes one warp, which needs no block barrier and lets 32 images share a multiprocessor.
// shared memory: kThreads * kItems bytes + 4 per warp; registers: see bench/aot_native.json, no spills
// floor: B * 17 L bytes written / HBM bandwidth, or the launch for small batches
template <bool kGuided, int kThreads, int kItems>
__global__ void __launch_bounds__(kThreads) mask_select_kernel(MaskPlan plan) {
  static_assert(kItems % 4 == 0, "a Philox block has four words");
  __shared__ uint32_t state[kThreads * kItems / 4];  // one byte per unit: 0 kept, 1 hidden, 2 equal to the threshold
  __shared__ int scratch[kThreads / 32];

  const int64_t b = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  const int units_per_row = plan.cols / plan.unit;
  const int units = plan.rows / plan.unit * units_per_row;
  const int64_t epoch = plan.epochs != nullptr ? plan.epochs[b] : plan.epoch;
  const int64_t sample_id = plan.sample_ids[b];
  const float* importance = kGuided ? plan.importance + b * units : nullptr;
  const MaskLists lists = lists_of(plan, b);
  const int kept_tokens = static_cast<int>(lists.kept);
  const int keep_units = kept_tokens / (plan.unit * plan.unit);

  // unit u = 4 * (j * kThreads + thread) + i sits in key[4 * j + i]; past the end the largest key, never below any T
  uint32_t key[kItems];
#pragma unroll
  for (int j = 0; j < kItems / 4; ++j) {
    const int block = j * kThreads + thread;
    PhiloxBlock drawn = {{0, 0, 0, 0}};
    if (4 * block < units) drawn = philox_words(plan.seed, kStreamMask, epoch, sample_id, block);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      key[4 * j + i] = 4 * block + i < units
                           ? unit_key<kGuided>(drawn.word[i] & plan.word_mask, importance, 4 * block + i)
                           : 0xffffffffu;
  }

  uint32_t threshold = 0;
  int below = 0;  // keys < threshold
  for (uint32_t bit = 1u << 31; bit != 0 && below != keep_units; bit >>= 1) {
    int count = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) count += key[i] < (threshold | bit);
    count = block_sum<kThreads>(count, scratch);
    if (count <= keep_units) {
      threshold |= bit;
      below = count;
    }
  }

#pragma unroll
  for (int j = 0; j < kItems / 4; ++j) {
    uint32_t packed = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t k = key[4 * j + i];
      packed |= (k < threshold ? 0u : k > threshold || below == keep_units ? 1u : 2u) << 8 * i;
    }
    state[j * kThreads + thread] = packed;
  }
  __syncthreads();
  if (below != keep_units) {  // rare (about U in 2^32 images) and exact: one thread walks the units in order
    if (thread == 0) {
      int missing = keep_units - below;
      for (int u = 0; u < units; ++u) {
        const uint32_t byte = 0xffu << 8 * (u % 4);
        if ((state[u / 4] & byte) >> 8 * (u % 4) != 2) continue;
        state[u / 4] = (state[u / 4] & ~byte) | (missing > 0 ? 0u : 1u) << 8 * (u % 4);
        --missing;
      }
    }
    __syncthreads();
  }

  const int tokens = plan.rows * plan.cols;
  int64_t* inverse = plan.inverse + b * tokens;
  bool* hidden = plan.hidden + b * tokens;
  int kept_before = 0;  // kept tokens of the chunks already written
  for (int chunk = 0; chunk < tokens; chunk += kThreads) {
    const int l = chunk + thread;
    const bool exists = l < tokens;
    const int u = plan.unit == 1 ? l : l / plan.cols / plan.unit * units_per_row + l % plan.cols / plan.unit;
    const bool is_kept = exists && (state[u / 4] >> 8 * (u % 4) & 0xff) == 0;
    const Rank rank = block_rank<kThreads>(is_kept, scratch);
    const int before = kept_before + rank.before;
    if (exists) {
      hidden[l] = !is_kept;
      inverse[l] = is_kept ? before : kept_tokens + l - before;
      if (is_kept)
        lists.keep[before] = l;
      else
        lists.hide[l - before] = l;
    }
    kept_before += rank.total;
  }
}

template <bool kGuided>
void mask_select_cuda(const char* op, const MaskPlan& plan, CUstream_st* stream) {
  const int64_t units = int64_t{plan.rows / plan.unit} * (plan.cols / plan.unit);
  if (units > kMaskPlanMaxUnitsCuda)
    throw std::runtime_error(std::string(op) + ": grid has " + std::to_string(units) +
                             " mask units, expected at most 8192 because one block keeps them in registers");
  if (units <= 256) return launch(op, mask_select_kernel<kGuided, 32, 8>, plan.batch, 32, stream, plan);
  if (units <= 1024) return launch(op, mask_select_kernel<kGuided, 128, 8>, plan.batch, 128, stream, plan);
  launch(op, mask_select_kernel<kGuided, 512, 16>, plan.batch, 512, stream, plan);
}

}  // namespace mimfast
