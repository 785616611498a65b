// crop_gather: the kept patches of resampled boxes as rows of a matrix, see mimfast/ops/crop_gather.py for the rule.
// crop_resize.h has the resampling, pixel_types.h the normalisation.
#pragma once

#include <cstdint>

#include "crop_resize.h"
#include "pixel_types.h"

namespace mimfast {

struct CropGather {
  CropResize crop;      // without its `out`
  const int64_t* keep;  // [batch, kept]; an index outside 0..(size / patch)^2 - 1 gives a row of zeros
  int64_t kept;
  int32_t patch;
  bool channels_last;     // a row is (p, q, c), not (c, p, q)
  float mean[3], std[3];  // (x / 255 - mean) / std
  // outputs
  void* out;  // [batch, kept, 3 * patch^2]
  PixelType out_type;
};

void crop_gather_cpu(const CropGather& call, int threads);
void crop_gather_cuda(const CropGather& call, CUstream_st* stream);

}  // namespace mimfast
