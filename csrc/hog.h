// hog: histograms of oriented gradients of 8-bit images; see mimfast/ops/hog.py for the rule and its sources.
//
// The arithmetic here is what CPU, CUDA and the loss share, and it gives the same bits everywhere, in any order:
// gradients are integers held in fp32 (|g| <= 1020), magnitudes are roots in fp32 cut to fixed point, histograms are
// sums of int32, a norm is the root of an exact int64, and no product is followed by a sum that a compiler could fuse
// inexactly.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __CUDACC__
#define HOG_BOTH __host__ __device__ __forceinline__
#else
#define HOG_BOTH inline
#endif

struct CUstream_st;

namespace mimfast {

constexpr int kHogBins = 9, kHogMaxWindow = 32;

// tangents of 20, 40, 60, 80 degrees; rounded to fp32 they still part all integer gradients right
// (tests/ops/test_hog.py)
constexpr float kHogTan1 = 0.36397023426620234f, kHogTan2 = 0.83909963117727993f, kHogTan3 = 1.7320508075688772f,
                kHogTan4 = 5.6712818196177066f;

// the images and the rule; h = height / cell, w = width / cell
struct HogImages {
  const uint8_t* img;  // [batch, 3, height, width], any strides
  int64_t stride[4];   // in elements
  int64_t batch;
  int32_t height, width, cell;  // height and width are multiples of cell, and at least 2
  float unit;                   // 2^k: magnitudes are kept in steps of 1 / unit; without a window
  int32_t window;               // 0, or side of the Gaussian window, tiled from the top left corner
  float weight[kHogMaxWindow];  // the magnitude at (y, x) is multiplied with weight[y % window] * weight[x % window]
  bool normalize;
  float factor[3];  // per colour, what the integer sums are multiplied with unless normalize
};

// Sums of magnitudes over a cell. A gradient has the level n = #{k = 1..4 : |gx| >= |gy| tan 20k}; its bin is n, or 8 -
// n where gx and gy have opposite signs. Sums from a level upwards need one test for each addend and no index.
struct HogSums {
  int32_t from[5] = {};     // level >= n
  int32_t opposed[4] = {};  // n <= level < 4 and opposite signs; at level 4 both signs give bin 4
};

// sqrt(x), correctly rounded, cut to an integer; x is u^2 times an integer up to 2 * 1020^2, u a power of two. On a GPU
// one step of Newton from the hardware's estimate, whose error is below 3 units in the last place: then the root is
// right for all these x (tests/ops/test_hog.py), in half the instructions of __fsqrt_rn; of 0 it is NaN, which converts
// to 0.
HOG_BOTH int32_t hog_size(float x, float weight) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  const float root = x * y;
  return __float2int_rz(__fmaf_rn(__fmaf_rn(-root, root, x), 0.5f * y, root) * weight);
#else
  return static_cast<int32_t>(std::sqrt(x) * weight);
#endif
}

// x += dx and y += dy where a >= b; for CUDA as predicated additions, which the compiler would make of more
// instructions
HOG_BOTH void hog_add_from(float a, float b, int32_t& x, int32_t dx, int32_t& y, int32_t dy) {
#ifdef __CUDA_ARCH__
  asm("{\n\t.reg .pred p;\n\tsetp.ge.f32 p, %2, %3;\n\t@p add.s32 %0, %0, %4;\n\t@p add.s32 %1, %1, %5;\n\t}"
      : "+r"(x), "+r"(y)
      : "f"(a), "f"(b), "r"(dx), "r"(dy));
#else
  if (a >= b) x += dx, y += dy;
#endif
}

// one pixel; its magnitude is multiplied with `weight`, and gx and gy may both be multiplied with a power of two before
HOG_BOTH void hog_add(HogSums& sums, float gx, float gy, float weight) {
  const int32_t size = hog_size(gx * gx + gy * gy, weight);
  const float across = std::fabs(gx), along = std::fabs(gy);
  const bool level4 = across >= along * kHogTan4;
  const int32_t opposed = gx * gy < 0.0f && !level4 ? size : 0;
  sums.from[0] += size;
  sums.opposed[0] += opposed;
  hog_add_from(across, along * kHogTan1, sums.from[1], size, sums.opposed[1], opposed);
  hog_add_from(across, along * kHogTan2, sums.from[2], size, sums.opposed[2], opposed);
  hog_add_from(across, along * kHogTan3, sums.from[3], size, sums.opposed[3], opposed);
  if (level4) sums.from[4] += size;
}

