// The inner loops of hog_cpu.cpp, see each_lanes.h. A lane is a cell.

constexpr int kLanes = MIMFAST_LANES;
using Floats = float __attribute__((vector_size(4 * kLanes)));
using Ints = int32_t __attribute__((vector_size(4 * kLanes)));
using Wide = int64_t __attribute__((vector_size(8 * kLanes)));
using LooseFloats = float __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline Floats load(const float* from) { return *reinterpret_cast<const LooseFloats*>(from); }
inline void store(float* to, Floats x) { *reinterpret_cast<LooseFloats*>(to) = x; }

inline Floats root(Floats x) {
#if MIMFAST_LANES == 16
  return _mm512_maskz_sqrt_ps(0xffff, x);  // plain _mm512_sqrt_ps sets off a warning in GCC's own header
#elif MIMFAST_LANES == 8
  return _mm256_sqrt_ps(x);
#elif defined(__SSE2__)
  return _mm_sqrt_ps(x);
#else
  for (int l = 0; l < kLanes; ++l) x[l] = std::sqrt(x[l]);
  return x;
#endif
}

inline Floats size_of(Floats x) { return reinterpret_cast<Floats>(reinterpret_cast<Ints>(x) & 0x7fffffff); }

// sum += x where the mask is set; each form is the one that becomes the fewest instructions
inline void add(Ints& sum, Ints x, Ints where) {
#if MIMFAST_LANES == 16
  sum = where ? sum + x : sum;
#else
  sum += x & where;
#endif
}

// one row of 8-pixel cells, dense, to floats: pixel p of cell l goes to phases[p * pitch + l]
inline void spread8(const uint8_t* line, int32_t cells, int64_t pitch, float* __restrict phases) {
  const uint32_t* words = reinterpret_cast<const uint32_t*>(line);
  for (int32_t l = 0; l < cells; ++l) {
    uint32_t low, high;
    std::memcpy(&low, words + 2 * l, sizeof(low));
    std::memcpy(&high, words + 2 * l + 1, sizeof(high));
    for (int p = 0; p < 4; ++p) {
      phases[p * pitch + l] = static_cast<float>(static_cast<int32_t>(low >> 8 * p & 255u));
      phases[(4 + p) * pitch + l] = static_cast<float>(static_cast<int32_t>(high >> 8 * p & 255u));
    }
  }
}

// The nine values of kLanes cells; `pixels` points to pixel (-1, 0) of the first in [cell + 2, cell, pitch], and the
// pixels before and after a row of a cell are those of its neighbours.
template <bool kWindow>
inline void describe(const HogImages& in, int c, const float* pixels, int64_t pitch, const float* weight_y,
                     const float* weight_x, float* values) {
  const int64_t cell = in.cell, line = cell * pitch;
  Ints from0 = {}, from1 = {}, from2 = {}, from3 = {}, from4 = {}, opposed0 = {}, opposed1 = {}, opposed2 = {},
       opposed3 = {};
  for (int64_t p = 0; p < cell; ++p) {
    const float* middle = pixels + p * pitch;
    const float* left = p > 0 ? middle - pitch : pixels + (cell - 1) * pitch - 1;
    const float* right = p + 1 < cell ? middle + pitch : pixels + 1;
    Floats d = load(left) - load(right), s_above = load(left) + load(right) + 2.0f * load(middle);
    Floats gx_part = d;
    left += line, middle += line, right += line;
    d = load(left) - load(right);
    gx_part += 2.0f * d;
    Floats s_last = load(left) + load(right) + 2.0f * load(middle);
    for (int64_t y = 0; y < cell; ++y) {
      left += line, middle += line, right += line;
      const Floats d_below = load(left) - load(right), s_below = load(left) + load(right) + 2.0f * load(middle);
      const Floats gx = gx_part + d_below, gy = s_above - s_below;
      gx_part = d + 2.0f * d_below;
      d = d_below;
      s_above = s_last;
      s_last = s_below;
      // as hog_add of hog.h
      Floats scale = in.unit - Floats{};
      if constexpr (kWindow) scale = weight_y[y] * load(weight_x + p * pitch);
      const Ints size = __builtin_convertvector(root(gx * gx + gy * gy) * scale, Ints);
      const Floats across = size_of(gx), along = size_of(gy);
      const Ints level4 = across >= along * kHogTan4;
      const Ints opposed = (gx * gy < 0.0f) & ~level4 ? size : 0;
      from0 += size;
      opposed0 += opposed;
      const Ints level1 = across >= along * kHogTan1;
      add(from1, size, level1);
      add(opposed1, opposed, level1);
      const Ints level2 = across >= along * kHogTan2;
      add(from2, size, level2);
      add(opposed2, opposed, level2);
      const Ints level3 = across >= along * kHogTan3;
      add(from3, size, level3);
      add(opposed3, opposed, level3);
      add(from4, size, level4);
    }
  }
  const Ints opposed[4] = {opposed0 - opposed1, opposed1 - opposed2, opposed2 - opposed3, opposed3};
  const Ints bins[kHogBins] = {from0 - from1 - opposed[0],
                               from1 - from2 - opposed[1],
                               from2 - from3 - opposed[2],
                               from3 - from4 - opposed[3],
                               from4,
                               opposed[3],
                               opposed[2],
                               opposed[1],
                               opposed[0]};
  Floats factor = in.factor[c] - Floats{};
  if (in.normalize) {
    Wide squares = {};
    for (const Ints h : bins) squares += __builtin_convertvector(h, Wide) * __builtin_convertvector(h, Wide);
    const Floats norm = root(__builtin_convertvector(squares, Floats));
    factor = 1.0f / (norm > 1.0f ? norm : 1.0f);  // of integers: below 1 only where all are 0
  }
  for (int k = 0; k < kHogBins; ++k) store(values + k * pitch, __builtin_convertvector(bins[k], Floats) * factor);
}

void describe_row(const HogImages& in, int c, const float* pixels, int64_t pitch, const float* weight_y,
                  const float* weight_x, float* values) {
  for (int32_t l = 0; l < in.width / in.cell; l += kLanes) {
    if (in.window > 0)
      describe<true>(in, c, pixels + l, pitch, weight_y, weight_x + l, values + l);
    else
      describe<false>(in, c, pixels + l, pitch, nullptr, nullptr, values + l);
  }
}
