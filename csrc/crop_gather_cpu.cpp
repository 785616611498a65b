// The kept patches of one column of patches are made together: the source rows that any of them needs are listed, each
// once, and filtered across for these columns alone, 16 of the list at a time; then each patch is filtered down from
// its part of the list. So both filters always have 16 pixels to work on, whichever patches are kept, and compute no
// pixel of a hidden patch. A pixel has 256 values, so its normalisation is a table. Threads take whole images.
#include "crop_gather.h"

#include <type_traits>

#include "crop_resize_cpu.h"
#include "parallel.h"

namespace mimfast {
namespace {

// a kept patch: its place in the grid, its row of the result, and where its source rows begin in the list
struct Kept {
  int32_t column, row;
  int64_t to, listed;

  bool operator<(const Kept& other) const { return column != other.column ? column < other.column : row < other.row; }
};

// One for each thread: memory that grows to the largest box it has seen.
template <typename Out>
class Gatherer {
 public:
  explicit Gatherer(const CropGather& call)
      : call_(call),
        run_(crop::loops()),
        patch_(call.patch),
        line_(3 * patch_),
        pitch_((line_ + 15) / 16 * 16),
        pixels_(static_cast<size_t>(patch_ * line_)),
        found_(static_cast<size_t>(pitch_ * 16)) {
    for (size_t c = 0; c < 3; ++c)
      for (int x = 0; x < 256; ++x)
        values_[c][x] = narrow<Out>(normalize(static_cast<uint8_t>(x), call.mean[c], call.std[c]));
    if constexpr (std::is_same<Out, float>::value) prepare_vectors();
  }

  void gather(int64_t b) {
    const CropResize& call = call_.crop;
    list_kept(b);
    const CropSource source = crop_source(call, b);
    if (source.at == nullptr) {
      std::fill(pixels_.begin(), pixels_.end(), uint8_t{0});
      for (const Kept& kept : kept_) write(kept.to);
      return;
    }
    wide_.start(crop_side(source.width, call.size, call.bicubic), call.flip != nullptr && call.flip[b]);
    tall_.start(crop_side(source.height, call.size, call.bicubic), false);
    filled_.assign(static_cast<size_t>(call.size / patch_), false);
    for (auto begin = kept_.begin(), end = begin; begin != kept_.end(); begin = end) {
      while (end != kept_.end() && end->column == begin->column) ++end;
      gather_column(source, &*begin, &*begin + (end - begin));
    }
  }

 private:
  // the kept patches of image b, column by column; rows of the result without one are zeros
  void list_kept(int64_t b) {
    const int32_t grid = call_.crop.size / call_.patch;
    kept_.clear();
    for (int64_t k = b * call_.kept; k < (b + 1) * call_.kept; ++k) {
      const int64_t token = call_.keep[k];
      if (token >= 0 && token < int64_t{grid} * grid)
        kept_.push_back({static_cast<int32_t>(token % grid), static_cast<int32_t>(token / grid), k, 0});
      else
        std::fill_n(static_cast<Out*>(call_.out) + k * patch_ * line_, patch_ * line_, Out{});
    }
    std::sort(kept_.begin(), kept_.end());
  }

  void gather_column(const CropSource& source, Kept* begin, Kept* end) {
    const int64_t x0 = begin->column * patch_;
    wide_.fill(x0, x0 + patch_);
    list_lines(begin, end);
    const int32_t left = std::min(wide_.first_of(x0), wide_.first_of(x0 + patch_ - 1));  // the other way if mirrored
    const int32_t right = std::max(wide_.end_of(x0), wide_.end_of(x0 + patch_ - 1));
    const int64_t count = static_cast<int64_t>(lines_.size());
    uint8_t* rows = crop::room(rows_, (count + 15) / 16 * 16 * pitch_);
    for (int64_t l = 0; l < count; l += 16) {
      int32_t lines[16];  // behind the last one that one again
      for (int r = 0; r < 16; ++r) lines[r] = lines_[static_cast<size_t>(std::min(l + r, count - 1))];
      const crop::Tile tile = crop::turn(source, lines, left, right, tile_);
      const int64_t step = call_.channels_last ? 3 : 1, colour = call_.channels_last ? 1 : patch_;
      run_.across(tile, wide_, x0, patch_, 16 * step, 16 * colour, found_.data());
      for (int64_t i = 0; i < pitch_; i += 16) crop::transpose16(found_.data() + 16 * i, rows + l * pitch_ + i, pitch_);
    }
    for (const Kept* kept = begin; kept != end; ++kept) {
      const int64_t y0 = kept->row * patch_;
      run_.down(rows + kept->listed * pitch_, pitch_, tall_.first_of(y0), tall_, y0, patch_, line_, pixels_.data());
      write(kept->to);
    }
  }

