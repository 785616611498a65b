// short_attention on vectors of MIMFAST_LANES floats, see each_lanes.h.

#include "attention_lanes.h"

// one head of one group
struct Scratch {
  int64_t pitch;            // values of a row, d filled up with zeros to whole vectors
  float *q, *k, *v, *grad;  // [longest to whole blocks, pitch]
  float* rows;              // [kBlock, pitch]: output or gradient of q
  float *d_k, *d_v;         // [longest, pitch]
  float* turned;            // [pitch, kBlock]: q, then grad, of a block
  float *probs, *d_scores;  // [longest, kBlock], one row per key; probs without their division by the sum at first
  float inverse[kBlock];    // 1 / sum of a query
  std::vector<float> memory;

  Scratch(const ShortAttention& call, int64_t longest) : pitch((call.head + kLanes - 1) / kLanes * kLanes) {
    const int64_t whole = (longest + kBlock - 1) / kBlock * kBlock;
    float** const arrays[] = {&q, &k, &v, &grad, &d_k, &d_v, &rows, &turned, &probs, &d_scores};
    const int64_t sizes[] = {whole * pitch,   whole * pitch,  whole * pitch,  whole * pitch,    longest * pitch,
                             longest * pitch, kBlock * pitch, kBlock * pitch, longest * kBlock, longest * kBlock};
    constexpr int64_t kLine = 16;  // floats; every pitch is a multiple of 4
    int64_t total = kLine;
    for (const int64_t size : sizes) total += (size + kLine - 1) / kLine * kLine;
    memory.assign(static_cast<size_t>(total), 0.0f);
    float* next = memory.data();
    while (reinterpret_cast<uintptr_t>(next) % (kLine * sizeof(float)) != 0) ++next;
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); ++i) {
      *arrays[i] = next;
      next += (sizes[i] + kLine - 1) / kLine * kLine;
    }
  }
};

// rows of d values, `stride` apart, into rows of `pitch`
template <typename T>
MIMFAST_TARGET void fetch(const T* from, int64_t stride, int64_t count, int64_t d, int64_t pitch, float* to) {
  for (int64_t i = 0; i < count; ++i, from += stride, to += pitch) {
    const T* __restrict source = from;
    float* __restrict target = to;
    int64_t c = 0;
    for (; c + kLanes <= d; c += kLanes)
      for (int lane = 0; lane < kLanes; ++lane) target[c + lane] = widen(source[c + lane]);
    for (; c < d; ++c) target[c] = widen(source[c]);
  }
}

// and back; FACTORS: row i times factor[i], else all times factor[0]
template <bool FACTORS, typename T>
MIMFAST_TARGET void put(const float* from, int64_t pitch, const float* factor, int64_t count, int64_t d, T* to,
                        int64_t stride) {
  for (int64_t i = 0; i < count; ++i, from += pitch, to += stride) {
    const float* __restrict source = from;
    T* __restrict target = to;
    const float by = factor[FACTORS ? i : 0];
    int64_t c = 0;
    for (; c + kLanes <= d; c += kLanes)
      for (int lane = 0; lane < kLanes; ++lane) narrow(source[c + lane] * by, target[c + lane]);
    for (; c < d; ++c) narrow(source[c] * by, target[c]);
  }
}

// scores to exponentials, NV vectors of queries, and 1 / their sum
template <int NV>
MIMFAST_TARGET void softmax(float factor, float* scores, int64_t keys, float* inverse) {
  Vec top[NV], sum[NV];
  for (int v = 0; v < NV; ++v) {
    top[v] = all(-std::numeric_limits<float>::infinity());
    sum[v] = Vec{};
  }
  for (int64_t j = 0; j < keys; ++j)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) top[v] = larger(load(scores + j * kBlock + v * kLanes) * factor, top[v]);
  for (int64_t j = 0; j < keys; ++j)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      float* at = scores + j * kBlock + v * kLanes;
      const Vec e = exp2_of(load(at) * factor - top[v]);
      store(at, e);
      sum[v] += e;
    }
  for (int v = 0; v < NV; ++v) store(inverse + v * kLanes, 1.0f / sum[v]);
}

// exponentials to probabilities, and gradients of probabilities to those of scores
template <int NV>
MIMFAST_TARGET void differentiate(float* probs, float* d, int64_t keys, const float* inverse) {
  Vec factor[NV], delta[NV];
  for (int v = 0; v < NV; ++v) {
    factor[v] = load(inverse + v * kLanes);
    delta[v] = Vec{};
  }
  for (int64_t j = 0; j < keys; ++j)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const int64_t at = j * kBlock + v * kLanes;
      const Vec p = load(probs + at) * factor[v];
      store(probs + at, p);
      delta[v] += p * load(d + at);
    }
  for (int64_t j = 0; j < keys; ++j)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const int64_t at = j * kBlock + v * kLanes;
      store(d + at, load(probs + at) * (load(d + at) - delta[v]));
    }
}

