// window_attention: attention inside the windows of a map, forward and backward; see mimfast/ops/window_attention.py
// for the rule, window_attention_v2.py for the cosine form. B images of H x W tokens, h heads of d values, windows of
// wh x ww tokens, O = (2 wh - 1) * (2 ww - 1) offsets.
#pragma once

#include <cstdint>

struct CUstream_st;

namespace mimfast {

struct WindowAttention {
  // inputs
  const void* qkv;          // [B, H, W, 3, h, d] float32 (CUDA: float16) or bfloat16, last three dimensions dense
  bool bf16;                // of everything that is not said to be float32
  int64_t qkv_stride[3];    // of images, rows and columns, in elements
  const float* qkv_bias;    // [3, h, d]: q, k and v of padding; null for zeros
  const float* table;       // [O, h], bias of each offset of a query from a key; null for none
  const float* head_scale;  // [h]: the cosine form, with these factors of the scores; null for the plain form
  const int32_t* group;     // [H, W] per image, ids from 0; null: every token sees its window
  int64_t group_stride;     // of images, in elements; 0: shared by the batch
  int64_t batch;
  int32_t rows, cols, heads, head;  // H, W, h, d
  int32_t window[2], shift[2];      // rows, columns
  bool roll_first;                  // the map is rolled, then padded; else padded, then rolled
  float scale, mask;                // of the scores of the plain form; added to pairs that the roll made
  const void* grad;                 // [B, H, W, h, d], gradient of the output, the last two dimensions dense
  int64_t grad_stride[3];           // in elements
  // outputs, dense, fully written
  void* out;            // [B, H, W, h, d]; forward
  void* d_qkv;          // [B, H, W, 3, h, d]; backward, as all that follow
  float* d_table;       // [O, h], or null
  float* d_bias;        // [3, h, d], through padding; or null
  float* d_head_scale;  // [h], or null
};

// with d_qkv null the forward, else the backward; on vectors of at most `lanes` floats, 16 being the most there are
void window_attention_cpu(const WindowAttention& call, int threads, int lanes);

// With d_qkv null the forward, else the backward; float16 or bfloat16, windows of up to 64 tokens, heads of up to 64
// values in whole chunks of 8, everything dense in its rows and aligned to 16 bytes. `parts` blocks
// share the windows of a head; results of the forward and d_qkv do not depend on it, d_table and d_bias do in rounding.
// partial [parts, h, O + 2 d, + 1 with head_scale] is scratch for d_table, d_bias and d_head_scale, null for none.
// Captured by a graph, what is given must outlive it; nothing waits for the device.
void window_attention_cuda(const WindowAttention& call, int parts, float* partial, CUstream_st* stream);

// the `parts` that fill the current device
int window_attention_cuda_parts(const WindowAttention& call);

}  // namespace mimfast