  // the source rows of some patches of one column, ascending; those of a patch follow each other without a gap
  void list_lines(Kept* begin, Kept* end) {
    lines_.clear();
    for (Kept* kept = begin; kept != end; ++kept) {
      const int64_t y0 = kept->row * patch_;
      if (!filled_[static_cast<size_t>(kept->row)]) tall_.fill(y0, y0 + patch_);
      filled_[static_cast<size_t>(kept->row)] = true;
      const int32_t top = tall_.first_of(y0), bottom = tall_.end_of(y0 + patch_ - 1);
      const int32_t next = lines_.empty() ? top : std::max(top, lines_.back() + 1);
      kept->listed = static_cast<int64_t>(lines_.size()) - (next - top);
      for (int32_t y = next; y < bottom; ++y) lines_.push_back(y);
    }
  }

  size_t colour_of(int64_t i) const { return static_cast<size_t>(call_.channels_last ? i % 3 : i / patch_); }

  // `vectors_` says whether the loop over vectors gives what values_ has, for all values of a pixel
  void prepare_vectors() {
    for (int64_t i = 0; i < line_; ++i) {
      const size_t c = colour_of(i);
      mean_.push_back(call_.mean[c]);
      std_.push_back(call_.std[c]);
      inverse_.push_back(1.0f / call_.std[c]);
    }
    std::vector<uint8_t> same(static_cast<size_t>(line_));
    std::vector<float> found(static_cast<size_t>(line_));
    for (int x = 0; x < 256 && vectors_; ++x) {
      std::fill(same.begin(), same.end(), static_cast<uint8_t>(x));
      const int64_t n = run_.normalize(same.data(), line_, mean_.data(), std_.data(), inverse_.data(), found.data());
      for (int64_t i = 0; i < n; ++i) vectors_ &= found[i] == values_[colour_of(i)][x];
    }
  }

  // places i .. i + n - 1 of a line
  void write(const uint8_t* from, int64_t i, int64_t n, Out* to) {
    int64_t done = 0;
    if constexpr (std::is_same<Out, float>::value)
      if (vectors_) done = run_.normalize(from, n, mean_.data() + i, std_.data() + i, inverse_.data() + i, to);
    if (call_.channels_last && done == 0)
      for (; done < n; done += 3)
        for (int c = 0; c < 3; ++c) to[done + c] = values_[c][from[done + c]];
    for (; done < n; ++done) to[done] = values_[colour_of(i + done)][from[done]];
  }

  // `pixels_`, patch_ lines in the order of a row's values, normalised
  void write(int64_t k) {
    Out* to = static_cast<Out*>(call_.out) + k * patch_ * line_;
    const uint8_t* from = pixels_.data();
    for (int64_t y = 0; y < patch_; ++y, from += line_) {
      if (call_.channels_last)
        write(from, 0, line_, to + y * line_);
      else
        for (int c = 0; c < 3; ++c) write(from + c * patch_, c * patch_, patch_, to + (c * patch_ + y) * patch_);
    }
  }

  const CropGather& call_;
  const crop::Loops run_;
  const int64_t patch_, line_, pitch_;  // a line has the three colours of one row of a patch
  Out values_[3][256];
  bool vectors_ = std::is_same<Out, float>::value;
  std::vector<float> mean_, std_, inverse_;  // [line_]
  std::vector<Kept> kept_;
  std::vector<bool> filled_;  // rows of patches whose weights are in tall_
  crop::Table wide_, tall_;
  std::vector<int32_t> lines_;
  std::vector<uint8_t> pixels_, found_, tile_, rows_;  // a patch; 16 lines of a patch, on their side; source rows
};

template <typename Out>
void run(const CropGather& call, int threads) {
  parallel_for(call.crop.batch, 1, threads, [&](int64_t begin, int64_t end) {
    Gatherer<Out> gatherer(call);
    for (int64_t b = begin; b < end; ++b) gatherer.gather(b);
  });
}

}  // namespace

void crop_gather_cpu(const CropGather& call, int threads) {
  switch (call.out_type) {
    case PixelType::kBfloat16:
      return run<Bfloat16>(call, threads);
    case PixelType::kFloat16:
      return run<Float16>(call, threads);
    default:
      return run<float>(call, threads);
  }
}

}  // namespace mimfast
