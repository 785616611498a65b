// Vectorised over the cells of a row: their pixels are spread so that pixel p of all cells lies side by side, as
// floats, and then a lane walks over its cell with nine sums in registers. No sum crosses lanes, and any side of a cell
// and any strides of the image take the same loops.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "hog.h"
#include "parallel.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace mimfast {
namespace {

#define MIMFAST_LANES_FILE "hog_lanes.h"
#include "each_lanes.h"

constexpr int32_t kMostLanes = 16;
constexpr int64_t kPixelsPerThread = 1 << 17;  // about 0.1 ms of work, several times the cost of a thread

struct Loops {
  decltype(&base::describe_row) describe;
  decltype(&base::spread8) spread8;
};

// the widest instruction set of this machine that has at most `bits` bits
Loops loops(int bits) {
#ifdef MIMFAST_X86
  if (lanes_here() >= 16 && bits >= 512) return {avx512::describe_row, avx512::spread8};
  if (lanes_here() >= 8 && bits >= 256) return {avx2::describe_row, avx2::spread8};
#endif
  static_cast<void>(bits);
  return {base::describe_row, base::spread8};
}

int simd_bits = 512;

void to_bfloat16(const float* from, int64_t n, uint16_t* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = hog_bfloat16(from[i]);
}

}  // namespace

void hog_simd_bits(int bits) { simd_bits = bits; }

// memory: pixels [cell + 2, cell, pitch] with one cell before the first, values [27, pitch], weights [cell, pitch] by
// phase and cell, weights [cell] by row
HogRows::HogRows(const HogImages& in)
    : in_(in), pitch_((in.width / in.cell + kMostLanes - 1) / kMostLanes * kMostLanes + kMostLanes) {
  const int64_t cell = in.cell, pitch = pitch_;
  memory_.assign(static_cast<size_t>(((cell + 2) * cell + 27 + cell) * pitch + cell + 2 * kMostLanes), 0.0f);
  const uintptr_t address = reinterpret_cast<uintptr_t>(memory_.data() + 1);
  constexpr uintptr_t kLine = 64;
  pixels_ = memory_.data() + 1 + (kLine - address % kLine) % kLine / sizeof(float);
  values_ = pixels_ + (cell + 2) * cell * pitch;
  weight_x_ = values_ + 27 * pitch;
  weight_y_ = weight_x_ + cell * pitch;
  if (in.window > 0)
    for (int32_t x = 0; x < in.width; ++x) weight_x_[x % cell * pitch + x / cell] = in.weight[x % in.window];
}

const float* HogRows::row(int64_t b, int32_t i) {
  const Loops run = loops(simd_bits);
  const int32_t cell = in_.cell, cells = in_.width / cell;
  const int64_t pitch = pitch_, step = in_.stride[3];
  if (in_.window > 0)
    for (int32_t y = 0; y < cell; ++y) weight_y_[y] = in_.weight[(i * cell + y) % in_.window];
  for (int c = 0; c < 3; ++c) {
    const uint8_t* plane = in_.img + b * in_.stride[0] + c * in_.stride[1];
    for (int32_t y = 0; y < cell + 2; ++y) {
      const uint8_t* line = plane + hog_reflect(i * cell + y - 1, in_.height) * in_.stride[2];
      float* phases = pixels_ + y * cell * pitch;
      if (cell == 8 && step == 1) {
        run.spread8(line, cells, pitch, phases);
      } else {
        for (int32_t l = 0; l < cells; ++l)
          for (int32_t p = 0; p < cell; ++p) phases[p * pitch + l] = line[(l * cell + p) * step];
      }
      phases[(cell - 1) * pitch - 1] = line[hog_reflect(-1, in_.width) * step];
      phases[cells] = line[hog_reflect(in_.width, in_.width) * step];
    }
    run.describe(in_, c, pixels_, pitch, weight_y_, weight_x_, values_ + 9 * c * pitch);
  }
  return values_;
}

namespace {

// Writes the values of rows of cells to their tokens. One for each thread.
template <typename Out>
class Tokens {
 public:
  explicit Tokens(const Hog& call)
      : call_(call),
        rows_(call.in),
        across_(call.in.width / call.in.cell / call.side),
        first_(static_cast<size_t>(call.in.height / call.in.cell / call.side)),
        next_(call.index != nullptr ? static_cast<size_t>(call.rows) : 0) {}

