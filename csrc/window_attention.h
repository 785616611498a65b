// window_attention: attention inside the windows of a map, forward and backward; see mimfast/ops/window_attention.py
// for the rule, window_attention_v2.py for the cosine form. B images of H x W tokens, h heads of d values, windows of
// wh x ww tokens, O = (2 wh - 1) * (2 ww - 1) offsets.
#pragma once

#include <array>
#include <cstdint>

namespace mimfast {

struct WindowAttention {
  // inputs
  const void* qkv;                    // [B, H, W, 3, h, d] float32 or bfloat16, the last three dimensions dense
  bool bf16;                          // of everything that is not said to be float32
  std::array<int64_t, 3> qkv_stride;  // of images, rows and columns, in elements
  const float* qkv_bias;              // [3, h, d]: q, k and v of padding; null for zeros
  const float* table;                 // [O, h], bias of each offset of a query from a key; null for none
  const float* head_scale;            // [h]: the cosine form, with these factors of the scores; null for the plain form
  const int32_t* group;               // [H, W] per image, ids from 0; null: every token sees its window
  int64_t group_stride;               // of images, in elements; 0: shared by the batch
  int64_t batch;
  int32_t rows, cols, heads, head;       // H, W, h, d
  std::array<int32_t, 2> window, shift;  // rows, columns
  bool roll_first;                       // the map is rolled, then padded; else padded, then rolled
  float scale, mask;                     // of the scores of the plain form; added to pairs that the roll made
  const void* grad;                      // [B, H, W, h, d], gradient of the output, the last two dimensions dense
  std::array<int64_t, 3> grad_stride;    // in elements
  // outputs, dense, fully written
  void* out;            // [B, H, W, h, d]; forward
  void* d_qkv;          // [B, H, W, 3, h, d]; backward, as all that follow
  float* d_table;       // [O, h], or null
  float* d_bias;        // [3, h, d], through padding; or null
  float* d_head_scale;  // [h], or null
};

// with d_qkv null the forward, else the backward; on vectors of at most `lanes` floats, 16 being the most there are
void window_attention_cpu(const WindowAttention& call, int threads, int lanes);

}  // namespace mimfast
