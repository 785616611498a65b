// The windows of one head, one after the other, on vectors of MIMFAST_LANES floats. Included behind attention_lanes.h,
// in the same namespace. A window is gathered; scores and probabilities of a block of queries at a time stay in the
// first caches and are recomputed in the backward.

// what one thread works with; rows are multiples of kLanes values
struct Scratch {
  int64_t keys, pitch, blocks;  // n; d and n / kBlock, rounded up
  float *q, *k, *v, *grad;      // [blocks * kBlock, pitch], rows from n on and columns from d on stay 0
  float *rows, *d_k, *d_v;      // [kBlock, pitch] of a block of queries, [n, pitch]
  float *turned, *turned_grad;  // [pitch, kBlock]
  float *probs, *d_scores;      // [n, kBlock], one row per key; probs without their division by the sum in the forward
  float *bias, *d_bias;         // [blocks, n, kBlock], of the present head; bias is times log2(e)
  float* inverse;               // [kBlock], 1 / sum of a query
  float *q_size, *k_size;       // [n], cosine form: 1 / norm, or 0 where the norm is
  float* labels;                // [blocks * kBlock], regions of the rolled map
  std::vector<int32_t> y, x;    // [n], where each token is; y = -1 for padding
  std::vector<int32_t> ids;     // [blocks * kBlock], groups; -1 for padding
  bool masked, grouped;         // whether any pair of this window is kept apart by labels, by ids
  std::vector<float> memory;

  Scratch(const WindowAttention& call, int64_t n)
      : keys(n), pitch((call.head + kLanes - 1) / kLanes * kLanes), blocks((n + kBlock - 1) / kBlock) {
    const int64_t all_rows = blocks * kBlock;
    float** const arrays[] = {&q,     &k,        &v,    &grad,   &rows,    &d_k,    &d_v,    &turned, &turned_grad,
                              &probs, &d_scores, &bias, &d_bias, &inverse, &q_size, &k_size, &labels};
    const int64_t sizes[] = {all_rows * pitch,
                             all_rows * pitch,
                             all_rows * pitch,
                             all_rows * pitch,
                             kBlock * pitch,
                             n * pitch,
                             n * pitch,
                             pitch * kBlock,
                             pitch * kBlock,
                             n * kBlock,
                             n * kBlock,
                             all_rows * n,
                             all_rows * n,
                             kBlock,
                             n,
                             n,
                             all_rows};
    constexpr int64_t kLine = 16;  // floats
    int64_t total = kLine;
    for (const int64_t size : sizes) total += (size + kLine - 1) / kLine * kLine;
    memory.assign(static_cast<size_t>(total), 0.0f);
    float* next = memory.data();
    while (reinterpret_cast<uintptr_t>(next) % (kLine * sizeof(float)) != 0) ++next;
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); ++i) {
      *arrays[i] = next;
      next += (sizes[i] + kLine - 1) / kLine * kLine;
    }
    y.resize(static_cast<size_t>(n));
    x.resize(static_cast<size_t>(n));
    ids.assign(static_cast<size_t>(all_rows), -1);
  }
};

template <typename T>
MIMFAST_LANE_FN void fetch(const T* __restrict from, float* __restrict to, int64_t d) {
  int64_t c = 0;
  for (; c + kLanes <= d; c += kLanes)
    for (int i = 0; i < kLanes; ++i) to[c + i] = widen(from[c + i]);
  for (; c < d; ++c) to[c] = widen(from[c]);
}

template <typename T>
MIMFAST_LANE_FN void put(const float* __restrict from, float factor, T* __restrict to, int64_t d) {
  int64_t c = 0;
  for (; c + kLanes <= d; c += kLanes)
    for (int i = 0; i < kLanes; ++i) narrow(from[c + i] * factor, to[c + i]);
  for (; c < d; ++c) narrow(from[c] * factor, to[c]);
}

MIMFAST_LANE_FN float dot(const float* a, const float* b, int64_t pitch) {
  Vec sum = {};
  for (int64_t c = 0; c < pitch; c += kLanes) sum += load(a + c) * load(b + c);
  float total = 0.0f;
  for (int i = 0; i < kLanes; ++i) total += sum[i];
  return total;
}

