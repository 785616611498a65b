// What the kernels of window_attention share: where things are in shared memory, how a window gets there and rows get
// back to the image, products of its matrices, scores. One block has one or two neighbouring heads, warp r of a head
// has rows 16 r to 16 r + 15 of the window, and lane l of it what mma gives it: rows l / 4 and l / 4 + 8 of those, of
// each 8 columns 2 (l % 4) and the next.
#pragma once

#include "tensor_cores.cuh"
#include "window_attention.h"

namespace mimfast {
namespace window_tiles {

constexpr float kLog2e = 1.4426950408889634f;

// the windows of all images, row by row, and who has them: block `part` of its heads has part, part + parts, ...
struct Windows {
  int32_t across, per_image, count, parts;
  float* partial;  // [parts, heads, offsets + 2 d + 1 with head_scale], sums over the windows of a block: of dS by
                   // offset, of dk and dv of padding, of the gradient of head_scale. Backward, or null
};

constexpr float kSmallest = 1e-12f;  // of a norm, in the cosine form

// for heads of up to D values and windows of up to 8 * TILES tokens; 3 tensors forward, 4 with the gradient backward
template <int D, int TILES, int TENSORS, bool COSINE>
struct Shape {
  static constexpr bool kCosine = COSINE;
  static constexpr int kD = D, kTiles = TILES, kTensors = TENSORS;
  static constexpr int kRows = 8 * kTiles;
  static constexpr int kWarps = (kTiles + 1) / 2;                   // of a head
  static constexpr int kHeads = kTensors == 3 && kD <= 32 ? 2 : 1;  // of a block
  static constexpr int kThreads = 32 * kWarps * kHeads;
  // threads of a multiprocessor: what registers and shared memory allow
  static constexpr int kResident = kTensors == 3 ? (kD <= 48 && !kCosine ? 512 : 384)
                                   : kTiles <= 5 ? 512
                                                 : (kD <= 32 && !kCosine ? 384 : 256);
  static constexpr int kBlocks = kResident / kThreads;
  static constexpr int kChunks = kD / 8;  // of 8 values
  static constexpr int kPitch = kChunks == 6 ? 7 : kChunks;
  static constexpr int kTile = kRows * kPitch;  // chunks of one tensor and head
  static constexpr int kStage = kTensors * kHeads * kTile;
  static constexpr int kScorePitch = kTiles | 1;                                 // odd: rows start in different banks
  static constexpr int kScores = kTensors == 4 ? 16 * kWarps * kScorePitch : 0;  // chunks of P or dS of one head
  static constexpr int kTable = 6 * kRows;                                       // numbers of one head, see Frame::bias
  static constexpr int kPads = kTensors == 4 ? 2 * kD : 0;                       // numbers of one warp
  // where each begins, in chunks
  static constexpr int kScoresAt = 2 * kStage;
  static constexpr int kBiasAt = kScoresAt + 2 * kHeads * kScores;
  static constexpr int kTableAt = kBiasAt + 3 * kHeads * kChunks;
  static constexpr int kPadsAt = kTableAt + kHeads * kTable / 4;
  static constexpr int kPlaceAt = kPadsAt + kHeads * kWarps * kPads / 4;
  static constexpr int kIdsAt = kPlaceAt + 2 * kRows / 4;
  static constexpr int kCellsAt = kIdsAt + 2 * kRows / 4;
  static constexpr int kInversesAt = kCellsAt + kRows / 4;
  static constexpr int kBytes = 16 * (kInversesAt + (kCosine ? 2 * kHeads * kRows / 4 : 0));

