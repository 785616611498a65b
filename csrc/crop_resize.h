// crop_resize: boxes of 8-bit images resampled with antialias to squares of 8-bit pixels; see
// mimfast/ops/crop_resize.py for the rule.
//
// Every implementation gives the same bits, in any order of sums. Positions are integers: of the distance between
// source pixel j and the centre of output pixel x only the numerator is kept, over 2 max(in, out). Weights are integers
// in steps of 2^-15 that add up to exactly 1, the differences of rounded running sums; products with pixels and their
// sums stay below 2^24, so that fp32 holds them exactly. No product is followed by a sum of floating-point numbers that
// a compiler could fuse.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define CROP_BOTH __host__ __device__ __forceinline__
#else
#define CROP_BOTH inline
#endif

struct CUstream_st;

namespace mimfast {

constexpr int kCropBits = 15;            // of a weight
constexpr int32_t kCropMaxSide = 65536;  // of an image or the result: cubes of positions fit into 64 bits

struct CropResize {
  const uint8_t* img;      // one shape: [batch, 3, height, width], any strides; packed: `bytes` bytes
  int64_t stride[4];       // in elements; not read when packed
  int32_t height, width;   // not read when packed
  int64_t bytes;           // of the packed buffer
  const int64_t* offsets;  // null, or [batch]: where in the buffer an image (height, width, 3) begins
  const int32_t* shapes;   // null, or [batch, 2]: its height and width
  int64_t batch;
  const int32_t* boxes;  // [batch, 4] top, left, height, width
  const bool* flip;      // null, or [batch]
  int32_t size;
  bool bicubic;
  uint8_t* out;  // [batch, 3, size, size] dense
};

// the part of an image that is resampled; `at` is null where a packed image is not inside its buffer
struct CropSource {
  const uint8_t* at;
  int64_t colour, row, column;  // strides
  int32_t height, width;
};

CROP_BOTH int32_t crop_limit(int32_t x, int32_t low, int32_t high) { return x < low ? low : x > high ? high : x; }

CROP_BOTH CropSource crop_source(const CropResize& call, int64_t b) {
  CropSource s = {call.img, call.stride[1], call.stride[2], call.stride[3], call.height, call.width};
  int64_t from = 0;
  if (call.offsets != nullptr) {
    from = call.offsets[b];
    s.height = call.shapes[2 * b];
    s.width = call.shapes[2 * b + 1];
    s.colour = 1;
    s.row = int64_t{3} * s.width;
    s.column = 3;
    const bool fits = s.height >= 1 && s.width >= 1 && s.height <= kCropMaxSide && s.width <= kCropMaxSide;
    if (!fits || from < 0 || from > call.bytes - s.height * s.row) return {nullptr, 0, 0, 0, 0, 0};
  } else {
    from = b * call.stride[0];
  }
  const int32_t* box = call.boxes + 4 * b;
  const int32_t top = crop_limit(box[0], 0, s.height - 1), left = crop_limit(box[1], 0, s.width - 1);
  s.height = crop_limit(box[2], 1, s.height - top);
  s.width = crop_limit(box[3], 1, s.width - left);
  s.at += from + top * s.row + left * s.column;
  return s;
}

// one side of a box, `in` pixels resampled to `out`; numerators are over `whole` = 2 max(in, out)
struct CropSide {
  int64_t in, out, whole, reach;  // the filter is 0 at `reach` and beyond
  double unit;                    // from the integer values of the filter to shares of 2^40
  bool bicubic;
};

CROP_BOTH CropSide crop_side(int32_t in, int32_t out, bool bicubic) {
  const int64_t whole = int64_t{2} * (in > out ? in : out);
  const double one = static_cast<double>(bicubic ? 2 * whole * whole * whole : whole);
  return {in, out, whole, bicubic ? 2 * whole : whole, 1099511627776.0 / one, bicubic};
}

// the source pixels of output pixel x are first .. end - 1
CROP_BOTH int32_t crop_first(const CropSide& s, int64_t x) {
  const int64_t at = (2 * x + 1) * s.in - s.reach - s.out;
  return static_cast<int32_t>(at < 0 ? 0 : at / (2 * s.out) + 1);
}
CROP_BOTH int32_t crop_end(const CropSide& s, int64_t x) {
  const int64_t at = ((2 * x + 1) * s.in + s.reach - s.out + 2 * s.out - 1) / (2 * s.out);
  return static_cast<int32_t>(at < s.in ? at : s.in);
}
CROP_BOTH int64_t crop_most(const CropSide& s) {
  const int64_t most = s.reach / s.out + 1;
  return most < s.in ? most : s.in;
}

// the filter at source pixel j, in steps of 2^-40, 0 outside its reach; bicubic: Keys' with a = -1/2, times 2 whole^3
CROP_BOTH int64_t crop_share(const CropSide& s, int64_t x, int64_t j) {
  const int64_t difference = (2 * j + 1) * s.out - (2 * x + 1) * s.in, n = difference < 0 ? -difference : difference;
  const int64_t d = s.whole;
  if (n >= s.reach) return 0;
  const int64_t value = !s.bicubic ? d - n
                        : n < d    ? n * n * (3 * n - 5 * d) + 2 * d * d * d
                                   : n * n * (5 * d - n) - 8 * n * d * d + 4 * d * d * d;
  return static_cast<int64_t>(static_cast<double>(value) * s.unit);
}

// where a running sum of the filter stands, in steps of a weight; `per` is 2 << kCropBits over the sum of all
CROP_BOTH int64_t crop_upto(int64_t sum, double per) {
  return (static_cast<int64_t>(static_cast<double>(sum) * per) + 1) >> 1;
}

// The weights of output pixel x for first, first + 1, ..., one after the other.
struct CropWeights {
  double per;
  int64_t sum, before;

  CROP_BOTH CropWeights(const CropSide& s, int64_t x) : per(0), sum(0), before(0) {
    int64_t total = 0;
#ifdef __CUDACC__
#pragma unroll 1
#endif
    for (int32_t j = crop_first(s, x), end = crop_end(s, x); j < end; ++j) total += crop_share(s, x, j);
    per = (2 << kCropBits) / static_cast<double>(total);
  }
  CROP_BOTH void restart() { sum = before = 0; }
  CROP_BOTH float next(const CropSide& s, int64_t x, int64_t j) {
    sum += crop_share(s, x, j);
    const int64_t upto = crop_upto(sum, per), weight = upto - before;
    before = upto;
    return static_cast<float>(weight);
  }
};

// the pixel of a sum of weights times pixels
CROP_BOTH uint8_t crop_pixel(float sum) {
  const int32_t value = (static_cast<int32_t>(sum) + (1 << (kCropBits - 1))) >> kCropBits;
  return static_cast<uint8_t>(crop_limit(value, 0, 255));
}

void crop_resize_cpu(const CropResize& call, int threads);
void crop_resize_cuda(const CropResize& call, CUstream_st* stream);

// for tests: the widest vectors crop_resize_cpu may use, in bits; 512 at the start
void crop_resize_simd_bits(int bits);

}  // namespace mimfast
