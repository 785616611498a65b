// mask_pack: index lists of a given map of hidden tokens; see mimfast/ops/mask_pack.py for the layout.
// B images, L tokens, K kept tokens.
#pragma once

#include <cstdint>

struct CUstream_st;  // cudaStream_t without the toolkit

namespace mimfast {

struct MaskPack {
  // inputs
  const bool* hidden;  // [B, L]
  int64_t batch, tokens;
  int64_t visible;      // K, the number every image keeps, or -1: they differ and the lists are packed
  int64_t most_hidden;  // packed: `hide` has room for this many tokens of every image
  // scratch of the packed layout: [B], tokens kept by each image
  int32_t* kept;
  // outputs: nothing is written outside them, whatever `hidden` holds
  int64_t* keep;        // [B, K], or [B * L] packed, -1 behind the last image
  int64_t* inverse;     // [B, L]
  int64_t* hide;        // [B, L - K], or [B * most_hidden] packed, -1 behind the last image
  int32_t* cu_seqlens;  // packed: [B + 1]
};

void mask_pack_cpu(const MaskPack& pack, int threads);
void mask_pack_cuda(const MaskPack& pack, CUstream_st* stream);

}  // namespace mimfast