  // chunk c of a row in its tile, such that 8 rows of one column are in different banks
  __device__ static __forceinline__ int slot(int row, int c) {
    if constexpr (kPitch != kChunks) return row * kPitch + c;
    return row * kChunks + (c ^ (row / (8 / kChunks)) % kChunks);
  }
};

struct Token {
  int32_t y, x;
  bool inside;  // the image
};

template <bool kBf16, typename S>
struct Frame {
  const WindowAttention& call;
  const Windows& windows;
  Chunk* const shared = static_cast<Chunk*>(dynamic_shared());
  const int warp = S::kHeads == 1 ? threadIdx.x / 32 : threadIdx.x / 32 % S::kWarps;
  const int own = S::kHeads == 1 ? 0 : threadIdx.x / 32 / S::kWarps;  // of the heads of the block
  int lane = threadIdx.x % 32, row = 16 * warp + lane / 4;
  const int32_t n, pairs, part, first_head, head;
  const bool present;  // false for the second head of the last block of an odd number
  // of both rows and of the 2 * kTiles columns of this lane: whether a token is behind the seams of the roll, 2 bits,
  // and what a query adds to and a key takes from the number of an offset
  uint32_t row_regions[2], key_regions = 0, key_offsets[(S::kTiles + 1) / 2] = {};
  uint32_t row_bias[2];

  __device__ __forceinline__ Frame(const WindowAttention& given, const Windows& all)
      : call(given),
        windows(all),
        n(given.window[0] * given.window[1]),
        pairs((given.heads + S::kHeads - 1) / S::kHeads),
        part(blockIdx.x / pairs),
        first_head(blockIdx.x % pairs * S::kHeads),
        head(first_head + own),
        present(S::kHeads == 1 || head < given.heads) {
    fill();
    const int32_t most = (call.window[0] - 1) * (2 * call.window[1] - 1) + call.window[1] - 1;
    for (int half = 0; half < 2; ++half) {
      const int32_t cell = row + 8 * half < n ? cells()[row + 8 * half] : 0;  // the first token sees every key
      row_regions[half] = region(cell);
      row_bias[half] = 2 * most + 1 + offset(cell);
    }
#pragma unroll
    for (int i = 0; i < 2 * S::kTiles; ++i) {
      const int key = i / 2 * 8 + lane % 4 * 2 + i % 2;
      const int32_t cell = cells()[key];
      key_regions |= region(cell) << 2 * i;
      key_offsets[i / 4] |= static_cast<uint32_t>(key < n ? offset(cell) : 2 * most + 1) << 8 * (i % 4);
    }
  }

  __device__ __forceinline__ Chunk* tile(int stage, int tensor, int h) const {
    return shared + stage * S::kStage + (tensor * S::kHeads + h) * S::kTile;
  }
  // P (0) or dS (1) of this warp's head, [queries, keys]
  __device__ __forceinline__ Chunk* scores_tile(int which) const {
    return shared + S::kScoresAt + (2 * own + which) * S::kScores;
  }
  __device__ __forceinline__ Chunk* bias_chunks() const { return shared + S::kBiasAt; }  // [3, kHeads, kChunks]
  __device__ __forceinline__ float* table(int h) const {
    return reinterpret_cast<float*>(shared + S::kTableAt) + h * S::kTable;
  }
  // sums of dk and dv of padding by the warps of a head, [kWarps, 2, kD]
  __device__ __forceinline__ float* pads(int h) const {
    return reinterpret_cast<float*>(shared + S::kPadsAt) + h * S::kWarps * S::kPads;
  }
  // number of each token in its image, -1 for padding
  __device__ __forceinline__ int32_t* places(int stage) const {
    return reinterpret_cast<int32_t*>(shared + S::kPlaceAt) + stage * S::kRows;
  }
  // group of each token, -1 for padding and beyond the window
  __device__ __forceinline__ int32_t* ids(int stage) const {
    return reinterpret_cast<int32_t*>(shared + S::kIdsAt) + stage * S::kRows;
  }
  // 1 / norm of each row of q (0) or k (1)
  __device__ __forceinline__ float* inverses(int which) const {
    return reinterpret_cast<float*>(shared + S::kInversesAt) + (2 * own + which) * S::kRows;
  }
  // row and column of each token in its window
  __device__ __forceinline__ int32_t* cells() const { return reinterpret_cast<int32_t*>(shared + S::kCellsAt); }

