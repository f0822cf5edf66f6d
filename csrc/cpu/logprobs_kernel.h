// linear_logprobs over tiles of logits, in one pass. A logit that is asked for by its id, or that is among the largest
// so far, is taken out of its tile before the tile is summed; one that falls behind later is added again. So every tail
// is a sum over what it consists of, never 1 minus the rest.
#pragma once

#include "cpu/distill_rows.h"
#include "cpu/largest.h"
#include "cpu/logit_tiles.h"

namespace bbopd::cpu::BBOPD_ISA {

// A logit and its id as one number: the larger logit is the larger key, and of equal logits the lower id.
inline std::uint64_t to_key(float logit, Index id) {
  const float z = logit + 0.0F;  // -0 becomes 0
  std::uint32_t bits;
  std::memcpy(&bits, &z, sizeof bits);
  bits = (bits & 0x80000000U) != 0 ? ~bits : bits | 0x80000000U;
  return static_cast<std::uint64_t>(bits) << 32 | static_cast<std::uint32_t>(~id);
}
inline float logit_of(std::uint64_t key) {
  std::uint32_t bits = static_cast<std::uint32_t>(key >> 32);
  bits = (bits & 0x80000000U) != 0 ? bits & 0x7fffffffU : ~bits;
  float z;
  std::memcpy(&z, &bits, sizeof z);
  return z;
}
inline Index id_of(std::uint64_t key) { return static_cast<std::uint32_t>(~key); }

using TokenSum = rows::LogSumExp<double>;

template <class G>
class Logprobs {
 public:
  Logprobs(const LogprobsArguments& arguments, const Products& products)
      : a(arguments),
        vocabulary(a.V, a.threads),
        head(a.head, a.N, vocabulary, products),
        temper(a.temperature),
        block(vocabulary.block),
        slots(vocabulary.slots) {
    limit = a.K + larger(64, a.K);
    capacity = round_up(limit + block, kLanes);
    const Index kept = slots * static_cast<Index>(a.K > 0 ? capacity * sizeof(std::uint64_t) : sizeof(std::uint64_t));
    chunk = smaller(a.N, round_up(larger(kChunkBytes / kept, kGroupTokens), kTokens));
    sums = Buffer(bytes<Sums>(slots * chunk));
    keys = Buffer(a.K > 0 ? bytes<std::uint64_t>(slots * chunk * capacity) : 0);
    best = Buffer(a.K > 0 ? bytes<Best>(slots * chunk) : 0);
    tiles = Buffer(bytes<float>(slots * kTokens * block));
    cursors = Buffer(bytes<Index>(slots * chunk));
    candidate_logits = Buffer(bytes<float>(a.N * a.M));
    scratch_keys = slots * capacity + a.M;
    scratch = Buffer(bytes<std::uint64_t>(larger(slots, a.threads) * scratch_keys));
    scratch_logits = Buffer(bytes<float>(larger(slots, a.threads) * round_up(scratch_keys, kLanes)));
  }

  void run() {
    for (start = 0; start < a.N; start += chunk) {
      const Index count = smaller(chunk, a.N - start);
      parallel(slots, [&](int slot) { sweep(slot, count); });
      for_each_token(a.threads, count, [&](int slot, Index i) { settle(slot, i); });
    }
  }

 private:
  static constexpr Index kChunkBytes = Index{32}
                                       << 20;  // of keys; so many tokens share a visit to a block of the weight

  struct Best {
    float cut;  // no logit at or below it is among the largest of the slot
    Index count;
  };

  template <class T>
  static std::size_t bytes(Index count) {
    return static_cast<std::size_t>(count) * sizeof(T);
  }

  void sweep(int slot, Index count) {
    for (Index i = 0; i < count; ++i) {
      sums.as<Sums>()[slot * chunk + i] = {vf{}, vf{}, -__builtin_inff()};
      if (a.K > 0) best.as<Best>()[slot * chunk + i] = {-__builtin_inff(), 0};
      cursors.as<Index>()[slot * chunk + i] = 0;
    }
    float* const z = tiles.as<float>() + slot * kTokens * block;
    for (Index b = vocabulary.first_of(slot); b < vocabulary.first_of(slot + 1); ++b) {
      const Index first = vocabulary.begin(b), entries = vocabulary.count(b);
      head.load(slot, first, entries);
      for (Index i = 0; i < count; i += kTokens) {
        const Index rows = smaller(kTokens, count - i);
        head.write(slot, start + i, rows, z);
        for (Index r = 0; r < rows; ++r) read_row(slot, i + r, first, entries, z + r * block);
      }
    }
    head.release();
  }

  void read_row(int slot, Index i, Index first, Index entries, float* z) {
    const Index n = start + i;
    if (a.token_ids != nullptr && a.token_ids[n] >= first && a.token_ids[n] < first + entries)
      a.sampled[n] = z[a.token_ids[n] - first];
    if (a.M > 0) {
      // the ids of a token ascend, and so do the blocks of a slot
      const std::int32_t* const ids = a.candidate_ids + n * a.M;
      Index& k = cursors.as<Index>()[slot * chunk + i];
      while (k < a.M && ids[k] < first) ++k;
      for (; k < a.M && ids[k] < first + entries; ++k) {
        candidate_logits.as<float>()[n * a.M + k] = z[ids[k] - first];
        z[ids[k] - first] = -__builtin_inff();
      }
    }
    Sums& sum = sums.as<Sums>()[slot * chunk + i];
    if (a.K > 0) collect(slot, i, first, z, sum);
    add_row(z, static_cast<int>(block), temper, false, sum);
  }

