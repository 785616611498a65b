// The windows of one head, one after the other, on vectors of MIMFAST_LANES floats, see each_lanes.h. A window is
// gathered; scores and probabilities of a block of queries at a time stay in the first caches and are recomputed in the
// backward.

#include "attention_lanes.h"

// where the tokens of a window are; y = -1 for padding
struct Tokens {
  int64_t image;
  std::vector<int64_t> y, x;  // [n]
};

constexpr int64_t kRun =
    32;  // keys that are added up one by one; longer sums are made of such sums, for their rounding

// what one thread works with; rows are multiples of kLanes values
struct Scratch {
  int64_t keys, pitch, blocks;  // n; d and n / kBlock, rounded up
  float *q, *k, *v, *grad;      // [blocks * kBlock, pitch], rows from n on and columns from d on stay 0
  float *rows, *d_k, *d_v;      // [kBlock, pitch] of a block of queries, [n, pitch]
  float *turned, *turned_grad;  // [pitch, kBlock]
  float *probs, *d_scores;      // [n, kBlock], one row per key; probs without their division by the sum in the forward
  float *bias, *d_bias;         // [blocks, n, kBlock], of the present head
  float* inverse;               // [kBlock], 1 / sum of a query
  float *q_size, *k_size;       // [n], cosine form: 1 / norm, or 0 where the norm is
  float* labels;                // [blocks * kBlock], regions of the rolled map
  std::vector<int32_t> ids;     // [blocks * kBlock], groups; -1 for padding
  bool masked, grouped;         // whether any pair of this window is kept apart by labels, by ids
  Tokens now, next;             // of this window, and of the one to fetch meanwhile
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
    float* spare = memory.data();
    while (reinterpret_cast<uintptr_t>(spare) % (kLine * sizeof(float)) != 0) ++spare;
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); ++i) {
      *arrays[i] = spare;
      spare += (sizes[i] + kLine - 1) / kLine * kLine;
    }
    for (Tokens* tokens : {&now, &next}) {
      tokens->y.resize(static_cast<size_t>(n));
      tokens->x.resize(static_cast<size_t>(n));
    }
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

MIMFAST_LANE_FN double dot(const float* a, const float* b, int64_t pitch) {
  Vec sum = {};
  for (int64_t c = 0; c < pitch; c += kLanes) sum += load(a + c) * load(b + c);
  double total = 0.0;
  for (int i = 0; i < kLanes; ++i) total += static_cast<double>(sum[i]);
  return total;
}

// window `w`, counted through the batch
inline void locate(const WindowAttention& call, const Map& map, int64_t w, Tokens& tokens) {
  const int64_t top = w % map.windows / map.across * call.window[0];
  const int64_t left = w % map.windows % map.across * call.window[1];
  tokens.image = w / map.windows;
  size_t i = 0;
  for (int64_t r = top; r < top + call.window[0]; ++r)
    for (int64_t c = left; c < left + call.window[1]; ++c, ++i) {
      const int32_t y = map.row_source[static_cast<size_t>(r)], x = map.col_source[static_cast<size_t>(c)];
      tokens.y[i] = x < 0 ? -1 : y;
      tokens.x[i] = x;
    }
}

// who is kept apart from whom in window `w`, whose tokens are s.now
inline void divide(const WindowAttention& call, const Map& map, int64_t w, Scratch& s) {
  const int64_t top = w % map.windows / map.across * call.window[0];
  const int64_t left = w % map.windows % map.across * call.window[1];
  s.masked = s.grouped = false;
  for (int64_t i = 0; i < s.keys; ++i) {
    const size_t r = static_cast<size_t>(top + i / call.window[1]), c = static_cast<size_t>(left + i % call.window[1]);
    s.labels[i] = static_cast<float>(3 * map.row_label[r] + map.col_label[c]);
    s.masked = s.masked || s.labels[i] != s.labels[0];
  }
  if (call.group == nullptr) return;
  const int32_t* group = call.group + s.now.image * call.group_stride;
  for (size_t i = 0; i < static_cast<size_t>(s.keys); ++i) {
    s.ids[i] = s.now.y[i] < 0 ? -1 : group[s.now.y[i] * call.cols + s.now.x[i]];
    s.grouped = s.grouped || s.ids[i] != s.ids[0];
  }
}