// the histogram from its sums
HOG_BOTH void hog_histogram(const HogSums& sums, int32_t bins[kHogBins]) {
  for (int n = 0; n < 4; ++n) {
    const int32_t opposed = sums.opposed[n] - (n < 3 ? sums.opposed[n + 1] : 0);
    bins[n] = sums.from[n] - sums.from[n + 1] - opposed;
    bins[8 - n] = opposed;
  }
  bins[4] = sums.from[4];
}

// what the integers of a cell and colour are multiplied with: 1 / norm, or the constant of the raw sums
HOG_BOTH float hog_factor(const HogImages& in, int c, const int32_t bins[kHogBins]) {
  if (!in.normalize) return in.factor[c];
  int64_t squares = 0;
  for (int k = 0; k < kHogBins; ++k) squares += int64_t{bins[k]} * bins[k];
  if (squares == 0) return 1.0f;  // a flat cell stays zero
#ifdef __CUDA_ARCH__
  return __frcp_rn(__fsqrt_rn(__ll2float_rn(squares)));
#else
  return 1.0f / std::sqrt(static_cast<float>(squares));
#endif
}

HOG_BOTH void hog_finish(const HogImages& in, int c, const HogSums& sums, float values[kHogBins]) {
  int32_t bins[kHogBins];
  hog_histogram(sums, bins);
  const float factor = hog_factor(in, c, bins);
  for (int k = 0; k < kHogBins; ++k) values[k] = static_cast<float>(bins[k]) * factor;
}

// bits of a finite value as bfloat16, to nearest, ties to even
HOG_BOTH uint16_t hog_bfloat16(float x) {
#ifdef __CUDA_ARCH__
  const uint32_t bits = __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
#endif
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// index of a pixel beyond the border by one: mirrored without repeating the edge
HOG_BOTH int32_t hog_reflect(int32_t i, int32_t size) { return i < 0 ? -i : i < size ? i : 2 * size - 2 - i; }

// A pixel x as the float unit * (2^15 + x), made of its bits without a conversion: `base` is unit * 2^15. The 2^15
// cancels in every difference, and all sums are exact.
HOG_BOTH float hog_pixel(uint32_t base, uint32_t x) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(base | x << 8);
#else
  const uint32_t bits = base | x << 8;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
#endif
}

// byte kByte of four pixels likewise
template <int kByte>
HOG_BOTH float hog_pixel_of(uint32_t base, uint32_t word) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(__byte_perm(word, base, 0x7604 | kByte << 4));  // bytes 0, x, and the upper two of base
#else
  return hog_pixel(base, word >> 8 * kByte & 255u);
#endif
}

// One row of a cell: pixels x0 - 1 .. x0 + 8. kWords: rows of planes are dense and begin at multiples of 8 bytes.
template <bool kWords>
HOG_BOTH void hog_load(const HogImages& in, uint32_t base, const uint8_t* plane, int32_t y, int32_t x0, float row[10]) {
  const uint8_t* line = plane + hog_reflect(y, in.height) * in.stride[2];
  const int64_t step = kWords ? 1 : in.stride[3];
  row[0] = hog_pixel(base, line[hog_reflect(x0 - 1, in.width) * step]);
  row[9] = hog_pixel(base, line[hog_reflect(x0 + 8, in.width) * step]);
  if constexpr (kWords) {
#ifdef __CUDA_ARCH__
    const uint2 words = __ldg(reinterpret_cast<const uint2*>(line + x0));
    const uint32_t low = words.x, high = words.y;
#else
    uint32_t low, high;
    std::memcpy(&low, line + x0, sizeof(low));
    std::memcpy(&high, line + x0 + 4, sizeof(high));
#endif
    row[1] = hog_pixel_of<0>(base, low), row[2] = hog_pixel_of<1>(base, low);
    row[3] = hog_pixel_of<2>(base, low), row[4] = hog_pixel_of<3>(base, low);
    row[5] = hog_pixel_of<0>(base, high), row[6] = hog_pixel_of<1>(base, high);
    row[7] = hog_pixel_of<2>(base, high), row[8] = hog_pixel_of<3>(base, high);
  } else {
    for (int x = 0; x < 8; ++x) row[1 + x] = hog_pixel(base, line[(x0 + x) * step]);
  }
}

