// Rows of a teacher's answer, checked and copied into other types of numbers while they are in cache.
//
// `bbopd.rpc.signals.check_signal` is the rule, in NumPy. What it refuses is never accepted here; what is only just
// accepted there, where another order of adding may decide, is left to it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/arguments.h"
#include "cpu/simd.h"

namespace bbopd::cpu::BBOPD_ISA {

class SignalChecker {
 public:
  explicit SignalChecker(const SignalRows& rows)
      : a_(rows),
        padded_((rows.K + kLanes - 1) / kLanes * kLanes),
        logprobs_(static_cast<std::size_t>(padded_) + kLanes, -std::numeric_limits<float>::infinity()),
        ids_(static_cast<std::size_t>(padded_)),
        seen_(rows.is_ranked ? static_cast<std::size_t>(rows.V + 63) / 64 : 0),
        most_off_(kMassTolerance - 1e-5F - 1.2e-7F * static_cast<float>(rows.K)) {}

  bool run() {
    for (Index row = 0; row < a_.N; ++row) {
      load_row(row);
      if (!check_row(row)) return false;
    }
    return true;
  }

 private:
  static constexpr float kMassTolerance = 2e-3F, kAboveZero = 1e-4F, kHalfStep = 1.0F / 1024.0F,
                         kLargestHalf = 65504.0F;

  // Into memory of our own, in one type each; behind the row is no mass, and its first id again.
  void load_row(Index row) {
    const Index K = a_.K, at = row * K;
    if (a_.logprobs != nullptr) {
      std::memcpy(logprobs_.data(), a_.logprobs + at, static_cast<std::size_t>(K) * sizeof(float));
    } else {
      Index i = 0;
      for (; i + kLanes <= K; i += kLanes) store(&logprobs_[i], from_half(a_.half_logprobs + at + i));
      if (i < K) {
        std::uint16_t rest[kLanes];
        std::fill_n(rest, kLanes, std::uint16_t{0xfc00});
        std::memcpy(rest, a_.half_logprobs + at + i, static_cast<std::size_t>(K - i) * sizeof(std::uint16_t));
        store(&logprobs_[i], from_half(rest));
      }
    }
    if (a_.ids != nullptr) {
      std::memcpy(ids_.data(), a_.ids + at, static_cast<std::size_t>(K) * sizeof(std::int32_t));
    } else {
      std::copy_n(a_.small_ids + at, K, ids_.data());
    }
    std::fill(ids_.begin() + K, ids_.end(), ids_[0]);
  }

  bool check_row(Index row) {
    const std::int32_t target = a_.targets[row];
    const float tail = a_.log_tail[row], own = a_.sampled[row];
    const vf above_zero = fill(kAboveZero), smallest = fill(-kLargestHalf);
    const bool is_sent = a_.half_logprobs_out != nullptr;
    vi good = vi{} - 1;
    vf sum{};
    bool own_agrees = true;
    for (Index i = 0; i < padded_; i += kLanes) {
      const vf x = load(&logprobs_[i]);
      vi id;
      std::memcpy(&id, &ids_[i], sizeof id);
      good &= x <= above_zero;  // false for NaN
      if (a_.is_ranked) {
        good &= load(&logprobs_[i + 1]) <= x;
        good &= (id >= 0) & (id < static_cast<std::int32_t>(a_.V));
      }
      if (is_sent) good &= (x >= smallest) | (x == -std::numeric_limits<float>::infinity());
      sum += exponential(x);
      for (std::uint32_t found = lanes_of(id == target); found != 0; found &= found - 1) {
        const Index at = i + __builtin_ctz(found);
        own_agrees &= at >= a_.K || agrees(logprobs_[at], own);
      }
    }
    if (any(~good) || !(tail <= kAboveZero) || !(own <= kAboveZero)) return false;
    if (a_.is_ranked && has_repeated_id()) return false;
    const float mass = sum_lanes(sum) + std::exp(tail);
    if (!(std::fabs(mass - 1.0F) <= most_off_)) return false;
    if (!own_agrees) return false;
    write_row(row, std::log(mass));
    return true;
  }

  // Marks every id and takes the marks away again: no pass over the vocabulary for each row.
  bool has_repeated_id() {
    std::uint64_t repeated = 0;
    for (Index i = 0; i < a_.K; ++i) {
      const auto id = static_cast<std::uint32_t>(ids_[i]);
      std::uint64_t& word = seen_[id / 64];
      repeated |= word >> (id % 64);
      word |= std::uint64_t{1} << (id % 64);
    }
    for (Index i = 0; i < a_.K; ++i) seen_[static_cast<std::uint32_t>(ids_[i]) / 64] = 0;
    return (repeated & 1U) != 0;
  }

  static bool agrees(float told, float own) {
    const float allowed = kMassTolerance + kHalfStep * std::min(std::fabs(told), std::fabs(own));
    return told == own || std::fabs(told - own) <= allowed;
  }

  void write_row(Index row, float log_mass) {
    const Index K = a_.K, at = row * K;
    if (a_.logprobs_out != nullptr) {
      for (Index i = 0; i < padded_; i += kLanes) store(&logprobs_[i], load(&logprobs_[i]) - log_mass);
      std::memcpy(a_.logprobs_out + at, logprobs_.data(), static_cast<std::size_t>(K) * sizeof(float));
    }
    if (a_.half_logprobs_out != nullptr) {
      Index i = 0;
      for (; i + kLanes <= K; i += kLanes) to_half(a_.half_logprobs_out + at + i, load(&logprobs_[i]));
      if (i < K) {
        std::uint16_t rest[kLanes];
        to_half(rest, load(&logprobs_[i]));
        std::memcpy(a_.half_logprobs_out + at + i, rest, static_cast<std::size_t>(K - i) * sizeof(std::uint16_t));
      }
    }
    if (a_.log_tail_out != nullptr) a_.log_tail_out[row] = a_.log_tail[row] - log_mass;
    if (a_.ids_out != nullptr)
      std::memcpy(a_.ids_out + at, ids_.data(), static_cast<std::size_t>(K) * sizeof(std::int32_t));
    if (a_.small_ids_out != nullptr)
      std::transform(ids_.begin(), ids_.begin() + K, a_.small_ids_out + at,
                     [](std::int32_t id) { return static_cast<std::uint16_t>(id); });
  }

  const SignalRows& a_;
  const Index padded_;
  std::vector<float> logprobs_;
  std::vector<std::int32_t> ids_;
  std::vector<std::uint64_t> seen_;
  const float most_off_;
};

inline bool are_good(const SignalRows& rows) { return SignalChecker(rows).run(); }

}  // namespace bbopd::cpu::BBOPD_ISA
