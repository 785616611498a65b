// Which windows of visible tokens share a group of attention; what is computed stands in mimfast/ops/group_plan.py.
#pragma once

#include <cstdint>
#include <utility>

namespace mimfast {

// window [tokens] in 0..windows-1; writes slot [tokens] and returns (groups, slots of a group)
std::pair<int64_t, int64_t> group_plan_cpu(const int64_t* window, int64_t tokens, int64_t windows, int64_t limit,
                                           int64_t overhead, int64_t* slot);

}  // namespace mimfast