  // row t of the tokens of image b
  void write(int64_t b, int32_t t) {
    if (call_.index != nullptr && b != image_) sort(b);
    if (call_.index != nullptr && first_[t] < 0) return;
    for (int32_t dy = 0; dy < call_.side; ++dy) {
      const float* values = rows_.row(b, t * call_.side + dy);
      if (call_.index == nullptr) {
        for (int32_t x = 0; x < across_; ++x) write_token(b * call_.rows + t * across_ + x, x, dy, values);
      } else {
        for (int64_t m = first_[t]; m >= 0; m = next_[m])
          write_token(b * call_.rows + m, static_cast<int32_t>(call_.index[b * call_.rows + m] % across_), dy, values);
      }
    }
  }

  // rows of indices outside the image
  void write_zeros(int64_t b) {
    const int64_t width = int64_t{27} * call_.side * call_.side;
    for (int64_t m = b * call_.rows; m < (b + 1) * call_.rows; ++m)
      if (!inside(call_.index[m])) std::memset(out() + m * width, 0, static_cast<size_t>(width) * sizeof(Out));
  }

 private:
  Out* out() const { return static_cast<Out*>(call_.out); }
  bool inside(int64_t token) const { return token >= 0 && token < across_ * static_cast<int64_t>(first_.size()); }

  // lists of the wanted rows by row of tokens
  void sort(int64_t b) {
    image_ = b;
    std::fill(first_.begin(), first_.end(), -1);
    for (int64_t m = call_.rows - 1; m >= 0; --m) {
      const int64_t token = call_.index[b * call_.rows + m];
      if (!inside(token)) continue;
      next_[m] = first_[token / across_];
      first_[token / across_] = m;
    }
  }

  void write_token(int64_t row, int32_t x, int32_t dy, const float* values) {
    const int64_t side = call_.side;
    Out* to = out() + (row * 27 * side + dy) * side;
    values += x * side;
    for (int k = 0; k < 27; ++k, to += side * side, values += rows_.pitch()) copy(values, side, to);
  }

  static void copy(const float* from, int64_t n, float* to) {
    for (int64_t i = 0; i < n; ++i) to[i] = from[i];
  }
  static void copy(const float* from, int64_t n, uint16_t* to) { to_bfloat16(from, n, to); }

  const Hog& call_;
  HogRows rows_;
  int32_t across_;
  std::vector<int64_t> first_, next_;
  int64_t image_ = -1;
};

void write_dense(const Hog& call, HogRows& rows, int64_t b, int32_t i) {
  const int64_t w = call.in.width / call.in.cell, h = call.in.height / call.in.cell;
  const float* values = rows.row(b, i);
  for (int64_t k = 0; k < 27; ++k, values += rows.pitch()) {
    const int64_t at = ((b * 27 + k) * h + i) * w;
    if (call.out_bf16)
      to_bfloat16(values, w, static_cast<uint16_t*>(call.out) + at);
    else
      std::memcpy(static_cast<float*>(call.out) + at, values, static_cast<size_t>(w) * sizeof(float));
  }
}

template <typename Out>
void write_tokens(const Hog& call, int64_t begin, int64_t end, int32_t down) {
  Tokens<Out> tokens(call);
  for (int64_t n = begin; n < end; ++n) {
    if (call.index != nullptr && n % down == 0) tokens.write_zeros(n / down);
    tokens.write(n / down, static_cast<int32_t>(n % down));
  }
}

}  // namespace

void hog_cpu(const Hog& call, int threads) {
  const int32_t side = call.dense ? 1 : call.side, down = call.in.height / call.in.cell / side;
  const int64_t pixels = int64_t{3} * call.in.width * call.in.cell * side;
  parallel_for(call.in.batch * down, kPixelsPerThread / pixels + 1, threads, [&](int64_t begin, int64_t end) {
    if (!call.dense)
      return call.out_bf16 ? write_tokens<uint16_t>(call, begin, end, down)
                           : write_tokens<float>(call, begin, end, down);
    HogRows rows(call.in);
    for (int64_t n = begin; n < end; ++n) write_dense(call, rows, n / down, static_cast<int32_t>(n % down));
  });
}

}  // namespace mimfast
