#include "mask_select.cuh"

namespace mimfast {

void mask_guided_cuda(const MaskPlan& plan, CUstream_st* stream) {
  mask_select_cuda<true>("mask_guided", plan, stream);
}

}  // namespace mimfast
