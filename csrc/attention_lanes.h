// Small matrix products, transposes and exponentials on vectors of MIMFAST_LANES floats, the parts of attention on a
// CPU; for files that each_lanes.h includes. Scores are kept transposed, one row of kBlock queries per key, so that
// maxima and sums over keys are sums of vectors.

#define MIMFAST_LANE_FN MIMFAST_TARGET __attribute__((always_inline)) inline

using Vec = float __attribute__((vector_size(MIMFAST_LANES * sizeof(float))));
using Loose = float __attribute__((vector_size(MIMFAST_LANES * sizeof(float)), aligned(alignof(float)), may_alias));
using Ints = int32_t __attribute__((vector_size(MIMFAST_LANES * sizeof(float))));
using Bits = uint32_t __attribute__((vector_size(MIMFAST_LANES * sizeof(float))));

constexpr int kLanes = MIMFAST_LANES;
constexpr int kBlock = 64;                     // queries of one block of scores, and the pitch of its rows
constexpr int kWidest = kLanes == 16 ? 4 : 2;  // vectors side by side in one tile of a product

// rows of a tile: sums, one row of b and one value of a stay in 32 registers, or 16
constexpr int tile_rows(int vecs) { return kLanes == 16 ? (vecs <= 2 ? 12 : 24 / vecs) : 12 / vecs; }

MIMFAST_LANE_FN Vec load(const float* from) { return *reinterpret_cast<const Loose*>(from); }
MIMFAST_LANE_FN void store(float* to, Vec x) { *reinterpret_cast<Loose*>(to) = x; }
MIMFAST_LANE_FN Vec all(float x) { return x - Vec{}; }

// c[i, :] (+)= sum over k of a[i * AM + k * AK] * b[k, :], ROWS rows of VECS vectors; a step of 0 stands for `pitch`,
// which is then also the pitch of b and c, else they have kBlock
template <int AM, int AK, int ROWS, int VECS>
MIMFAST_TARGET void tile(const float* a, const float* b, float* c, int64_t pitch, int64_t depth, bool add) {
  const int64_t am = AM != 0 ? AM : pitch, ak = AK, step = AM != 0 ? pitch : kBlock;
  Vec sums[ROWS][VECS];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) sums[i][v] = add ? load(c + i * step + v * kLanes) : Vec{};
  for (int64_t k = 0; k < depth; ++k) {
    Vec row[VECS];
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) row[v] = load(b + k * step + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const Vec x = all(a[i * am + k * ak]);
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v) sums[i][v] += x * row[v];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) store(c + i * step + v * kLanes, sums[i][v]);
}

template <int AM, int AK, int VECS, int ROWS>
MIMFAST_TARGET void pick_tile(int rows, const float* a, const float* b, float* c, int64_t pitch, int64_t depth,
                              bool add) {
  if (rows == ROWS)
    tile<AM, AK, ROWS, VECS>(a, b, c, pitch, depth, add);
  else if constexpr (ROWS > 1)
    pick_tile<AM, AK, VECS, ROWS - 1>(rows, a, b, c, pitch, depth, add);
}

// `rows` rows in tiles of nearly equal height, because a low tile waits for its own sums
template <int AM, int AK, int VECS>
MIMFAST_TARGET void panel(const float* a, const float* b, float* c, int64_t pitch, int64_t rows, int64_t depth,
                          bool add) {
  constexpr int kRows = tile_rows(VECS);
  const int64_t tiles = (rows + kRows - 1) / kRows, am = AM != 0 ? AM : pitch, step = AM != 0 ? pitch : kBlock;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t first = rows * t / tiles, count = rows * (t + 1) / tiles - first;
    pick_tile<AM, AK, VECS, kRows>(static_cast<int>(count), a + first * am, b, c + first * step, pitch, depth, add);
  }
}