  __device__ __forceinline__ int32_t offset(int32_t cell) const {
    return (cell >> 16) * (2 * call.window[1] - 1) + (cell & 0xffff);
  }
  __device__ __forceinline__ uint32_t region(int32_t cell) const {
    return ((cell >> 16) >= call.window[0] - call.shift[0]) | ((cell & 0xffff) >= call.window[1] - call.shift[1]) << 1;
  }

  // what stays as it is for all windows; ends with a barrier
  __device__ __forceinline__ void fill() const {
    for (int i = threadIdx.x; i < 2 * S::kStage; i += S::kThreads) shared[i] = {};  // what no token reaches stays 0
    for (int i = threadIdx.x; i < 3 * S::kHeads * S::kChunks; i += S::kThreads) {
      const int tensor = i / (S::kHeads * S::kChunks), h = i / S::kChunks % S::kHeads, c = i % S::kChunks;
      Chunk chunk = {};
      if (call.qkv_bias != nullptr && first_head + h < call.heads && 8 * c < call.head) {
        const float* from = call.qkv_bias + (int64_t{tensor} * call.heads + first_head + h) * call.head + 8 * c;
        for (int e = 0; e < 4; ++e) chunk.word[e] = pack<kBf16>(from[2 * e], from[2 * e + 1]);
      }
      bias_chunks()[i] = chunk;
    }
    const int32_t offsets = (2 * call.window[0] - 1) * (2 * call.window[1] - 1), hidden = offsets / 2 + 1;
    for (int i = threadIdx.x; i < S::kHeads * (hidden + offsets); i += S::kThreads) {
      const int h = i / (hidden + offsets), at = i % (hidden + offsets) - hidden;
      const bool given = call.table != nullptr && first_head + h < call.heads && at >= 0;
      const float value = given ? call.table[int64_t{at} * call.heads + first_head + h] * kLog2e : 0.0f;
      table(h)[hidden + at] = at < 0 ? -INFINITY : value;
    }
    for (int i = threadIdx.x; i < S::kHeads * S::kWarps * S::kPads; i += S::kThreads) pads(0)[i] = 0.0f;
    for (int i = threadIdx.x; i < 2 * S::kRows; i += S::kThreads) ids(0)[i] = -1;
    for (int i = threadIdx.x; i < S::kRows; i += S::kThreads)
      cells()[i] = i < n ? i / call.window[1] << 16 | i % call.window[1] : 0;
    __syncthreads();
  }

  // the bias of row half and of column i of this lane, times log2(e); -inf for a key that is not there: such a key
  // takes so much that it meets the first half of the table
  __device__ __forceinline__ float bias(int half, int i) const {
    return table(own)[row_bias[half] - (key_offsets[i / 4] >> 8 * (i % 4) & 0xff)];
  }

  __device__ __forceinline__ Token locate(int32_t down, int32_t right, int32_t cell) const {
    const int32_t r = down * call.window[0] + (cell >> 16), c = right * call.window[1] + (cell & 0xffff);
    int32_t ring_y = call.rows, ring_x = call.cols;  // what is rolled
    bool inside = true;
    if (call.roll_first) {
      inside = r < call.rows && c < call.cols;
    } else {
      ring_y = windows.per_image / windows.across * call.window[0];
      ring_x = windows.across * call.window[1];
    }
    const int32_t y = r + call.shift[0], x = c + call.shift[1];
    Token token = {y >= ring_y ? y - ring_y : y, x >= ring_x ? x - ring_x : x, inside};
    token.inside = inside && token.y < call.rows && token.x < call.cols;
    return token;
  }

