// From gradients of logits, a group of tokens and a block of the vocabulary at a time, to those of hidden, weight and
// bias. A block of the weight's gradient is written once; each slot sums that of hidden, and the slots' sums are added
// in their order.
#pragma once

#include "cpu/gradient_rows.h"
#include "cpu/logit_tiles.h"

namespace bbopd::cpu::BBOPD_ISA {

template <class G>
class InputGradients {
  using T = typename G::T;

 public:
  InputGradients(const DistillArguments& arguments, const Products& products, const Vocabulary& all_entries)
      : a(arguments),
        torch(products),
        vocabulary(all_entries),
        block(vocabulary.block),
        width(round_up(a.student.hidden.columns, G::kPanel)),
        stride(width + kLanes),
        depth(round_up(kGroupTokens, 2 * kLanes)) {}

  bool are_wanted() const { return a.hidden_grad != nullptr || a.weight_grad != nullptr || a.bias_grad != nullptr; }
  Index groups() const { return (a.N + kGroupTokens - 1) / kGroupTokens; }

  // Once, before the first block.
  void prepare() {
    const Index slots = vocabulary.slots;
    bias_sums = Buffer(bytes<float>(slots * block));
    if (a.hidden_grad != nullptr) hidden_sums = Buffer(bytes<float>(slots * a.N * stride));
    if (a.hidden_grad != nullptr) weight_rows = Buffer(bytes<T>(slots * block * width));
    if (a.weight_grad != nullptr) {
      weight_sums = Buffer(bytes<float>(slots * block * stride));
      is_packed_once = static_cast<Index>(bytes<T>(groups() * depth * width)) <= kCopyBytes;
      hidden_packed = Buffer(bytes<T>((is_packed_once ? groups() : slots) * depth * width));
      hidden_rows = Buffer(bytes<T>(slots * depth * width));
      if (is_packed_once) pack_all();
    }
    if (G::kRowMajorLeft) {
      rounded = Buffer(bytes<T>(slots * depth * block));
      turned = Buffer(bytes<T>(slots * depth * block));
    }
  }

  // A slot takes up a block, whose rows of the weight are these.
  void begin(int slot, const typename HeadLogits<G>::Rows& rows) {
    if (a.hidden_grad != nullptr) pack<G>(rows.data, rows.stride, block, width, weight_of(slot));
    float* const bias = bias_of(slot);
    for (Index c = 0; c < block; ++c) bias[c] = 0.0F;
  }

  // Gradients of the logits [rows of the group, block]; there is room for those of a whole group. `is_first`: the
  // slot's first block.
  void add(int slot, Index group, float* logits, bool is_first) {
    const Index first = group * kGroupTokens, rows = smaller(kGroupTokens, a.N - first);
    if (a.bias_grad != nullptr) {
      float* const bias = bias_of(slot);
      for (Index r = 0; r < rows; ++r)
        for (Index c = 0; c < block; ++c) bias[c] += logits[r * block + c];
    }
    const T* left;
    const T* left_turned;
    Index turned_stride, turned_step;
    if constexpr (G::kRowMajorLeft) {
      T* const by_token = rounded.as<T>() + slot * depth * block;
      T* const by_entry = turned.as<T>() + slot * depth * block;
      round_rows(logits, rows, depth, block, by_token, by_entry);
      left = by_token, left_turned = by_entry;
      turned_stride = depth, turned_step = 1;
    } else {
      std::memset(logits + rows * block, 0, bytes<float>((kGroupTokens - rows) * block));
      left = left_turned = logits;
      turned_stride = 1, turned_step = block;
    }
    if (a.hidden_grad != nullptr)
      G::multiply(torch, rows, width, block, left, block, 1, weight_of(slot), hidden_of(slot) + first * stride, stride,
                  !is_first);
    if (a.weight_grad != nullptr)
      G::multiply(torch, block, width, depth, left_turned, turned_stride, turned_step, packed(slot, group),
                  sums_of(slot), stride, group != 0);
  }

  // A slot has added every group of a block.
  void end(int slot, Index b) {
    const Index first = vocabulary.begin(b), count = vocabulary.count(b), D = a.student.hidden.columns;
    if (a.weight_grad != nullptr)
      for (Index r = 0; r < count; ++r)
        write_row(sums_of(slot) + r * stride, D, a.weight_grad, (first + r) * D, a.weight_grad_type);
    if (a.bias_grad != nullptr) std::memcpy(a.bias_grad + first, bias_of(slot), bytes<float>(count));
  }

  // Once, after the last block of all slots.
  void finish() {
    if (a.hidden_grad == nullptr) return;
    for_each_token(a.threads, a.N, [this](int, Index n) {
      float* const all = hidden_sums.as<float>() + n * stride;
      for (int slot = 1; slot < vocabulary.slots; ++slot) {
        const float* const part = all + slot * a.N * stride;
        for (Index c = 0; c < width; c += kLanes) store(all + c, load(all + c) + load(part + c));
      }
      write_row(all, a.student.hidden.columns, a.hidden_grad, n * a.student.hidden.columns, a.hidden_grad_type);
    });
  }

  // Where there are no tokens.
  void zero() {
    const Index item = a.weight_grad_type == Type::float32 ? 4 : 2;
    if (a.weight_grad != nullptr)
      std::memset(a.weight_grad, 0, static_cast<std::size_t>(a.V * a.student.hidden.columns * item));
    if (a.bias_grad != nullptr) std::memset(a.bias_grad, 0, bytes<float>(a.V));
  }

 private:
  template <class Number>
  static std::size_t bytes(Index count) {
    return static_cast<std::size_t>(count) * sizeof(Number);
  }
  T* weight_of(int slot) const { return weight_rows.as<T>() + slot * block * width; }
  float* sums_of(int slot) const { return weight_sums.as<float>() + slot * block * stride; }
  float* hidden_of(int slot) const { return hidden_sums.as<float>() + slot * a.N * stride; }
  float* bias_of(int slot) const { return bias_sums.as<float>() + slot * block; }

  // A group's hidden states as the right-hand side of a product.
  const T* packed(int slot, Index group) {
    if (is_packed_once) return hidden_packed.as<T>() + group * depth * width;
    pack_group(slot, group, slot);
    return hidden_packed.as<T>() + slot * depth * width;
  }

  void pack_all() {
    const Index slots = smaller(vocabulary.slots, groups());
    parallel(static_cast<int>(slots), [&](int slot) {
      for (Index group = slot; group < groups(); group += slots) pack_group(slot, group, group);
    });
  }

  void pack_group(int slot, Index group, Index place) {
    const Index first = group * kGroupTokens;
    T* const rows = hidden_rows.as<T>() + slot * depth * width;
    copy_rows<G>(a.student.hidden, first, smaller(kGroupTokens, a.N - first), depth, width, rows);
    pack<G>(rows, width, depth, width, hidden_packed.as<T>() + place * depth * width);
  }

  const DistillArguments& a;
  const Products torch;
  const Vocabulary vocabulary;
  const Index block;
  const Index width;   // D in whole panels
  const Index stride;  // of sums: a few numbers more, as rows 4 KB apart would share a set of the cache
  const Index depth;   // tokens of a group in whole vectors of both layouts
  bool is_packed_once = true;
  Buffer hidden_sums, weight_sums, weight_rows, hidden_packed, hidden_rows, rounded, turned, bias_sums;
};

}  // namespace bbopd::cpu::BBOPD_ISA
