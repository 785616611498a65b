// short_attention: attention inside short groups of tokens, forward and backward; see mimfast/ops/short_attention.py
// for the rule. h heads of d values, B groups of N tokens, or T tokens of G groups end to end.
#pragma once

#include <array>
#include <cstdint>

namespace mimfast {

struct ShortAttention {
  // inputs
  const void* qkv;                    // [B, N, 3, h, d] or [T, 3, h, d] float32 or bfloat16, the last three dense
  bool bf16;                          // of everything
  std::array<int64_t, 2> qkv_stride;  // of groups and tokens, in elements
  const int32_t* cu_seqlens;          // [G + 1]: group g is tokens cu_seqlens[g] to cu_seqlens[g + 1]; null: all have N
  int64_t groups, tokens;             // B and N, or G and T
  int32_t heads, head;                // h, d
  float scale;                        // of the scores
  const void* grad;                   // [B, N, h, d] or [T, h, d], gradient of the output, the last two dense
  std::array<int64_t, 2> grad_stride;
  // outputs, dense, fully written; rows behind the last group get 0
  void* out;    // [B, N, h, d] or [T, h, d]; forward
  void* d_qkv;  // as qkv; backward
};

// with d_qkv null the forward, else the backward
void short_attention_cpu(const ShortAttention& call, int threads);

}  // namespace mimfast