  // x, of which the compiler no longer knows that it was here before: addresses and the like are made of it again, kept
  // through the loop they would take the registers of 16 and more of them
  __device__ __forceinline__ static uint32_t again(uint32_t x) {
#ifdef __CUDA_ARCH__
    asm volatile("" : "+r"(x));
#endif
    return x;
  }

  // the same for what belongs to the lane; called before each part of the work on a window
  __device__ __forceinline__ void renew() {
    lane = again(lane);
    row = 16 * warp + lane / 4;
    for (int half = 0; half < 2; ++half) row_bias[half] = again(row_bias[half]);
    for (auto& offsets : key_offsets) offsets = again(offsets);
    key_regions = again(key_regions);
  }

  // of the scores
  __device__ __forceinline__ float factor() const {
    if constexpr (S::kCosine) return call.head_scale[head];
    return call.scale;
  }

  // numbers of `partial` for one head
  __device__ __forceinline__ int32_t columns() const {
    return (2 * call.window[0] - 1) * (2 * call.window[1] - 1) + 2 * call.head + (S::kCosine ? 1 : 0);
  }

  // the norms of this window's queries and keys; ends with a barrier
  __device__ __forceinline__ void fill_inverses(int stage) const {
    for (int at = again(threadIdx.x); at < 2 * S::kHeads * S::kRows; at += S::kThreads) {
      const int i = at % S::kRows, which = at / S::kRows % 2, h = at / S::kRows / 2;
      float square = 0.0f;
#pragma unroll
      for (int c = 0; c < S::kChunks; ++c) {
        const Chunk chunk = tile(stage, which, h)[S::slot(i, c)];
        for (int e = 0; e < 4; ++e) {
          float first, second;
          unpack<kBf16>(chunk.word[e], first, second);
          square += first * first + second * second;
        }
      }
      reinterpret_cast<float*>(shared + S::kInversesAt)[at] = 1.0f / fmaxf(sqrtf(square), kSmallest);
    }
    __syncthreads();
  }

  // 1 / norm as gradients want it: nothing flows into a row without a norm
  __device__ __forceinline__ static float slope(float inverse) { return inverse < 1.0f / kSmallest ? inverse : 0.0f; }

  // from the gradient of this warp's rows over their norms to that of the rows, which are in `tile`; returns the
  // products of rows and gradients, that of a row only to the first of its lanes
  __device__ __forceinline__ float through_norm(float (&d)[S::kChunks][4], const Chunk* rows, int which) const {
    float sum = 0.0f;
    for (int half = 0; half < 2; ++half) {
      const int i = row + 8 * half;
      const float inverse = i < n ? inverses(which)[i] : 0.0f, size = slope(inverse);
      float along = 0.0f, first, second;
#pragma unroll
      for (int c = 0; c < S::kChunks; ++c) {
        unpack<kBf16>(i < n ? rows[S::slot(i, c)].word[lane % 4] : 0u, first, second);
        along += first * d[c][2 * half] + second * d[c][2 * half + 1];
      }
      along *= inverse;
      along += __shfl_xor_sync(kAllLanes, along, 1);
      along += __shfl_xor_sync(kAllLanes, along, 2);
      if (lane % 4 == 0) sum += along;
#pragma unroll
      for (int c = 0; c < S::kChunks; ++c) {
        unpack<kBf16>(i < n ? rows[S::slot(i, c)].word[lane % 4] : 0u, first, second);
        d[c][2 * half] = (d[c][2 * half] - first * inverse * along) * size;
        d[c][2 * half + 1] = (d[c][2 * half + 1] - second * inverse * along) * size;
      }
    }
    return sum;
  }

