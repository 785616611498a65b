#include "mask_select_cpu.h"

namespace mimfast {

void mask_guided_cpu(const MaskPlan& plan, int threads) { mask_select_cpu<true>(plan, threads); }

}  // namespace mimfast
