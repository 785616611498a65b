#include "local_norm.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "device.cuh"

namespace mimfast {
namespace {

constexpr int64_t kUnits = 4096;  // warps that fill a large GPU; fewer planes are cut into bands of rows
constexpr int kLeastRows = 32;    // of a band: before its first row it reads 2 radius others

// differences of sums modulo 2^32 are right as long as a box fits; doubles lose nothing that fp32 would show
template <typename Pixel>
using Sum = std::conditional_t<std::is_same<Pixel, uint8_t>::value, uint32_t, double>;

__device__ __forceinline__ int32_t less(int32_t a, int32_t b) { return a < b ? a : b; }
__device__ __forceinline__ int32_t more(int32_t a, int32_t b) { return a > b ? a : b; }

__device__ __forceinline__ float spread(int32_t n, uint32_t sum, uint32_t squares) {
  return static_cast<float>(int64_t{n} * squares - int64_t{sum} * sum);
}
__device__ __forceinline__ float spread(int32_t n, double sum, double squares) {
  const double exact = n * squares - sum * sum;
  return static_cast<float>(exact > 0.0 ? exact : 0.0);
}
__device__ __forceinline__ float centred(int32_t n, uint8_t pixel, uint32_t sum) {
  return static_cast<float>(n * pixel - static_cast<int32_t>(sum));
}
__device__ __forceinline__ float centred(int32_t n, float pixel, double sum) {
  return static_cast<float>(n * static_cast<double>(pixel) - sum);
}

// One warp takes rows of one plane from the top down, lane by lane its columns: sums over the rows of the box are kept
// in shared memory, a scan along the row turns them into running sums, of which a box is a difference. registers: see
// bench/aot_native.json, no spills; floor: reads each pixel twice (once from L2), writes 4 bytes
template <bool kUint8, int kWidth>
__global__ void __launch_bounds__(32 * 1024 / kWidth) local_norm_kernel(LocalNorm call, int64_t bands, int32_t rows) {
  using Pixel = std::conditional_t<kUint8, uint8_t, float>;
  constexpr int kWarps = 1024 / kWidth;
  __shared__ Sum<Pixel> shared_column[kWarps][2][kWidth], shared_run[kWarps][2][kWidth + 1];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t unit = int64_t{blockIdx.x} * kWarps + warp;
  if (unit >= 3 * call.batch * bands) return;
  const int64_t b = unit / bands / 3, c = unit / bands % 3;
  const int32_t width = call.width, height = call.height, radius = call.radius;
  const int32_t first = static_cast<int32_t>(unit % bands) * rows, end = less(first + rows, height);
  const Pixel* plane = static_cast<const Pixel*>(call.img) + b * call.stride[0] + c * call.stride[1];
  const float floor = c == 0 ? call.floor[0] : c == 1 ? call.floor[1] : call.floor[2];  // an index would copy them all
  float* out = call.out + unit / bands * height * width;
  Sum<Pixel>*column = shared_column[warp][0], *squares = shared_column[warp][1];
  Sum<Pixel>*run = shared_run[warp][0], *run_squares = shared_run[warp][1];
  if (lane == 0) run[0] = run_squares[0] = 0;
  for (int32_t x = lane; x < width; x += 32) {  // a lane touches no column of another
    const Pixel* pixel = plane + x * call.stride[3];
    Sum<Pixel> total = 0, total_squares = 0;
    for (int32_t y = more(first - radius, 0); y < less(first + radius, height); ++y) {
      const Sum<Pixel> value = static_cast<Sum<Pixel>>(pixel[y * call.stride[2]]);
      total += value;
      total_squares += value * value;
    }
    column[x] = total;
    squares[x] = total_squares;
  }
  for (int32_t y = first; y < end; ++y) {
    const int32_t box_rows = less(y + radius, height - 1) - more(y - radius, 0) + 1;
    Sum<Pixel> before = 0, before_squares = 0;  // sums of the columns to the left
    for (int32_t x0 = 0; x0 < width; x0 += 32) {
      const int32_t x = x0 + lane;
      Sum<Pixel> total = 0, total_squares = 0;
      if (x < width) {
        const Pixel* pixel = plane + x * call.stride[3];
        total = column[x], total_squares = squares[x];
        if (y + radius < height) {
          const Sum<Pixel> value = static_cast<Sum<Pixel>>(pixel[(y + radius) * call.stride[2]]);
          total += value, total_squares += value * value;
        }
        if (y > first && y > radius) {
          const Sum<Pixel> value = static_cast<Sum<Pixel>>(pixel[(y - radius - 1) * call.stride[2]]);
          total -= value, total_squares -= value * value;
        }
        column[x] = total, squares[x] = total_squares;
      }
      for (int by = 1; by < 32; by *= 2) {
        const Sum<Pixel> other = __shfl_up_sync(kAllLanes, total, by);
        const Sum<Pixel> other_squares = __shfl_up_sync(kAllLanes, total_squares, by);
        if (lane >= by) total += other, total_squares += other_squares;
      }
      total += before, total_squares += before_squares;
      if (x < width) run[x + 1] = total, run_squares[x + 1] = total_squares;
      before = __shfl_sync(kAllLanes, total, 31);
      before_squares = __shfl_sync(kAllLanes, total_squares, 31);
    }
    __syncwarp();
    for (int32_t x = lane; x < width; x += 32) {
      const int32_t left = more(x - radius, 0), right = less(x + radius + 1, width), n = box_rows * (right - left);
      const Sum<Pixel> sum = run[right] - run[left];
      const float size = static_cast<float>(n), unbias = n > 1 ? size / (size - 1.0f) : 0.0f;
      const float top = centred(n, plane[y * call.stride[2] + x * call.stride[3]], sum);
      const float kept = spread(n, sum, run_squares[right] - run_squares[left]);
      out[int64_t{y} * width + x] = top / std::sqrt(kept * unbias + floor * size * size);
    }
    __syncwarp();  // the running sums may be written again
  }
}

template <bool kUint8, int kWidth>
void start(const LocalNorm& call, CUstream_st* stream) {
  constexpr int64_t kWarps = 1024 / kWidth;
  const int64_t planes = 3 * call.batch, most = (call.height + kLeastRows - 1) / kLeastRows;
  const int64_t wanted = std::min(most, std::max<int64_t>(1, kUnits / std::max<int64_t>(planes, 1)));
  const int32_t rows = static_cast<int32_t>((call.height + wanted - 1) / wanted);
  const int64_t bands = (call.height + rows - 1) / rows;
  launch("local_norm", local_norm_kernel<kUint8, kWidth>, (planes * bands + kWarps - 1) / kWarps, 32 * kWarps, stream,
         call, bands, rows);
}

}  // namespace

void local_norm_cuda(const LocalNorm& call, CUstream_st* stream) {
  const bool narrow = call.width <= 256;
  if (call.img_uint8)
    narrow ? start<true, 256>(call, stream) : start<true, kLocalNormMaxWidthCuda>(call, stream);
  else
    narrow ? start<false, 256>(call, stream) : start<false, kLocalNormMaxWidthCuda>(call, stream);
}

}  // namespace mimfast
