// Down a plane the sums over the rows of the box are kept for each column: a row enters, a row leaves. Their running
// sum along the row then gives every box by one subtraction. Only that running sum is not vector code.
#include "local_norm.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "clones.h"
#include "parallel.h"

namespace mimfast {
namespace {

constexpr int64_t kPixelsPerThread = 1 << 15;  // about 0.05 ms of work, several times the cost of a thread

// differences of sums modulo 2^32 are right as long as a box fits; doubles lose nothing that fp32 would show
template <typename Pixel>
using Sum = std::conditional_t<std::is_same_v<Pixel, uint8_t>, uint32_t, double>;

template <typename Pixel>
struct Scratch {
  std::vector<Sum<Pixel>> column, column_squares;  // [width], sums over the rows of the box
  std::vector<Sum<Pixel>> run, run_squares;  // [width + 2 radius + 1], entry j: sum of the columns before j - radius
  std::vector<int32_t> count;                // [width], n
  std::vector<float> unbias, floor;          // [width], n / (n - 1); eps (n / scale)^2
  std::vector<Pixel> in, out, own;           // [width], rows of an image whose pixels are not neighbours in memory

  explicit Scratch(const LocalNorm& call)
      : column(static_cast<size_t>(call.width)),
        column_squares(column.size()),
        run(static_cast<size_t>(call.width + 2 * call.radius + 1)),
        run_squares(run.size()),
        count(column.size()),
        unbias(column.size()),
        floor(column.size()),
        in(column.size()),
        out(column.size()),
        own(column.size()) {}
};

template <typename Pixel>
MIMFAST_INLINE const Pixel* row_of(const LocalNorm& call, const Pixel* plane, int32_t y, std::vector<Pixel>& copy) {
  const Pixel* row = plane + y * call.stride[2];
  if (call.stride[3] == 1) return row;
  for (int64_t x = 0; x < call.width; ++x) copy[static_cast<size_t>(x)] = row[x * call.stride[3]];
  return copy.data();
}

template <bool ENTERS, typename Pixel>
MIMFAST_INLINE void update(const Pixel* __restrict row, int64_t n, Sum<Pixel>* __restrict column,
                           Sum<Pixel>* __restrict squares) {
  for (int64_t x = 0; x < n; ++x) {
    const Sum<Pixel> value = static_cast<Sum<Pixel>>(row[x]);
    column[x] += ENTERS ? value : -value;
    squares[x] += ENTERS ? value * value : -(value * value);
  }
}

template <typename Pixel>
MIMFAST_INLINE void add_up(const LocalNorm& call, Scratch<Pixel>& scratch) {
  const int64_t n = call.width, radius = call.radius;
  Sum<Pixel>*run = scratch.run.data() + radius + 1, *squares = scratch.run_squares.data() + radius + 1;
  Sum<Pixel> total = 0, total_squares = 0;
  for (int64_t x = 0; x < n; ++x) {
    run[x] = total += scratch.column[static_cast<size_t>(x)];
    squares[x] = total_squares += scratch.column_squares[static_cast<size_t>(x)];
  }
  std::fill(run + n, run + n + radius, total);
  std::fill(squares + n, squares + n + radius, total_squares);
}

template <typename Pixel>
MIMFAST_INLINE void count_pixels(const LocalNorm& call, int32_t rows, float floor, Scratch<Pixel>& scratch) {
  for (int32_t x = 0; x < call.width; ++x) {
    const int32_t columns = std::min(x + call.radius, call.width - 1) - std::max(x - call.radius, 0) + 1;
    const float n = static_cast<float>(rows) * static_cast<float>(columns);
    const size_t at = static_cast<size_t>(x);
    scratch.count[at] = rows * columns;
    scratch.unbias[at] = n > 1.0f ? n / (n - 1.0f) : 0.0f;  // a box of one pixel has no variance
    scratch.floor[at] = floor * n * n;
  }
}

template <typename Pixel>
MIMFAST_INLINE void standardise(const Pixel* __restrict row, const Scratch<Pixel>& scratch, int64_t n, int64_t box,
                                float* __restrict out) {
  const Sum<Pixel>*run = scratch.run.data(), *squares = scratch.run_squares.data();
  const int32_t* count = scratch.count.data();
  const float *unbias = scratch.unbias.data(), *floor = scratch.floor.data();
  for (int64_t x = 0; x < n; ++x) {
    const double sum = static_cast<double>(run[x + box] - run[x]);
    const double square = static_cast<double>(squares[x + box] - squares[x]);
    const double spread = static_cast<double>(count[x]) * square - sum * sum;  // exact for uint8: below 2^53
    const double centred = static_cast<double>(count[x]) * static_cast<double>(row[x]) - sum;
    const float kept = static_cast<float>(spread > 0.0 ? spread : 0.0);
    out[x] = static_cast<float>(centred) / std::sqrt(kept * unbias[x] + floor[x]);
  }
}

template <typename Pixel>
MIMFAST_CLONES void norm_planes(const LocalNorm& call, int64_t begin, int64_t end, Scratch<Pixel>& scratch) {
  const int64_t width = call.width;
  const int32_t radius = call.radius, height = call.height;
  for (int64_t i = begin; i < end; ++i) {
    const Pixel* plane = static_cast<const Pixel*>(call.img) + i / 3 * call.stride[0] + i % 3 * call.stride[1];
    Sum<Pixel>*column = scratch.column.data(), *squares = scratch.column_squares.data();
    std::fill(column, column + width, Sum<Pixel>{0});
    std::fill(squares, squares + width, Sum<Pixel>{0});
    int32_t rows = 0, before = -1;  // in the box, and when the counts were made
    for (int32_t y = 0; y < std::min(radius, height); ++y, ++rows)
      update<true>(row_of(call, plane, y, scratch.in), width, column, squares);
    for (int32_t y = 0; y < height; ++y) {
      if (y + radius < height) {
        update<true>(row_of(call, plane, y + radius, scratch.in), width, column, squares);
        ++rows;
      }
      if (y > radius) {
        update<false>(row_of(call, plane, y - radius - 1, scratch.out), width, column, squares);
        --rows;
      }
      if (rows != before) count_pixels(call, rows, call.floor[i % 3], scratch);
      before = rows;
      add_up(call, scratch);
      standardise(row_of(call, plane, y, scratch.own), scratch, width, 2 * int64_t{radius} + 1,
                  call.out + (i * height + y) * width);
    }
  }
}

template <typename Pixel>
void norm_all(const LocalNorm& call, int threads) {
  const int64_t pixels = int64_t{call.height} * call.width;
  parallel_for(3 * call.batch, kPixelsPerThread / pixels + 1, threads, [&](int64_t begin, int64_t end) {
    Scratch<Pixel> scratch(call);
    norm_planes<Pixel>(call, begin, end, scratch);
  });
}

}  // namespace

void local_norm_cpu(const LocalNorm& call, int threads) {
  if (call.img_uint8)
    norm_all<uint8_t>(call, threads);
  else
    norm_all<float>(call, threads);
}

}  // namespace mimfast