// the rows of a head of one tensor in image order; which token has which
template <typename T>
struct Rows {
  T* base;
  std::array<int64_t, 3> stride;

  T* at(const Tokens& tokens, int64_t i) const {
    const size_t t = static_cast<size_t>(i);
    return base + tokens.image * stride[0] + tokens.y[t] * stride[1] + tokens.x[t] * stride[2];
  }
};

// asks for rows that will be read (0) or written (1) soon
template <int WRITE, typename T>
MIMFAST_LANE_FN void expect(const Rows<T>& rows, const Tokens& tokens, int64_t keys, int64_t head) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < keys; ++i)
    if (tokens.y[static_cast<size_t>(i)] >= 0) {
      T* row = rows.at(tokens, i);
      for (int64_t c = 0; c < head; c += kLine) __builtin_prefetch(row + c, WRITE, 2);
    }
}

// the rows of the window's tokens; padding has those of `padding`, or zeros
template <typename T>
MIMFAST_LANE_FN void gather(const Rows<const T>& rows, const Scratch& s, int64_t head, const float* padding,
                            float* to) {
  for (int64_t i = 0; i < s.keys; ++i, to += s.pitch)
    if (s.now.y[static_cast<size_t>(i)] >= 0)
      fetch(rows.at(s.now, i), to, head);
    else if (padding != nullptr)
      fetch(padding, to, head);
    else
      std::fill(to, to + head, 0.0f);
}

// the other way, for tokens first .. first + count - 1; what padding gets is added to `padding`, if any
template <typename T>
MIMFAST_LANE_FN void scatter(const Rows<T>& rows, const Scratch& s, int64_t head, int64_t first, int64_t count,
                             const float* from, float factor, float* padding) {
  for (int64_t i = first; i < first + count; ++i, from += s.pitch)
    if (s.now.y[static_cast<size_t>(i)] >= 0)
      put(from, factor, rows.at(s.now, i), head);
    else if (padding != nullptr)
      for (int64_t c = 0; c < head; ++c) padding[c] += from[c] * factor;
}

// rows over their norms; a row without a norm has no gradient
MIMFAST_LANE_FN void normalize(float* rows, float* size, const Scratch& s) {
  constexpr double kSmallest = 1e-12;
  for (int64_t i = 0; i < s.keys; ++i, rows += s.pitch) {
    const double norm = std::sqrt(dot(rows, rows, s.pitch));
    const double factor = 1.0 / std::max(norm, kSmallest);
    size[i] = norm < kSmallest ? 0.0f : static_cast<float>(factor);
    // in double, because an error that a whole row shares would show in scores of up to 100
    for (int64_t c = 0; c < s.pitch; ++c) rows[c] = static_cast<float>(static_cast<double>(rows[c]) * factor);
  }
}

// from the gradient of a row over its norm to that of the row, in place; returns their product
MIMFAST_LANE_FN double through_norm(const float* row, float size, float* d, int64_t pitch) {
  const double along = dot(row, d, pitch);
  for (int64_t c = 0; c < pitch; c += kLanes)
    store(d + c, (load(d + c) - load(row + c) * static_cast<float>(along)) * size);
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
  const float mask = call.mask;
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
  for (int64_t first = 0; first < s.keys; first += kRun) {
    Vec part[NV] = {};
    for (int64_t j = first; j < std::min(first + kRun, s.keys); ++j)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const Vec e = exp2_of((load(scores + j * kBlock + v * kLanes) - top[v]) * kLog2e);
        store(scores + j * kBlock + v * kLanes, e);
        part[v] += e;
      }
    for (int v = 0; v < NV; ++v) sum[v] += part[v];
  }
  for (int v = 0; v < NV; ++v) store(inverse + v * kLanes, 1.0f / sum[v]);
}

