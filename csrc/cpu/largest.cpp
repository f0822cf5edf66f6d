#include "cpu/largest.h"

#include <algorithm>
#include <functional>

namespace bbopd::cpu {

void select_largest(std::uint64_t* keys, Index count, Index k) {
  if (k < count) {
    std::nth_element(keys, keys + k - 1, keys + count, std::greater<>());
  } else {
    std::iter_swap(keys + k - 1, std::min_element(keys, keys + count));
  }
}

void sort_descending(std::uint64_t* keys, Index count) { std::sort(keys, keys + count, std::greater<>()); }

}  // namespace bbopd::cpu
