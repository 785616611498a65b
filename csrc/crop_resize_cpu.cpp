// Threads take whole images.
#include "crop_resize_cpu.h"
#include "parallel.h"

namespace mimfast {
namespace {

// One for each thread: memory that grows to the largest box it has seen.
class Cropper {
 public:
  explicit Cropper(const CropResize& call) : call_(call), run_(crop::loops()) {}

  void crop(int64_t b) {
    const int64_t size = call_.size, pitch = (size + 15) / 16 * 16;
    uint8_t* out = call_.out + b * 3 * size * size;
    const CropSource source = crop_source(call_, b);
    if (source.at == nullptr) {
      std::memset(out, 0, static_cast<size_t>(3 * size * size));
      return;
    }
    wide_.start(crop_side(source.width, call_.size, call_.bicubic), call_.flip != nullptr && call_.flip[b]);
    wide_.fill(0, size);
    tall_.start(crop_side(source.height, call_.size, call_.bicubic), false);
    tall_.fill(0, size);
    const int64_t plane = (source.height + 15) / 16 * 16 * pitch;
    uint8_t* rows = crop::room(rows_, 3 * plane);
    alignas(16) uint8_t found[3][16 * 16] = {};
    for (int32_t y = 0; y < source.height; y += 16) {
      int32_t lines[16];  // below the last one that one again
      for (int r = 0; r < 16; ++r) lines[r] = std::min(y + r, source.height - 1);
      const crop::Tile tile = crop::turn(source, lines, 0, source.width, tile_);
      for (int64_t x = 0; x < size; x += 16) {
        run_.across(tile, wide_, x, std::min<int64_t>(size - x, 16), 16, 16 * 16, found[0]);
        for (int c = 0; c < 3; ++c) crop::transpose16(found[c], rows + c * plane + y * pitch + x, pitch);
      }
    }
    for (int c = 0; c < 3; ++c) run_.down(rows + c * plane, pitch, 0, tall_, 0, size, size, out + c * size * size);
  }

 private:
  const CropResize& call_;
  const crop::Loops run_;
  crop::Table wide_, tall_;
  std::vector<uint8_t> tile_, rows_;  // 16 rows on their side; all rows, filtered across
};

}  // namespace

void crop_resize_simd_bits(int bits) { crop::simd_bits = bits; }

void crop_resize_cpu(const CropResize& call, int threads) {
  parallel_for(call.batch, 1, threads, [&](int64_t begin, int64_t end) {
    Cropper cropper(call);
    for (int64_t b = begin; b < end; ++b) cropper.crop(b);
  });
}

}  // namespace mimfast