// exponentials to probabilities, gradients of probabilities to those of scores, and these onto the gradient of the bias
template <int NV>
MIMFAST_TARGET void differentiate(const Scratch& s, float* probs, float* d, float* d_bias, const float* inverse) {
  Vec factor[NV], delta[NV], sum[NV];
  for (int v = 0; v < NV; ++v) {
    factor[v] = load(inverse + v * kLanes);
    delta[v] = sum[v] = Vec{};
  }
  for (int64_t first = 0; first < s.keys; first += kRun) {
    Vec part[NV] = {}, part_sum[NV] = {};
    for (int64_t j = first; j < std::min(first + kRun, s.keys); ++j)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const Vec p = load(probs + j * kBlock + v * kLanes) * factor[v];
        store(probs + j * kBlock + v * kLanes, p);
        part[v] += p * load(d + j * kBlock + v * kLanes);
        part_sum[v] += p;
      }
    for (int v = 0; v < NV; ++v) {
      delta[v] += part[v];
      sum[v] += part_sum[v];
    }
  }
  for (int v = 0; v < NV; ++v) delta[v] /= sum[v];  // not quite 1, and gradients of a query's scores cancel
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

// a head of the call's tensors
template <typename T>
struct Head {
  int64_t size;
  float scale;
  Rows<const T> in[3], grad;
  Rows<T> d_in[3], out;
  const float* padding[3];

  Head(const WindowAttention& call, int64_t head) : size(call.head) {
    const int64_t width = int64_t{call.heads} * size;
    const std::array<int64_t, 3> dense = {call.rows * call.cols * width, call.cols * width, width};
    const std::array<int64_t, 3> dense3 = {3 * dense[0], 3 * dense[1], 3 * dense[2]};
    scale = call.head_scale != nullptr ? call.head_scale[head] : call.scale;
    grad = {static_cast<const T*>(call.grad) + head * size,
            {call.grad_stride[0], call.grad_stride[1], call.grad_stride[2]}};
    out = {static_cast<T*>(call.out) + head * size, dense};
    for (int64_t part = 0; part < 3; ++part) {
      const int64_t column = part * width + head * size;
      in[part] = {static_cast<const T*>(call.qkv) + column,
                  {call.qkv_stride[0], call.qkv_stride[1], call.qkv_stride[2]}};
      d_in[part] = {static_cast<T*>(call.d_qkv) + column, dense3};
      padding[part] = call.qkv_bias != nullptr ? call.qkv_bias + column : nullptr;
    }
  }
};

template <typename T>
MIMFAST_LANE_FN void gather_all(const WindowAttention& call, const Head<T>& head, Scratch& s) {
  gather(head.in[0], s, head.size, head.padding[0], s.q);
  gather(head.in[1], s, head.size, head.padding[1], s.k);
  gather(head.in[2], s, head.size, head.padding[2], s.v);
  if (call.head_scale != nullptr) {
    normalize(s.q, s.q_size, s);
    normalize(s.k, s.k_size, s);
  }
}

template <typename T>
MIMFAST_TARGET void forward_window(const WindowAttention& call, const Head<T>& head, Scratch& s) {
  gather_all(call, head, s);
  expect<0>(head.in[0], s.next, s.keys, head.size);
  expect<1>(head.out, s.now, s.keys, head.size);
  for (int64_t block = 0; block < s.blocks; ++block) {
    const int64_t first = block * kBlock, queries = std::min<int64_t>(kBlock, s.keys - first);
    attend(call, s, head.scale, block, (queries + kLanes - 1) / kLanes);
    if (block == 0) expect<0>(head.in[1], s.next, s.keys, head.size);
    over_keys(s.probs, s.v, s.rows, s.pitch, queries, s.keys);
    if (block == 0) expect<0>(head.in[2], s.next, s.keys, head.size);
    for (int64_t i = 0; i < queries; ++i)
      if (s.now.y[static_cast<size_t>(first + i)] >= 0)
        put(s.rows + i * s.pitch, s.inverse[i], head.out.at(s.now, first + i), head.size);
  }
}

