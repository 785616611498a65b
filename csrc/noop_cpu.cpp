#include <cstring>

#include "noop.h"

namespace mimfast {

void noop_cpu(const float* x, float* y, int64_t n) {
  if (n > 0) std::memcpy(y, x, static_cast<size_t>(n) * sizeof(float));
}

}  // namespace mimfast
