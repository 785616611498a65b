// 16 rows of a box are turned on their side, so that the same pixel of all of them lies side by side, and filtered
// along the row with one weight for 16 pixels; turned back, the filter down the columns has its 16 pixels side by side
// as they are. Neither needs a shuffle inside its sums. Threads take whole images.
#include "crop_resize.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "parallel.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MIMFAST_X86 1
#endif

namespace mimfast {
namespace {

// where the source pixels of each output pixel begin, how many there are, and their weights, `most` apart
struct CropTable {
  int64_t most = 0;
  std::vector<int32_t> first, count;
  std::vector<float> weights;

  void fill(const CropSide& side, bool mirrored) {
    const int32_t out = static_cast<int32_t>(side.out);
    most = crop_most(side);
    first.resize(static_cast<size_t>(out));
    count.resize(static_cast<size_t>(out));
    weights.resize(static_cast<size_t>(out * most));
    for (int32_t i = 0; i < out; ++i) {
      const int32_t x = mirrored ? out - 1 - i : i, begin = crop_first(side, x), n = crop_end(side, x) - begin;
      CropWeights run(side, x);
      for (int32_t k = 0; k < n; ++k) weights[static_cast<size_t>(i * most + k)] = run.next(side, x, begin + k);
      first[static_cast<size_t>(i)] = begin;
      count[static_cast<size_t>(i)] = n;
    }
  }
};

// to[j * to_pitch + i] = from[i * from_pitch + j] for i and j below 16
inline void transpose16(const uint8_t* const (&from)[16], uint8_t* to, int64_t to_pitch) {
#if defined(__SSE2__)
  __m128i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from[i]));
  for (int round = 0; round < 4; ++round) {  // each interleaves row i with row i + 8
    for (int i = 0; i < 8; ++i) {
      b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 8]);
      b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 8]);
    }
    std::copy(b, b + 16, a);
  }
  for (int i = 0; i < 16; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * to_pitch), a[i]);
#else
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) to[j * to_pitch + i] = from[i][j];
#endif
}

inline void transpose16(const uint8_t* from, int64_t from_pitch, uint8_t* to, int64_t to_pitch) {
  const uint8_t* rows[16];
  for (int i = 0; i < 16; ++i) rows[i] = from + i * from_pitch;
  transpose16(rows, to, to_pitch);
}

namespace base {
#define MIMFAST_LANES 4
#include "crop_resize_lanes.h"
#undef MIMFAST_LANES
}  // namespace base

#ifdef MIMFAST_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define MIMFAST_LANES 8
#include "crop_resize_lanes.h"
#undef MIMFAST_LANES
}  // namespace avx2
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
namespace avx512 {
#define MIMFAST_LANES 16
#include "crop_resize_lanes.h"
#undef MIMFAST_LANES
}  // namespace avx512
#pragma GCC pop_options
#endif

struct Loops {
  decltype(&base::across) across;
  decltype(&base::down) down;
};

// the widest instruction set of this machine that has at most `bits` bits
Loops loops(int bits) {
#ifdef MIMFAST_X86
  __builtin_cpu_init();
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (wide && bits >= 512) return {avx512::across, avx512::down};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && bits >= 256) return {avx2::across, avx2::down};
#endif
  static_cast<void>(bits);
  return {base::across, base::down};
}

int simd_bits = 512;

// `n` bytes of 16 rows, each turned into a column of `to`: byte i of row r goes to to[16 * i + r]. Reads no byte more.
void turn(const uint8_t* const (&rows)[16], int64_t n, uint8_t* to) {
  const uint8_t* part[16];
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    for (int r = 0; r < 16; ++r) part[r] = rows[r] + i;
    transpose16(part, to + 16 * i, 16);
  }
  for (; i < n; ++i)
    for (int r = 0; r < 16; ++r) to[16 * i + r] = rows[r][i];
}

// One for each thread: memory that grows to the largest box it has seen.
class Cropper {
 public:
  explicit Cropper(const CropResize& call) : call_(call), run_(loops(simd_bits)) {}

  void crop(int64_t b) {
    const int64_t size = call_.size, pitch = (size + 15) / 16 * 16;
    uint8_t* out = call_.out + b * 3 * size * size;
    const CropSource source = crop_source(call_, b);
    if (source.at == nullptr) {
      std::memset(out, 0, static_cast<size_t>(3 * size * size));
      return;
    }
    wide_.fill(crop_side(source.width, call_.size, call_.bicubic), call_.flip != nullptr && call_.flip[b]);
    tall_.fill(crop_side(source.height, call_.size, call_.bicubic), false);
    const bool mixed = source.colour == 1 && source.column == 3;
    const int64_t colour = mixed ? 1 : source.width, column = mixed ? 3 : 1;
    const int64_t plane = (source.height + 15) / 16 * 16 * pitch;
    tile_.resize(static_cast<size_t>(48 * int64_t{source.width}));
    rows_.resize(static_cast<size_t>(3 * plane));
    for (int32_t y = 0; y < source.height; y += 16) {
      gather(source, y, mixed);
      run_.across(tile_.data(), colour, column, wide_, call_.size, plane, pitch, rows_.data() + y * pitch);
    }
    for (int c = 0; c < 3; ++c) run_.down(rows_.data() + c * plane, pitch, tall_, call_.size, out + c * size * size);
  }

 private:
  // rows y .. y + 15 of the box; below its last row that one again
  void gather(const CropSource& source, int32_t y, bool mixed) {
    const uint8_t* rows[16];
    for (int r = 0; r < 16; ++r) rows[r] = source.at + std::min(y + r, source.height - 1) * source.row;
    if (mixed) return turn(rows, 3 * int64_t{source.width}, tile_.data());
    for (int c = 0; c < 3; ++c) {
      uint8_t* to = tile_.data() + c * 16 * int64_t{source.width};
      if (source.column == 1) {
        turn(rows, source.width, to);
      } else {
        for (int32_t x = 0; x < source.width; ++x)
          for (int r = 0; r < 16; ++r) to[16 * int64_t{x} + r] = rows[r][x * source.column];
      }
      for (int r = 0; r < 16; ++r) rows[r] += source.colour;
    }
  }

  const CropResize& call_;
  const Loops run_;
  CropTable wide_, tall_;
  std::vector<uint8_t> tile_, rows_;  // 16 rows on their side; all rows, filtered across
};

}  // namespace

void crop_resize_simd_bits(int bits) { simd_bits = bits; }

void crop_resize_cpu(const CropResize& call, int threads) {
  parallel_for(call.batch, 1, threads, [&](int64_t begin, int64_t end) {
    Cropper cropper(call);
    for (int64_t b = begin; b < end; ++b) cropper.crop(b);
  });
}

}  // namespace mimfast
