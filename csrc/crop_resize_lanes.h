// The inner loops of crop_resize_cpu.cpp, which includes this file once for each instruction set, inside a namespace
// and with that set switched on; MIMFAST_LANES is how many fp32 it computes at once. Pixels come and go 16 at a time.

constexpr int kLanes = MIMFAST_LANES, kParts = 16 / kLanes;
using Floats = float __attribute__((vector_size(4 * kLanes)));
using Ints = int32_t __attribute__((vector_size(4 * kLanes)));

struct Sums {
  Floats part[kParts];
};

inline Floats spread(const uint8_t* from) {
#if MIMFAST_LANES == 16
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepu8_epi32(0xffff, bytes));
#elif MIMFAST_LANES == 8
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#elif defined(__SSE2__)
  int32_t word;
  std::memcpy(&word, from, sizeof(word));
  const __m128i zero = _mm_setzero_si128(), bytes = _mm_cvtsi32_si128(word);
  return _mm_cvtepi32_ps(_mm_unpacklo_epi16(_mm_unpacklo_epi8(bytes, zero), zero));
#else
  return Floats{float(from[0]), float(from[1]), float(from[2]), float(from[3])};
#endif
}

inline void add(Sums& sums, const uint8_t* pixels, float weight) {
  for (int p = 0; p < kParts; ++p) sums.part[p] += spread(pixels + p * kLanes) * weight;
}

// crop_pixel of 16 sums
inline void finish(const Sums& sums, uint8_t* to) {
  Ints value[kParts];
  for (int p = 0; p < kParts; ++p)
    value[p] = (__builtin_convertvector(sums.part[p], Ints) + (1 << (kCropBits - 1))) >> kCropBits;
#if MIMFAST_LANES == 16
  const __m512i positive = reinterpret_cast<__m512i>(value[0] > 0 ? value[0] : Ints{});
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_maskz_cvtusepi32_epi8(0xffff, positive));
#elif defined(__SSE2__)
#if MIMFAST_LANES == 8
  const __m256i low = reinterpret_cast<__m256i>(value[0]), high = reinterpret_cast<__m256i>(value[1]);
  const __m128i first = _mm_packs_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
  const __m128i second = _mm_packs_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
#else
  const __m128i* words = reinterpret_cast<const __m128i*>(value);
  const __m128i first = _mm_packs_epi32(words[0], words[1]), second = _mm_packs_epi32(words[2], words[3]);
#endif
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(first, second));
#else
  for (int l = 0; l < 16; ++l) to[l] = static_cast<uint8_t>(crop_limit(value[l / kLanes][l % kLanes], 0, 255));
#endif
}

// Along the rows, 16 of them at once: pixel (row r, colour c, column x) of `tile` is at (c * colour + x * column) * 16
// + r. Writes pixel (r, c, x) to out + c * plane + r * pitch + x; whole blocks of 16 x 16 of them.
inline void across(const uint8_t* tile, int64_t colour, int64_t column, const CropTable& table, int32_t size,
                   int64_t plane, int64_t pitch, uint8_t* out) {
  alignas(16) uint8_t found[3][16 * 16] = {};
  for (int32_t x0 = 0; x0 < size; x0 += 16) {
    const int32_t count = std::min(16, size - x0);
    for (int32_t i = 0; i < count; ++i) {
      const float* weights = table.weights.data() + (x0 + i) * table.most;
      const uint8_t* pixels = tile + table.first[static_cast<size_t>(x0 + i)] * column * 16;
      const int32_t taps = table.count[static_cast<size_t>(x0 + i)];
      Sums red = {}, green = {}, blue = {};
      for (int32_t k = 0; k < taps; ++k, pixels += column * 16) {
        add(red, pixels, weights[k]);
        add(green, pixels + colour * 16, weights[k]);
        add(blue, pixels + 2 * colour * 16, weights[k]);
      }
      finish(red, found[0] + 16 * i);
      finish(green, found[1] + 16 * i);
      finish(blue, found[2] + 16 * i);
    }
    for (int c = 0; c < 3; ++c) transpose16(found[c], 16, out + c * plane + x0, pitch);
  }
}

// down the columns of one plane [rows, pitch], to [size, size]
inline void down(const uint8_t* plane, int64_t pitch, const CropTable& table, int32_t size, uint8_t* out) {
  for (int32_t y = 0; y < size; ++y, out += size) {
    const float* weights = table.weights.data() + y * table.most;
    const uint8_t* rows = plane + table.first[static_cast<size_t>(y)] * pitch;
    const int32_t taps = table.count[static_cast<size_t>(y)];
    for (int32_t x = 0; x < size; x += 16) {
      Sums sums = {};
      for (int32_t k = 0; k < taps; ++k) add(sums, rows + k * pitch + x, weights[k]);
      if (x + 16 <= size) {
        finish(sums, out + x);
      } else {
        uint8_t last[16];
        finish(sums, last);
        std::memcpy(out + x, last, static_cast<size_t>(size - x));
      }
    }
  }
}
