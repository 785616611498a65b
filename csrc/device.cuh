// What the kernels share: warp and block sums and ranks, and the checked launches. Compiled by nvcc, or by g++ through
// emulate.h. Every function here is called by all threads of the block.
#pragma once

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "emulate.h"
#endif

#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

namespace mimfast {

constexpr unsigned kAllLanes = 0xffffffffu;

// sum of `value` over the block; `scratch` has kThreads / 32 ints of shared memory
template <int kThreads>
__device__ __forceinline__ int block_sum(int value, int* scratch) {
  const int in_warp = __reduce_add_sync(kAllLanes, value);
  if (kThreads == 32) return in_warp;
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = in_warp;
  __syncthreads();
  int total = 0;
  for (int warp = 0; warp < kThreads / 32; ++warp) total += scratch[warp];
  __syncthreads();  // scratch may be written again
  return total;
}

struct Rank {
  int before;  // threads below this one with the flag set
  int total;   // threads of the block with the flag set
};

// rank of each thread among those with `flag` set; `scratch` as in block_sum
template <int kThreads>
__device__ __forceinline__ Rank block_rank(bool flag, int* scratch) {
  const unsigned votes = __ballot_sync(kAllLanes, flag);
  Rank rank = {__popc(votes & ((1u << threadIdx.x % 32) - 1)), __popc(votes)};
  if (kThreads == 32) return rank;
  const int own_warp = threadIdx.x / 32;
  if (threadIdx.x % 32 == 0) scratch[own_warp] = rank.total;
  __syncthreads();
  rank.total = 0;
  for (int warp = 0; warp < kThreads / 32; ++warp) {
    if (warp < own_warp) rank.before += scratch[warp];
    rank.total += scratch[warp];
  }
  __syncthreads();  // scratch may be written again
  return rank;
}

// what launch_shared gave the kernel, aligned to 16 bytes
__device__ __forceinline__ void* dynamic_shared() {
#ifdef __CUDACC__
  extern __shared__ uint4 dynamic_shared_memory[];
  return dynamic_shared_memory;
#else
  return emulate::machine().shared.data();
#endif
}

// starts `kernel` on `blocks` x `threads` with dynamic shared memory, and raises std::runtime_error with a sentence
// when the launch is refused
template <typename... Params>
void launch_shared(const char* op, void (*kernel)(Params...), int64_t blocks, int threads, int shared_bytes,
                   CUstream_st* stream, Params... params) {
  if (blocks == 0) return;
  if (blocks > INT32_MAX)
    throw std::runtime_error(std::string(op) + ": grid has " + std::to_string(blocks) +
                             " blocks, expected at most 2147483647 because CUDA counts them in 31 bits");
#ifdef __CUDACC__
  cudaError_t status = cudaSuccess;
  if (shared_bytes > 48 * 1024)  // more than every GPU grants without being asked
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (status == cudaSuccess) {
    kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(params...);
    status = cudaGetLastError();
  } else {
    cudaGetLastError();  // or the next call would report it
  }
  if (status != cudaSuccess)
    throw std::runtime_error(std::string(op) + ": CUDA launch of " + std::to_string(blocks) + " blocks of " +
                             std::to_string(threads) + " threads failed because " + cudaGetErrorString(status));
#else
  static_cast<void>(stream);
  emulate::run({static_cast<unsigned>(blocks)}, {static_cast<unsigned>(threads)}, static_cast<size_t>(shared_bytes),
               [=] { kernel(params...); });
#endif
}

// the same without dynamic shared memory
template <typename... Params>
void launch(const char* op, void (*kernel)(Params...), int64_t blocks, int threads, CUstream_st* stream,
            Params... params) {
  launch_shared(op, kernel, blocks, threads, 0, stream, params...);
}

// how many blocks of `kernel` the current device runs at once, asked for once for each device; when emulated few, so
// that each has more work than one piece
template <typename... Params>
int resident_blocks(const char* op, void (*kernel)(Params...), int threads, int shared_bytes) {
#ifdef __CUDACC__
  static std::mutex mutex;
  static std::map<std::pair<void (*)(Params...), int>, int> known;
  int device = 0, processors = 0, each = 0;
  cudaError_t status = cudaGetDevice(&device);
  const std::lock_guard<std::mutex> lock(mutex);
  int& blocks = known[{kernel, device}];
  if (blocks > 0) return blocks;
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (status == cudaSuccess && shared_bytes > 48 * 1024)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (status == cudaSuccess)
    status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, shared_bytes);
  if (status != cudaSuccess) {
    cudaGetLastError();  // or the next launch would report it
    throw std::runtime_error(std::string(op) + ": the CUDA device could not be asked because " +
                             cudaGetErrorString(status));
  }
  return blocks = processors * each;
#else
  static_cast<void>(op), static_cast<void>(kernel), static_cast<void>(threads), static_cast<void>(shared_bytes);
  return 4;
#endif
}

}  // namespace mimfast