  // starts to bring a window into a stage
  __device__ __forceinline__ void load(int32_t window, int stage) const {
    constexpr int kOfToken = S::kHeads * S::kChunks;
    const int64_t image = window / windows.per_image;
    const int32_t down = window % windows.per_image / windows.across, right = window % windows.across;
    const uint16_t* qkv = static_cast<const uint16_t*>(call.qkv) + image * call.qkv_stride[0];
    const uint16_t* grad = static_cast<const uint16_t*>(call.grad) + image * call.grad_stride[0];
    const int32_t width = call.heads * call.head;
    const int thread = again(threadIdx.x);
#pragma unroll
    for (int k = 0; k < (S::kRows * kOfToken + S::kThreads - 1) / S::kThreads; ++k) {
      const int at = thread + k * S::kThreads, i = at / kOfToken, c = at % S::kChunks;
      const int h = at % kOfToken / S::kChunks;
      if (i >= n || 8 * c >= call.head || first_head + h >= call.heads) continue;
      const Token token = locate(down, right, cells()[i]);
      const int32_t column = (first_head + h) * call.head + 8 * c;
      const uint16_t* from = qkv + token.y * call.qkv_stride[1] + token.x * call.qkv_stride[2] + column;
      Chunk* to = tile(stage, 0, h) + S::slot(i, c);
#pragma unroll
      for (int tensor = 0; tensor < 3; ++tensor, from += width, to += S::kHeads * S::kTile) {
        if (token.inside)
          copy_async(to, from);
        else
          *to = bias_chunks()[(tensor * S::kHeads + h) * S::kChunks + c];
      }
      if constexpr (S::kTensors == 4) {
        from = grad + token.y * call.grad_stride[1] + token.x * call.grad_stride[2] + column;
        if (token.inside)
          copy_async(to, from);
        else
          *to = {};  // what padding computes is thrown away
      }
    }
    for (int i = thread; i < n; i += S::kThreads) {
      const Token token = locate(down, right, cells()[i]);
      const int32_t place = token.y * call.cols + token.x;
      places(stage)[i] = token.inside ? place : -1;
      if (call.group == nullptr) continue;
      if (token.inside)
        copy_async(ids(stage) + i, call.group + image * call.group_stride + place);
      else
        ids(stage)[i] = -1;
    }
  }

  // s = rows of this warp from one tile times all rows of another
  __device__ __forceinline__ void multiply_rows(const Chunk* a, const Chunk* b, float (&s)[S::kTiles][4]) const {
    uint32_t left[S::kChunks / 2][4];
    const int a_row = 16 * warp + lane % 16, a_in = a_row < S::kRows ? a_row : S::kRows - 1;
#pragma unroll
    for (int k = 0; k < S::kChunks / 2; ++k)
      load_matrices<4, false>(left[k], shared_at(a + S::slot(a_in, 2 * k + lane / 16)));
#pragma unroll
    for (int j = 0; j < S::kTiles; ++j) {
      for (int e = 0; e < 4; ++e) s[j][e] = 0.0f;
      const int b_row = 8 * j + lane % 8;
#pragma unroll
      for (int c = 0; c < S::kChunks; c += 4) {
        uint32_t right[4];
        if (c + 4 <= S::kChunks)
          load_matrices<4, false>(right, shared_at(b + S::slot(b_row, c + lane / 8)));
        else
          load_matrices<2, false>(right, shared_at(b + S::slot(b_row, c + lane / 8 % 2)));
        multiply_16<kBf16>(s[j], left[c / 2], right);
        if (c + 4 <= S::kChunks) multiply_16<kBf16>(s[j], left[c / 2 + 1], right + 2);
      }
    }
  }

  // columns 8 c to 8 c + 15 of rows 16 k to 16 k + 15, as the right side of two products
  __device__ __forceinline__ void load_columns(const Chunk* b, int k, int c, uint32_t (&right)[4]) const {
    const int at = 16 * k + lane % 16;
    load_matrices<4, true>(right, shared_at(b + S::slot(at < S::kRows ? at : S::kRows - 1, c + lane / 16)));
  }