// where the tokens of window `w` of image `b` are, and who is kept apart from whom
inline void place(const WindowAttention& call, const Map& map, int64_t b, int64_t w, Scratch& s) {
  const int64_t top = w / map.across * call.window[0], left = w % map.across * call.window[1];
  size_t i = 0;
  for (int64_t r = top; r < top + call.window[0]; ++r)
    for (int64_t c = left; c < left + call.window[1]; ++c, ++i) {
      const int32_t y = map.row_source[static_cast<size_t>(r)], x = map.col_source[static_cast<size_t>(c)];
      const bool padding = y < 0 || x < 0;
      s.y[i] = padding ? -1 : y;
      s.x[i] = x;
      s.labels[i] =
          static_cast<float>(3 * map.row_label[static_cast<size_t>(r)] + map.col_label[static_cast<size_t>(c)]);
      if (call.group != nullptr) s.ids[i] = padding ? -1 : call.group[b * call.group_stride + y * call.cols + x];
    }
  s.masked = s.grouped = false;
  for (size_t j = 1; j < i; ++j) {
    s.masked = s.masked || s.labels[j] != s.labels[0];
    s.grouped = s.grouped || s.ids[j] != s.ids[0];
  }
}

// part 0, 1, 2 (q, k, v) of the window's tokens
template <typename T>
MIMFAST_LANE_FN void gather(const WindowAttention& call, int64_t b, int64_t head, int part, const Scratch& s,
                            float* to) {
  const int64_t column = (int64_t{part} * call.heads + head) * call.head;
  const T* image = static_cast<const T*>(call.qkv) + b * call.qkv_stride[0] + column;
  for (int64_t i = 0; i < s.keys; ++i, to += s.pitch) {
    const int64_t y = s.y[static_cast<size_t>(i)], x = s.x[static_cast<size_t>(i)];
    if (y >= 0)
      fetch(image + y * call.qkv_stride[1] + x * call.qkv_stride[2], to, call.head);
    else if (call.qkv_bias != nullptr)
      fetch(call.qkv_bias + column, to, call.head);
    else
      std::fill(to, to + call.head, 0.0f);
  }
}

template <typename T>
MIMFAST_LANE_FN void gather_grad(const WindowAttention& call, int64_t b, int64_t head, const Scratch& s) {
  const T* image = static_cast<const T*>(call.grad) + b * call.grad_stride[0] + head * call.head;
  for (int64_t i = 0; i < s.keys; ++i) {
    const int64_t y = s.y[static_cast<size_t>(i)], x = s.x[static_cast<size_t>(i)];
    float* to = s.grad + i * s.pitch;
    if (y >= 0)
      fetch(image + y * call.grad_stride[1] + x * call.grad_stride[2], to, call.head);
    else
      std::fill(to, to + call.head, 0.0f);  // what padding computes is thrown away
  }
}

// rows over their norms; a row without a norm has no gradient
MIMFAST_LANE_FN void normalize(float* rows, float* size, const Scratch& s) {
  constexpr float kSmallest = 1e-12f;
  for (int64_t i = 0; i < s.keys; ++i, rows += s.pitch) {
    const float norm = std::sqrt(dot(rows, rows, s.pitch)), factor = 1.0f / std::max(norm, kSmallest);
    size[i] = norm < kSmallest ? 0.0f : factor;
    for (int64_t c = 0; c < s.pitch; c += kLanes) store(rows + c, load(rows + c) * factor);
  }
}

// from the gradient of a row over its norm to that of the row, in place; returns their product
MIMFAST_LANE_FN float through_norm(const float* row, float size, float* d, int64_t pitch) {
  const float along = dot(row, d, pitch);
  for (int64_t c = 0; c < pitch; c += kLanes) store(d + c, (load(d + c) - load(row + c) * along) * size);
  return along;
}

// scores to exponentials, NV vectors of queries from the first one of `scores` on; returns 1 / sum in s.inverse
template <int NV, bool RULES>
MIMFAST_TARGET void softmax(const WindowAttention& call, Scratch& s, float factor, const float* bias, float* scores,
                            int64_t query, float* inverse) {
  Vec top[NV], label[NV], sum[NV];
  Ints id[NV];
  for (int v = 0; v < NV; ++v) {
    top[v] = all(-std::numeric_limits<float>::infinity());
    sum[v] = Vec{};
    label[v] = load(s.labels + query + v * kLanes);
    std::memcpy(&id[v], s.ids.data() + query + v * kLanes, sizeof(Ints));
  }
  const float mask = call.mask * kLog2e;
  for (int64_t j = 0; j < s.keys; ++j)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      Vec x = load(scores + j * kBlock + v * kLanes) * factor + load(bias + j * kBlock + v * kLanes);
      if constexpr (RULES) {
        const int32_t own = s.ids[static_cast<size_t>(j)];
        x = label[v] != all(s.labels[j]) ? x + mask : x;
        if (own >= 0) x = (id[v] != own) & (id[v] >= 0) ? all(-std::numeric_limits<float>::infinity()) : x;
      }
      store(scores + j * kBlock + v * kLanes, x);
      top[v] = larger(x, top[v]);
    }
  for (int64_t j = 0; j < s.keys; ++j)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const Vec e = exp2_of(load(scores + j * kBlock + v * kLanes) - top[v]);
      store(scores + j * kBlock + v * kLanes, e);
      sum[v] += e;
    }
  for (int v = 0; v < NV; ++v) store(inverse + v * kLanes, 1.0f / sum[v]);
}

