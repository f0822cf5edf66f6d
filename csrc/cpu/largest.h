// Selection among keys: compiled once for the baseline instruction set, as what it calls of the standard library is.
#pragma once

#include <cstdint>

#include "cpu/arguments.h"

namespace bbopd::cpu {

// Brings the `k` largest of `count` keys to the front, the k-th largest of all at position k - 1; 0 < k <= count.
void select_largest(std::uint64_t* keys, Index count, Index k);
void sort_descending(std::uint64_t* keys, Index count);

}  // namespace bbopd::cpu
