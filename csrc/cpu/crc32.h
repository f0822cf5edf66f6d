// CRC-32 as zlib computes it, several times faster where the processor multiplies without carries.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bbopd::cpu {

// The checksum of what `start` is the checksum of, followed by these bytes; 0 is that of nothing.
std::uint32_t crc32(const std::uint8_t* data, std::size_t size, std::uint32_t start);

}  // namespace bbopd::cpu
