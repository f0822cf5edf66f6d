// Tiles of logits: a block of the vocabulary is laid out once as the right-hand side of a product, then multiplied by
// all tokens in turn.
#pragma once

#include "cpu/buffer.h"
#include "cpu/gemm.h"
#include "cpu/threads.h"

namespace bbopd::cpu::BBOPD_ISA {

constexpr Index kBlock = 256;  // vocabulary entries of a tile
constexpr Index kTokens =
    64;  // tokens of a tile: with 256 entries its logits stay in the second-level cache, a few rows in the first
// A layout of hidden that would be larger than this is made again for every tile that needs it.
constexpr Index kCopyBytes = Index{16} << 20;
constexpr Index kGroupTokens = 256;  // tokens between two visits to the accumulators of the weight's gradient

// How the vocabulary is split: into blocks, and blocks over slots, in order.
struct Vocabulary {
  Index V, block, blocks;
  int slots;
  Vocabulary(Index vocabulary, int threads) : V(vocabulary) {
    block = smaller(kBlock, round_up((V + threads - 1) / threads, 64));
    blocks = (V + block - 1) / block;
    slots = static_cast<int>(smaller(threads, blocks));
  }
  Index first_of(int slot) const { return blocks * slot / slots; }
  Index begin(Index b) const { return b * block; }
  Index count(Index b) const { return smaller(block, V - b * block); }
};

// Calls `body(slot, n)` for every token, a range of them a slot.
template <class Body>
void for_each_token(int threads, Index tokens, Body body) {
  const Index slots = smaller(threads, larger(1, tokens / 16));
  parallel(static_cast<int>(slots), [&](int slot) {
    for (Index n = tokens * slot / slots; n < tokens * (slot + 1) / slots; ++n) body(slot, n);
  });
}

inline void cap(float* z, Index n, float inner, float limit) {
  for (Index c = 0; c < n; c += kLanes) store(z + c, hyperbolic_tangent(load(z + c) * inner) * limit);
}

// Where the logits of a block come from. Calls of one slot are made by one thread at a time.
class Logits {
 public:
  virtual ~Logits() = default;
  virtual void load(int slot, Index first, Index count) = 0;
  // [rows, block] from token `first` on, at most kTokens rows, `block` apart; -inf in columns beyond the vocabulary
  virtual void write(int slot, Index first, Index rows, float* z) = 0;
  virtual void release() = 0;
};

template <class G>
class HeadLogits final : public Logits {
  using T = typename G::T;

 public:
  HeadLogits(const Head& head, Index tokens, const Vocabulary& vocabulary, const Products& products)
      : head_(head),
        block_(vocabulary.block),
        products_(products),
        current_(static_cast<std::size_t>(vocabulary.slots) * sizeof(Rows)) {
    const Index D = head.hidden.columns;
    depth_ = round_up(D, G::kGroup);
    padded_ = round_up(D, G::kPanel);
    if (head.hidden.type == G::kType && depth_ == D) {
      left_ = static_cast<const T*>(head.hidden.data);
      left_stride_ = head.hidden.stride;
    } else {
      const Index bytes = tokens * depth_ * static_cast<Index>(sizeof(T));
      left_stride_ = depth_;
      if (bytes <= kCopyBytes) {
        copy_ = Buffer(static_cast<std::size_t>(bytes));
        copy_rows<G>(head.hidden, 0, tokens, tokens, depth_, copy_.as<T>());
        left_ = copy_.as<T>();
      } else {
        copy_ = Buffer(static_cast<std::size_t>(vocabulary.slots * kTokens * depth_) * sizeof(T));
      }
    }
    rows_ = Buffer(static_cast<std::size_t>(vocabulary.slots * block_ * padded_) * sizeof(T));
    right_ = Buffer(static_cast<std::size_t>(vocabulary.slots * block_ * depth_) * sizeof(T));
  }

  // The block's rows of the weight in type T, `stride` apart, whole vectors and panels of them readable.
  struct Rows {
    const T* data;
    Index stride, first, count;
  };

  void take(int slot, Index first, Index count) {
    Rows& rows = current_.as<Rows>()[slot];
    if (head_.weight.type == G::kType && padded_ == head_.hidden.columns && count == block_) {
      rows = {static_cast<const T*>(head_.weight.data) + first * head_.weight.stride, head_.weight.stride, first,
              count};
    } else {
      T* const to = rows_.as<T>() + slot * block_ * padded_;
      copy_rows<G>(head_.weight, first, count, block_, padded_, to);
      rows = {to, padded_, first, count};
    }
  }

  void load(int slot, Index first, Index count) override {
    take(slot, first, count);
    const Rows& rows = current_.as<Rows>()[slot];
    pack_transposed<G>(rows.data, rows.stride, block_, depth_, right(slot));
  }

  void write(int slot, Index first, Index rows, float* z) override {
    const T* left;
    if (left_ != nullptr) {
      left = left_ + first * left_stride_;
    } else {
      T* const copy = copy_.as<T>() + slot * kTokens * depth_;
      copy_rows<G>(head_.hidden, first, rows, rows, depth_, copy);
      left = copy;
    }
    G::multiply(products_, rows, block_, depth_, left, left_stride_, 1, right(slot), z, block_, false);
    const Rows& at = current_.as<Rows>()[slot];
    for (Index r = 0; r < rows; ++r) finish(z + r * block_, at.first, at.count);
  }

  void release() override { G::release(products_); }

  const Rows& current(int slot) const { return current_.as<Rows>()[slot]; }
  Index padded() const { return padded_; }  // D in whole panels

 private:
  T* right(int slot) const { return right_.template as<T>() + slot * block_ * depth_; }

  void finish(float* z, Index first, Index count) const {
    if (head_.bias != nullptr)
      for (Index c = 0; c < count; ++c) z[c] += head_.bias[first + c];
    if (head_.softcap != 0.0F) {
      cap(z, block_, head_.scale / head_.softcap, head_.softcap);
    } else if (head_.scale != 1.0F) {
      for (Index c = 0; c < block_; ++c) z[c] *= head_.scale;
    }
    for (Index c = count; c < block_; ++c) z[c] = -__builtin_inff();
  }

  Head head_;
  Index block_, depth_, padded_, left_stride_;
  Products products_;
  const T* left_ = nullptr;
  Buffer copy_, rows_, right_, current_;
};

// Logits that were given as a tensor.
class GivenLogits final : public Logits {
 public:
  GivenLogits(const Matrix& logits, const Vocabulary& vocabulary)
      : logits_(logits),
        block_(vocabulary.block),
        current_(static_cast<std::size_t>(vocabulary.slots) * sizeof(Span)) {}
  void load(int slot, Index first, Index count) override { current_.as<Span>()[slot] = {first, count}; }
  void write(int slot, Index first, Index rows, float* z) override {
    const Span at = current_.as<Span>()[slot];
    for (Index r = 0; r < rows; ++r) {
      row_as_float(logits_, first + r, at.first, at.count, z + r * block_);
      for (Index c = at.count; c < block_; ++c) z[r * block_ + c] = -__builtin_inff();
    }
  }
  void release() override {}

 private:
  struct Span {
    Index first, count;
  };
  Matrix logits_;
  Index block_;
  Buffer current_;
};

}  // namespace bbopd::cpu::BBOPD_ISA
