// The inner loops of crop_resize and crop_gather, see each_lanes.h. Pixels come and go 16 at a time.

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

// a / b, from the inverse of b where a product and a sum can be rounded as one: twice corrected by the remainder, which
// gives the last bit too, but for extreme numbers
inline Floats quotient(Floats a, Floats b, [[maybe_unused]] Floats inverse_b) {
#if MIMFAST_LANES == 4
  return a / b;
#else
  Floats q = a * inverse_b;
  for (int round = 0; round < 2; ++round) {
#if MIMFAST_LANES == 16
    q = _mm512_fmadd_ps(_mm512_fnmadd_ps(b, q, a), inverse_b, q);
#else
    q = _mm256_fmadd_ps(_mm256_fnmadd_ps(b, q, a), inverse_b, q);
#endif
  }
  return q;
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

// Along the rows, 16 of them at once, outputs x0 .. x0 + count - 1 of the table: pixel (row r, colour c, output x0 + i)
// goes to out[i * step + c * colour + r].
inline void across(const Tile& tile, const Table& table, int64_t x0, int64_t count, int64_t step, int64_t colour,
                   uint8_t* out) {
  for (int64_t x = x0; x < x0 + count; ++x, out += step) {
    const float* weights = table.weights.data() + x * table.most;
    const uint8_t* pixels = tile.at + (table.first_of(x) - tile.left) * tile.column * 16;
    const int32_t taps = table.count[static_cast<size_t>(x)];
    Sums red = {}, green = {}, blue = {};
    for (int32_t k = 0; k < taps; ++k, pixels += tile.column * 16) {
      add(red, pixels, weights[k]);
      add(green, pixels + tile.colour * 16, weights[k]);
      add(blue, pixels + 2 * tile.colour * 16, weights[k]);
    }
    finish(red, out);
    finish(green, out + colour);
    finish(blue, out + 2 * colour);
  }
}

// Down the columns, outputs y0 .. y0 + count - 1 of the table, `width` pixels of each. `rows` begins with row `top` of
// the box, and its rows are `pitch` apart, a multiple of 16 pixels.
inline void down(const uint8_t* rows, int64_t pitch, int32_t top, const Table& table, int64_t y0, int64_t count,
                 int64_t width, uint8_t* out) {
  for (int64_t y = y0; y < y0 + count; ++y, out += width) {
    const float* weights = table.weights.data() + y * table.most;
    const uint8_t* from = rows + (table.first_of(y) - top) * pitch;
    const int32_t taps = table.count[static_cast<size_t>(y)];
    for (int64_t x = 0; x < width; x += 16) {
      Sums sums = {};
      for (int32_t k = 0; k < taps; ++k) add(sums, from + k * pitch + x, weights[k]);
      if (x + 16 <= width) {
        finish(sums, out + x);
      } else {
        uint8_t last[16];
        finish(sums, last);
        std::memcpy(out + x, last, static_cast<size_t>(width - x));
      }
    }
  }
}

// Normalises pixels from[i] with mean[i] and std[i] = 1 / inverse[i], whole vectors of them; says how many.
inline int64_t normalize(const uint8_t* from, int64_t n, const float* mean, const float* std, const float* inverse,
                         float* to) {
  using Loose = float __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Floats m = *reinterpret_cast<const Loose*>(mean + i), s = *reinterpret_cast<const Loose*>(std + i);
    const Floats per = *reinterpret_cast<const Loose*>(inverse + i);
    const Floats unit = quotient(spread(from + i), Floats{} + 255.0f, Floats{} + 1.0f / 255.0f);
    *reinterpret_cast<Loose*>(to + i) = quotient(unit - m, s, per);
  }
  return i;
}