template <typename T>
MIMFAST_TARGET void backward_window(const WindowAttention& call, const Head<T>& head, Scratch& s,
                                    const Partial& partial) {
  gather_all(call, head, s);
  gather(head.grad, s, head.size, nullptr, s.grad);  // what padding computes is thrown away
  expect<0>(head.in[0], s.next, s.keys, head.size);
  const bool cosine = call.head_scale != nullptr;
  double along = 0.0;
  for (int64_t block = 0; block < s.blocks; ++block) {
    const int64_t first = block * kBlock, queries = std::min<int64_t>(kBlock, s.keys - first);
    const int64_t vecs = (queries + kLanes - 1) / kLanes;
    const float *q = s.q + first * s.pitch, *grad = s.grad + first * s.pitch;
    attend(call, s, head.scale, block, vecs);
    if (block == 0) expect<0>(head.in[1], s.next, s.keys, head.size);
    turn(grad, s.turned_grad, s.pitch, vecs);
    scores_of(s.v, s.turned_grad, s.d_scores, s.pitch, s.keys, vecs);
    if (block == 0) expect<0>(head.in[2], s.next, s.keys, head.size);
    float* d_bias = s.d_bias + block * s.keys * kBlock;
    for (int64_t v = 0; v < vecs; v += v + 4 <= vecs ? 4 : 1) {
      const int64_t at = v * kLanes;
      (v + 4 <= vecs ? differentiate<4> : differentiate<1>)(s, s.probs + at, s.d_scores + at, d_bias + at,
                                                            s.inverse + at);
    }
    if (block == 0) expect<1>(head.d_in[0], s.now, s.keys, head.size);
    over_queries(s.probs, grad, s.d_v, s.pitch, s.keys, queries, block > 0);
    if (block == 0) expect<1>(head.d_in[1], s.now, s.keys, head.size);
    over_queries(s.d_scores, q, s.d_k, s.pitch, s.keys, queries, block > 0);
    if (block == 0) expect<1>(head.d_in[2], s.now, s.keys, head.size);
    over_keys(s.d_scores, s.k, s.rows, s.pitch, queries, s.keys);
    if (block == 0) expect<0>(head.grad, s.next, s.keys, head.size);
    if (cosine)
      for (int64_t i = 0; i < queries; ++i)
        along += through_norm(q + i * s.pitch, s.q_size[first + i], s.rows + i * s.pitch, s.pitch);
    scatter(head.d_in[0], s, head.size, first, queries, s.rows, head.scale, nullptr);
  }
  if (cosine) *partial.head_scale += static_cast<float>(along);
  if (cosine)
    for (int64_t j = 0; j < s.keys; ++j) through_norm(s.k + j * s.pitch, s.k_size[j], s.d_k + j * s.pitch, s.pitch);
  float* padding = partial.bias;
  scatter(head.d_in[1], s, head.size, 0, s.keys, s.d_k, head.scale, padding == nullptr ? padding : padding + head.size);
  scatter(head.d_in[2], s, head.size, 0, s.keys, s.d_v, 1.0f, padding == nullptr ? padding : padding + 2 * head.size);
}

// items of work until none is left; item = chunk of windows * heads + head
template <typename T>
inline void run_items(const WindowAttention& call, const Map& map, const Plan& plan, std::atomic<int64_t>& free_item) {
  Scratch s(call, int64_t{call.window[0]} * call.window[1]);
  const bool backward = call.d_qkv != nullptr;
  for (int64_t item; (item = free_item++) < plan.items;) {
    const int64_t first = item / call.heads * plan.chunk, last = std::min(first + plan.chunk, plan.windows);
    const Head<T> head(call, item % call.heads);
    const Partial partial = plan.partial(item);
    spread_bias(call, plan.table_of(item % call.heads), s);
    if (partial.table != nullptr) std::fill(s.d_bias, s.d_bias + s.blocks * kBlock * s.keys, 0.0f);
    locate(call, map, first, s.next);
    for (int64_t w = first; w < last; ++w) {
      std::swap(s.now, s.next);
      divide(call, map, w, s);
      locate(call, map, std::min(w + 1, last - 1), s.next);
      if (backward)
        backward_window(call, head, s, partial);
      else
        forward_window(call, head, s);
    }
    if (partial.table != nullptr) fold_bias(call, s, partial.table);
  }
}
