// hog_loss: predicted histograms of oriented gradients of hidden tokens against those of the image, and the gradient of
// the prediction in the same pass; see mimfast/ops/hog_loss.py for the rule.
// A token is u x u cells, D = 27 u^2 values with entry (k u + dy) u + dx; the rest as in loss_tail.h and hog.h.
#pragma once

#include <cstdint>

#include "hog.h"
#include "loss_tail.h"

namespace mimfast {

struct HogLoss {
  // With a map: of v x v parts of every token, [B, down v, across v] in row-major order; part (y, x) is u/v x u/v
  // cells.
  LossRows rows;
  HogImages images;
  int32_t side, parts;  // u, v
  // only on a GPU, where rows.loss and rows.upstream are not used
  const int64_t* count;   // [] number of parts that count
  const float* upstream;  // [] gradient of the loss; null stands for 1
  float* partial;         // [hog_loss_partials(call)], fully written, adds up to the loss; or null
  bool stale;             // rows.grad does not hold the gradient for an upstream gradient of 1
};

constexpr int kHogLossThreads = 128;  // of a CUDA block, each for one cell and colour

inline int64_t hog_loss_partials(const HogLoss& call) {
  const int64_t cells = call.rows.rows * call.side * call.side;
  return 3 * call.rows.batch * ((cells + kHogLossThreads - 1) / kHogLossThreads);
}

void hog_loss_cpu(const HogLoss& call, int threads);
void hog_loss_cuda(const HogLoss& call, CUstream_st* stream);

}  // namespace mimfast
