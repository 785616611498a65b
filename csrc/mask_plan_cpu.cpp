#include "mask_select_cpu.h"

namespace mimfast {

void mask_plan_cpu(const MaskPlan& plan, int threads) { mask_select_cpu<false>(plan, threads); }

}  // namespace mimfast
