// The K largest logits of a row, exactly: radix select (Alabi et al., "Fast k-selection algorithms for graphics
// processing units", 2012) over keys of which no two are equal. What it counts are integers, so that the order of
// threads does not matter.
#pragma once

#include "cuda/statistics_rows.h"

namespace bbopd::cuda {

using Key = std::uint64_t;

// Unsigned integers in the order of the logits; -0 is 0, NaN is beyond the infinity of its sign.
BBOPD_IN_BLOCK std::uint32_t order_of(float z) {
  const std::uint32_t bits = bits_of(z == 0.0F ? 0.0F : z);
  return bits ^ ((bits >> 31) != 0 ? 0xffffffffU : 0x80000000U);
}

// The lower id is the larger key.
BBOPD_IN_BLOCK Key key_of(float z, int column) {
  return static_cast<Key>(order_of(z)) << 32 | (0xffffffffU - static_cast<std::uint32_t>(column));
}

// Shared memory of a block.
struct TopKRoom {
  static constexpr int kKeys = 2048, kDigits = 256;
  static_assert(kDigits == kThreads, "a thread a digit");
  Key keys[kKeys];
  int counts[kDigits], sums[2][kDigits];
  int found, digit, above;
};

template <class Block>
struct TopKRow {
  Block& block;
  const TopKArguments& a;
  bool aligned;
  Index row;
  TopKRoom& room;

  // Calls body(key) for the keys of a thread.
  template <class Body>
  BBOPD_IN_BLOCK void keys_of_row(int thread, Body body) const {
    for (int column = 4 * thread; column < a.V; column += kStep) {
      float z[4];
      read(a.logits, aligned, row, column, a.V, z);
      for (int i = 0; i < 4; ++i)
        if (column + i < a.V) body(key_of(z[i], column + i));
    }
  }
  template <class Body>
  BBOPD_IN_BLOCK void keys_of(bool in_room, int thread, Body body) const {
    if (in_room) {
      for (int k = thread; k < room.found; k += kThreads) body(room.keys[k]);
    } else {
      keys_of_row(thread, body);
    }
  }

  // A bound that K keys or more reach, and few others: the K-th largest of the threads' own largest.
  BBOPD_IN_BLOCK std::uint32_t floor() {
    typename Block::template PerThread<std::uint32_t> best;
    block.lanes([&](int thread) {
      Key largest = 0;
      keys_of_row(thread, [&](Key key) { largest = key > largest ? key : largest; });
      best[thread] = static_cast<std::uint32_t>(largest >> 32);
    });
    std::uint32_t cut = 0;
    for (std::uint32_t bit = 0x80000000U; bit != 0; bit >>= 1) {
      const std::uint32_t higher = cut | bit;
      if (block.count([&](int thread) { return best[thread] >= higher; }) >= a.K) cut = higher;
    }
    return cut;
  }

  // Copies the keys from the bound on to shared memory; whether there was room for all of them.
  BBOPD_IN_BLOCK bool gather(std::uint32_t bound) {
    block.each([&](int thread) {
      if (thread == 0) room.found = 0;
    });
    block.each([&](int thread) {
      keys_of_row(thread, [&](Key key) {
        if (key >> 32 < bound) return;
        const int place = block.add(room.found, 1);
        if (place < TopKRoom::kKeys) room.keys[place] = key;
      });
    });
    return room.found <= TopKRoom::kKeys;
  }

  // The smallest key that is kept, but for bits that make no difference: digit by digit, the highest first.
  BBOPD_IN_BLOCK Key smallest(bool in_room) {
    Key prefix = 0;
    int wanted = a.K;  // of the keys that begin like the prefix
    for (int shift = 56; shift >= 0; shift -= 8) {
      block.each([&](int thread) { room.counts[thread] = 0; });
      block.each([&](int thread) {
        keys_of(in_room, thread, [&](Key key) {
          if ((key ^ prefix) >> shift >> 8 == 0) block.add(room.counts[key >> shift & 255], 1);
        });
      });
      // how many have this digit or a higher one
      block.each([&](int thread) { room.sums[0][thread] = room.counts[thread]; });
      int from = 0;
      for (int apart = 1; apart < TopKRoom::kDigits; apart *= 2) {
        block.each([&](int thread) {
          const int other = thread + apart;
          room.sums[1 - from][thread] =
              room.sums[from][thread] + (other < TopKRoom::kDigits ? room.sums[from][other] : 0);
        });
        from = 1 - from;
      }
      block.each([&](int thread) {
        const int above = thread + 1 < TopKRoom::kDigits ? room.sums[from][thread + 1] : 0;
        if (room.sums[from][thread] >= wanted && above < wanted) {
          room.digit = thread;
          room.above = above;
        }
      });
      prefix |= static_cast<Key>(room.digit) << shift;
      wanted -= room.above;
      const bool is_all = room.counts[room.digit] == wanted;
      block.barrier();
      if (is_all) break;
    }
    return prefix;
  }

  BBOPD_IN_BLOCK void run() {
    bool in_room = false;
    if (a.K <= kThreads) {
      in_room = gather(floor());
    } else if (a.V <= TopKRoom::kKeys) {
      in_room = gather(0);
    }
    const Key cut = smallest(in_room);
    block.each([&](int thread) {
      if (thread == 0) room.above = 0;
    });
    block.lanes([&](int thread) {
      keys_of(in_room, thread, [&](Key key) {
        if (key < cut) return;
        const int place = block.add(room.above, 1);
        a.keys[row * a.K + place] = static_cast<std::int64_t>(key ^ Key{1} << 63);
      });
    });
  }
};

}  // namespace bbopd::cuda
