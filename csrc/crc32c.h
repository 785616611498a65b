// crc32c: the checksum of a store's records (Castagnoli polynomial, RFC 3720 appendix B.4).
#pragma once

#include <cstdint>

namespace mimfast {

// data [n] bytes. crc: 0, or the checksum of what came before. portable: tables even where the processor has an
// instruction, so that tests reach them.
uint32_t crc32c_cpu(const uint8_t* data, int64_t n, uint32_t crc, bool portable);

}  // namespace mimfast
