// local_norm: every pixel standardised by the box around it, colour by colour; see mimfast/ops/local_norm.py for the
// rule. With n pixels in the box, their sum s and the sum of their squares q, all of raw values x:
//   out = (n x - s) / sqrt((n q - s^2) n / (n - 1) + eps (n / scale)^2)
// where the normalised image is scale * x + shift. For uint8 all but the last operations is exact.
#pragma once

#include <cstdint>

struct CUstream_st;

namespace mimfast {

constexpr int kLocalNormMaxBoxUint8 = 255;  // the widest box whose sum of squares fits into 32 bits
constexpr int kLocalNormMaxWidthCuda = 1024;

struct LocalNorm {
  const void* img;  // [B, 3, H, W] uint8 or float32, any strides
  bool img_uint8;
  int64_t stride[4];  // in elements
  int64_t batch;
  int32_t height, width;
  int32_t radius;  // the box has 2 radius + 1 pixels a side, less what is outside the image
  float floor[3];  // eps / scale^2 of a colour
  float* out;      // [B, 3, H, W] dense
};

void local_norm_cpu(const LocalNorm& call, int threads);
void local_norm_cuda(const LocalNorm& call, CUstream_st* stream);

}  // namespace mimfast
