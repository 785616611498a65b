#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "parallel.h"
#include "patch_gather.h"

namespace mimfast {
namespace {

constexpr int64_t kValuesPerThread = 1 << 18;  // about 0.1 ms of work, several times the cost of a thread

// What one thread works with: a row goes through `pixels`, in its final order but as the image has it, so that the
// arithmetic runs over contiguous values whatever the strides are.
template <typename In>
struct Scratch {
  std::vector<In> pixels;        // [D]
  std::vector<float> mean, std;  // [D], by the channel of each value

  explicit Scratch(const PatchGather& call) {
    const size_t area = static_cast<size_t>(call.patch) * call.patch;
    pixels.resize(3 * area);
    if (!std::is_same<In, uint8_t>::value) return;
    for (size_t d = 0; d < 3 * area; ++d) {
      mean.push_back(call.mean[call.channels_last ? d % 3 : d / area]);
      std.push_back(call.std[call.channels_last ? d % 3 : d / area]);
    }
  }
};

template <typename In, typename Out>
void convert(const Scratch<In>& scratch, Out* __restrict to) {
  const In* __restrict from = scratch.pixels.data();
  const size_t count = scratch.pixels.size();
  if constexpr (std::is_same<In, uint8_t>::value) {
    const float* __restrict mean = scratch.mean.data(), * __restrict std = scratch.std.data();
    for (size_t d = 0; d < count; ++d) to[d] = narrow<Out>(normalize(from[d], mean[d], std[d]));
  } else {
    for (size_t d = 0; d < count; ++d) to[d] = narrow<Out>(widen(from[d]));
  }
}

struct Strides {
  int64_t c, y, x;
};

// the pixels of a patch in the order of its row; SIDE is the patch where it is known when this is compiled, else 0
template <int SIDE, typename In>
void collect(const PatchGather& call, const In* corner, const Strides& stride, In* to) {
  const int64_t patch = SIDE != 0 ? SIDE : call.patch;
  if (call.channels_last) {
    for (int64_t y = 0; y < patch; ++y, to += 3 * patch) {
      const In* line = corner + y * stride.y;
      if (stride.x == 3 && stride.c == 1)
        std::memcpy(to, line, static_cast<size_t>(3 * patch) * sizeof(In));
      else
        for (int64_t x = 0; x < patch; ++x)
          for (int64_t c = 0; c < 3; ++c) to[3 * x + c] = line[x * stride.x + c * stride.c];
    }
    return;
  }
  for (int64_t c = 0; c < 3; ++c) {
    for (int64_t y = 0; y < patch; ++y, to += patch) {
      const In* line = corner + c * stride.c + y * stride.y;
      if (stride.x == 1)
        std::memcpy(to, line, static_cast<size_t>(patch) * sizeof(In));
      else
        for (int64_t x = 0; x < patch; ++x) to[x] = line[x * stride.x];
    }
  }
}

template <typename In, typename Out>
void write_row(const PatchGather& call, const In* corner, const Strides& stride, Scratch<In>& scratch, Out* to) {
  In* pixels = scratch.pixels.data();
  if constexpr (std::is_same<In, Out>::value) pixels = to;
  call.patch == 16 ? collect<16>(call, corner, stride, pixels) : collect<0>(call, corner, stride, pixels);
  if constexpr (!std::is_same<In, Out>::value) convert(scratch, to);
}

// the rows [first, last) of image b, or of none when b is outside the batch
template <typename In, typename Out>
void image_rows(const PatchGather& call, int64_t b, int64_t first, int64_t last, Scratch<In>& scratch) {
  const int64_t tokens = int64_t{call.grid_rows} * call.grid_cols, patch = call.patch, width = 3 * patch * patch;
  Out* to = static_cast<Out*>(call.out) + first * width;
  const bool known = b >= 0 && b < call.batch, flipped = known && call.flip != nullptr && call.flip[b];
  const Strides stride{call.stride[1], call.stride[2], flipped ? -call.stride[3] : call.stride[3]};
  for (int64_t r = first; r < last; ++r, to += width) {
    const int64_t token = call.keep != nullptr ? call.keep[r] : r % tokens;
    if (!known || token < 0 || token >= tokens) {
      std::memset(static_cast<void*>(to), 0, static_cast<size_t>(width) * sizeof(Out));
      continue;
    }
    const int64_t left = token % call.grid_cols * patch, y = token / call.grid_cols * patch;
    const int64_t x = flipped ? call.grid_cols * patch - 1 - left : left;
    const In* corner = static_cast<const In*>(call.img) + b * call.stride[0] + y * stride.y + x * call.stride[3];
    write_row(call, corner, stride, scratch, to);
  }
}

template <typename In, typename Out>
void rows_of(const PatchGather& call, int64_t begin, int64_t end) {
  Scratch<In> scratch(call);
  const int64_t each = call.cu_seqlens == nullptr ? call.rows / call.batch : 0;
  for (int64_t r = begin; r < end;) {
    int64_t b, next;
    if (call.cu_seqlens == nullptr) {
      b = r / each;
      next = (b + 1) * each;
    } else {  // the last image that starts at or before the row, as the reference searches
      const int32_t* bounds = call.cu_seqlens;
      b = std::upper_bound(bounds, bounds + call.batch + 1, r) - bounds - 1;
      next = b < call.batch ? bounds[b + 1] : end;
    }
    next = std::min(std::max(next, r + 1), end);  // bounds that do not ascend still come to an end
    image_rows<In, Out>(call, b, r, next, scratch);
    r = next;
  }
}

template <typename In, typename Out>
void run(const PatchGather& call, int threads) {
  const int64_t width = int64_t{3} * call.patch * call.patch;
  parallel_for(call.rows, kValuesPerThread / width + 1, threads,
               [&call](int64_t begin, int64_t end) { rows_of<In, Out>(call, begin, end); });
}

template <typename In>
void run_from(const PatchGather& call, int threads) {
  switch (call.out_type) {
    case PixelType::kBfloat16:
      return run<In, Bfloat16>(call, threads);
    case PixelType::kFloat16:
      return run<In, Float16>(call, threads);
    default:
      return run<In, float>(call, threads);
  }
}

}  // namespace

void patch_gather_cpu(const PatchGather& call, int threads) {
  if (call.rows == 0) return;
  switch (call.img_type) {
    case PixelType::kUint8:
      return run_from<uint8_t>(call, threads);
    case PixelType::kBfloat16:
      return run_from<Bfloat16>(call, threads);
    case PixelType::kFloat16:
      return run_from<Float16>(call, threads);
    case PixelType::kFloat32:
      return run_from<float>(call, threads);
  }
}

}  // namespace mimfast
