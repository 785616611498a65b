#include "device.cuh"
#include "noop.h"

namespace mimfast {
namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = 4;

// One thread copies four floats, a block apart so that every load and store of a warp is one 128-byte line.
// registers 16, shared memory 0; floor = 8 n bytes / HBM bandwidth
__global__ void __launch_bounds__(kThreads) noop_kernel(const float* x, float* y, int64_t n) {
  const int64_t first = int64_t{blockIdx.x} * kThreads * kPerThread + threadIdx.x;
  for (int item = 0; item < kPerThread; ++item) {
    const int64_t i = first + item * kThreads;
    if (i < n) y[i] = x[i];
  }
}

}  // namespace

void noop_cuda(const float* x, float* y, int64_t n, CUstream_st* stream) {
  constexpr int64_t kPerBlock = kThreads * kPerThread;
  launch("noop", noop_kernel, (n + kPerBlock - 1) / kPerBlock, kThreads, stream, x, y, n);
}

}  // namespace mimfast
