// Two tokenisations of one text, side by side: where both have a boundary after the same bytes.
#pragma once

#include <cstdint>

#include "cpu/arguments.h"

namespace bbopd::cpu {

// Some tokens, and what each id of their vocabulary puts into a text: bytes[offsets[id]] up to bytes[offsets[id + 1]],
// where is_text[id].
struct Tokens {
  const std::int64_t* ids;
  Index count;
  const std::int64_t* offsets;
  const std::uint8_t* bytes;
  const std::uint8_t* is_text;
  Index vocabulary;
};

// Writes the pair of token counts, of `first` and of `second`, up to the end of each group: the smallest runs of tokens
// on both sides that spell the same bytes. Stops at the first byte that differs, and at an id that is no text. Tokens
// without bytes belong to the group before them, at the start to the first. `ends` has room for twice the smaller
// count; returns the number of groups.
Index align_tokens(const Tokens& first, const Tokens& second, std::int64_t* ends);

}  // namespace bbopd::cpu