  // d = this warp's rows of scores, in registers, times a tile
  __device__ __forceinline__ void multiply_scores(const float (&s)[S::kTiles][4], const Chunk* b,
                                                  float (&d)[S::kChunks][4]) const {
    for (int c = 0; c < S::kChunks; ++c)
      for (int e = 0; e < 4; ++e) d[c][e] = 0.0f;
#pragma unroll
    for (int k = 0; k < S::kTiles / 2; ++k) {
      const uint32_t left[4] = {pack<kBf16>(s[2 * k][0], s[2 * k][1]), pack<kBf16>(s[2 * k][2], s[2 * k][3]),
                                pack<kBf16>(s[2 * k + 1][0], s[2 * k + 1][1]),
                                pack<kBf16>(s[2 * k + 1][2], s[2 * k + 1][3])};
#pragma unroll
      for (int c = 0; c < S::kChunks; c += 2) {
        uint32_t right[4];
        load_columns(b, k, c, right);
        multiply_16<kBf16>(d[c], left, right);
        multiply_16<kBf16>(d[c + 1], left, right + 2);
      }
    }
    if constexpr (S::kTiles % 2 == 1) {
      constexpr int j = S::kTiles - 1;
      const uint32_t left[2] = {pack<kBf16>(s[j][0], s[j][1]), pack<kBf16>(s[j][2], s[j][3])};
#pragma unroll
      for (int c = 0; c < S::kChunks; c += 2) {
        uint32_t right[2];
        load_matrices<2, true>(right, shared_at(b + S::slot(8 * j + lane % 8, c + lane / 8 % 2)));
        multiply_8<kBf16>(d[c], left, right);
        multiply_8<kBf16>(d[c + 1], left, right + 1);
      }
    }
  }

  // d = this warp's keys of scores, in shared memory, times a tile of queries
  __device__ __forceinline__ void multiply_turned(const Chunk* scores, const Chunk* b,
                                                  float (&d)[S::kChunks][4]) const {
    for (int c = 0; c < S::kChunks; ++c)
      for (int e = 0; e < 4; ++e) d[c][e] = 0.0f;
    const int column = 2 * warp + lane / 8 % 2, column_in = column < S::kTiles ? column : S::kTiles - 1;
#pragma unroll
    for (int k = 0; k < S::kWarps; ++k) {
      uint32_t left[4];
      load_matrices<4, true>(left,
                             shared_at(scores + (16 * k + lane % 8 + lane / 16 * 8) * S::kScorePitch + column_in));
#pragma unroll
      for (int c = 0; c < S::kChunks; c += 2) {
        uint32_t right[4];
        load_columns(b, k, c, right);
        multiply_16<kBf16>(d[c], left, right);
        multiply_16<kBf16>(d[c + 1], left, right + 2);
      }
    }
  }

  // from products of queries and keys to scores, times log2(e), by bias(half, i)
  template <typename Bias>
  __device__ __forceinline__ void finish_scores(int32_t window, int stage, float (&s)[S::kTiles][4],
                                                const Bias& bias) const {
    const float by = factor() * kLog2e, mask = call.mask * kLog2e;
    if constexpr (S::kCosine) {
      const float of_row[2] = {row < n ? inverses(0)[row] * by : 0.0f, row + 8 < n ? inverses(0)[row + 8] * by : 0.0f};
#pragma unroll
      for (int j = 0; j < S::kTiles; ++j)
        for (int e = 0; e < 4; ++e)
          s[j][e] = s[j][e] * (of_row[e / 2] * inverses(1)[8 * j + lane % 4 * 2 + e % 2]) + bias(e / 2, 2 * j + e % 2);
    } else {
#pragma unroll
      for (int j = 0; j < S::kTiles; ++j)
        for (int e = 0; e < 4; ++e) s[j][e] = s[j][e] * by + bias(e / 2, 2 * j + e % 2);
    }
    const bool last_row = window % windows.per_image / windows.across == windows.per_image / windows.across - 1;
    const uint32_t seams = last_row | (window % windows.across == windows.across - 1) << 1;
    if (seams != 0 && (call.shift[0] | call.shift[1]) != 0)
#pragma unroll
      for (int j = 0; j < S::kTiles; ++j)
        for (int e = 0; e < 4; ++e)
          if (((key_regions >> 2 * (2 * j + e % 2) ^ row_regions[e / 2]) & seams) != 0) s[j][e] += mask;
    if (call.group != nullptr) {
      const int32_t* id = ids(stage);
      const int32_t row_id[2] = {row < n ? id[row] : -1, row + 8 < n ? id[row + 8] : -1};
#pragma unroll
      for (int i = 0; i < 2 * S::kTiles; ++i) {
        const int32_t key_id = id[i / 2 * 8 + lane % 4 * 2 + i % 2];
        for (int half = 0; half < 2; ++half)
          if (key_id != row_id[half] && key_id >= 0 && row_id[half] >= 0) s[i / 2][2 * half + i % 2] = -INFINITY;
      }
    }
  }

