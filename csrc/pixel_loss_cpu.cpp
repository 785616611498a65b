// Each hidden patch is read once into a buffer in the order of the prediction, which stays in the first cache; the loss
// of a row and its gradient come from one pass over it.
#include <array>
#include <cmath>
#include <vector>

#include "loss_tail_cpu.h"
#include "pixel_loss.h"

namespace mimfast {
namespace {

using namespace loss_tail;

// the value of every byte in every channel: one load is quicker than a conversion and a multiplication
using Table = std::array<std::array<float, 256>, 3>;

MIMFAST_INLINE float pixel(uint8_t x, const float* values) { return values[x]; }
MIMFAST_INLINE float pixel(float x, const float*) { return x; }

// the patch in the order of the prediction. SIDE and STEP are p and the distance of neighbours in x where known, 0
// where not; MAJOR is colour_major
template <bool MAJOR, int SIDE, int STEP, typename Pixel>
MIMFAST_INLINE void load(const PixelLoss& call, const Table& table, const Pixel* __restrict corner,
                         float* __restrict target) {
  const int64_t patch = SIDE != 0 ? SIDE : call.patch, step = STEP != 0 ? STEP : call.img_stride[3];
  const int64_t next = MAJOR ? 1 : 3, colour = MAJOR ? patch * patch : 1;  // distances in the target
  for (int64_t y = 0; y < patch; ++y, target += next * patch) {
    const Pixel* red = corner + y * call.img_stride[2];
    const Pixel *green = red + call.img_stride[1], *blue = green + call.img_stride[1];
    for (int64_t x = 0; x < patch; ++x) {
      target[next * x] = pixel(red[x * step], table[0].data());
      target[next * x + colour] = pixel(green[x * step], table[1].data());
      target[next * x + 2 * colour] = pixel(blue[x * step], table[2].data());
    }
  }
}

template <bool MAJOR, typename Pixel>
MIMFAST_INLINE void load_patch(const PixelLoss& call, const Table& table, int64_t b, int64_t token, float* target) {
  const int64_t y = token / call.grid_cols * call.patch, x = token % call.grid_cols * call.patch;
  const Pixel* corner =
      static_cast<const Pixel*>(call.img) + b * call.img_stride[0] + y * call.img_stride[2] + x * call.img_stride[3];
  if (call.img_stride[3] != 1)
    load<MAJOR, 0, 0>(call, table, corner, target);
  else if (call.patch == 16)
    load<MAJOR, 16, 1>(call, table, corner, target);
  else
    load<MAJOR, 0, 1>(call, table, corner, target);
}

// subtracts the mean and returns 1 / sqrt(var + eps); a second pass for the variance, so that a constant patch has none
MIMFAST_INLINE float centre(float* __restrict target, float* __restrict squares, int64_t n, float eps) {
  const float mean = sum(target, n) / static_cast<float>(n);
  for (int64_t i = 0; i < n; ++i) {
    const float centred = target[i] - mean;
    target[i] = centred;
    squares[i] = centred * centred;
  }
  return 1.0f / std::sqrt(sum(squares, n) / static_cast<float>(n - 1) + eps);
}

// rows [begin, end) of all B * R; the gradient of the loss with respect to f(d) of any value is `weight`
template <bool MAJOR, typename Pixel>
MIMFAST_INLINE void score_part(const PixelLoss& call, const Table& table, int64_t begin, int64_t end, float weight,
                               float* target, float* scratch, float* losses) {
  const LossRows& rows = call.rows;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t token = token_of(rows, i);
    if (token < 0) {
      losses[i] = 0.0f;
      zero_row(rows, i);
      continue;
    }
    load_patch<MAJOR, Pixel>(call, table, i / rows.rows, token, target);
    const float factor = call.norm ? centre(target, scratch, rows.values, call.eps) : 1.0f;
    score_row(rows, i, target, factor, weight, scratch);
    losses[i] = sum(scratch, rows.values);
  }
}

template <bool MAJOR>
MIMFAST_CLONES void score_rows(const PixelLoss& call, const Table& table, int64_t begin, int64_t end, float weight,
                               float* target, float* scratch, float* losses) {
  if (call.img_uint8)
    score_part<MAJOR, uint8_t>(call, table, begin, end, weight, target, scratch, losses);
  else
    score_part<MAJOR, float>(call, table, begin, end, weight, target, scratch, losses);
}

}  // namespace

void pixel_loss_cpu(const PixelLoss& call, int threads) {
  const LossRows& rows = call.rows;
  int64_t count = 0;
  for (int64_t i = 0; i < rows.batch * rows.rows; ++i) count += token_of(rows, i) >= 0 ? 1 : 0;
  Table table;
  for (size_t c = 0; c < 3; ++c)
    for (size_t x = 0; x < 256; ++x)
      table[c][x] = (static_cast<float>(x) / 255.0f - call.mean[c]) / call.std[c];  // as the reference does
  const int64_t total = rows.batch * rows.rows, grain = kValuesPerThread / rows.values + 1;
  score_all(rows, count * rows.values, total, grain, threads,
            [&](int64_t begin, int64_t end, float weight, float* losses) {
              std::vector<float> target(static_cast<size_t>(rows.values)), scratch(target.size());
              const auto score = call.colour_major ? score_rows<true> : score_rows<false>;
              score(call, table, begin, end, weight, target.data(), scratch.data(), losses);
            });
}

}  // namespace mimfast