// exponentials to probabilities, gradients of probabilities to those of scores, and these onto the gradient of the bias
template <int NV>
MIMFAST_TARGET void differentiate(const Scratch& s, float* probs, float* d, float* d_bias, const float* inverse) {
  Vec factor[NV], delta[NV];
  for (int v = 0; v < NV; ++v) {
    factor[v] = load(inverse + v * kLanes);
    delta[v] = Vec{};
  }
  for (int64_t j = 0; j < s.keys; ++j)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const Vec p = load(probs + j * kBlock + v * kLanes) * factor[v];
      store(probs + j * kBlock + v * kLanes, p);
      delta[v] += p * load(d + j * kBlock + v * kLanes);
    }
  for (int64_t j = 0; j < s.keys; ++j)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const int64_t at = j * kBlock + v * kLanes;
      const Vec d_score = load(probs + at) * (load(d + at) - delta[v]);
      store(d + at, d_score);
      store(d_bias + at, load(d_bias + at) + d_score);
    }
}

// the scores of block `block` of queries as exponentials in s.probs, and s.inverse
MIMFAST_TARGET inline void attend(const WindowAttention& call, Scratch& s, float factor, int64_t block, int64_t vecs) {
  turn(s.q + block * kBlock * s.pitch, s.turned, s.pitch, vecs);
  scores_of(s.k, s.turned, s.probs, s.pitch, s.keys, vecs);
  const float* bias = s.bias + block * s.keys * kBlock;
  int64_t v = 0;
  for (; v < vecs; v += v + 4 <= vecs ? 4 : 1) {
    const int64_t at = v * kLanes, query = block * kBlock + at;
    const bool rules = s.masked || s.grouped;
    if (v + 4 <= vecs)
      (rules ? softmax<4, true> : softmax<4, false>)(call, s, factor, bias + at, s.probs + at, query, s.inverse + at);
    else
      (rules ? softmax<1, true> : softmax<1, false>)(call, s, factor, bias + at, s.probs + at, query, s.inverse + at);
  }
}

// what the windows of an item of work share: the bias of their head, spread over queries and keys
inline void spread_bias(const WindowAttention& call, const float* table, Scratch& s) {
  if (table == nullptr) return;
  const int64_t wide = call.window[1], offsets = 2 * wide - 1;
  for (int64_t j = 0; j < s.keys; ++j)
    for (int64_t y = 0; y < call.window[0]; ++y) {
      const float* from = table + (y - j / wide + call.window[0] - 1) * offsets + wide - 1 - j % wide;
      for (int64_t x = 0; x < wide; ++x) {
        const int64_t i = y * wide + x;
        s.bias[(i / kBlock * s.keys + j) * kBlock + i % kBlock] = from[x];
      }
    }
}

inline void fold_bias(const WindowAttention& call, const Scratch& s, float* table) {
  const int64_t wide = call.window[1], offsets = 2 * wide - 1;
  for (int64_t j = 0; j < s.keys; ++j)
    for (int64_t y = 0; y < call.window[0]; ++y) {
      float* to = table + (y - j / wide + call.window[0] - 1) * offsets + wide - 1 - j % wide;
      for (int64_t x = 0; x < wide; ++x) {
        const int64_t i = y * wide + x;
        to[x] += s.d_bias[(i / kBlock * s.keys + j) * kBlock + i % kBlock];
      }
    }
}

template <typename T>
MIMFAST_TARGET void forward_window(const WindowAttention& call, int64_t b, int64_t head, Scratch& s) {
  gather<T>(call, b, head, 0, s, s.q);
  gather<T>(call, b, head, 1, s, s.k);
  gather<T>(call, b, head, 2, s, s.v);
  float scale = call.scale;
  if (call.head_scale != nullptr) {
    normalize(s.q, s.q_size, s);
    normalize(s.k, s.k_size, s);
    scale = call.head_scale[head];
  }
  for (int64_t block = 0; block < s.blocks; ++block) {
    const int64_t first = block * kBlock, queries = std::min<int64_t>(kBlock, s.keys - first);
    attend(call, s, scale * kLog2e, block, (queries + kLanes - 1) / kLanes);
    over_keys(s.probs, s.v, s.rows, s.pitch, queries, s.keys);
    for (int64_t i = 0; i < queries; ++i) {
      const int64_t y = s.y[static_cast<size_t>(first + i)], x = s.x[static_cast<size_t>(first + i)];
      T* image = static_cast<T*>(call.out) + ((b * call.rows + y) * call.cols + x) * call.heads * call.head;
      if (y >= 0) put(s.rows + i * s.pitch, s.inverse[i], image + head * call.head, call.head);
    }
  }
}

