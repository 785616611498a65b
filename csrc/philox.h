// Philox4x32-10 for the host and the device, with the addressing of mimfast/philox.py; the two agree bit for bit.
// Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MIMFAST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MIMFAST_HOST_DEVICE inline
#endif

namespace mimfast {

constexpr uint32_t kStreamMask = 1;
constexpr uint32_t kStreamCrop = 2;
constexpr uint32_t kStreamOrder = 3;
constexpr uint32_t kStreamReplace = 4;
constexpr uint32_t kStreamBlock = 5;
constexpr uint32_t kStreamTube = 6;

struct PhiloxBlock {
  uint32_t word[4];
};

MIMFAST_HOST_DEVICE PhiloxBlock philox4x32(PhiloxBlock counter, uint32_t key0, uint32_t key1) {
  uint32_t c0 = counter.word[0], c1 = counter.word[1], c2 = counter.word[2], c3 = counter.word[3];
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53} * c0;
    const uint64_t product1 = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
    c3 = static_cast<uint32_t>(product0);
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  return {{c0, c1, c2, c3}};
}

// words 4 * block .. 4 * block + 3 of `stream` for one sample; block < 2^24, the low 32 bits of the epoch count
MIMFAST_HOST_DEVICE PhiloxBlock philox_words(uint64_t seed, uint32_t stream, int64_t epoch, int64_t sample_id,
                                             uint32_t block) {
  const PhiloxBlock counter = {{stream << 24 | block, static_cast<uint32_t>(epoch), static_cast<uint32_t>(sample_id),
                                static_cast<uint32_t>(static_cast<uint64_t>(sample_id) >> 32)}};
  return philox4x32(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

}  // namespace mimfast
