#include "mask_select.cuh"

namespace mimfast {

void mask_plan_cuda(const MaskPlan& plan, CUstream_st* stream) { mask_select_cuda<false>("mask_plan", plan, stream); }

}  // namespace mimfast