  void collect(int slot, Index i, Index first, float* z, Sums& sum) {
    Best& found = best.as<Best>()[slot * chunk + i];
    std::uint64_t* const row = keys.as<std::uint64_t>() + (slot * chunk + i) * capacity;
    const vf cut = fill(found.cut);
    for (Index c = 0; c < block; c += kLanes) {
      for (std::uint32_t hits = lanes_of(load(z + c) > cut); hits != 0; hits &= hits - 1) {
        const Index at = c + __builtin_ctz(hits);
        row[found.count++] = to_key(z[at], first + at);
        z[at] = -__builtin_inff();
      }
    }
    if (found.count > limit) {
      select_largest(row, found.count, a.K);
      add_keys(slot, row + a.K, found.count - a.K, sum);
      found = {logit_of(row[a.K - 1]), a.K};
    }
  }

  void add_keys(int slot, const std::uint64_t* from, Index count, Sums& sum) {
    if (count == 0) return;
    float* const z = scratch_logits.as<float>() + slot * round_up(scratch_keys, kLanes);
    const Index padded = round_up(count, kLanes);
    for (Index k = 0; k < count; ++k) z[k] = logit_of(from[k]);
    for (Index k = count; k < padded; ++k) z[k] = -__builtin_inff();
    add_row(z, static_cast<int>(padded), temper, false, sum);
  }

  TokenSum total(const Sums& sum) const {
    return {static_cast<double>(sum.max) * temper.inverse, sum_lanes(sum.tempered)};
  }

  TokenSum total_of_keys(int slot, const std::uint64_t* from, Index count) {
    Sums sum{vf{}, vf{}, -__builtin_inff()};
    add_keys(slot, from, count, sum);
    return total(sum);
  }

  void settle(int slot, Index i) {
    const Index n = start + i;
    TokenSum rest;  // of what no list holds
    for (int s = 0; s < slots; ++s) rest.merge(total(sums.as<Sums>()[s * chunk + i]));
    std::uint64_t* const all = scratch.as<std::uint64_t>() + slot * scratch_keys;
    Index count = 0;
    for (int s = 0; a.K > 0 && s < slots; ++s) {
      const Best& found = best.as<Best>()[s * chunk + i];
      std::memcpy(all + count, keys.as<std::uint64_t>() + (s * chunk + i) * capacity,
                  bytes<std::uint64_t>(found.count));
      count += found.count;
    }
    TokenSum outside = rest;
    if (a.M > 0) outside.merge(total_of_keys(slot, all, count));
    const std::int32_t* const ids = a.candidate_ids + n * a.M;
    const float* const logits = candidate_logits.as<float>() + n * a.M;
    Index asked = 0;
    for (Index k = 0; k < a.M; ++k)
      if (ids[k] >= 0 && !(logits[k] == -__builtin_inff())) all[count + asked++] = to_key(logits[k], ids[k]);
    TokenSum whole = outside;
    whole.merge(total_of_keys(slot, all + count, asked));
    if (a.K > 0) {
      count += asked;
      const Index k = smaller(a.K, count);
      if (k > 0) select_largest(all, count, k);
      TokenSum tail = rest;
      tail.merge(total_of_keys(slot, all + k, count - k));
      whole = tail;
      whole.merge(total_of_keys(slot, all, k));
      sort_descending(all, k);
      const double lse = whole.value();
      for (Index j = 0; j < k; ++j) {
        a.topk_ids[n * a.K + j] = id_of(all[j]);
        a.topk_logprobs[n * a.K + j] = logprob(logit_of(all[j]), lse);
      }
      fill_up(n, k);
      a.log_tail[n] = static_cast<float>(tail.value() - lse);
    }
    const double lse = whole.value();
    a.logsumexp[n] = static_cast<float>(lse);
    if (a.token_ids != nullptr) a.sampled[n] = logprob(a.sampled[n], lse);
    for (Index k = 0; k < a.M; ++k)
      a.candidates[n * a.M + k] = ids[k] >= 0 ? logprob(logits[k], lse) : -__builtin_inff();
    if (a.M > 0) a.candidates_log_tail[n] = static_cast<float>(outside.value() - lse);
  }

  float logprob(float logit, double lse) const {
    return static_cast<float>(static_cast<double>(logit) / a.temperature - lse);
  }

  // Where fewer than K logits are above -inf, the lowest of the other ids take the places that are left.
  void fill_up(Index n, Index filled) {
    std::int64_t* const ids = a.topk_ids + n * a.K;
    Index id = 0;
    for (Index k = filled; k < a.K; ++id) {
      bool is_taken = false;
      for (Index j = 0; j < filled; ++j) is_taken |= ids[j] == id;
      if (is_taken) continue;
      ids[k] = id;
      a.topk_logprobs[n * a.K + k++] = -__builtin_inff();
    }
  }

  const LogprobsArguments& a;
  const Vocabulary vocabulary;
  HeadLogits<G> head;
  const Temper temper;
  const Index block;
  const int slots;
  Index limit, capacity, chunk, scratch_keys, start = 0;
  Buffer sums, keys, best, tiles, cursors, candidate_logits, scratch, scratch_logits;
};

}  // namespace bbopd::cpu::BBOPD_ISA