  // 2^(s - the row's largest), and the sum of each row
  __device__ __forceinline__ void exponentials(float (&s)[S::kTiles][4], float (&total)[2]) const {
    float top[2] = {s[0][0], s[0][2]};
#pragma unroll
    for (int j = 0; j < S::kTiles; ++j)
      for (int e = 0; e < 4; ++e) top[e / 2] = fmaxf(top[e / 2], s[j][e]);
    for (int half = 0; half < 2; ++half) {
      top[half] = fmaxf(top[half], __shfl_xor_sync(kAllLanes, top[half], 1));
      top[half] = fmaxf(top[half], __shfl_xor_sync(kAllLanes, top[half], 2));
      total[half] = 0.0f;
    }
#pragma unroll
    for (int j = 0; j < S::kTiles; ++j)
      for (int e = 0; e < 4; ++e) {
        s[j][e] = power_of_2(s[j][e] - top[e / 2]);
        total[e / 2] += s[j][e];
      }
    add_quads(total);
  }

  // sums over the four lanes of a row
  __device__ __forceinline__ static void add_quads(float (&sum)[2]) {
    for (int half = 0; half < 2; ++half) {
      sum[half] += __shfl_xor_sync(kAllLanes, sum[half], 1);
      sum[half] += __shfl_xor_sync(kAllLanes, sum[half], 2);
    }
  }

  // this warp's rows into a tile, of which no other warp reads them; then from there to their tokens, `pitch` apart
  __device__ __forceinline__ void store(Chunk* through, const uint32_t (&values)[S::kChunks][2], int stage,
                                        uint16_t* to, int64_t pitch) const {
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int c = 0; c < S::kChunks; ++c)
        if (row + 8 * half < n && 8 * c < call.head)
          through[S::slot(row + 8 * half, c)].word[lane % 4] = values[c][half];
    __syncwarp();
#pragma unroll
    for (int k = 0; k < S::kChunks / 2; ++k) {
      const int at = lane + 32 * k, i = 16 * warp + at / S::kChunks, c = at % S::kChunks;
      const int32_t place = i < n ? places(stage)[i] : -1;
      if (place >= 0 && 8 * c < call.head)
        *reinterpret_cast<Chunk*>(to + place * pitch + 8 * c) = through[S::slot(i, c)];
    }
    __syncwarp();  // the rows may be written again
  }

  // two values of a chunk in each half of the rows, with factors
  __device__ __forceinline__ static void pack_rows(const float (&d)[S::kChunks][4], float upper, float lower,
                                                   uint32_t (&values)[S::kChunks][2]) {
#pragma unroll
    for (int c = 0; c < S::kChunks; ++c) {
      values[c][0] = pack<kBf16>(d[c][0] * upper, d[c][1] * upper);
      values[c][1] = pack<kBf16>(d[c][2] * lower, d[c][3] * lower);
    }
  }