// rows of part 0, 1, 2 (q, k, v) of the gradient, from token `first` on; those of padding go into `padding`, if any
template <typename T>
MIMFAST_LANE_FN void scatter(const WindowAttention& call, int64_t b, int64_t head, int part, const Scratch& s,
                             int64_t first, int64_t count, const float* from, float factor, float* padding) {
  const int64_t width = int64_t{3} * call.heads * call.head, column = (int64_t{part} * call.heads + head) * call.head;
  for (int64_t i = 0; i < count; ++i, from += s.pitch) {
    const int64_t y = s.y[static_cast<size_t>(first + i)], x = s.x[static_cast<size_t>(first + i)];
    if (y >= 0)
      put(from, factor, static_cast<T*>(call.d_qkv) + ((b * call.rows + y) * call.cols + x) * width + column,
          call.head);
    else if (padding != nullptr)
      for (int64_t c = 0; c < call.head; ++c) padding[part * call.head + c] += from[c] * factor;
  }
}

template <typename T>
MIMFAST_TARGET void backward_window(const WindowAttention& call, int64_t b, int64_t head, Scratch& s,
                                    const Partial& partial) {
  gather<T>(call, b, head, 0, s, s.q);
  gather<T>(call, b, head, 1, s, s.k);
  gather<T>(call, b, head, 2, s, s.v);
  gather_grad<T>(call, b, head, s);
  const bool cosine = call.head_scale != nullptr;
  const float scale = cosine ? call.head_scale[head] : call.scale;
  if (cosine) {
    normalize(s.q, s.q_size, s);
    normalize(s.k, s.k_size, s);
  }
  for (int64_t block = 0; block < s.blocks; ++block) {
    const int64_t first = block * kBlock, queries = std::min<int64_t>(kBlock, s.keys - first);
    const int64_t vecs = (queries + kLanes - 1) / kLanes;
    const float *q = s.q + first * s.pitch, *grad = s.grad + first * s.pitch;
    attend(call, s, scale * kLog2e, block, vecs);
    turn(grad, s.turned_grad, s.pitch, vecs);
    scores_of(s.v, s.turned_grad, s.d_scores, s.pitch, s.keys, vecs);
    float* d_bias = s.d_bias + block * s.keys * kBlock;
    for (int64_t v = 0; v < vecs; v += v + 4 <= vecs ? 4 : 1) {
      const int64_t at = v * kLanes;
      (v + 4 <= vecs ? differentiate<4> : differentiate<1>)(s, s.probs + at, s.d_scores + at, d_bias + at,
                                                            s.inverse + at);
    }
    over_queries(s.probs, grad, s.d_v, s.pitch, s.keys, queries, block > 0);
    over_queries(s.d_scores, q, s.d_k, s.pitch, s.keys, queries, block > 0);
    over_keys(s.d_scores, s.k, s.rows, s.pitch, queries, s.keys);
    if (cosine)
      for (int64_t i = 0; i < queries; ++i)
        *partial.head_scale += through_norm(q + i * s.pitch, s.q_size[first + i], s.rows + i * s.pitch, s.pitch);
    scatter<T>(call, b, head, 0, s, first, queries, s.rows, scale, nullptr);
  }
  if (cosine)
    for (int64_t j = 0; j < s.keys; ++j) through_norm(s.k + j * s.pitch, s.k_size[j], s.d_k + j * s.pitch, s.pitch);
  scatter<T>(call, b, head, 1, s, 0, s.keys, s.d_k, scale, partial.bias);
  scatter<T>(call, b, head, 2, s, 0, s.keys, s.d_v, 1.0f, partial.bias);
}

// items [begin, end): item = chunk of windows * heads + head
template <typename T>
inline void run_items(const WindowAttention& call, const Map& map, const Plan& plan, int64_t begin, int64_t end) {
  Scratch s(call, int64_t{call.window[0]} * call.window[1]);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item % call.heads, first = item / call.heads * plan.chunk;
    spread_bias(call, plan.table_of(head), s);
    const Partial partial = plan.partial(item);
    if (call.d_qkv != nullptr) std::fill(s.d_bias, s.d_bias + s.blocks * kBlock * s.keys, 0.0f);
    for (int64_t w = first; w < std::min(first + plan.chunk, plan.windows); ++w) {
      place(call, map, w / map.windows, w % map.windows, s);
      if (call.d_qkv != nullptr)
        backward_window<T>(call, w / map.windows, head, s, partial);
      else
        forward_window<T>(call, w / map.windows, head, s);
    }
    if (partial.table != nullptr) fold_bias(call, s, partial.table);
  }
}