// exponentials of the scores of `vecs` vectors of queries, from row q on, into s.probs, and s.inverse
MIMFAST_TARGET inline void attend(Scratch& s, float factor, const float* q, int64_t keys, int64_t vecs) {
  turn(q, s.turned, s.pitch, vecs);
  scores_of(s.k, s.turned, s.probs, s.pitch, keys, vecs);
  for (int64_t v = 0; v < vecs;) {
    float *at = s.probs + v * kLanes, *inverse = s.inverse + v * kLanes;
    if (v + 4 <= vecs) {
      softmax<4>(factor, at, keys, inverse);
      v += 4;
    } else {
      softmax<1>(factor, at, keys, inverse);
      v += 1;
    }
  }
}

template <typename T>
MIMFAST_TARGET void forward_head(const ShortAttention& call, const Group& group, int64_t head, Scratch& s) {
  const int64_t d = call.head, width = call.heads * d, n = group.length, row = call.qkv_stride[1];
  const T* qkv = static_cast<const T*>(call.qkv) + group.image * call.qkv_stride[0] + group.first * row + head * d;
  T* out = static_cast<T*>(call.out) + (group.image * call.tokens + group.first) * width + head * d;
  fetch(qkv, row, n, d, s.pitch, s.q);
  fetch(qkv + width, row, n, d, s.pitch, s.k);
  fetch(qkv + 2 * width, row, n, d, s.pitch, s.v);
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t queries = std::min<int64_t>(kBlock, n - first);
    attend(s, call.scale * kLog2e, s.q + first * s.pitch, n, (queries + kLanes - 1) / kLanes);
    over_keys(s.probs, s.v, s.rows, s.pitch, queries, n);
    put<true>(s.rows, s.pitch, s.inverse, queries, d, out + first * width, width);
  }
}

template <typename T>
MIMFAST_TARGET void backward_head(const ShortAttention& call, const Group& group, int64_t head, Scratch& s) {
  const int64_t d = call.head, width = call.heads * d, n = group.length, row = call.qkv_stride[1];
  const T* qkv = static_cast<const T*>(call.qkv) + group.image * call.qkv_stride[0] + group.first * row + head * d;
  const T* grad = static_cast<const T*>(call.grad) + group.image * call.grad_stride[0] +
                  group.first * call.grad_stride[1] + head * d;
  T* d_qkv = static_cast<T*>(call.d_qkv) + (group.image * call.tokens + group.first) * 3 * width + head * d;
  const float one = 1.0f;
  fetch(qkv, row, n, d, s.pitch, s.q);
  fetch(qkv + width, row, n, d, s.pitch, s.k);
  fetch(qkv + 2 * width, row, n, d, s.pitch, s.v);
  fetch(grad, call.grad_stride[1], n, d, s.pitch, s.grad);
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t queries = std::min<int64_t>(kBlock, n - first), vecs = (queries + kLanes - 1) / kLanes;
    const float *q = s.q + first * s.pitch, *upstream = s.grad + first * s.pitch;
    attend(s, call.scale * kLog2e, q, n, vecs);
    turn(upstream, s.turned, s.pitch, vecs);
    scores_of(s.v, s.turned, s.d_scores, s.pitch, n, vecs);
    for (int64_t v = 0; v < vecs;) {
      float *probs = s.probs + v * kLanes, *d_scores = s.d_scores + v * kLanes;
      if (v + 4 <= vecs) {
        differentiate<4>(probs, d_scores, n, s.inverse + v * kLanes);
        v += 4;
      } else {
        differentiate<1>(probs, d_scores, n, s.inverse + v * kLanes);
        v += 1;
      }
    }
    over_queries(s.probs, upstream, s.d_v, s.pitch, n, queries, first > 0);
    over_queries(s.d_scores, q, s.d_k, s.pitch, n, queries, first > 0);
    over_keys(s.d_scores, s.k, s.rows, s.pitch, queries, n);
    put<false>(s.rows, s.pitch, &call.scale, queries, d, d_qkv + first * 3 * width, 3 * width);
  }
  put<false>(s.d_k, s.pitch, &call.scale, n, d, d_qkv + width, 3 * width);
  put<false>(s.d_v, s.pitch, &one, n, d, d_qkv + 2 * width, 3 * width);
}

// heads [begin, end): group * h + head
template <typename T>
inline void run_heads(const ShortAttention& call, int64_t longest, int64_t begin, int64_t end) {
  Scratch s(call, longest);
  for (int64_t item = begin; item < end; ++item) {
    const Group group = group_of(call, item / call.heads);
    if (call.d_qkv != nullptr)
      backward_head<T>(call, group, item % call.heads, s);
    else
      forward_head<T>(call, group, item % call.heads, s);
  }
}
