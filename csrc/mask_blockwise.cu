#include "device.cuh"
#include "mask_blockwise.h"

namespace mimfast {
namespace {

constexpr int kThreads = 32;

// where the first of this round's tries succeeds: its rectangle and the cells it adds, in all lanes; added 0 when none
// does
struct Found {
  Rectangle at;
  int added;
};

__device__ __forceinline__ Found find_block(const MaskBlockwise& call, const uint32_t* map, int64_t epoch,
                                            int64_t sample_id, int round, int room) {
  const int lane = static_cast<int>(threadIdx.x);
  Rectangle at = {0, 0, 0, 0};
  int added = 0;
  if (lane < kBlockTries) {
    at =
        draw_rectangle(call, philox_words(call.seed, kStreamBlock, epoch, sample_id, round * kBlockTries + lane), room);
    added = new_cells(map, words_per_row(call), at);
  }
  const unsigned good = __ballot_sync(kAllLanes, added > 0 && added <= room);
  if (good == 0) return {{0, 0, 0, 0}, 0};
  const int first = __popc((good & (0u - good)) - 1);  // index of the lowest bit
  at = {__shfl_sync(kAllLanes, at.top, first), __shfl_sync(kAllLanes, at.left, first),
        __shfl_sync(kAllLanes, at.height, first), __shfl_sync(kAllLanes, at.width, first)};
  return {at, __shfl_sync(kAllLanes, added, first)};
}

// the smaller of two (word, cell) in every lane
__device__ __forceinline__ uint64_t warp_min(uint64_t value) {
  for (int flip = 16; flip > 0; flip >>= 1) {
    const uint64_t other = __shfl_xor_sync(kAllLanes, value, flip);
    value = other < value ? other : value;
  }
  return value;
}

// One warp masks one image. The ten tries of a round do not depend on each other: ten lanes make one each, and the
// first that fits wins, as if they had been made in turn. The map is one bit per cell in shared memory. Filling up
// takes the smallest (word, cell) among the visible cells, one at a time: on average half a cell is missing. shared
// memory: 8 KiB; registers: see bench/aot_native.json, no spills; floor: latency of about 10 rounds
__global__ void __launch_bounds__(kThreads) mask_blockwise_kernel(MaskBlockwise call) {
  __shared__ uint32_t map[kMaskBlockwiseMaxWordsCuda];
  const int64_t b = blockIdx.x;
  const int lane = static_cast<int>(threadIdx.x);
  const int words = words_per_row(call), cells = call.rows * call.cols;
  const int64_t epoch = call.epochs != nullptr ? call.epochs[b] : call.epoch;
  const int64_t sample_id = call.sample_ids[b];
  for (int i = lane; i < call.rows * words; i += kThreads) map[i] = 0;
  __syncwarp();

  int room = call.count;
  for (int round = 0; room > 0; ++round) {
    const Found found = find_block(call, map, epoch, sample_id, round, room);
    if (found.added == 0) break;
    const int first_word = found.at.left / 32, width_words = (found.at.left + found.at.width - 1) / 32 - first_word + 1;
    for (int i = lane; i < found.at.height * width_words; i += kThreads) {
      const int index = first_word + i % width_words;
      map[(found.at.top + i / width_words) * words + index] |= bits_within(index, found.at.left, found.at.width);
    }
    __syncwarp();
    room -= found.added;
  }

  if (call.exact) {
    uint64_t last = 0;  // (word, cell + 1) hidden so far: the next one is larger
    for (; room > 0; --room) {
      uint64_t least = ~uint64_t{0};
      for (int block = lane; 4 * block < cells; block += kThreads) {
        const PhiloxBlock drawn = philox_words(call.seed, kStreamMask, epoch, sample_id, block);
        for (int i = 0; i < 4 && 4 * block + i < cells; ++i) {
          const int u = 4 * block + i, y = u / call.cols, x = u % call.cols;
          const uint64_t key = uint64_t{drawn.word[i]} << 32 | static_cast<uint32_t>(u + 1);
          if (key > last && key < least && !(map[y * words + x / 32] >> x % 32 & 1)) least = key;
        }
      }
      last = warp_min(least);
      const int u = static_cast<int>(static_cast<uint32_t>(last)) - 1;
      if (lane == 0) map[u / call.cols * words + u % call.cols / 32] |= 1u << u % call.cols % 32;
      __syncwarp();
    }
  }

  bool* hidden = call.hidden + b * cells;
  for (int u = lane; u < cells; u += kThreads)
    hidden[u] = map[u / call.cols * words + u % call.cols / 32] >> u % call.cols % 32 & 1;
}

}  // namespace

void mask_blockwise_cuda(const MaskBlockwise& call, CUstream_st* stream) {
  const int64_t words = int64_t{call.rows} * words_per_row(call);
  if (words > kMaskBlockwiseMaxWordsCuda)
    throw std::runtime_error("mask_blockwise: grid has " + std::to_string(words) +
                             " words of cells, expected at most 2048 because one block keeps them in shared memory");
  launch("mask_blockwise", mask_blockwise_kernel, call.batch, kThreads, stream, call);
}

}  // namespace mimfast