  // this warp's rows of P (0) or dS (1), with factors
  __device__ __forceinline__ void put_scores(int which, const float (&s)[S::kTiles][4], float upper = 1.0f,
                                             float lower = 1.0f) const {
    for (int half = 0; half < 2; ++half) {
      Chunk* to = scores_tile(which) + (row + 8 * half) * S::kScorePitch;
#pragma unroll
      for (int j = 0; j < S::kTiles; ++j) {
        const float by = half == 0 ? upper : lower;
        to[j].word[lane % 4] = pack<kBf16>(s[j][2 * half] * by, s[j][2 * half + 1] * by);
      }
    }
  }

  // adds rows of dk (0) or dv (1) that are padding to this warp's sums; only lanes 0 to 3 have some
  __device__ __forceinline__ void add_padding(int which, const float (&d)[S::kChunks][4], float factor,
                                              int stage) const {
    const bool upper = row < n && places(stage)[row] < 0, lower = row + 8 < n && places(stage)[row + 8] < 0;
    if (__ballot_sync(kAllLanes, upper || lower) == 0) return;
    float* sums = pads(own) + warp * S::kPads + which * S::kD;
#pragma unroll
    for (int c = 0; c < S::kChunks; ++c)
      for (int e = 0; e < 2; ++e) {
        float sum = (upper ? d[c][e] : 0.0f) + (lower ? d[c][2 + e] : 0.0f);
        for (int flip = 4; flip < 32; flip *= 2) sum += __shfl_xor_sync(kAllLanes, sum, flip);
        if (lane < 4) sums[8 * c + 2 * lane + e] += sum * factor;
      }
  }

  // the sums of this block, by way of the stages; called when those are free
  __device__ __forceinline__ void store_partial(const float (&d_scores)[S::kTiles][4], float d_factor) const {
    static_assert(2 * S::kStage * 16 >= S::kHeads * S::kRows * S::kRows * 4, "dS of a block fits");
    float* all = reinterpret_cast<float*>(shared);  // [kHeads, keys, queries]
    for (int e = 0; e < 4; ++e)
#pragma unroll
      for (int j = 0; j < S::kTiles; ++j) {
        const int key = 8 * j + lane % 4 * 2 + e % 2, query = row + e / 2 * 8;
        if (key < n && query < n) all[(own * n + key) * n + query] = d_scores[j][e];
      }
    if constexpr (S::kCosine) {
      for (int flip = 1; flip < 32; flip *= 2) d_factor += __shfl_xor_sync(kAllLanes, d_factor, flip);
      if (lane == 0) inverses(0)[warp] = d_factor;
    }
    __syncthreads();
    const int32_t wide = 2 * call.window[1] - 1, offsets = (2 * call.window[0] - 1) * wide;
    for (int at = threadIdx.x; at < S::kHeads * columns(); at += S::kThreads) {
      const int h = at / columns(), column = at % columns();
      if (first_head + h >= call.heads) continue;
      float sum = 0.0f;
      if (column < offsets) {
        const int32_t dy = column / wide - (call.window[0] - 1), dx = column % wide - (call.window[1] - 1);
        const float* from = all + h * n * n + dy * call.window[1] + dx;
        for (int32_t y = dy < 0 ? -dy : 0; y < call.window[0] - (dy > 0 ? dy : 0); ++y)
          for (int32_t x = 0; x < call.window[1]; ++x)
            if (x + dx >= 0 && x + dx < call.window[1]) sum += from[(y * call.window[1] + x) * (n + 1)];
      } else if (S::kCosine && column == offsets + 2 * call.head) {
        for (int w = 0; w < S::kWarps; ++w) sum += inverses(0)[w];
      } else {
        const int32_t which = (column - offsets) / call.head, d = (column - offsets) % call.head;
        for (int w = 0; w < S::kWarps; ++w) sum += pads(h)[w * S::kPads + which * S::kD + d];
      }
      windows.partial[(int64_t{part} * call.heads + first_head + h) * columns() + column] = sum;
    }
  }
};

}  // namespace window_tiles
}  // namespace mimfast