template <int AM, int AK>
MIMFAST_TARGET void multiply(const float* a, const float* b, float* c, int64_t pitch, int64_t rows, int64_t vecs,
                             int64_t depth, bool add) {
  const int64_t panels = (vecs + kWidest - 1) / kWidest;
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t first = vecs * p / panels, count = vecs * (p + 1) / panels - first;
    const float* from = b + first * kLanes;
    float* to = c + first * kLanes;
    if constexpr (kWidest == 4) {
      if (count == 4) {
        panel<AM, AK, 4>(a, from, to, pitch, rows, depth, add);
        continue;
      }
      if (count == 3) {
        panel<AM, AK, 3>(a, from, to, pitch, rows, depth, add);
        continue;
      }
    }
    if (count == 2)
      panel<AM, AK, 2>(a, from, to, pitch, rows, depth, add);
    else
      panel<AM, AK, 1>(a, from, to, pitch, rows, depth, add);
  }
}

// scores[key, query] = sum over c of a[key, c] * turned[c, query]; `pitch` of a, a multiple of kLanes
MIMFAST_LANE_FN void scores_of(const float* a, const float* turned, float* scores, int64_t pitch, int64_t keys,
                               int64_t vecs) {
  multiply<0, 1>(a, turned, scores, pitch, keys, vecs, pitch, false);
}

// out[key, :] (+)= sum over queries of scores[key, query] * b[query, :]
MIMFAST_LANE_FN void over_queries(const float* scores, const float* b, float* out, int64_t pitch, int64_t keys,
                                  int64_t queries, bool add) {
  multiply<kBlock, 1>(scores, b, out, pitch, keys, pitch / kLanes, queries, add);
}

// out[query, :] = sum over keys of scores[key, query] * b[key, :]
MIMFAST_LANE_FN void over_keys(const float* scores, const float* b, float* out, int64_t pitch, int64_t queries,
                               int64_t keys) {
  multiply<1, kBlock>(scores, b, out, pitch, queries, pitch / kLanes, keys, false);
}

#if defined(__clang__)
#define MIMFAST_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MIMFAST_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Ints{__VA_ARGS__})
#endif

// exchanges bit STEP of the number of a row with that of a lane
template <int STEP, int... LANE>
MIMFAST_LANE_FN void exchange(Vec& low, Vec& high, std::integer_sequence<int, LANE...>) {
  const Vec a = low, b = high;
  low = MIMFAST_SHUFFLE(a, b, ((LANE & STEP) != 0 ? kLanes + LANE - STEP : LANE)...);
  high = MIMFAST_SHUFFLE(a, b, ((LANE & STEP) != 0 ? kLanes + LANE : LANE + STEP)...);
}

template <int STEP>
MIMFAST_LANE_FN void exchange_all(Vec (&rows)[kLanes]) {
  if constexpr (STEP < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      if ((i & STEP) == 0) exchange<STEP>(rows[i], rows[i + STEP], std::make_integer_sequence<int, kLanes>{});
    exchange_all<2 * STEP>(rows);
  }
}

#undef MIMFAST_SHUFFLE

// turned[c, i] = from[i, c] for `vecs` * kLanes rows i and `pitch` columns c; turned has rows of kBlock
MIMFAST_TARGET inline void turn(const float* from, float* turned, int64_t pitch, int64_t vecs) {
  for (int64_t v = 0; v < vecs; ++v)
    for (int64_t c = 0; c < pitch; c += kLanes) {
      Vec rows[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) rows[i] = load(from + (v * kLanes + i) * pitch + c);
      exchange_all<1>(rows);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(turned + (c + i) * kBlock + v * kLanes, rows[i]);
    }
}

MIMFAST_LANE_FN Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// 2^x for x <= 0, to about one unit in the last place; 0 below 2^-126
MIMFAST_LANE_FN Vec exp2_of(Vec x) {
  const Vec shifted = x + 12582912.0f;  // 1.5 * 2^23: the sum is rounded to a whole number
  const Vec f = x - (shifted - 12582912.0f);
  Vec p = 1.53457993e-4f * f + 1.33999309e-3f;
  p = p * f + 9.61848907e-3f;
  p = p * f + 5.55032864e-2f;
  p = p * f + 0.240226462f;
  p = p * f + 0.693147182f;
  p = p * f + 1.0f;
  const Bits power = (reinterpret_cast<Bits>(shifted) << 23) + 0x3f800000u;  // what is above the whole number falls off
  return x < -126.0f ? Vec{} : p * reinterpret_cast<Vec>(power);             // a product, so that NaN stays NaN
}