// The nine values of cell (i, j) of colour c of image b, in.cell = 8, by one thread walking down its rows.
template <bool kWords, bool kWindow>
HOG_BOTH void hog_cell(const HogImages& in, int64_t b, int c, int32_t i, int32_t j, float values[kHogBins]) {
  const uint8_t* plane = in.img + b * in.stride[0] + c * in.stride[1];
  const int32_t y0 = i * 8, x0 = j * 8;
  const float scale = 32768.0f * (kWindow ? 1.0f : in.unit);
  uint32_t base;
  std::memcpy(&base, &scale, sizeof(base));
  // d = left - right and s = left + 2 middle + right of a row; gx = d above + 2 d + d below, gy = s above - s below
  float gx_part[8], d_last[8], s_above[8], s_last[8], row[10];
  hog_load<kWords>(in, base, plane, y0 - 1, x0, row);
  for (int x = 0; x < 8; ++x) {
    gx_part[x] = row[x] - row[x + 2];
    s_above[x] = row[x] + 2.0f * row[x + 1] + row[x + 2];
  }
  hog_load<kWords>(in, base, plane, y0, x0, row);
  for (int x = 0; x < 8; ++x) {
    d_last[x] = row[x] - row[x + 2];
    gx_part[x] += 2.0f * d_last[x];
    s_last[x] = row[x] + 2.0f * row[x + 1] + row[x + 2];
  }
  HogSums sums;
  float weight_x[8];
  if constexpr (kWindow)
    for (int x = 0; x < 8; ++x) weight_x[x] = in.weight[(x0 + x) % in.window];
#ifdef __CUDA_ARCH__
#pragma unroll 2
#endif
  for (int y = 0; y < 8; ++y) {
    hog_load<kWords>(in, base, plane, y0 + y + 1, x0, row);
    const float weight_y = kWindow ? in.weight[(y0 + y) % in.window] : 1.0f;
    for (int x = 0; x < 8; ++x) {
      const float d = row[x] - row[x + 2], s = row[x] + 2.0f * row[x + 1] + row[x + 2];
      hog_add(sums, gx_part[x] + d, s_above[x] - s, kWindow ? weight_y * weight_x[x] : 1.0f);
      gx_part[x] = d_last[x] + 2.0f * d;
      d_last[x] = d;
      s_above[x] = s_last[x];
      s_last[x] = s;
    }
  }
  hog_finish(in, c, sums, values);
}

// The same for a cell of any side, with or without a window: pixel by pixel, about twice the work.
HOG_BOTH void hog_cell_any(const HogImages& in, int64_t b, int c, int32_t i, int32_t j, float values[kHogBins]) {
  const uint8_t* plane = in.img + b * in.stride[0] + c * in.stride[1];
  HogSums sums;
  for (int32_t y = i * in.cell; y < (i + 1) * in.cell; ++y) {
    const uint8_t* above = plane + hog_reflect(y - 1, in.height) * in.stride[2];
    const uint8_t* middle = plane + y * in.stride[2];
    const uint8_t* below = plane + hog_reflect(y + 1, in.height) * in.stride[2];
    for (int32_t x = j * in.cell; x < (j + 1) * in.cell; ++x) {
      const int64_t left = hog_reflect(x - 1, in.width) * in.stride[3], centre = x * in.stride[3],
                    right = hog_reflect(x + 1, in.width) * in.stride[3];
      const int gx = above[left] + 2 * middle[left] + below[left] - above[right] - 2 * middle[right] - below[right];
      const int gy = above[left] + 2 * above[centre] + above[right] - below[left] - 2 * below[centre] - below[right];
      const float weight = in.window > 0 ? in.weight[y % in.window] * in.weight[x % in.window] : in.unit;
      hog_add(sums, static_cast<float>(gx), static_cast<float>(gy), weight);
    }
  }
  hog_finish(in, c, sums, values);
}

// The values of whole rows of cells on the CPU, vectorised over the cells; one object for each thread.
class HogRows {
 public:
  explicit HogRows(const HogImages& in);
  HogRows(const HogRows&) = delete;
  HogRows& operator=(const HogRows&) = delete;
  int32_t pitch() const { return pitch_; }
  // [27, pitch] values of cells (i, 0..w-1) of image b, entry k = 9 colour + bin; kept until the next call
  const float* row(int64_t b, int32_t i);

 private:
  HogImages in_;
  int32_t pitch_;
  std::vector<float> memory_;
  float *pixels_, *values_, *weight_x_, *weight_y_;  // in memory_
};

// for tests: use instruction sets of at most so many bits, 128, 256 or 512
void hog_simd_bits(int bits);

// where the values go: R rows of u x u cells (tokens) for each image
struct Hog {
  HogImages in;
  int32_t side;          // u, cells across a token; 1 for the dense output
  int64_t rows;          // R: all h * w / u^2 tokens, or as many as indices
  const int64_t* index;  // [batch, R] tokens in row-major order, one outside gives zeros; or null: all
  bool dense;            // out is [batch, 27, h, w], else [batch, R, 27 u^2] with entry (k u + dy) u + dx
  bool out_bf16;         // else float32
  void* out;             // contiguous, fully written
};

void hog_cpu(const Hog& call, int threads);
void hog_cuda(const Hog& call, CUstream_st* stream);

}  // namespace mimfast
